"""The state after a path of a tree, by the kernel of kernels/tree_commit.cpp."""

from collections.abc import Sequence

import torch
from torch import Tensor

from everlong.ops.native.call import call
from everlong.ops.native.register import register
from everlong.ops.tree import MemoryRecords, State


def commit_native(records: MemoryRecords, paths: Sequence[Sequence[int]]) -> State:
    """The state after one path for all rows of the batch, or after one for each: chains of nodes, checked before."""
    (keys, values), *others = records.sources
    longest = max(map(len, paths))
    nodes = torch.tensor([[*path, *[-1] * (longest - len(path))] for path in paths], dtype=torch.long)
    other = others[0] if others else (None, None)
    total = records.state[1] if isinstance(records.state, tuple) else None
    state = records.state[0] if isinstance(records.state, tuple) else records.state
    after, total_after = _commit(nodes, keys, values, *other, records.log_decay, state, total)
    return after if total is None else (after, total_after)


def _compute(
    paths: Tensor,
    keys: Tensor,
    values: Tensor,
    other_keys: Tensor | None,
    other_values: Tensor | None,
    log_decay: Tensor | None,
    state: Tensor,
    total: Tensor | None,
) -> tuple[Tensor, Tensor]:
    after, total_after = _shapes(paths, keys, values, other_keys, other_values, log_decay, state, total)
    batch, heads, channels, width = state.shape
    of_channels = log_decay is not None and log_decay.dim() == 4
    call(
        "tree_commit",
        paths.expand(batch, -1),
        *(_rows(x) for x in (keys, values, other_keys, other_values)),
        _rows(log_decay) if of_channels else log_decay,
        *(_rows(x) for x in (state, total)),
        after,
        None if total is None else total_after,
        batch,
        paths.shape[1],
        heads,
        keys.shape[2],
        0 if other_keys is None else other_keys.shape[2],
        channels,
        width,
        of_channels,
    )
    return after, total_after


def _shapes(
    paths: Tensor,
    keys: Tensor,
    values: Tensor,
    other_keys: Tensor | None,
    other_values: Tensor | None,
    log_decay: Tensor | None,
    state: Tensor,
    total: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return state.new_empty(state.shape), state.new_empty(0 if total is None else total.shape)


def _rows(x: Tensor | None) -> Tensor | None:
    """With neighbouring channels side by side in memory, as the kernel reads them."""
    return x if x is None or x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


_commit = register(
    "tree_commit(Tensor paths, Tensor keys, Tensor values, Tensor? other_keys, Tensor? other_values, "
    "Tensor? log_decay, Tensor state, Tensor? total) -> (Tensor, Tensor)",
    _compute,
    _shapes,
)

"""The recurrent forms of the operators with a matrix state: one token after another, all sequences together.

The cheapest way for a few tokens, and the one that can be differentiated any number of times. States are
`[N, H, K, V]`, and everything is computed in their dtype; see `recurrence.py` and `delta.py` for the rest.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from everlong.ops.chunks import plan, without_autocast


def linear_steps(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, cu_seqlens: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Linear attention: o and the last state."""

    def step(state: Tensor, q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None = None) -> tuple[Tensor, Tensor]:
        state = write(state if decay is None else state * decay, k, v)
        return read(state, q), state

    return run(step, (q, k), (v,), log_decay, state, cu_seqlens, scale)


def delta_steps(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The delta rule: o and the last state."""

    def step(
        state: Tensor, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        state = state if decay is None else state * decay
        state = write(state, k, beta[..., None] * (v - read(state, k)))
        return read(state, q), state

    return run(step, (q, k), (v, beta), log_decay, state, cu_seqlens, scale)


def dplr_steps(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Diagonal plus low rank: o and the last state."""

    def step(
        state: Tensor, q: Tensor, k: Tensor, a: Tensor, b: Tensor, v: Tensor, decay: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        found = read(state, a)
        state = write(write(state if decay is None else state * decay, b, found), k, v)
        return read(state, q), state

    return run(step, (q, k, a, b), (v,), log_decay, state, cu_seqlens, scale)


def run(
    step: Callable[..., tuple[Tensor, Tensor]],
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    log_decay: Tensor | None,
    state: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Runs `step(state, *keys_t, *values_t, decay_t) -> (o_t, state)`; the first `keys [B, T, h, K]` are the queries.

    The step gets keys with as many heads as values, and decays, if any, ready to multiply the state.
    """
    v = values[0]
    if v.shape[1] == 0:
        return v, state
    with without_autocast(v):
        q, *keys = (spread(x.to(state.dtype), v.shape[2]) for x in keys)
        inputs = [q * scale, *keys, *(x.to(state.dtype) for x in values)]
        if log_decay is not None:
            decay = log_decay.to(state.dtype).exp()[..., None]
            inputs.append(decay if decay.dim() == 5 else decay[..., None])
        o, state = unroll(step, state, inputs, cu_seqlens)
    return o.to(v.dtype), state


def spread(x: Tensor, heads: int) -> Tensor:
    """`[B, T, h, K]` -> `[B, T, heads, K]`, each head as often as needed."""
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], 2)


def unroll(
    step: Callable[..., tuple[Tensor, Tensor]], state: Tensor, inputs: Sequence[Tensor], cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`step(state [n, ...], *tokens [n, ...])` over the tokens of `inputs [B, T, ...]`, T > 0."""
    outputs: list[Tensor] = []
    if cu_seqlens is None:
        for tokens in zip(*(x.unbind(1) for x in inputs), strict=True):
            output, state = step(state, *tokens)
            outputs.append(output)
        return torch.stack(outputs, 1), state
    layout = plan(1, inputs[0].shape[1], cu_seqlens, 1)
    assert layout.order is not None
    assert layout.token is not None
    assert layout.slot is not None
    counts = [tokens.stop - tokens.start for tokens in layout.rounds]
    state, ended = state[layout.order], []
    for tokens in zip(*(torch.split(x[0].index_select(0, layout.token), counts) for x in inputs), strict=True):
        ended.append(state[len(tokens[0]) :])
        output, state = step(state[: len(tokens[0])], *tokens)
        outputs.append(output)
    state = torch.cat([state, *reversed(ended)])
    return torch.cat(outputs).index_select(0, layout.slot)[None], state[layout.order.argsort()]


def write(state: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """S + k v^T"""
    k, v = k.flatten(0, 1)[:, :, None], v.flatten(0, 1)[:, None]
    return torch.baddbmm(state.flatten(0, 1), k, v).view_as(state)


def read(state: Tensor, q: Tensor) -> Tensor:
    """S^T q"""
    return torch.bmm(q.flatten(0, 1)[:, None], state.flatten(0, 1)).view(*q.shape[:2], -1)

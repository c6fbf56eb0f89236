"""Sequences cut into chunks, and a state carried from chunk to chunk.

Chunks stand in time-major order: first the first chunk of every sequence, then the second of all that have one, and so
on, longest sequence first. So one step of a recurrence over chunks reads a contiguous slice and updates a prefix of the
states, whether the sequences are the rows of a batch or packed into one row with different lengths.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

STEPS = 4  # up to so many tokens, one after another is faster than a chunk


@dataclass(frozen=True)
class Layout:
    """Where the tokens of `x [B, T, ...]` stand among M chunks of `size` slots."""

    batch: int
    length: int
    size: int
    rounds: tuple[slice, ...]  # of the M chunks: those that can be computed together
    capacity: int  # at least M, known from shapes alone
    order: Tensor | None = None  # packed only, [N]: the sequences, longest first
    token: Tensor | None = None  # packed only, [M * size]: the token of a slot
    slot: Tensor | None = None  # packed only, [T]: the slot of a token
    empty: Tensor | None = None  # packed only: the slots without a token

    @property
    def count(self) -> int:
        return self.rounds[-1].stop if self.rounds else 0

    def split(self, x: Tensor, out: Tensor) -> Tensor:
        """Copies `x [B, T, h, ...]` to `out [M, H, size, ...]`, each head H // h times; empty slots become zeros."""
        groups = torch.unflatten(out, 1, (x.shape[2], -1))
        if self.token is not None:
            assert self.empty is not None
            slots = x[0].index_select(0, self.token).index_fill_(0, self.empty, 0.0)
            groups.copy_(torch.unflatten(slots, 0, (-1, self.size)).transpose(1, 2).unsqueeze(2))
            return out
        whole, rest = divmod(self.length, self.size)
        groups = torch.unflatten(groups, 0, (-1, self.batch))
        if whole:
            chunks = torch.unflatten(x[:, : whole * self.size], 1, (whole, self.size))
            groups[:whole].copy_(chunks.transpose(0, 1).transpose(2, 3).unsqueeze(3))
        if rest:
            groups[whole, :, :, :, :rest].copy_(x[:, whole * self.size :].transpose(1, 2).unsqueeze(2))
            groups[whole, :, :, :, rest:].zero_()
        return out

    def chunks(self, x: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
        """`x [B, T, h, ...]` as a new tensor `[M * heads, size, ...]`."""
        return self.split(x, x.new_empty(self.count, heads, self.size, *x.shape[3:], dtype=dtype)).flatten(0, 1)

    def join(self, chunks: Tensor, dtype: torch.dtype) -> Tensor:
        """The inverse of `split`: `[M * H, size, ...]` -> `[B, T, H, ...]`"""
        chunks = torch.unflatten(chunks, 0, (self.count, -1))
        x = chunks.new_empty(self.batch, self.length, chunks.shape[1], *chunks.shape[3:], dtype=dtype)
        if self.slot is not None:
            x[0] = chunks.transpose(1, 2).flatten(0, 1).index_select(0, self.slot)
            return x
        whole, rest = divmod(self.length, self.size)
        chunks = torch.unflatten(chunks, 0, (-1, self.batch))
        chunks = chunks.transpose(0, 1).transpose(2, 3)  # [B, chunks, size, H, ...]
        if whole:
            torch.unflatten(x[:, : whole * self.size], 1, (whole, self.size)).copy_(chunks[:, :whole])
        if rest:
            x[:, whole * self.size :].copy_(chunks[:, whole, :rest])
        return x

    def gradients(self, chunks: Sequence[Tensor | None], inputs: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        """Those of `inputs [B, T, h, ...]` from those of their chunks `[M * H, size, ...]`; empty where there is none.

        What was copied to several heads gets the sum of their gradients.
        """
        results = []
        for x, like in zip(chunks, inputs, strict=True):
            if x is None or like is None:
                results.append(torch.empty(0))
                continue
            x = torch.unflatten(x, 0, (self.count, like.shape[2], -1))
            x = x.squeeze(2) if x.shape[2] == 1 else x.sum(2)
            results.append(self.join(x.flatten(0, 1), like.dtype))
        return tuple(results)

    def sort(self, state: Tensor) -> Tensor:
        """A copy of `state [N, ...]` in the order of the rounds."""
        return state.clone() if self.order is None else state[self.order]

    def unsort(self, state: Tensor) -> Tensor:
        """The inverse of `sort`."""
        return state if self.order is None else torch.empty_like(state).index_copy_(0, self.order, state)


def plan(batch: int, length: int, cu_seqlens: Tensor | None, size: int) -> Layout:
    """How sequences are cut into chunks of `size` tokens.

    Raises:
        ValueError: `cu_seqlens` does not rise from 0 to the length.
    """
    if cu_seqlens is not None:
        return _plan_packed(length, cu_seqlens, size)
    count = -(-length // size)
    rounds = tuple(slice(j * batch, (j + 1) * batch) for j in range(count))
    return Layout(batch, length, size, rounds, count * batch)


def _plan_packed(length: int, cu_seqlens: Tensor, size: int) -> Layout:
    bounds = cu_seqlens.long()
    lengths = bounds.diff()
    if bounds[0] != 0 or bounds[-1] != length or bool((lengths < 0).any()):
        raise ValueError(f"`cu_seqlens` must rise from 0 to T = {length}: got {bounds.tolist()}")
    counts, order = ((lengths + size - 1) // size).sort(descending=True, stable=True)
    # A chunk is known by its sequence's rank and its own number in the sequence; sorted by number, then by rank.
    rank = torch.repeat_interleave(counts)
    number = torch.arange(len(rank), device=rank.device) - (counts.cumsum(0) - counts)[rank]
    by_round = number.argsort(stable=True)
    rank, number = rank[by_round], number[by_round]
    ends = torch.bincount(number).cumsum(0).tolist()
    rounds = tuple(slice(start, stop) for start, stop in zip([0, *ends], ends, strict=False))
    sequence = order[rank]
    token = bounds[sequence, None] + number[:, None] * size + torch.arange(size, device=rank.device)
    filled = (token < bounds[sequence + 1, None]).flatten()
    token = token.flatten()
    slot = torch.empty(length, dtype=torch.long, device=rank.device)
    slot[token[filled]] = filled.nonzero().squeeze(1)
    empty = (~filled).nonzero().squeeze(1)
    capacity = int(capacity_of(1, length, len(lengths), size))
    return Layout(1, length, size, rounds, capacity, order, token.clamp_max(length - 1), slot, empty)


Size = int | torch.SymInt


def capacity_of(batch: Size, length: Size, packed: Size | None, size: Size) -> Size:
    """An upper bound of the number of chunks, exact for a batch: what shapes alone can tell."""
    return batch * -(-length // size) if packed is None else length // size + packed


def form_size(form: str, v: Tensor, cu_seqlens: Tensor | None, largest: int) -> int:
    """The size of chunk, a power of two, that a form means for `v [B, T, ...]`; 0 for the recurrent form.

    `largest` is that of the chunk form; sequences that are shorter, or packed and shorter on average, take less.
    """
    length = v.shape[1]
    if form == "recurrent" or length == 0 or (form == "auto" and cu_seqlens is None and length <= STEPS):
        return 0
    if form == "parallel":
        wanted = length if cu_seqlens is None else int(cu_seqlens.diff().max())
    elif cu_seqlens is None:
        wanted = min(length, largest)
    else:
        wanted = min(max(-(-length // max(cu_seqlens.shape[0] - 1, 1)), largest // 4), largest)
    size = 1
    while size < wanted:
        size *= 2
    return size


def starting_state(q: Tensor, v: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """The initial state `[N, H, K, V]` in the states' dtype, zeros where none is given."""
    if initial_state is not None:
        return initial_state.to(state_dtype(v.dtype))
    count = v.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return v.new_zeros(count, v.shape[2], q.shape[3], v.shape[3], dtype=state_dtype(v.dtype))


def scan(
    state: Tensor, update: Tensor, decay: Tensor | None, rounds: Sequence[slice], dtype: torch.dtype, capacity: int
) -> Tensor:
    """S_c = decay_c S_{c-1} + update_c over chunks c; with the rounds reversed this is its own gradient.

    Shapes: `state [N, H, ...]` (changed in place: the last state), `update [M, H, ...]`, `decay` broadcasts to it.

    Returns:
        The states before each chunk, `[capacity, H, ...]` in `dtype`, zeros after the first M.
    """
    starts = update.new_empty(capacity, *update.shape[1:], dtype=dtype)
    starts[len(update) :].zero_()
    for chunks in rounds:
        current = state[: chunks.stop - chunks.start]
        starts[chunks] = current
        if decay is None:
            current += update[chunks]
        else:
            torch.addcmul(update[chunks], current, decay[chunks], out=current)
    return starts


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """States and decays are float32, for float64 inputs float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """Matrix products of bfloat16 inputs stay in bfloat16, where sums are float32; all others are those of states."""
    return dtype if dtype == torch.bfloat16 else state_dtype(dtype)


def without_autocast(x: Tensor) -> torch.autocast:
    """A context in which autocast does not touch the arithmetic of states."""
    return torch.autocast(x.device.type, enabled=False)


def confine(
    o: Tensor,
    state: Tensor,
    inputs: Sequence[Tensor | None],
    cu_seqlens: Tensor | None,
    chunked: Callable[..., Tensor],
    stepwise: Callable[..., tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:
    """Keeps infinities and NaN from the earlier tokens of their chunk, where 0 * inf would carry them.

    Sound work ends at the first line. Else the tokens before the first bad one of their sequence come from `chunked`
    without all that follows, bit for bit the same as before any other future, and the rest from `stepwise`.

    Args:
        o, state: what `chunked` gave: `[B, T, H, V]` and the last states.
        inputs: what `chunked -> o` and `stepwise -> (o, state)` are called with, `[B, T, ...]` each.
    """
    if bool(o.sum(dtype=state.dtype).isfinite()):
        return o, state
    exact, state = stepwise(*inputs)
    bad = (~exact.isfinite()).flatten(2).any(2).long()
    seen = bad.cumsum(1)
    if cu_seqlens is not None:
        lengths = cu_seqlens.diff()
        first = cu_seqlens[:-1][lengths > 0].repeat_interleave(lengths[lengths > 0])
        seen = seen - (seen - bad)[:, first]
    clean = (seen == 0)[:, :, None]
    kept = chunked(*(x if x is None else x.where(clean if x.dim() == 3 else clean[..., None], 0.0) for x in inputs))
    return torch.where(clean[..., None] & kept.isfinite(), kept, exact), state

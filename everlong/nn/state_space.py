"""Linear state spaces that do not change with time, one for each channel, in the forms that a mixer has.

    x_t = A x_{t-1} + B u_t            y_t = C x_t                                   one token after another
    y_t = sum_{s <= t} K_s u_{t-s} + C A^{t+1} x_{-1},     K_s = C A^s B             as a convolution

"parallel" is the convolution by FFT; "chunk" cuts time into chunks, inside of which the convolution is a triangular
matrix product, and carries the state from chunk to chunk; "recurrent" is the loop. What A is, and how its powers are
had, only the system knows.

Shapes    u, y [B, T, D];  states [n, D, N], real numbers (a complex one is two of them)
Cost      FLOPs a token, forward: "chunk" D (2 size + 4 N); "parallel" 2 D N + O(D log T), and 2 D N more where a state
          comes in
"""

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from everlong.config import config
from everlong.ops import long_convolution
from everlong.ops.chunks import Layout, plan

CHUNK = 64  # tokens at most


@config
class SystemOptions:
    """What the options of all mixers with such a state space begin with."""

    width: int
    state_size: int = 64
    """N, the real numbers of a channel's state: N/2 complex ones."""
    smallest_step: float = 1e-3
    largest_step: float = 1e-1
    """The channels' steps dt at the start are spread evenly in the logarithm between these two: in so many tokens as
    1 / dt, a state fades by a factor of about e^(-1/2)."""
    bias: bool = False
    """Biases in the output projections."""

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"`width` must be at least 1: got {self.width}")
        if self.state_size < 2 or self.state_size % 2:
            raise ValueError(
                f"`state_size` must be even, two numbers for each complex one: got {self.state_size}. "
                f"Nearest: {max(2, self.state_size // 2 * 2)} or {max(4, self.state_size // 2 * 2 + 2)}"
            )
        if not 0 < self.smallest_step <= self.largest_step:
            raise ValueError(
                "`smallest_step` must be positive and at most `largest_step`: "
                f"got {self.smallest_step} and {self.largest_step}"
            )

    @property
    def pairs(self) -> int:
        return self.state_size // 2


class System(ABC):
    """A, B and C of D channels, discretised. States stand as `[D, n, N]`, so that products go channel by channel."""

    steps = 1  # "auto": up to so many tokens, one after another
    long = 1 << 62  # "auto": from so many on, by FFT

    @abstractmethod
    def kernel(self, length: int) -> Float[Tensor, "D L"]:
        """C A^s B for s < length."""

    @abstractmethod
    def reads(self, length: int) -> Float[Tensor, "D L N"]:
        """C A^{s+1} for s < length: what later outputs see of a state."""

    @abstractmethod
    def writes(self, length: int) -> Float[Tensor, "D L N"]:
        """A^{length-1-s} B for s < length: what inputs leave in the state after them."""

    @abstractmethod
    def advance(self, state: Float[Tensor, "D n N"], steps: int | Int[Tensor, " n"]) -> Float[Tensor, "D n N"]:
        """A^steps x, the state after so many tokens without input."""

    @abstractmethod
    def loop(
        self, u: Float[Tensor, "B T D"], state: Float[Tensor, "n D N"], cu_seqlens: Int[Tensor, " N_plus_1"] | None
    ) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "n D N"]]:
        """Outputs and last states, one token after another."""


def respond(
    system: System,
    u: Float[Tensor, "B T D"],
    state: Float[Tensor, "D n N"] | None,
    cu_seqlens: Int[Tensor, " N_plus_1"] | None,
    form: str,
) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "D n N"]]:
    """The outputs and the last states of all sequences, from the states before them (None: 0), in one of the forms."""
    count = u.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    average = u.shape[1] if cu_seqlens is None else -(-u.shape[1] // max(count, 1))
    if form == "auto":
        form = "recurrent" if average <= system.steps else "chunk" if average < system.long else "parallel"
    if form == "recurrent":
        width, numbers = system.writes(1).shape[0], system.writes(1).shape[2]
        return system.loop(u, u.new_zeros(width, count, numbers) if state is None else state, cu_seqlens)
    size = chunk_size(average)
    layout, writes = plan(u.shape[0], u.shape[1], cu_seqlens, size), system.writes(size)
    if layout.count == 0:
        return u, writes.new_zeros(len(writes), count, writes.shape[2]) if state is None else state
    tokens = layout.chunks(u, u.shape[2], u.dtype).unflatten(0, (layout.count, -1)).transpose(0, 1)  # [D, M, size]
    added = tokens[:, : layout.rounds[-1].start] @ writes
    if form == "chunk" or state is None:
        initial = writes.new_zeros(len(writes), count, writes.shape[2]) if state is None else state
        starts = seen = carried(system, added, initial, layout)
    else:
        seen = carried(system, None, state, layout)
        starts = seen + carried(system, added, torch.zeros_like(state), layout)
    last = _last(system, u, writes, starts, state, layout, cu_seqlens)
    if form == "chunk":
        y = tokens @ triangular(system.kernel(size)).mT + seen @ system.reads(size).mT
        return layout.join(y.transpose(0, 1).flatten(0, 1), u.dtype), last
    longest = u.shape[1] if cu_seqlens is None else int(cu_seqlens.diff().max())
    y = long_convolution(u, system.kernel(longest), cu_seqlens=cu_seqlens)
    if state is not None:
        y = y + layout.join((seen @ system.reads(size).mT).transpose(0, 1).flatten(0, 1), u.dtype)
    return y, last


def chunk_size(length: int) -> int:
    """Tokens of a chunk: at most `CHUNK`, and such that the last one is nearly full."""
    return max(1, -(-length // max(1, -(-length // CHUNK))))


def triangular(kernel: Float[Tensor, "D L"]) -> Float[Tensor, "D L L"]:
    """The convolution as a matrix: K_{t-s} at row t and column s <= t, zeros above."""
    length = kernel.shape[1]
    return pad(kernel.flip(1), (0, length - 1)).unfold(1, length, 1).flip(1)


def carried(
    system: System, added: Float[Tensor, "D M_full N"] | None, state: Float[Tensor, "D n N"], layout: Layout
) -> Float[Tensor, "D M N"]:
    """The states before each chunk, of which all but those of the last round add something to the state."""
    current, starts = state if layout.order is None else state[:, layout.order], []
    before: slice | None = None
    for chunks in layout.rounds:
        count = chunks.stop - chunks.start
        current = current[:, :count]
        if before is not None:
            current = system.advance(current, layout.size)
            if added is not None:
                current = current + added[:, before.start : before.start + count]
        starts.append(current)
        before = chunks
    return torch.cat(starts, 1)


def _last(
    system: System,
    u: Tensor,
    writes: Tensor,
    starts: Tensor,
    state: Tensor | None,
    layout: Layout,
    cu_seqlens: Tensor | None,
) -> Float[Tensor, "D n N"]:
    """The states at the end: from those before the last chunks, which may be shorter."""
    size = layout.size
    if cu_seqlens is None:
        rest = u.shape[1] - size * (len(layout.rounds) - 1)
        ends = u[:, -rest:].permute(2, 0, 1) @ writes[:, size - rest :]
        first = starts[:, layout.rounds[-1]]
        return ends if state is None and len(layout.rounds) == 1 else system.advance(first, rest) + ends
    assert layout.order is not None
    lengths, stop = cu_seqlens.diff(), cu_seqlens[1:, None]
    number = (lengths - 1).div(size, rounding_mode="floor").clamp_min(0)  # of the last chunk of each sequence
    rest = lengths - number * size
    rank = torch.empty_like(layout.order).index_copy_(0, layout.order, torch.arange(len(lengths), device=u.device))
    begins = torch.tensor([chunks.start for chunks in layout.rounds], device=u.device)
    chunk = (begins[number] + rank).clamp_max(layout.count - 1)
    token = stop - size + torch.arange(size, device=u.device)
    filled = token >= stop - rest[:, None]
    ends = torch.where(filled[..., None], u[0, token.clamp_min(0)], 0.0).permute(2, 0, 1) @ writes
    empty = (lengths == 0)[:, None]
    first = torch.where(empty, 0.0 if state is None else state, starts[:, chunk])
    return system.advance(first, rest) + ends

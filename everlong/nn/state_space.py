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

import math
from abc import ABC, abstractmethod

import torch
from jaxtyping import Complex, Float, Int
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

    numbers: int  # N
    steps: int  # up to so many tokens, one after another is fastest

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
    """The outputs and the last states of all sequences, from the states before them (None: 0), in one of the forms.

    "auto" never takes the FFT: chunks are causal bit for bit and, with states of 64 numbers, were no slower on a CPU
    from 64 to 16,384 tokens. With 256 numbers the FFT can be faster.
    """
    count = u.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    initial = u.new_zeros(u.shape[2], count, system.numbers) if state is None else state
    if form == "recurrent" or (form == "auto" and u.shape[1] <= system.steps):
        return system.loop(u, initial, cu_seqlens)
    size = chunk_size(u.shape[1] if cu_seqlens is None else -(-u.shape[1] // max(count, 1)))
    layout = plan(u.shape[0], u.shape[1], cu_seqlens, size)
    if layout.count == 0:
        return u, initial
    tokens, writes = _cut(u, layout), system.writes(size)
    added = tokens[:, : layout.rounds[-1].start] @ writes
    if form != "parallel":
        starts = carried(system, added, initial, layout)
        y = _join(tokens @ triangular(system.kernel(size)).mT + starts @ system.reads(size).mT, layout)
        return y, _last(system, u, writes, starts, initial, layout, cu_seqlens)
    starts = carried(system, added, torch.zeros_like(initial), layout)
    longest = u.shape[1] if cu_seqlens is None else int(cu_seqlens.diff().max())
    y = long_convolution(u, system.kernel(longest), cu_seqlens=cu_seqlens)
    if state is not None:  # what it adds, as if there were no input
        alone = carried(system, None, state, layout)
        y, starts = y + _join(alone @ system.reads(size).mT, layout), starts + alone
    return y, _last(system, u, writes, starts, initial, layout, cu_seqlens)


def _cut(u: Float[Tensor, "B T D"], layout: Layout) -> Float[Tensor, "D M size"]:
    return torch.unflatten(layout.chunks(u, u.shape[2], u.dtype), 0, (layout.count, -1)).transpose(0, 1)


def _join(y: Float[Tensor, "D M size"], layout: Layout) -> Float[Tensor, "B T D"]:
    return layout.join(y.transpose(0, 1).flatten(0, 1), y.dtype)


def chunk_size(length: int) -> int:
    """Tokens of a chunk: about as many as there are chunks, and such that the last one is nearly full."""
    largest = min(CHUNK, max(16, math.isqrt(length)))
    return max(1, -(-length // max(1, -(-length // largest))))


def triangular(kernel: Float[Tensor, "D L"]) -> Float[Tensor, "D L L"]:
    """The convolution as a matrix: K_{t-s} at row t and column s <= t, zeros above."""
    length = kernel.shape[1]
    return pad(kernel.flip(1), (0, length - 1)).unfold(1, length, 1).flip(1)


def carried(
    system: System, added: Float[Tensor, "D M_full N"] | None, state: Float[Tensor, "D n N"], layout: Layout
) -> Float[Tensor, "D M N"]:
    """The states before each chunk, of which all but those of the last round add something to the state."""
    current = state if layout.order is None else state[:, layout.order]
    counts = [chunks.stop - chunks.start for chunks in layout.rounds]
    starts = [current[:, : counts[0]]]
    additions = [None] * (len(counts) - 1) if added is None else torch.split(added, counts[:-1], 1)
    for count, addition in zip(counts[1:], additions, strict=True):
        kept = system.advance(starts[-1][:, :count], layout.size)
        starts.append(kept if addition is None else kept + addition[:, :count])
    return torch.cat(starts, 1)


def _last(
    system: System,
    u: Float[Tensor, "B T D"],
    writes: Float[Tensor, "D L N"],
    starts: Float[Tensor, "D M N"],
    initial: Float[Tensor, "D n N"],
    layout: Layout,
    cu_seqlens: Int[Tensor, " N_plus_1"] | None,
) -> Float[Tensor, "D n N"]:
    """The states at the end: from those before the last chunks, which may hold fewer tokens."""
    size = layout.size
    if cu_seqlens is None:
        left = u.shape[1] - size * (len(layout.rounds) - 1)
        ends = u[:, -left:].permute(2, 0, 1) @ writes[:, size - left :]
        return system.advance(starts[:, layout.rounds[-1]], left) + ends
    assert layout.order is not None
    lengths, stop = cu_seqlens.diff(), cu_seqlens[1:, None]
    number = (lengths - 1).div(size, rounding_mode="floor").clamp_min(0)  # of a sequence's last chunk
    rest = lengths - number * size
    place = torch.arange(size, device=u.device)
    token = stop - size + place
    inside = place >= size - rest[:, None]
    ends = torch.where(inside[..., None], u[0, token.clamp_min(0)], 0.0).permute(2, 0, 1) @ writes
    first = torch.tensor([chunks.start for chunks in layout.rounds], device=u.device)
    chunk = first[number] + layout.order.argsort()
    before = torch.where((lengths == 0)[:, None], initial, starts[:, chunk.clamp_max(layout.count - 1)])
    return system.advance(before, rest) + ends


def reals(x: Complex[Tensor, "*B P"], *, conjugate: bool = False) -> Float[Tensor, "*B N"]:
    """Complex numbers as twice as many real ones. The product of x's with those of c's conjugate is Re(c x)."""
    return torch.view_as_real((x.conj() if conjugate else x).resolve_conj()).flatten(-2)


def complexes(x: Float[Tensor, "*B N"]) -> Complex[Tensor, "*B P"]:
    """The inverse of `reals`."""
    return torch.view_as_complex(torch.unflatten(x, -1, (-1, 2)).contiguous())

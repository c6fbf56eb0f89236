"""Vectors of positions that meet the embedded tokens before the first layer.

    learned           x + p_t                                          one vector for each of `length` positions
    hierarchical      x + alpha u_i + (1 - alpha) u_j,  t = i n + j    n^2 positions out of n vectors p:
                      u_i = (p_i - alpha p_0) / (1 - alpha), so that the first n are p itself
    sinusoidal        x + amplitude [sin(t w_i), cos(t w_i)],  w_i = base^(-2i/D)
    multiplicative    x * (1 + p_t),  p = 0 at first

Source    learned, sinusoidal: Vaswani et al. 2017, arXiv 1706.03762, section 3.5; hierarchical: Su 2020,
          kexue.fm/archives/7947
Deviates  sinusoids are by default as small as embedded tokens are at first (0.02 where those of the paper are 1); a
          position beyond a table is an error; with an odd width the last channel is a sine
"""

import math
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from everlong.config import config
from everlong.nn.positions.base import Kept, PositionEncoding

LARGEST = 1 << 24  # beyond this a number of positions is a slip

Layout = Literal["interleaved", "halves"]


@config
class LearnedOptions:
    """Options of a table of positions."""

    length: int = 1024
    """Vectors, one a position; no longer text can be read."""

    def __post_init__(self) -> None:
        if not 1 <= self.length <= LARGEST:
            raise ValueError(f"`length` must be at least 1 and no slip: got {self.length}")


class Learned(PositionEncoding):
    """A learned vector for each position, added to the embedding."""

    Options: Any = LearnedOptions
    hooks = frozenset({"embedding"})
    relative = False

    def make(self) -> None:
        self.weight = nn.Parameter(0.02 * torch.randn(self.options.length, self.size))

    @property
    def limit(self) -> int:
        length: int = self.options.length
        return length

    def vectors(self, positions: Int[Tensor, "*B"]) -> Float[Tensor, "*B D"]:
        """What belongs to these positions.

        Raises:
            ValueError: one of them is not in the table.
        """
        check_positions(positions, self.limit)
        read: Tensor = F.embedding(positions, self.weight)
        return read

    def embed(
        self,
        x: Float[Tensor, "B T D"],
        positions: Int[Tensor, "rows T"],
        *,
        tokens: Int[Tensor, "B T"] | None = None,
        kept: Kept = (),
        cu_seqlens: Int[Tensor, " N_plus_1"] | None = None,
    ) -> tuple[Float[Tensor, "B T D"], Kept]:
        return x + self.vectors(positions), ()


@config
class HierarchicalOptions(LearnedOptions):
    """Options of a table whose vectors stand for two digits of a position."""

    alpha: float = 0.4
    """Share of the leading digit."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.alpha < 1 or self.alpha == 0.5:
            raise ValueError(
                f"`alpha` must lie between 0 and 1 and not be 0.5, which confuses the digits: got {self.alpha}"
            )


class Hierarchical(Learned):
    """The vectors of n learned positions stand for both digits of n^2; a model that has learned n goes on with them."""

    Options = HierarchicalOptions

    @property
    def limit(self) -> int:
        return super().limit ** 2

    def vectors(self, positions: Int[Tensor, "*B"]) -> Float[Tensor, "*B D"]:
        check_positions(positions, self.limit)
        alpha, n = self.options.alpha, len(self.weight)
        base = (self.weight - alpha * self.weight[:1]) / (1 - alpha)
        read: Tensor = alpha * F.embedding(positions // n, base) + (1 - alpha) * F.embedding(positions % n, base)
        return read


@config
class SinusoidalOptions:
    """Options of sinusoids."""

    base: float = 10_000.0
    layout: Layout = "interleaved"
    """sin and cos of one frequency as neighbours, as in the paper, or all sines before all cosines."""
    amplitude: float = 0.02

    def __post_init__(self) -> None:
        if not self.base > 1:
            raise ValueError(f"`base` must be above 1: got {self.base}")


class Sinusoidal(PositionEncoding):
    """Sines and cosines of the position, added to the embedding."""

    Options = SinusoidalOptions
    hooks = frozenset({"embedding"})
    relative = False

    def embed(
        self,
        x: Float[Tensor, "B T D"],
        positions: Int[Tensor, "rows T"],
        *,
        tokens: Int[Tensor, "B T"] | None = None,
        kept: Kept = (),
        cu_seqlens: Int[Tensor, " N_plus_1"] | None = None,
    ) -> tuple[Float[Tensor, "B T D"], Kept]:
        exact = torch.promote_types(x.dtype, torch.float32)
        waves = sinusoids(positions, self.size, layout=self.options.layout, base=self.options.base, dtype=exact)
        return x + (self.options.amplitude * waves).to(x.dtype), ()


class Multiplicative(Learned):
    """The embedding times one more than a learned vector for each position."""

    def make(self) -> None:
        super().make()
        nn.init.zeros_(self.weight)

    def embed(
        self,
        x: Float[Tensor, "B T D"],
        positions: Int[Tensor, "rows T"],
        *,
        tokens: Int[Tensor, "B T"] | None = None,
        kept: Kept = (),
        cu_seqlens: Int[Tensor, " N_plus_1"] | None = None,
    ) -> tuple[Float[Tensor, "B T D"], Kept]:
        return x * (1 + self.vectors(positions)), ()


def sinusoids(
    positions: Int[Tensor, "*B"],
    width: int,
    *,
    layout: Layout,
    base: float = 10_000.0,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "*B D"]:
    """sin and cos of each position at frequencies from 1 down to nearly 1 / base."""
    index = torch.arange(0, width, 2, device=positions.device, dtype=dtype)
    angles = positions.to(dtype)[..., None] * torch.exp(index * (-math.log(base) / width))
    sin, cos = angles.sin(), angles.cos()
    if layout == "interleaved":
        return torch.stack([sin, cos], dim=-1).flatten(-2)[..., :width]
    return torch.cat([sin, cos], dim=-1)[..., :width]


def check_positions(positions: Int[Tensor, "*B"], known: int) -> None:
    """Raises ValueError where a position lies outside of those that a model has learned."""
    if torch.compiler.is_compiling() or not positions.numel():
        return
    first, last = (int(end) for end in positions.aminmax())
    if last >= known:
        raise ValueError(
            f"the model has learned {known:,} positions, and reads no longer text: got {last + 1:,} tokens. Give less, "
            "or train one with more of them or with rope, which has no limit"
        )
    if first < 0:
        raise ValueError(f"positions count from 0: got {first}")

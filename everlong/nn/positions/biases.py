"""Numbers added to the scores, that know nothing but the distance and the head.

    alibi         -slope_h |t - s|                 Press et al. 2021, "Train Short, Test Long", arXiv 2108.12409
    t5            table_h[bucket(s - t)]           Raffel et al. 2019, arXiv 1910.10683, section 2.1
    rotary_bias   (R_t a_h)^T R_s b_h              Hua et al. 2022, arXiv 2202.10447, appendix

Slopes are 2^(-8h/H), h = 1..H; for an H that is no power of two those of the next lower power, then every second slope
of the next higher one. T5's buckets hold one distance each up to half of them, and beyond are evenly spaced in the
logarithm up to `max_distance`; without causality half of all are for what lies ahead. As in T5, scores are not divided
by sqrt(K) under its bias. R turns pairs of channels as in rotary.py; a and b are learned vectors of a head's size, so
that the bias is a sum of waves over the distance with learned amplitudes and phases.

Deviates  T5 has one table for all layers, in its first: here each layer has its own
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from everlong.config import config
from everlong.nn.positions.base import PositionEncoding, bounds


class Alibi(PositionEncoding):
    """A penalty that grows linearly with the distance, at a slope of its own for each head."""

    hooks = frozenset({"score bias"})

    def slopes(self) -> list[float]:
        """One slope a head."""
        power = 2 ** int(math.log2(self.num_heads))
        first = [2.0 ** (-8 * h / power) for h in range(1, power + 1)]
        second = [2.0 ** (-4 * h / power) for h in range(1, 2 * power + 1, 2)]
        return (first + second)[: self.num_heads]

    def score_bias(self, queries: Int[Tensor, "*rows T"], keys: Int[Tensor, "*rows S"]) -> Float[Tensor, "..."]:
        distance = (queries[..., :, None] - keys[..., None, :]).abs().float()
        slopes = torch.tensor(self.slopes(), device=queries.device)
        return -slopes[:, None, None] * distance[..., None, :, :]


@config
class T5Options:
    """Options of T5's bias."""

    buckets: int = 32
    max_distance: int = 128
    """All distances from here on share a bucket."""

    def __post_init__(self) -> None:
        if self.buckets < 4 or self.buckets % 2 or self.max_distance <= self.buckets // 2:
            raise ValueError(
                "`buckets` must be even, at least 4, and `max_distance` more than half of them: got "
                f"buckets={self.buckets}, max_distance={self.max_distance}"
            )


class T5(PositionEncoding):
    """A learned number for each head and bucket of distances; scores are not divided by sqrt(K)."""

    Options = T5Options
    hooks = frozenset({"score bias"})

    def make(self) -> None:
        self.weight = nn.Parameter(0.02 * torch.randn(self.options.buckets, self.num_heads))

    @property
    def scale(self) -> float:
        return 1.0

    def bucket(self, ahead: Int[Tensor, "*B"]) -> Int[Tensor, "*B"]:
        """The row of the table for keys that lie so many tokens ahead of the query."""
        count = self.options.buckets if self.causal else self.options.buckets // 2
        offset = 0 if self.causal else (ahead > 0) * count
        distance = (-ahead).clamp_min(0) if self.causal else ahead.abs()
        each = count // 2
        # In float32, as whoever trained a table had it: at the edges of buckets float64 rounds differently.
        growth = torch.log(distance.clamp_min(1).float() / each) / math.log(self.options.max_distance / each)
        wide = (each + (growth * (count - each)).long()).clamp_max(count - 1)
        return offset + torch.where(distance < each, distance, wide)

    def score_bias(self, queries: Int[Tensor, "*rows T"], keys: Int[Tensor, "*rows S"]) -> Float[Tensor, "..."]:
        ahead = keys[..., None, :] - queries[..., :, None]
        return F.embedding(self.bucket(ahead), self.weight).movedim(-1, -3)


class RotaryBias(PositionEncoding):
    """A sum of waves over the distance, of learned amplitudes and phases: two vectors turned as by rope."""

    hooks = frozenset({"score bias"})

    def make(self) -> None:
        if self.size % 2:
            raise ValueError(f"`rotary_bias` turns pairs of channels: the size of a head must be even, got {self.size}")
        self.a = nn.Parameter(0.02 * torch.randn(self.num_heads, self.size))
        self.b = nn.Parameter(0.02 * torch.randn(self.num_heads, self.size))

    def score_bias(self, queries: Int[Tensor, "*rows T"], keys: Int[Tensor, "*rows S"]) -> Float[Tensor, "..."]:
        ahead = keys[..., None, :] - queries[..., :, None]
        low, high = bounds(ahead)
        exact = torch.promote_types(self.a.dtype, torch.float32)
        (a1, a2), (b1, b2) = (y.to(exact).chunk(2, dim=-1) for y in (self.a, self.b))
        pair = torch.arange(self.size // 2, device=ahead.device, dtype=exact)
        frequencies = torch.exp(pair * (-2 * math.log(10_000.0) / self.size))
        angles = torch.arange(low, high, device=ahead.device, dtype=exact)[:, None, None] * frequencies
        # a^T R b of each distance; elementwise, as there are few of them beside the scores.
        table = ((a1 * b1 + a2 * b2) * angles.cos() + (a2 * b1 - a1 * b2) * angles.sin()).sum(-1)
        return F.embedding(ahead - low, table).movedim(-1, -3)

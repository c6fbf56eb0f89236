"""Distances that queries read as they read keys: each has a vector.

    shaw              q^T (k + a_c) / sqrt(K)  and values  v + b_c,  c = clip(s - t, -k, k)    Shaw et al. 2018, eq. 3-5
    transformer_xl    [(q + u)^T k + (q + v)^T W_r R_{t-s}] / sqrt(K)                          Dai et al. 2019, sec. 3.3

R are sinusoids as wide as the layer, the halves sin and cos; u, v and W_r are learned. Vectors of distances are met
once each and their products gathered: no tensor has axes for query, key and channel.

Source    Shaw et al. 2018, arXiv 1803.02155; Dai et al. 2019, arXiv 1901.02860; Yang et al. 2019, "XLNet", arXiv
          1906.08237
Deviates  u and v are each layer's own, as in XLNet; a causal layer of `shaw` has no vectors for what lies ahead
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from everlong.config import config
from everlong.nn.positions.absolute import sinusoids
from everlong.nn.positions.base import PositionEncoding, Projection, bounds, pick, positive


@config
class ShawOptions:
    """Options of Shaw's relative positions."""

    max_distance: int = 16
    """k: distances beyond are clipped to it."""
    values: bool = True
    """Distances have vectors for values as well as for keys."""

    def __post_init__(self) -> None:
        positive(self, "max_distance")


class Shaw(PositionEncoding):
    """A learned vector for each clipped distance, added to keys and to values; all heads share them."""

    Options = ShawOptions
    hooks = frozenset({"score", "value"})

    def make(self) -> None:
        rows = self.options.max_distance * (1 if self.causal else 2) + 1
        self.keys = nn.Parameter(0.02 * torch.randn(rows, self.size))
        if self.options.values:
            self.values = nn.Parameter(0.02 * torch.randn(rows, self.size))
        else:
            self.hooks = frozenset({"score"})

    def _row(self, distance: Int[Tensor, "*B"]) -> Int[Tensor, "*B"]:
        """The row of the tables: keys furthest behind come first."""
        k = self.options.max_distance
        row: Tensor = (k - distance).clamp(0, len(self.keys) - 1)
        return row

    def score(
        self,
        q: Float[Tensor, "N T H K"],
        k: Float[Tensor, "N S G K"],
        distance: Int[Tensor, "rows T S"],
        project: tuple[Projection, Projection],
    ) -> Float[Tensor, "N H T S"]:
        products = q.transpose(1, 2) @ self.keys.T.to(q.dtype)
        return pick(products * self.size**-0.5, self._row(distance))

    def value(
        self, weights: Float[Tensor, "N H T S"], distance: Int[Tensor, "rows T S"]
    ) -> Float[Tensor, "N H T K"] | float:
        if not self.options.values:
            return 0.0
        index = self._row(distance)[:, None].expand_as(weights)
        sums = weights.new_zeros(*weights.shape[:3], len(self.values)).scatter_add(-1, index, weights)
        read: Tensor = sums @ self.values.to(weights.dtype)
        return read

    def flops(self, queries: int, keys: int, kv_heads: int) -> int:
        tables = 2 if self.options.values else 1
        return 2 * tables * queries * self.num_heads * self.size * len(self.keys)


class TransformerXL(PositionEncoding):
    """Queries read sinusoids of the distance through a learned matrix; u and v are added to them."""

    hooks = frozenset({"score"})

    def make(self) -> None:
        width = self.num_heads * self.size
        self.u = nn.Parameter(0.02 * torch.randn(self.num_heads, self.size))
        self.v = nn.Parameter(0.02 * torch.randn(self.num_heads, self.size))
        self.r = nn.Linear(width, width, bias=False)

    def content(self, q: Float[Tensor, "N T H K"]) -> Float[Tensor, "N T H K"]:
        return q + self.u.to(q.dtype)

    def score(
        self,
        q: Float[Tensor, "N T H K"],
        k: Float[Tensor, "N S G K"],
        distance: Int[Tensor, "rows T S"],
        project: tuple[Projection, Projection],
    ) -> Float[Tensor, "N H T S"]:
        low, high = bounds(distance)
        if high - low <= 4 * sum(distance.shape[1:]):
            different, index = torch.arange(low, high, device=q.device), distance - low
        else:  # positions with gaps
            different, index = torch.unique(distance, return_inverse=True)
        waves = sinusoids(different, self.num_heads * self.size, layout="halves", dtype=_exact(q)).to(q.dtype)
        q = q + self.v.to(q.dtype)
        if self._fold(q.shape[0] * q.shape[1], len(different)):
            weight = self.r.weight.view(self.num_heads, self.size, -1).to(q.dtype)
            products = torch.einsum("nthk,hkd->nhtd", q, weight) @ waves.T
        else:
            products = torch.einsum("nthk,rhk->nhtr", q, self.r(waves).unflatten(-1, (self.num_heads, -1)))
        return pick(products * self.size**-0.5, index)

    def _fold(self, queries: int, distances: int) -> bool:
        """Whether it takes less to bring W_r to the queries than to all distances."""
        width = self.num_heads * self.size
        return queries * (width + self.num_heads * distances) < distances * (width + queries)

    def flops(self, queries: int, keys: int, kv_heads: int) -> int:
        width, distances = self.num_heads * self.size, keys + queries - 1
        if self._fold(queries, distances):
            return 2 * queries * width * (width + self.num_heads * distances)
        return 2 * distances * width * (width + queries)


def _exact(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)

"""DeBERTa's disentangled attention: contents meet contents, contents meet distances, and distances meet contents.

    [ q_t^T k_s  +  q_t^T Kr_{d(t,s)}  +  k_s^T Qr_{d(t,s)} ] / sqrt(3 K)                                 (eq. 2, 4)
    Kr, Qr = E W_k, E W_q + b;   d(t,s) = 0 for t - s <= -k,  2k - 1 for t - s >= k,  t - s + k otherwise   (eq. 3)

The 3 is the number of terms. With `buckets` d is first made coarse, as version 2 does: exact up to half of them, then
evenly spaced in the logarithm up to `max_distance`, and k is `buckets`. With `share_projections`, as version 2 has it
too, E goes through the layer's own projections.

The third term is indexed by d(t, s) in Microsoft's code and in transformers' (`p2c_index` "code"), and by d(s, t) in
the paper ("paper"); weights are only right under the one that they were trained with.

What the paper calls an enhanced mask decoder is no part of an encoding of distances: for masked language modelling,
absolute positions enter as queries of the last two layers before the softmax over words, and nowhere below.

Source    He et al. 2020, "DeBERTa", arXiv 2006.03654; version 2: He et al. 2021, arXiv 2111.09543, and its code
Deviates  E is each layer's own, not shared over layers; Kr has no bias, which would add the same to all scores of a
          query
"""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from everlong.config import config
from everlong.nn.positions.base import PositionEncoding, Projection, bounds, pick, positive


@config
class DebertaOptions:
    """Options of disentangled attention."""

    max_distance: int = 512
    """k: all larger distances are alike."""
    buckets: int | None = None
    """Rows of E for each direction, coarser with the distance; None: one for each distance up to `max_distance`."""
    terms: tuple[Literal["c2p", "p2c"], ...] = ("c2p", "p2c")
    """Content to position, position to content, or both."""
    p2c_index: Literal["code", "paper"] = "code"
    share_projections: bool = False

    def __post_init__(self) -> None:
        positive(self, "max_distance")
        if not self.terms or len(set(self.terms)) < len(self.terms):
            raise ValueError(f"`terms` must be c2p, p2c or both: got {list(self.terms)}")
        if self.buckets is not None and not 4 <= self.buckets < 2 * self.max_distance - 2:
            raise ValueError(
                "`buckets` must be at least 4 and less than twice `max_distance` - 2: got "
                f"buckets={self.buckets}, max_distance={self.max_distance}"
            )


class Deberta(PositionEncoding):
    """Contents meet distances and distances contents, each through projections of their own."""

    Options = DebertaOptions
    hooks = frozenset({"score"})

    def make(self) -> None:
        width = self.num_heads * self.size
        self.span = self.options.max_distance if self.options.buckets is None else self.options.buckets
        self.weight = nn.Parameter(0.02 * torch.randn(2 * self.span, width))
        if not self.options.share_projections:
            if "c2p" in self.options.terms:
                self.position_k = nn.Linear(width, width, bias=False)
            if "p2c" in self.options.terms:
                self.position_q = nn.Linear(width, width)

    @property
    def scale(self) -> float:
        return float(((1 + len(self.options.terms)) * self.size) ** -0.5)

    def row(self, distance: Int[Tensor, "*B"]) -> Int[Tensor, "*B"]:
        """d of a distance t - s: the row of E."""
        if self.options.buckets is not None:
            distance = self._coarse(distance)
        row: Tensor = (distance + self.span).clamp(0, 2 * self.span - 1)
        return row

    def _coarse(self, distance: Int[Tensor, "*B"]) -> Int[Tensor, "*B"]:
        assert self.options.buckets is not None
        middle = self.options.buckets // 2
        size = distance.abs()
        # In float32, as whoever trained the rows had it.
        growth = torch.log(size.clamp_min(middle).float() / middle)
        whole = torch.log(torch.tensor((self.options.max_distance - 1) / middle, device=distance.device))
        wide = (torch.ceil(growth / whole * (middle - 1)) + middle).long()
        return torch.where(size <= middle, distance, wide * distance.sign())

    def score(
        self,
        q: Float[Tensor, "N T H K"],
        k: Float[Tensor, "N S G K"],
        distance: Int[Tensor, "rows T S"],
        project: tuple[Projection, Projection],
    ) -> Float[Tensor, "N H T S"]:
        index, terms = self.row(distance), list[Tensor]()
        if "c2p" in self.options.terms:
            low, high = bounds(index)
            rows = self._heads(low, high, project[1], "position_k")
            terms.append(pick(torch.einsum("nthk,rhk->nhtr", q, rows.to(q.dtype)), index - low))
        if "p2c" in self.options.terms:
            index = self.row(-distance) if self.options.p2c_index == "paper" else index
            low, high = bounds(index)
            rows = self._heads(low, high, project[0], "position_q")
            k = k.repeat_interleave(self.num_heads // k.shape[2], dim=2)
            if distance.shape[1] == 1:  # a key meets the row of its own distance only
                met = rows.to(k.dtype)[index[:, 0] - low].expand_as(k)
                terms.append(torch.einsum("nshk,nshk->nhs", k, met)[:, :, None])
            else:
                products = torch.einsum("nshk,rhk->nhsr", k, rows.to(k.dtype))
                terms.append(pick(products, (index - low).mT).mT)
        total = terms[0] if len(terms) == 1 else terms[0] + terms[1]
        return total * self.scale

    def _heads(self, low: int, high: int, shared: Projection, own: str) -> Float[Tensor, "R H K"]:
        """Rows of E as queries or keys."""
        rows = F.embedding(torch.arange(low, high, device=self.weight.device), self.weight)
        if not self.options.share_projections:
            projected: Tensor = getattr(self, own)(rows)
            return projected.view(len(rows), self.num_heads, -1)
        heads = shared(rows[None])[0]
        return heads.repeat_interleave(self.num_heads // heads.shape[1], dim=1)

    def flops(self, queries: int, keys: int, kv_heads: int) -> int:
        width, shared, total = self.num_heads * self.size, self.options.share_projections, 0
        ends = torch.tensor([1 - queries, keys - 1])
        if "c2p" in self.options.terms:
            low, high = bounds(self.row(ends))
            keys_wide = kv_heads * self.size if shared else width
            total += 2 * (high - low) * width * (keys_wide + queries)
        if "p2c" in self.options.terms:
            low, high = bounds(self.row(-ends if self.options.p2c_index == "paper" else ends))
            total += 2 * width * ((high - low) * width + keys * (1 if queries == 1 else high - low))
        return total

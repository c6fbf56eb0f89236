"""Online softmax: attention in tiles, whose memory grows with the length and not with its square.

    m_j = max(m_{j-1}, x_j)        d_j = d_{j-1} e^{m_{j-1} - m_j} + e^{x_j - m_j}
    o_j = o_{j-1} (d_{j-1} e^{m_{j-1} - m_j} / d_j) + (e^{x_j - m_j} / d_j) v_j

The steps on the way there are functions of their own: `safe_softmax` (three passes over the scores), `online_softmax`
(two), `one_pass_attention` (one, with the values) and `tiled_attention` (one, tile by tile, with its own backward).
`merge` joins results over disjoint sets of keys.

Shapes    scores x [..., S];  q [B, T, H, K];  k [B, S, Hkv, K];  v [B, S, Hkv, V];  o [B, T, H, V];  lse [B, T, H]
Memory    of `tiled_attention`, beyond its inputs and outputs: B H query_block key_block numbers at a time
Cost      2 T S H (K + V) FLOPs forward, 2.5 times that backward, for the tiles that are visited
Source    Milakov and Gimelshein 2018, arXiv 1805.02867 (the normaliser); Dao et al. 2022, arXiv 2205.14135, and
          Dao 2023, arXiv 2307.08691 (tiles, loop order, recomputation)
Deviates  a row that sees no key gives o = 0 and lse = -inf, with zero gradients; lse has a gradient
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from everlong.ops.scoring import Scoring, accumulator, blocks, heads_times, part, uncompiled


def safe_softmax(scores: Float[Tensor, "*rows S"]) -> Float[Tensor, "*rows S"]:
    """Softmax in three passes over the scores: the maximum, the normaliser, the weights.

    Without the maximum, e^x overflows float32 from x = 89.
    """
    columns = scores.unbind(-1)
    maximum = torch.full_like(scores[..., :1].sum(-1), -torch.inf)
    for x in columns:
        maximum = torch.maximum(maximum, x)
    maximum = finite(maximum)
    normaliser = torch.zeros_like(maximum)
    for x in columns:
        normaliser = normaliser + torch.exp(x - maximum)
    normaliser = nonzero(normaliser)
    return _stack([torch.exp(x - maximum) / normaliser for x in columns], like=scores)


def online_softmax(scores: Float[Tensor, "*rows S"]) -> Float[Tensor, "*rows S"]:
    """Softmax in two passes: the maximum and the normaliser together, then the weights.

    Where a larger score appears, what was summed under the old maximum is scaled down to the new one.
    """
    columns = scores.unbind(-1)
    maximum = torch.full_like(scores[..., :1].sum(-1), -torch.inf)
    normaliser = torch.zeros_like(maximum)
    for x in columns:
        new = torch.maximum(maximum, x)
        normaliser = normaliser * torch.exp(maximum - finite(new)) + torch.exp(x - finite(new))
        maximum = new
    maximum, normaliser = finite(maximum), nonzero(normaliser)
    return _stack([torch.exp(x - maximum) / normaliser for x in columns], like=scores)


def one_pass_attention(
    scores: Iterable[Float[Tensor, "*rows"]], values: Iterable[Float[Tensor, "*rows_or_1 V"]]
) -> tuple[Float[Tensor, "*rows V"], Float[Tensor, "*rows"]]:
    """Attention in one pass: each key's scores and value are seen once, and no weight is kept.

    The accumulator is normalised after every key, so that it is at any time the attention over the keys so far.

    Args:
        scores: for each key in turn, its score in every row; -inf where the row may not see it.
        values: for each key in turn, its value, broadcastable over the rows.

    Returns:
        The output and the log-sum-exp of the scores of each row.

    Raises:
        ValueError: there is no key at all, or the two differ in number.
    """
    o = normaliser = maximum = None
    for x, value in zip(scores, values, strict=True):
        if maximum is None or normaliser is None or o is None:
            maximum, normaliser = torch.full_like(x, -torch.inf), torch.zeros_like(x)
            o = torch.zeros_like(x[..., None] * value)
        # Any number that keeps the exponents small would do: neither o and lse nor their gradients depend on it.
        new = torch.maximum(maximum, x.detach())
        kept, weight = normaliser * torch.exp(maximum - finite(new)), torch.exp(x - finite(new))
        normaliser, maximum = kept + weight, new
        o = o * (kept / nonzero(normaliser))[..., None] + (weight / nonzero(normaliser))[..., None] * value
    if o is None or normaliser is None or maximum is None:
        raise ValueError(
            "`one_pass_attention` needs at least one key: got none. Attention over no keys is 0, with lse = -inf"
        )
    return o, maximum + safe_log(normaliser)


def merge(
    o1: Float[Tensor, "*rows V"],
    lse1: Float[Tensor, "*rows"],
    o2: Float[Tensor, "*rows V"],
    lse2: Float[Tensor, "*rows"],
) -> tuple[Float[Tensor, "*rows V"], Float[Tensor, "*rows"]]:
    """Joins the attention of the same queries over two disjoint sets of keys into that over their union.

    lse = log(e^lse1 + e^lse2),  o = e^{lse1 - lse} o1 + e^{lse2 - lse} o2. Associative and commutative, with
    (0, -inf) as its neutral element; a row that is empty on both sides stays so, with zero gradients.
    """
    top = finite(torch.maximum(lse1, lse2).detach())
    weight1, weight2 = torch.exp(lse1 - top), torch.exp(lse2 - top)
    total = weight1 + weight2
    share1, share2 = weight1 / nonzero(total), weight2 / nonzero(total)
    o = share1[..., None] * o1 + share2[..., None] * o2
    return o.to(o1.dtype), torch.where(total == 0, -torch.inf, top) + safe_log(total)


def tiled_attention(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B S Hkv K"],
    v: Float[Tensor, "B S Hkv V"],
    scoring: Scoring,
    *,
    query_block: int = 128,
    key_block: int = 256,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B T H"]]:
    """Attention in tiles of `query_block` by `key_block`; tiles that the band kills are skipped.

    The backward keeps o and lse only, and computes each tile's weights again; it has no derivative of its own.
    A bias function is called tile by tile, unless what it returns asks for a gradient: then it is built in one piece,
    which is the gradient's shape as well.
    """
    rows, columns = slice(0, q.shape[1]), slice(0, k.shape[1])
    if callable(scoring.bias) and scoring.learns(q.device):
        bias = scoring.added(rows, columns, q.device)
        scoring = replace(scoring, bias=None if bias is None else bias[(None,) * (4 - bias.dim())])
    bias = scoring.bias if isinstance(scoring.bias, Tensor) else None
    rule = replace(scoring, mask=None, bias=None if bias is not None else scoring.bias)
    return uncompiled(_apply)(q, k, v, bias, scoring.mask, _Tiles(rule, query_block, key_block))


@dataclass(frozen=True)
class _Tiles:
    """The tiles of one attention: their order, and what applies to their scores."""

    scoring: Scoring
    query_block: int
    key_block: int

    def rows(self, num_queries: int) -> Iterator[slice]:
        return blocks(slice(0, num_queries), self.query_block)

    def columns(self, rows: slice, num_keys: int) -> Iterator[slice]:
        return blocks(self.scoring.band.reach(rows, num_keys), self.key_block)

    def under(self, bias: Tensor | None, mask: Tensor | None) -> "_Tiles":
        """The same with the tensors, which autograd keeps apart from the rest."""
        return replace(self, scoring=replace(self.scoring, mask=mask, bias=self.scoring.bias if bias is None else bias))


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, tiles: _Tiles
    ) -> tuple[Tensor, Tensor]:
        with _full_precision(q):
            o, lse = _forward(q, k, v, tiles.under(bias, mask))
        ctx.save_for_backward(q, k, v, bias, mask, o, lse)
        ctx.tiles = tiles
        ctx.set_materialize_grads(False)
        return o, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, bias, mask, o, lse = ctx.saved_tensors
        dtype = accumulator(q)
        do = torch.zeros_like(o) if do is None else do
        # dS = P (dP - rowsum(dO O) + dlse): what belongs to the row is one number.
        delta = (do.to(dtype) * o.to(dtype)).sum(-1)
        delta = delta if dlse is None else delta - dlse
        dbias = torch.zeros_like(bias, dtype=dtype) if bias is not None and ctx.needs_input_grad[3] else None
        with _full_precision(q):
            dq, dk, dv = _backward(q, k, v, lse, do, delta, ctx.tiles.under(bias, mask), dbias)
        return dq, dk, dv, None if dbias is None else dbias.to(bias.dtype), None, None


def _apply(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, tiles: _Tiles
) -> tuple[Tensor, Tensor]:
    o, lse = _Tiled.apply(q, k, v, bias, mask, tiles)  # type: ignore[no-untyped-call]
    return o, lse


def _forward(q: Tensor, k: Tensor, v: Tensor, tiles: _Tiles) -> tuple[Tensor, Tensor]:
    B, T, H, _ = q.shape
    o, lse = v.new_zeros(B, T, H, v.shape[-1]), q.new_full((B, T, H), -torch.inf, dtype=accumulator(q))
    for rows in tiles.rows(T):
        q_tile = _tile(q, rows)
        maximum = q_tile.new_full(q_tile.shape[:-1], -torch.inf)
        normaliser, total = torch.zeros_like(maximum), q_tile.new_zeros(*q_tile.shape[:-1], v.shape[-1])
        for columns in tiles.columns(rows, k.shape[1]):
            x = tiles.scoring.scores(q_tile, _tile(k, columns), rows, columns)
            new = torch.maximum(maximum, x.amax(-1))
            top = finite(new)
            weights, old = x.sub_(top[..., None]).exp_(), torch.exp(maximum - top)
            normaliser = old * normaliser + weights.sum(-1)
            total = old[..., None] * total + heads_times(weights, _tile(v, columns))
            maximum = new
        o[:, rows] = (total / nonzero(normaliser)[..., None]).transpose(1, 2)
        lse[:, rows] = (maximum + normaliser.log()).transpose(1, 2)
    return o, lse


def _backward(
    q: Tensor, k: Tensor, v: Tensor, lse: Tensor, do: Tensor, delta: Tensor, tiles: _Tiles, dbias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v; that of the bias is added to `dbias`."""
    dtype, scoring = accumulator(q), tiles.scoring
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k, dtype=dtype), torch.zeros_like(v, dtype=dtype)
    for rows in tiles.rows(q.shape[1]):
        q_tile, do_tile = _tile(q, rows), _tile(do, rows)
        lse_row, delta_row = finite(lse[:, rows]).transpose(1, 2)[..., None], delta[:, rows].transpose(1, 2)[..., None]
        dq_tile = torch.zeros_like(q_tile)
        for columns in tiles.columns(rows, k.shape[1]):
            k_tile, v_tile = _tile(k, columns), _tile(v, columns)
            weights = scoring.scores(q_tile, k_tile, rows, columns).sub_(lse_row).exp_()
            dv[:, columns] += _shared(weights, do_tile, k).transpose(1, 2)
            dx = heads_times(do_tile, v_tile.mT).sub_(delta_row).mul_(weights)
            if dbias is not None:
                place = part(dbias, rows, columns)
                place += dx.sum_to_size(place.shape)
            dq_tile += heads_times(dx, k_tile)
            dk[:, columns] += _shared(dx, q_tile, k).transpose(1, 2)
        dq[:, rows] = dq_tile.mul_(scoring.scale).transpose(1, 2)
    return dq, dk.mul_(scoring.scale).to(k.dtype), dv.to(v.dtype)


def _tile(x: Tensor, block: slice) -> Tensor:
    """Positions of x [B, T, H, K] as [B, H, R, K], in the precision of the sums."""
    return x[:, block].transpose(1, 2).to(accumulator(x)).contiguous()


def _shared(x: Tensor, y: Tensor, k: Tensor) -> Tensor:
    """x^T y summed over the heads that share one of k's: x [B, H, R, C], y [B, H, R, J] -> [B, Hkv, C, J]."""
    B, heads = x.shape[0], k.shape[2]
    return x.reshape(B, heads, -1, x.shape[-1]).mT @ y.reshape(B, heads, -1, y.shape[-1])


def finite(x: Tensor) -> Tensor:
    """x with 0 for -inf: a maximum over nothing, which would make -inf - (-inf) = NaN in an exponent."""
    return x.masked_fill(x == -torch.inf, 0.0)


def nonzero(x: Tensor) -> Tensor:
    """x with 1 for 0: the normaliser of a row that sees nothing, whose weights are all 0."""
    return x.masked_fill(x == 0, 1.0)


def safe_log(x: Tensor) -> Tensor:
    """log x, with -inf and a zero gradient at 0."""
    return torch.where(x == 0, -torch.inf, nonzero(x).log())


def _stack(columns: list[Tensor], like: Tensor) -> Tensor:
    return torch.stack(columns, -1) if columns else torch.zeros_like(like)


def _full_precision(x: Tensor) -> torch.autocast:
    return torch.autocast(x.device.type, enabled=False)

"""Softmax attention as products of blocks, for processors that multiply matrices fastest in bfloat16.

    P = softmax(scale Q K^T)      O = P V                              for a block of queries and the keys it reaches
    dV += P^T dO      dP = dO V^T      dS = P * (dP - rowsum(P * dP))      dQ = scale dS K      dK += scale dS^T Q

torch's fused kernel multiplies small tiles, which on a CPU without matrix units is several times slower than its
products of large matrices. So blocks are made as large as the cache takes; the backward pass computes P once more.

Shapes    q [B, T, H, K];  k [B, S, G, K];  v [B, S, G, V];  o [B, T, H, V], G heads shared by groups of H
Memory    three blocks of BLOCK scores beside inputs, outputs and float32 sums of dK and dV: linear in T and S
Source    Vaswani et al. 2017, arXiv 1706.03762, eq. 1; the backward pass as in Dao et al. 2022, arXiv 2205.14135, B.4
Deviates  scores and their gradient are rounded to the inputs' dtype, as every product under autocast is; the softmax
          and its sums are float32. It cannot be differentiated twice
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from everlong.ops.chunks import without_autocast
from everlong.ops.scoring import Band

BLOCK = 1 << 21  # scores in a block: 4 MB of bfloat16
ROWS = 128, 256  # queries in a block: more waste on keys that causality forbids, fewer make slow products


class _Blocks:
    """Queries `[B G, H / G, T, K]`, keys and values `[B G, S, *]`, and the blocks in which they meet."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, scale: float, band: Band, mask: Tensor | None) -> None:
        self.batch, self.shared, self.band = q.shape[0], q.shape[2] // k.shape[2], band
        self.mask = None if mask is None else mask[:, 0].expand(-1, q.shape[1], k.shape[1])
        self.q = self.by_head(q, self.shared).mul(scale)
        self.k, self.v = self.by_head(k), self.by_head(v)

    def by_head(self, x: Tensor, shared: int = 0) -> Tensor:
        """`[B, T, H, K]` -> `[B H, T, K]`, or `[B G, H / G, T, K]` where heads of a group share keys."""
        rows = x.transpose(1, 2).contiguous()
        return rows.flatten(0, 1) if not shared else rows.view(-1, shared, *rows.shape[2:])

    def by_token(self, x: Tensor) -> Tensor:
        """The inverse of `by_head`, as a view."""
        return x.view(self.batch, -1, *x.shape[-2:]).transpose(1, 2)

    def __iter__(self) -> Iterator[tuple[slice, slice, slice]]:
        """Heads, queries and keys of block after block; all blocks of some heads before the next."""
        heads, length, keys = self.q.shape[0], self.q.shape[2], self.k.shape[1]
        rows = max(32, min(max(ROWS[0], min(ROWS[1], length // 4)), BLOCK // keys))
        together = max(1, BLOCK // (rows * self.shared * keys))
        for first in range(0, heads, together):
            for start in range(0, length, rows):
                queries = slice(start, min(start + rows, length))
                yield slice(first, min(first + together, heads)), queries, self.band.reach(queries, keys)

    def queries(self, x: Tensor, heads: slice, queries: slice) -> Tensor:
        """The block's part of `[B G, H / G, T, K]` as the rows of one matrix a head of keys: `[n, rows, K]`."""
        return x[heads, :, queries].flatten(1, 2)

    def weights(self, heads: slice, queries: slice, keys: slice) -> Tensor:
        """P of a block: `[n, rows, keys]`."""
        scores = torch.bmm(self.queries(self.q, heads, queries), self.k[heads, keys].mT)
        by_query = scores.view(len(scores), self.shared, -1, scores.shape[-1])
        for part in self.edges(queries, keys):
            hidden = ~self.band.visible(queries, part, scores.device)
            by_query[..., part.start - keys.start : part.stop - keys.start].masked_fill_(hidden, -torch.inf)
        if self.mask is None:
            return torch.softmax(scores, -1)
        unseen = ~self.unmasked(heads, queries, keys)
        by_query.masked_fill_(unseen, -torch.inf)
        weights = torch.softmax(scores, -1)
        weights.view_as(by_query).masked_fill_(unseen, 0.0)  # a query that sees no key has made them NaN
        return weights

    def unmasked(self, heads: slice, queries: slice, keys: slice) -> Tensor:
        """The mask's part of a block, broadcastable to `[n, H / G, rows, keys]`."""
        assert self.mask is not None
        if len(self.mask) == 1:
            return self.mask[:, None, queries, keys]
        groups = self.k.shape[0] // self.batch
        row = torch.arange(heads.start, heads.stop, device=self.mask.device) // groups
        return self.mask[row, queries, keys][:, None]

    def edges(self, queries: slice, keys: slice) -> list[slice]:
        """The keys that some of the block's queries see and some do not."""
        first, last = self.band.offset + queries.start, self.band.offset + queries.stop - 1
        left = min(max(last - self.band.left, keys.start), keys.stop)
        right = min(max(first + self.band.right + 1, left), keys.stop)
        return [part for part in (slice(keys.start, left), slice(right, keys.stop)) if part.start < part.stop]


@torch.library.custom_op("everlong::product_attention", mutates_args=())
def product_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, offset: int, left: int, right: int, mask: Tensor | None = None
) -> Tensor:
    """o; query i sits at p = offset + i and sees keys p - left <= j <= p + right, one of them at least.

    Of these it sees those that the mask, [B or 1, 1, T or 1, S or 1], leaves; where that is none, o is 0.
    """
    with without_autocast(q):
        blocks = _Blocks(q, k, v, scale, Band(offset, left, right), mask)
        o = v.new_empty(*blocks.q.shape[:3], v.shape[3])
        for heads, queries, keys in blocks:
            mixed = torch.bmm(blocks.weights(heads, queries, keys), blocks.v[heads, keys])
            o[heads, :, queries] = mixed.view(len(mixed), blocks.shared, -1, mixed.shape[-1])
        return blocks.by_token(o.flatten(0, 1))


@product_attention.register_fake
def _(q, k, v, scale, offset, left, right, mask=None):  # type: ignore[no-untyped-def]
    return v.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)


@torch.library.custom_op("everlong::product_attention_backward", mutates_args=())
def product_attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    d_o: Tensor,
    scale: float,
    offset: int,
    left: int,
    right: int,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v."""
    with without_autocast(q):
        blocks = _Blocks(q, k, v, scale, Band(offset, left, right), mask)
        d_out = blocks.by_head(d_o, blocks.shared)
        d_q = torch.empty_like(blocks.q)
        exact = torch.promote_types(q.dtype, torch.float32)
        d_k, d_v = (torch.zeros_like(x, dtype=exact) for x in (blocks.k, blocks.v))
        for heads, queries, keys in blocks:
            weights, d_part = blocks.weights(heads, queries, keys), blocks.queries(d_out, heads, queries)
            d_v[heads, keys] += torch.bmm(weights.mT, d_part)
            d_weights = torch.bmm(d_part, blocks.v[heads, keys].mT)
            d_scores = torch.ops.aten._softmax_backward_data(d_weights, weights, -1, weights.dtype)
            d_rows = torch.bmm(d_scores, blocks.k[heads, keys])
            d_q[heads, :, queries] = d_rows.view(len(d_rows), blocks.shared, -1, d_rows.shape[-1])
            d_k[heads, keys] += torch.bmm(d_scores.mT, blocks.queries(blocks.q, heads, queries))
        d_q = d_q.mul_(scale).flatten(0, 1)
        return blocks.by_token(d_q), blocks.by_token(d_k.to(k.dtype)), blocks.by_token(d_v.to(v.dtype))


@product_attention_backward.register_fake
def _(q, k, v, d_o, scale, offset, left, right, mask=None):  # type: ignore[no-untyped-def]
    return tuple(x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2) for x in (q, k, v))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, *ctx.rule, mask = inputs
    ctx.save_for_backward(q, k, v, mask)


def _backward(ctx: Any, d_o: Tensor) -> tuple[Tensor | None, ...]:
    *inputs, mask = ctx.saved_tensors
    return *product_attention_backward(*inputs, d_o, *ctx.rule, mask), None, None, None, None, None


product_attention.register_autograd(_backward, setup_context=_setup)

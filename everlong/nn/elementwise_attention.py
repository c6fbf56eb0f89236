"""Attention whose weights are functions of one score each, so that nothing has to be known of a row but its scores.

    o_t = sum_s f(x_ts) v_s,    x_ts = q_t^T k_s + gain_t b(s - t)

    relu2      f(x) = max(x, 0)^2                                       So et al. 2021, arXiv 2109.08668
    laplace    f(x) = (1 + erf((x - mu) / (sigma sqrt(2)))) / 2,        Ma et al. 2022, "Mega", arXiv 2209.10655, eq. 16
               mu = sqrt(1/2), sigma = sqrt(1 / (4 pi))

Blocks of queries meet the keys that they may see, and the scores of a block are made once more in the backward pass: of
all T S scores no more than `SCORES` are there at a time.
"""

import itertools
import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from everlong.ops.scoring import uncompiled

Function = Literal["relu2", "laplace"]

SCORES = 1 << 20  # that are held at a time: they pass through the caches several times
ROWS = 64
MEAN, DEVIATION = math.sqrt(0.5), math.sqrt(1 / (4 * math.pi))  # of laplace


def elementwise_attention(
    q: Float[Tensor, "N T K"],
    k: Float[Tensor, "N S K"],
    v: Float[Tensor, "N S V"],
    *,
    function: Function,
    bias: Float[Tensor, "..."] | None = None,
    gain: Float[Tensor, "rows T"] | None = None,
    causal: bool = True,
    form: str = "auto",
) -> Float[Tensor, "N T V"]:
    """Sums of values under weights that are not normalised; queries are the last of the keys.

    Args:
        bias: a number for each distance s - t from -(S - 1) up to 0 or, without causality, to T - 1; or
            `[rows, T, S]`.
        gain: what the bias is multiplied by, a constant for gradients; None: 1.
        form: "parallel" makes all scores at once, "recurrent" those of one query after another.
    """
    if not (q.numel() and k.numel() and v.numel()):
        return v.new_zeros(*q.shape[:2], v.shape[2])
    rows = {"parallel": q.shape[1], "recurrent": 1}.get(form, max(1, min(ROWS, SCORES // k.shape[1])))
    # One more distance, which no pair has: rows of the matrix of biases then begin one apart in the flat vector.
    bias = functional.pad(bias, (0, 1)) if bias is not None and bias.dim() == 1 else bias
    o: Tensor = uncompiled(_Elementwise.apply)(q, k, v, bias, gain, function, causal, rows)  # type: ignore[no-untyped-call]
    return o


class _Elementwise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        gain: Tensor | None,
        function: Function,
        causal: bool,
        rows: int,
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, bias, gain)
        ctx.function, ctx.causal, ctx.rows = function, causal, rows
        o = v.new_empty(*q.shape[:2], v.shape[2])
        with torch.autocast(q.device.type, enabled=False):
            for part in _parts(q, k, causal, rows):
                x = part.scores(q, k, bias, gain)
                weights = part.visible(_weights(x, function))
                torch.bmm(weights.to(v.dtype), part.seen(v), out=part.own(o))
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_o: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias, gain = ctx.saved_tensors
        exact = torch.promote_types(q.dtype, torch.float32)
        d_q = torch.empty_like(q)
        d_k, d_v = (torch.zeros(y.shape, dtype=exact, device=y.device) for y in (k, v))
        d_bias = None if bias is None else torch.zeros(bias.shape, dtype=exact, device=bias.device)
        with torch.autocast(q.device.type, enabled=False):
            for part in _parts(q, k, ctx.causal, ctx.rows):
                own = part.own(d_o)
                d_weights = torch.bmm(own, part.seen(v).mT).to(exact)
                x = part.scores(q, k, bias, gain)
                weights, slope = _weights_and_slope(x, ctx.function)
                d_x = part.visible(slope.mul_(d_weights))
                _add_product(part.seen(d_v), part.visible(weights).to(v.dtype).mT, own)
                if d_bias is not None:
                    part.add_to_bias(d_bias, d_x, gain)
                d_x = d_x.to(q.dtype)
                torch.bmm(d_x, part.seen(k), out=part.own(d_q))
                _add_product(part.seen(d_k), d_x.mT, part.own(q))
        d_bias = None if d_bias is None else d_bias.to(bias.dtype)
        return d_q, d_k.to(k.dtype), d_v.to(v.dtype), d_bias, None, None, None, None


class _Part:
    """Some queries of some sequences, and the keys up to the last that these queries may see."""

    def __init__(self, batch: slice, rows: slice, shape: tuple[int, int], causal: bool) -> None:
        self.batch, self.rows, self.causal = batch, rows, causal
        self.num_queries, self.num_keys = shape
        self.stop = rows.stop + self.num_keys - self.num_queries if causal else self.num_keys

    def own(self, x: Tensor) -> Tensor:
        return x[self.batch, self.rows]

    def seen(self, x: Tensor) -> Tensor:
        return x[self.batch, : self.stop]

    def scores(self, q: Tensor, k: Tensor, bias: Tensor | None, gain: Tensor | None) -> Tensor:
        x = torch.bmm(self.own(q), self.seen(k).mT).to(torch.promote_types(q.dtype, torch.float32))
        if bias is None:
            return x
        added = self._matrix(bias) if bias.dim() == 1 else self._rows_of(bias)[..., : self.stop]
        return x.add_(added) if gain is None else x.addcmul_(added.to(x.dtype), self._rows_of(gain)[..., None])

    def visible(self, weights: Tensor) -> Tensor:
        """Zeros where a key comes after its query; in place."""
        size = weights.shape[1]
        if self.causal and size > 1:
            weights[..., self.stop - size :].tril_()
        return weights

    def add_to_bias(self, d_bias: Tensor, d_x: Tensor, gain: Tensor | None) -> None:
        d_x = d_x if gain is None else d_x * self._rows_of(gain)[..., None]
        if d_bias.dim() == 1:
            rows = d_x.new_zeros(d_x.shape[1] + 1, len(d_bias))
            self._skewed(rows, d_x.shape[1]).copy_(d_x.sum(0))
            d_bias += rows.sum(0)
        elif len(d_bias) == 1:
            self._rows_of(d_bias)[..., : self.stop].add_(d_x.sum(0))
        else:
            self._rows_of(d_bias)[..., : self.stop].add_(d_x)

    def _rows_of(self, x: Tensor) -> Tensor:
        return x[self.batch if len(x) > 1 else slice(None), self.rows]

    def _matrix(self, bias: Tensor) -> Tensor:
        """The biases of all pairs, from those of the distances."""
        size = self.rows.stop - self.rows.start
        return self._skewed(bias.repeat(size + 1, 1), size)

    def _skewed(self, rows: Tensor, size: int) -> Tensor:
        """A view of equal rows in which each begins one distance further behind than the one above."""
        first = self.num_queries - 1 - self.rows.start
        return rows.as_strided((size, self.stop), (rows.shape[1] - 1, 1), first)


def _parts(q: Tensor, k: Tensor, causal: bool, rows: int) -> Iterator[_Part]:
    """All queries of all sequences, in parts of so many queries that hold no more scores than they may."""
    batch, shape = q.shape[0], (q.shape[1], k.shape[1])
    each = batch if rows == shape[0] > ROWS else max(1, SCORES // (min(rows, shape[0]) * shape[1]))
    for n, start in itertools.product(range(0, batch, each), range(0, shape[0], rows)):
        yield _Part(slice(n, min(n + each, batch)), slice(start, min(start + rows, shape[0])), shape, causal)


def _weights(x: Tensor, function: Function) -> Tensor:
    """f(x); in place of x."""
    if function == "relu2":
        return x.clamp_min_(0).square_()
    return x.sub_(MEAN).div_(DEVIATION * math.sqrt(2)).erf_().add_(1).mul_(0.5)


def _weights_and_slope(x: Tensor, function: Function) -> tuple[Tensor, Tensor]:
    """f(x) and its derivative; x is gone."""
    if function == "relu2":
        x.clamp_min_(0)
        return x.square(), x.mul_(2)
    z = x.sub_(MEAN).div_(DEVIATION * math.sqrt(2))
    slope = z.square().neg_().exp_().mul_(1 / (DEVIATION * math.sqrt(2 * math.pi)))
    return z.erf_().add_(1).mul_(0.5), slope


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left right, whatever is shorter than the total."""
    if left.dtype == total.dtype:
        total.baddbmm_(left, right)
    else:
        total += torch.bmm(left, right)

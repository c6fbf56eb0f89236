"""Averages whose weights are sums of products of exponentials, exact in their order of tokens and without overflow.

    o_i = sum_j w_ij v_j / sum_j w_ij            w_ij = sum_f exp(q_if + k_jf)           over the j that i may see

Every feature f keeps the largest exponent that it has met, m_f, and holds its sums over exp(k_jf - m_f). Where m_f
rises they fade by exp(m_before - m_after), a decay of linear attention; a query reads exp(q_if + m_f), over the largest
of these. So no exponent is positive, the feature that decides a query's weights has a sum of at least 1, and what a
token gets does not depend on any later one, not even in its rounding. One maximum for a whole text would let it; one
for all features would lose those that are weak in the keys and strong in a query.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from everlong.nn.layers import exact
from everlong.ops import linear_attention


class Sums(NamedTuple):
    """What is kept of a sequence."""

    memory: Float[Tensor, "N H F V"]  # sum of exp(k - maximum) v^T
    normalizer: Float[Tensor, "N H F 1"]  # sum of exp(k - maximum)
    maximum: Float[Tensor, "N H F"]


def nothing(zeros: Float[Tensor, "N H F"]) -> Float[Tensor, "N H F"]:
    """The maximum before the first key: finite, since a difference of infinities is no number."""
    return torch.full_like(zeros, torch.finfo(zeros.dtype).min)


def average(
    q: Float[Tensor, "B T H F"],
    k: Float[Tensor, "B T H F"],
    v: Float[Tensor, "B T H V"],
    past: Sums,
    *,
    causal: bool,
    cu_seqlens: Int[Tensor, " N_plus_1"] | None,
    form: str,
) -> tuple[Float[Tensor, "B T H V"], Sums]:
    """The averages and the sums after the last token, of exponents `q` and `k`; only if `causal` is `past` read."""
    q, k = exact(q), exact(k)
    start = past.maximum.to(k.dtype)
    if not causal:
        start = nothing(start)
    after, before, last = running_maximum(k.detach(), start.detach(), cu_seqlens)
    initial = None
    if causal:
        # The sums have a meaning only times exp(maximum): that is how a gradient reaches the maximum that came in.
        initial = torch.cat([past.memory, past.normalizer], -1) * (start - start.detach()).exp()[..., None]
    else:
        after = last[:, None] if cu_seqlens is None else last.repeat_interleave(cu_seqlens.diff(), 0)[None]
    read = q + after
    read = (read - read.detach().amax(-1, keepdim=True)).exp()
    both, sums = linear_attention(
        read.to(v.dtype),
        (k - after).exp().to(v.dtype),
        torch.cat([v, torch.ones_like(v[..., :1])], -1),
        log_decay=before - after if causal else None,
        scale=1.0,
        causal=causal,
        initial_state=initial,
        cu_seqlens=cu_seqlens,
        form=form,
    )
    assert isinstance(sums, Tensor)  # a pair comes with `normalize` only
    return both[..., :-1] / both[..., -1:], Sums(sums[..., :-1], sums[..., -1:], last)


@torch.no_grad()
def running_maximum(
    x: Float[Tensor, "B T H F"], start: Float[Tensor, "N H F"], cu_seqlens: Int[Tensor, " N_plus_1"] | None
) -> tuple[Float[Tensor, "B T H F"], Float[Tensor, "B T H F"], Float[Tensor, "N H F"]]:
    """The largest of `start` and the tokens so far: with each token, without it, and after the last one."""
    if cu_seqlens is None:
        largest = _prefixes(torch.cat([start[:, None], x], 1))
        return largest[:, 1:], largest[:, :-1], largest[:, -1]
    parts = torch.split(x[0], cu_seqlens.diff().tolist())
    found = [_prefixes(torch.cat([s[None], part])[None])[0] for s, part in zip(start, parts, strict=True)]
    if not found:
        return x, x, start
    with_it, without_it = torch.cat([part[1:] for part in found]), torch.cat([part[:-1] for part in found])
    return with_it[None], without_it[None], torch.stack([part[-1] for part in found])


def _prefixes(x: Float[Tensor, "B T H F"]) -> Float[Tensor, "B T H F"]:
    """The maximum of each token and those before it, by doubling: torch's own goes along time one by one."""
    reach = 1
    while reach < x.shape[1]:
        x = torch.cat([x[:, :reach], torch.maximum(x[:, reach:], x[:, :-reach])], 1)
        reach *= 2
    return x

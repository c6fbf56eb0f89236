"""What an attention map does to gradients, and how far it looks: two measurements of Qin et al. 2022.

With weights p_ij = f(s_ij) / sum_k f(s_ik) of scores s

    dp_ij / ds_ik = f'(s_ik) / f(s_ik) * (1{j = k} p_ij - p_ij p_ik)
    softmax       f = exp:  at most 1/4, whatever the scores are
    linear        f(s) = s: at most 1 / (4 |s_ik|), which grows without end as a score goes to 0
    norm          o_i = RMSNorm(sum_j s_ij v_j), nothing is divided by a sum: |dL/ds_ij| <= 3 c d / (2 sqrt(eps)),
                  d channels, c the largest entry of dL/do times the largest of v
    dilution      l(i, r) = sum of p_ij over the nearest r n of the n tokens that i sees: r where the weights do not
                  tell near from far, 1 at any r where they look at i alone

Source    Qin et al. 2022, "The Devil in Linear Transformer", arXiv 2210.10340
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from everlong.mixers.attention import Attention
from everlong.mixers.base import Mixer, name_of
from everlong.mixers.linear_attention import LinearAttention
from everlong.mixers.transnormer import TransNormer

Kind = Literal["softmax", "linear", "norm"]


@dataclass(frozen=True)
class GradientBound:
    """The largest gradient through a kind of attention, and what it cannot exceed."""

    kind: Kind
    largest: float
    bound: float  # at the smallest score that was met, for linear
    smallest_score: float


def score_gradient(scores: Float[Tensor, "*B N"], kind: Literal["softmax", "linear"]) -> Float[Tensor, "*B N N"]:
    """dp_j / ds_k for each row of scores (exponents for softmax, positive weights for linear)."""
    p, slope = _weights(scores, kind)
    return slope[..., None, :] * (torch.diag_embed(p) - p[..., :, None] * p[..., None, :])


def gradient_bound_report(
    q: Float[Tensor, "*B T K"],
    k: Float[Tensor, "*B T K"],
    v: Float[Tensor, "*B T V"],
    *,
    causal: bool = True,
    eps: float = 1e-5,
) -> list[GradientBound]:
    """What softmax, linear (1 + elu) and norm attention make of these queries, keys and values.

    For softmax and linear the largest |dp_ij / ds_ik|, found without forming them all: it stands at j = k. For norm the
    largest |dL / ds_ij| under a random cotangent of entries -1 and 1, so that its numbers are in other units.
    """
    visible = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool)
    visible = visible.tril() if causal else visible
    features = (F.elu(q) + 1) @ (F.elu(k) + 1).mT
    found = []
    for kind, scores, hidden in (("softmax", q @ k.mT * q.shape[-1] ** -0.5, -torch.inf), ("linear", features, 0.0)):
        p, slope = _weights(scores.masked_fill(~visible, hidden), kind)  # type: ignore[arg-type]
        gradients = (slope * p * (1 - p)).abs()[..., visible]
        smallest = scores[..., visible].abs().min().item()
        bound = 0.25 if kind == "softmax" else 0.25 / smallest if smallest else torch.inf
        found.append(GradientBound(kind, gradients.max().item(), bound, smallest))  # type: ignore[arg-type]
    scores = (features * visible).detach().requires_grad_()
    cotangent = torch.where(torch.rand(v.shape, generator=torch.Generator().manual_seed(0)) < 0.5, -1.0, 1.0).to(
        v.dtype
    )
    o = F.rms_norm(scores @ v.detach(), v.shape[-1:], eps=eps)
    (gradient,) = torch.autograd.grad((o * cotangent).sum(), scores)
    bound = 1.5 * v.abs().max().item() * v.shape[-1] / eps**0.5
    smallest = features[..., visible].abs().min().item()
    return [*found, GradientBound("norm", gradient[..., visible].abs().max().item(), bound, smallest)]


def _weights(scores: Tensor, kind: Literal["softmax", "linear"]) -> tuple[Tensor, Tensor]:
    """p, and f'(s) / f(s)."""
    if kind == "softmax":
        return scores.softmax(-1), torch.ones_like(scores)
    return scores / scores.sum(-1, keepdim=True), torch.where(scores == 0, 0.0, 1 / scores)


def dilution_curve(
    weights: Float[Tensor, "*B T T"], ratios: Float[Tensor, " R"], *, causal: bool = True
) -> Float[Tensor, " R"]:
    """l(r), the mean over queries of the weight that their nearest tokens get, for shares r of the tokens they see.

    The window stands around the query and is shifted where it would reach beyond the first or the last visible token.
    The first eighth of the queries, which see hardly anything, is left out where the map is causal.
    """
    length = weights.shape[-1]
    query = torch.arange(length)
    seen = query + 1 if causal else torch.full((length,), length)
    sums = F.pad(weights.cumsum(-1), (1, 0))
    curve = []
    for ratio in ratios.tolist():
        size = (ratio * seen).round().long().clamp(1)
        start = (query - size // 2).clamp(min=torch.zeros_like(seen), max=seen - size)
        index = torch.stack([start, start + size], -1).expand(*weights.shape[:-1], 2)
        low, high = sums.gather(-1, index).unbind(-1)
        curve.append((high - low)[..., length // 8 if causal else 0 :].mean())
    return torch.stack(curve)


@torch.no_grad()
def attention_map(mixer: Mixer, x: Float[Tensor, "T D"]) -> Float[Tensor, "H T T"]:
    """The weights that each token of a sequence gives to each; rows sum to one, or are 0 where nothing has a weight.

    NormAttention has no such weights, since it divides by a norm: these are its scores over their sum.

    Raises:
        ValueError: the mixer is none whose map is known here.
    """
    if not isinstance(mixer, Attention | LinearAttention | TransNormer):
        raise ValueError(f"maps are known of attention, linear_attention and transnormer: got {name_of(type(mixer))}")
    if mixer.position.hooks or (isinstance(mixer, LinearAttention) and not mixer.feature_map.normalized):
        raise ValueError("maps are known of layers without positions and with weights that sum to one")
    c, token = mixer.config, torch.arange(len(x))
    size = c.key_size if isinstance(mixer, LinearAttention) else c.head_size
    q, k = (project(x).unflatten(-1, (-1, size)) for project in (mixer.q, mixer.k))
    diag = isinstance(mixer, TransNormer) and c.kind == "diag"
    seen = token[:, None] >= token if c.causal else torch.ones(len(x), len(x), dtype=torch.bool)
    if diag:
        seen = seen & (token[:, None] // c.block_size == token // c.block_size)
    if isinstance(mixer, Attention):
        if c.window is not None:
            seen = seen & ((token[:, None] - token).abs() < c.window)
        q, k = mixer.q_norm(q[None])[0], mixer.k_norm(k[None])[0]
        k = k.repeat_interleave(c.heads // c.kv_heads, 1)
    elif not diag:
        q, k = (mixer.feature_map(y, token) for y in (q, k))
        if mixer.feature_map.logarithmic:
            q, k = (q - q.amax(-1, keepdim=True)).exp(), (k - k.amax()).exp()
    scores = torch.einsum("thk,shk->hts", q, k)
    if isinstance(mixer, Attention) or (diag and c.variant == "T2"):
        weights: Tensor = (scores / size**0.5).masked_fill(~seen, -torch.inf).softmax(-1)
        return weights
    weights = scores.relu() * seen
    return weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)

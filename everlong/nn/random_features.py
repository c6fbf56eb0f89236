"""Random features: products of features whose mean over their draws is the exponential of a product.

    positive        m^-1/2 exp(w^T x - |x|^2 / 2)                                           (lemma 1)
    hyperbolic      (2m)^-1/2 exp(+-w^T x - |x|^2 / 2)                                      (lemma 1, second form)
    trigonometric   m^-1/2 exp(|x|^2 / 2) [sin w^T x, cos w^T x]                            (eq. 10)

with phi(q)^T phi(k) = exp(q^T k) in the mean over rows w of normal numbers; m rows are drawn.

Shapes    x [*, K]; rows [m, K]; features [*, m], and [*, 2 m] where there are two for each row
Source    Choromanski et al. 2020, "Rethinking Attention with Performers", arXiv 2009.14794
Deviates  the orthogonal matrices are uniform (Haar): QR alone prefers some, by the signs that it leaves on R's diagonal
          (Mezzadri 2007, arXiv math-ph/0609050)
"""

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Kind = Literal["positive", "hyperbolic"]
Draw = Literal["orthogonal", "regularized", "independent"]


def draw_rows(
    count: int, size: int, *, draw: Draw = "orthogonal", generator: torch.Generator | None = None
) -> Float[Tensor, "m K"]:
    """Rows for random features, in float64.

    Args:
        draw: "orthogonal": rows of random orthogonal matrices, `size` of them from each, as long as normal vectors
            are: each row is a normal vector, and no two of a matrix repeat each other; "regularized": all of the
            length sqrt(size), which is a little off in the mean (SMREG); "independent": normal numbers.
    """
    normal = torch.randn(count, size, dtype=torch.float64, generator=generator)
    if draw == "independent":
        return normal
    blocks = []
    for _ in range(-(-count // size)):
        q, r = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))
        blocks.append(q * r.diagonal().sign())
    directions = torch.cat([normal[:0], *blocks])[:count]
    lengths = normal.norm(dim=-1, keepdim=True)
    return directions * (torch.full_like(lengths, size**0.5) if draw == "regularized" else lengths)


def scores(x: Float[Tensor, "*B K"], rows: Float[Tensor, "m K"], kind: Kind) -> Float[Tensor, "*B F"]:
    """The logarithms of features up to what those of a token share: enough for a query, of which that cancels."""
    score = x @ rows.T.to(x.dtype)
    return torch.cat([score, -score], -1) if kind == "hyperbolic" else score


def exponents(x: Float[Tensor, "*B K"], rows: Float[Tensor, "m K"], kind: Kind) -> Float[Tensor, "*B F"]:
    """The logarithms of features, all of them positive."""
    score = scores(x, rows, kind)
    return score - half_square(x) - math.log(score.shape[-1]) / 2


def trigonometric(x: Float[Tensor, "*B K"], rows: Float[Tensor, "m K"]) -> Float[Tensor, "*B F"]:
    """Features as of Rahimi and Recht (2007): products may be negative, and are least certain where they are small.

    For comparison only: an average under such weights has no bound.
    """
    score = x @ rows.T.to(x.dtype)
    return torch.cat([score.sin(), score.cos()], -1) * (half_square(x) - math.log(len(rows)) / 2).exp()


def half_square(x: Float[Tensor, "*B K"]) -> Float[Tensor, "*B 1"]:
    """|x|^2 / 2"""
    return x.square().sum(-1, keepdim=True) / 2

"""The Performer against performer-pytorch's features, under the rows that ours has drawn."""

from collections.abc import Iterator

import torch
from torch import Tensor

from everlong.lab.bench.comparison import Comparison, make
from everlong.lab.bench.errors import heads_first

ORACLE = "performer-pytorch, softmax_kernel, generalized_kernel and linear_attention"


def comparisons() -> Iterator[Comparison]:
    """Positive features at three lengths, hyperbolic ones and relu; both directions. Theirs without its added 1e-4."""
    for length in (1, 7, 130):
        yield _compared(length, "positive", causal=True)
    for kind in ("hyperbolic", "relu"):
        yield _compared(65, kind, causal=True)
    for kind in ("positive", "hyperbolic", "relu"):
        yield _compared(65, kind, causal=False)


def _compared(length: int, kind: str, *, causal: bool) -> Comparison:
    from performer_pytorch.performer_pytorch import (
        generalized_kernel,
        linear_attention,
        softmax_kernel,
    )

    ours = make("performer", width=48, num_heads=3, features=kind, num_features=30, causal=causal).double()
    rows = ours.rows

    def phi(x: Tensor, is_query: bool) -> Tensor:
        if kind == "relu":
            y: Tensor = generalized_kernel(x, projection_matrix=rows)
        else:
            both = torch.cat([rows, -rows]) if kind == "hyperbolic" else rows
            y = softmax_kernel(x, projection_matrix=both, is_query=is_query, eps=0.0)
        return y

    def theirs(x: Tensor) -> Tensor:
        q, k, v = heads_first(*(getattr(ours, label)(x).unflatten(-1, (3, -1)) for label in "qkv"))
        q, k = phi(q, True), phi(k, False)
        if causal:  # theirs needs a kernel for this: its features as a dense matrix
            weights = (q @ k.mT).tril()
            o = weights @ v / weights.sum(-1, keepdim=True)
        else:
            o = linear_attention(q, k, v)
        y: Tensor = ours.o(o.transpose(1, 2).flatten(-2))
        return y

    x = torch.randn(2, length, 48, dtype=torch.float64)
    label = f"{kind}, {'causal' if causal else 'bidirectional'}, T={length}"
    return Comparison(label, lambda x: ours(x)[0], theirs, x, bound=1e-9)

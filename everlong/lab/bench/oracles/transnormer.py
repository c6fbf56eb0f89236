"""TransNormer against torch's attention under a block-diagonal mask, and the paper's products as dense matrices."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from everlong.lab.bench.comparison import Comparison, make
from everlong.lab.bench.errors import heads_first

ORACLE = "torch, scaled_dot_product_attention in blocks; the paper's products as dense matrices"


def comparisons() -> Iterator[Comparison]:
    """Each kind of layer, causal and not; the blocks at lengths below, at and beyond their size."""
    for causal in (True, False):
        for length in (1, 7, 16, 37):
            yield _compared("diag", "T2", length, causal)
        yield _compared("diag", "T1", 37, causal)
        yield _compared("norm", "T2", 130, causal)


def _compared(kind: str, variant: str, length: int, causal: bool) -> Comparison:
    size = 8
    options: dict[str, Any] = {"kind": kind, "variant": variant, "block_size": size, "causal": causal}
    ours = make("transnormer", width=24, num_heads=2, **options).double()
    token = torch.arange(length)
    seen = torch.ones(length, length, dtype=torch.bool) if kind == "norm" else token[:, None] // size == token // size
    seen = seen.tril() if causal else seen

    def theirs(x: Tensor) -> Tensor:
        q, k, v = heads_first(*(getattr(ours, label)(x).unflatten(-1, (2, -1)) for label in "qkv"))
        if kind == "norm":
            o = ((F.elu(q) + 1) @ (F.elu(k) + 1).mT * seen) @ v
        elif variant == "T1":
            o = (q @ k.mT / 12**0.5).relu() * seen @ v
        else:
            o = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        o = o.transpose(1, 2).flatten(-2)
        if kind == "norm" or variant == "T1":
            o = F.rms_norm(o, (24,), ours.norm.weight, 1e-5)
        y: Tensor = ours.o(o)
        return y

    x = torch.randn(2, length, 24, dtype=torch.float64)
    label = f"{kind} {variant if kind == 'diag' else ''}, {'causal' if causal else 'bidirectional'}, T={length}"
    return Comparison(label, lambda x: ours(x)[0], theirs, x, bound=1e-9)

"""DeltaNet against flash-linear-attention's loop, through the layer's projections and torch's own convolution."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from everlong.lab.bench.comparison import Comparison, convolved, make, unit
from everlong.lab.bench.errors import naive

ORACLE = "fla-core, delta_rule/naive.py"


def comparisons() -> Iterator[Comparison]:
    """Eigenvalues of one sign and of both, at three lengths."""
    for length in (1, 7, 130):
        yield _layer(length, "positive")
        yield _layer(length, "both")


def _layer(length: int, eigenvalues: str) -> Comparison:
    ours = make("deltanet", width=48, num_heads=3, value_expansion=0.5, eigenvalues=eigenvalues)
    run = naive("fla/ops/delta_rule/naive.py").delta_rule_recurrence

    def theirs(x: Tensor) -> Tensor:
        q, k, v = (convolved(ours, name, x).unflatten(-1, (3, -1)).transpose(1, 2) for name in "qkv")
        beta = torch.sigmoid(ours.beta(x)).mT * (2 if eigenvalues == "both" else 1)
        o, _ = run(unit(q), unit(k), v, beta)
        o = F.rms_norm(o.transpose(1, 2), (8,), ours.norm.weight[0], ours.norm.eps)
        y: Tensor = ours.o(o.flatten(-2))
        return y

    return Comparison(f"{eigenvalues}, T={length}", lambda x: ours(x)[0], theirs, torch.randn(2, length, 48))

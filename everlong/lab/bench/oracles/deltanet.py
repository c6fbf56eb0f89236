"""DeltaNet against flash-linear-attention's loop, through the layer's projections and torch's own convolution."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from everlong.lab.bench.comparison import Comparison, make
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

    def heads(x: Tensor, name: str) -> Tensor:
        filters = getattr(ours, f"{name}_conv").weight[:, None]
        rows = F.pad(getattr(ours, name)(x).mT, (filters.shape[-1] - 1, 0))
        y: Tensor = F.silu(F.conv1d(rows, filters, groups=len(filters))).mT.unflatten(-1, (3, -1)).transpose(1, 2)
        return y

    def theirs(x: Tensor) -> Tensor:
        q, k, v = (heads(x, name) for name in "qkv")
        beta = torch.sigmoid(ours.beta(x)).mT * (2 if eigenvalues == "both" else 1)
        o, _ = run(F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, beta)
        o = F.rms_norm(o.transpose(1, 2), (8,), ours.norm.weight[0], ours.norm.eps)
        y: Tensor = ours.o(o.flatten(-2))
        return y

    x = 3 * torch.randn(2, length, 48)  # short vectors differ by the small number under our root
    return Comparison(f"{eigenvalues}, T={length}", lambda x: ours(x)[0], theirs, x)

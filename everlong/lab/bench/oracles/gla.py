"""Gated linear attention against flash-linear-attention's loop, through the layer's projections."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from everlong.lab.bench.comparison import Comparison, make
from everlong.lab.bench.errors import naive

ORACLE = "fla-core, gla/naive.py"


def comparisons() -> Iterator[Comparison]:
    """Three lengths; wide keys and a short memory."""
    for length in (1, 7, 130):
        yield _layer(length, key_expansion=0.5, gate_temperature=16.0)
    yield _layer(65, key_expansion=1.5, gate_temperature=1.0)


def _layer(length: int, *, key_expansion: float, gate_temperature: float) -> Comparison:
    options: dict[str, Any] = {"key_expansion": key_expansion, "gate_temperature": gate_temperature}
    ours = make("gla", width=48, num_heads=3, **options)
    run = naive("fla/ops/gla/naive.py").naive_recurrent_gla

    def theirs(x: Tensor) -> Tensor:
        q, k, v, g = (getattr(ours, name)(x).unflatten(-1, (3, -1)) for name in ("q", "k", "v", "decay"))
        o, _ = run(q, k, v, F.logsigmoid(g) / gate_temperature)
        o = F.rms_norm(o, (16,), ours.norm.weight[0], ours.norm.eps)
        y: Tensor = ours.o(o.flatten(-2) * F.silu(ours.gate(x)))
        return y

    return Comparison(f"{options}, T={length}", lambda x: ours(x)[0], theirs, torch.randn(2, length, 48))

"""Gated linear attention against flash-linear-attention's loop, through the layer's projections.

Where there are convolutions they are torch's own.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from everlong.lab.bench.comparison import Comparison, convolved, make
from everlong.lab.bench.errors import naive

ORACLE = "fla-core, gla/naive.py"


def comparisons() -> Iterator[Comparison]:
    """Each at three lengths: as in the paper; wide keys and a short memory; convolutions."""
    for length in (1, 7, 130):
        yield _layer(length)
        yield _layer(length, key_expansion=1.5, gate_temperature=1.0)
        yield _layer(length, kernel=4)


def _layer(length: int, **options: Any) -> Comparison:
    ours = make("gla", width=48, num_heads=3, **options)
    run = naive("fla/ops/gla/naive.py").naive_recurrent_gla

    def projected(x: Tensor, name: str) -> Tensor:
        y: Tensor = getattr(ours, name)(x) if ours.config.kernel is None else convolved(ours, name, x)
        return y

    def theirs(x: Tensor) -> Tensor:
        q, k, v, g = (y.unflatten(-1, (3, -1)) for y in (*(projected(x, name) for name in "qkv"), ours.decay(x)))
        o, _ = run(q, k, v, F.logsigmoid(g) / ours.config.gate_temperature)
        o = F.rms_norm(o, (16,), ours.norm.weight[0], ours.norm.eps)
        y: Tensor = ours.o(o.flatten(-2) * F.silu(ours.gate(x)))
        return y

    return Comparison(f"{options or 'defaults'}, T={length}", lambda x: ours(x)[0], theirs, torch.randn(2, length, 48))

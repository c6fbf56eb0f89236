"""HGRN2 against flash-linear-attention's loop of gated linear attention, of which it is the case k = 1 - f."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from everlong.lab.bench.comparison import Comparison, make
from everlong.lab.bench.errors import naive

ORACLE = "fla-core, gla/naive.py"


def comparisons() -> Iterator[Comparison]:
    """At three lengths."""
    for length in (1, 7, 130):
        yield _layer(length)


def _layer(length: int) -> Comparison:
    ours = make("minimal", width=48, num_heads=3)
    run = naive("fla/ops/gla/naive.py").naive_recurrent_gla

    def theirs(x: Tensor) -> Tensor:
        q, f, v = (getattr(ours, name)(x).unflatten(-1, (3, -1)) for name in ("q", "f", "v"))
        f = torch.sigmoid(f)
        o, _ = run(16**0.5 * F.silu(q), 1 - f, v, f.log())  # theirs divides queries by the root of K
        y: Tensor = ours.o(F.rms_norm(o, (16,), ours.norm.weight[0], ours.norm.eps).flatten(-2))
        return y

    return Comparison(f"T={length}", lambda x: ours(x)[0], theirs, torch.randn(2, length, 48))

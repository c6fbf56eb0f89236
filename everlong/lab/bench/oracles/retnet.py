"""Retention against torchscale's layer, and without rotation against flash-linear-attention's."""

from collections.abc import Iterator
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn import functional as F

from everlong.lab.bench.comparison import Comparison, make
from everlong.lab.bench.errors import naive

ORACLE = "torchscale, MultiScaleRetention; fla-core, retention/naive.py"


def comparisons() -> Iterator[Comparison]:
    """The layer at three lengths, whose normalisation of rows its norm takes back; the memory alone."""
    for length in (1, 7, 130):
        yield _torchscale(length)
    yield _fla(130)


def _torchscale(length: int) -> Comparison:
    from torchscale.component.multiscale_retention import MultiScaleRetention

    arguments = SimpleNamespace(multiway=False, layernorm_eps=1e-12)
    theirs = MultiScaleRetention(arguments, 24, 48, 3).double()
    ours = make("retnet", width=24, num_heads=3).double()
    ours.norm.eps = 1e-12  # below which rows that they divide by a sum differ from ours
    with torch.no_grad():
        for name, label in (("q", "q"), ("k", "k"), ("v", "v"), ("gate", "g")):
            getattr(theirs, f"{label}_proj").weight.copy_(getattr(ours, name).weight)
        theirs.out_proj.weight.copy_(ours.o.weight)
    theta = (1.0 / 10_000 ** torch.linspace(0, 1, 4, dtype=torch.float64)).repeat_interleave(2)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * theta
    gamma = torch.log(1 - 2.0 ** (-5 - torch.arange(3, dtype=torch.float64)))
    apart = torch.arange(length)[:, None] - torch.arange(length)
    mask = torch.where(apart >= 0, torch.exp(gamma[:, None, None] * apart), 0.0)

    def run(x: Tensor) -> Tensor:
        y: Tensor = theirs(x, ((angles.sin(), angles.cos()), mask / mask.sum(-1, keepdim=True).sqrt()))
        return y

    x = torch.randn(2, length, 24, dtype=torch.float64)
    # Their norm computes in float32.
    return Comparison(f"torchscale's layer, T={length}", lambda x: ours(x)[0], run, x)


def _fla(length: int) -> Comparison:
    """Rotated as ours is, then read by their formula."""
    ours = make("retnet", width=24, num_heads=3)
    run = naive("fla/ops/retention/naive.py").naive_retention
    angles = torch.arange(length)[:, None, None] * 1e4 ** -torch.linspace(0, 1, 4)

    def turned(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.polar(torch.ones_like(angles), angles)
        return torch.view_as_real(pairs).flatten(-2).transpose(1, 2)

    def theirs(x: Tensor) -> Tensor:
        q, k, v = (getattr(ours, name)(x).unflatten(-1, (3, -1)) for name in "qkv")
        o = run(turned(q), turned(k), v.transpose(1, 2)).transpose(1, 2)
        y: Tensor = ours.o(F.rms_norm(o, (16,), eps=ours.norm.eps).flatten(-2) * F.silu(ours.gate(x)))
        return y

    return Comparison(f"the memory, T={length}", lambda x: ours(x)[0], theirs, torch.randn(2, length, 24))

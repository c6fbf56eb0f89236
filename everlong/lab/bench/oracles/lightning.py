"""Lightning attention against transformers' MiniMax; the paper's decay; its positions against a dense matrix."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from everlong.lab.bench.comparison import Comparison, make
from everlong.lab.bench.errors import naive

ORACLE = "transformers, MiniMaxLightningAttention; fla-core, simple_gla/naive.py; LRPE-d: eq. 4 as a dense matrix"


def comparisons() -> Iterator[Comparison]:
    """The released flavour in three layers of a model; the paper's decay; LRPE-d."""
    for layer in (0, 1, 3):
        for length in (1, 7, 130):
            yield _minimax(layer, length)
    for length in (1, 7, 130):
        yield _fla(length)
        yield _dense(length)


def _minimax(layer: int, length: int) -> Comparison:
    from transformers import MiniMaxConfig
    from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

    config = MiniMaxConfig(
        hidden_size=24,
        num_attention_heads=3,
        head_dim=8,
        num_hidden_layers=4,
        block_size=32,
        layer_types=["linear_attention"] * 4,
    )
    theirs = MiniMaxLightningAttention(config, layer)
    flavour: dict[str, Any] = {"decay": "alibi", "rotation": "none", "values": "silu", "gate": "sigmoid", "gain": True}
    ours = make("lightning", layer=layer, depth=4, width=24, num_heads=3, **flavour)
    with torch.no_grad():
        heads = [getattr(ours, name).weight.view(3, 8, 24) for name in "qkv"]
        theirs.qkv_proj.weight.copy_(torch.cat(heads, 1).flatten(0, 1))
        theirs.output_gate.weight.copy_(ours.gate.weight)
        theirs.out_proj.weight.copy_(ours.o.weight)
        theirs.norm.weight.copy_(ours.gain)
        theirs.norm.variance_epsilon = 1e-6

    def run(x: Tensor) -> Tensor:
        nowhere = (torch.empty(0), torch.empty(0))
        y: Tensor = theirs(x, nowhere, torch.ones(x.shape[:2], dtype=torch.bool))[0]
        return y

    return Comparison(f"MiniMax, layer {layer}, T={length}", lambda x: ours(x)[0], run, torch.randn(2, length, 24))


def _fla(length: int) -> Comparison:
    ours = make("lightning", layer=1, depth=4, width=24, num_heads=3, rotation="none")
    run = naive("fla/ops/simple_gla/naive.py").naive_recurrent_simple_gla
    slopes = torch.tensor([8 * head / 3 * (1 - 1 / 4) for head in range(3)])

    def theirs(x: Tensor) -> Tensor:
        q, k, v = (getattr(ours, name)(x).unflatten(-1, (3, 8)) for name in "qkv")
        o, _ = run(F.silu(q), F.silu(k), v, -slopes.expand(*x.shape[:2], 3), scale=1.0)
        y: Tensor = ours.o(F.rms_norm(o.flatten(-2), (24,), eps=1e-6) * ours.gate(x))
        return y

    return Comparison(f"the paper's decay, T={length}", lambda x: ours(x)[0], theirs, torch.randn(2, length, 24))


def _dense(length: int) -> Comparison:
    """Each weight lambda^(t - s) sum_i q_i k_i cos(theta_i (t - s)) as one number of a T x T matrix."""
    ours = make("lightning", depth=4, width=24, num_heads=3).double()
    slopes = torch.tensor([8 * head / 3 for head in range(3)], dtype=torch.float64)

    def theirs(x: Tensor) -> Tensor:
        q, k, v = (getattr(ours, name)(x).unflatten(-1, (3, 8)) for name in "qkv")
        apart = torch.arange(length)[:, None] - torch.arange(length)
        waves = torch.cos(apart[..., None, None] * ours.theta)
        weights = torch.einsum("bthi,bshi,tshi->bhts", F.silu(q), F.silu(k), waves)
        weights = weights * torch.exp(-slopes[:, None, None] * apart.clamp_min(0)) * (apart >= 0)
        o = torch.einsum("bhts,bshv->bthv", weights, v)
        y: Tensor = ours.o(F.rms_norm(o.flatten(-2), (24,), eps=1e-6) * ours.gate(x))
        return y

    x = torch.randn(2, length, 24, dtype=torch.float64)
    return Comparison(f"LRPE-d, T={length}", lambda x: ours(x)[0], theirs, x, 1e-9)

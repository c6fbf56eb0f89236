"""Gated DeltaNet against transformers' Qwen3-Next, and Kimi Delta Attention against its Kimi Linear: whole layers.

Options that neither has, against flash-linear-attention's loops through the layer's projections.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from everlong.lab.bench.comparison import Comparison, convolved, make, unit
from everlong.lab.bench.errors import naive

ORACLE = "transformers, Qwen3NextGatedDeltaNet and KimiLinearDeltaAttention; fla-core, gated_delta_rule, kda/naive.py"


def comparisons() -> Iterator[Comparison]:
    """Both kinds of decay at three lengths, alone and with eigenvalues of both signs and shared keys."""
    for length in (1, 7, 130):
        yield _qwen(length)
        yield _kimi(length)
        yield _fla(length, "head")
        yield _fla(length, "channel")


def _qwen(length: int) -> Comparison:
    from transformers import Qwen3NextConfig
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

    config = Qwen3NextConfig(
        hidden_size=32,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=12,
        linear_conv_kernel_dim=4,
        rms_norm_eps=1e-5,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
    )
    theirs = Qwen3NextGatedDeltaNet(config, 0)
    ours = make("gated_deltanet", width=32, num_heads=4, num_key_heads=2, key_size=8, value_expansion=1.5)
    with torch.no_grad():  # theirs keeps what belongs to a key head together
        parts = [getattr(ours, name).weight.view(2, -1, 32) for name in ("q", "k", "v", "gate")]
        theirs.in_proj_qkvz.weight.copy_(torch.cat(parts, 1).flatten(0, 1))
        parts = [getattr(ours, name).weight.view(2, -1, 32) for name in ("beta", "step")]
        theirs.in_proj_ba.weight.copy_(torch.cat(parts, 1).flatten(0, 1))
        theirs.conv1d.weight.copy_(torch.cat([getattr(ours, f"{label}_conv").weight for label in "qkv"])[:, None])
        theirs.norm.weight.copy_(ours.norm.weight[0])
        theirs.out_proj.weight.copy_(ours.o.weight)
        theirs.A_log.copy_(ours.log_rate)
        theirs.dt_bias.copy_(ours.step_bias)
    return Comparison(f"a head's decay, T={length}", lambda x: ours(x)[0], theirs, torch.randn(2, length, 32))


def _kimi(length: int) -> Comparison:
    from transformers import KimiLinearConfig
    from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearDeltaAttention

    config = KimiLinearConfig(
        hidden_size=24,
        linear_num_heads=3,
        linear_head_dim=8,
        linear_conv_kernel_dim=4,
        rms_norm_eps=1e-5,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
        mlp_layer_types=["dense"],
    )
    theirs = KimiLinearDeltaAttention(config, 0)
    ours = make("gated_deltanet", width=24, num_heads=3, decay="channel")
    with torch.no_grad():
        for name in "qkv":
            getattr(theirs, f"{name}_proj").weight.copy_(getattr(ours, name).weight)
        theirs.conv1d.weight.copy_(torch.cat([getattr(ours, f"{label}_conv").weight for label in "qkv"])[:, None])
        theirs.forget_gate.f_a_proj.weight.copy_(ours.step[0].weight)
        theirs.forget_gate.f_b_proj.weight.copy_(ours.step[1].weight)
        theirs.forget_gate.dt_bias.copy_(ours.step_bias)
        theirs.forget_gate.A_log.copy_(ours.log_rate.view(1, 1, -1, 1))
        theirs.b_proj.weight.copy_(ours.beta.weight)
        theirs.g_a_proj.weight.copy_(ours.gate[0].weight)
        theirs.g_b_proj.weight.copy_(ours.gate[1].weight)
        theirs.o_norm.weight.copy_(ours.norm.weight[0])
        theirs.o_proj.weight.copy_(ours.o.weight)

    def run(x: Tensor) -> Tensor:
        y: Tensor = theirs(x)
        return y

    return Comparison(f"a channel's decay, T={length}", lambda x: ours(x)[0], run, torch.randn(2, length, 24))


def _fla(length: int, decay: str) -> Comparison:
    ours = make("gated_deltanet", width=24, num_heads=4, num_key_heads=2, key_size=5, decay=decay, eigenvalues="both")
    head = naive("fla/ops/gated_delta_rule/naive.py").naive_recurrent_gated_delta_rule
    channel = naive("fla/ops/kda/naive.py").naive_recurrent_kda

    def theirs(x: Tensor) -> Tensor:
        q, k, v = (
            convolved(ours, name, x).unflatten(-1, (heads, -1)) for name, heads in zip("qkv", (2, 2, 4), strict=True)
        )
        q, k = (unit(y).repeat_interleave(2, dim=2) for y in (q, k))
        step = F.softplus(ours.step(x) + ours.step_bias).unflatten(-1, (4, -1))
        g, beta = -ours.log_rate.exp()[:, None] * step, 2 * torch.sigmoid(ours.beta(x))
        if decay == "head":
            o, _ = head(q=q, k=k, v=v, g=g[..., 0], beta=beta)
        else:
            o, _ = channel(q=q, k=k, v=v, g=g, beta=beta)
        o = F.rms_norm(o, (6,), ours.norm.weight[0], ours.norm.eps).flatten(-2)
        y: Tensor = ours.o(o * (F.silu(ours.gate(x)) if decay == "head" else torch.sigmoid(ours.gate(x))))
        return y

    case = f"both signs, a {decay}'s decay, T={length}"
    return Comparison(case, lambda x: ours(x)[0], theirs, torch.randn(2, length, 24))

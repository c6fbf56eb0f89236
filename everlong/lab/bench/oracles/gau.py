"""The gated attention unit against FLASH-pytorch's, and against the formulas as dense matrices where it has others."""

import importlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from everlong.lab.bench.comparison import Comparison, make

ORACLE = "FLASH-pytorch, GAU; the formulas as dense matrices"

WIDTH, SIZE = 24, 10


def comparisons() -> Iterator[Comparison]:
    """Both norms and ways of FLASH-pytorch's unit; then each other kind of weights, causal and not."""
    for length in (1, 7, 130):
        yield _lucidrains(length, causal=True)
    yield _lucidrains(37, causal=False)
    yield _lucidrains(37, causal=True, norm="scale", laplace=True)
    for weights in ("relu2_n2", "relu2_ns", "softmax", "softmax_plus"):
        for causal in (True, False):
            yield _dense(weights, 37, causal)
        yield _dense(weights, 600, True)


def _lucidrains(length: int, *, causal: bool, norm: str = "layer", laplace: bool = False) -> Comparison:
    package = importlib.import_module("flash_pytorch.flash_pytorch")
    theirs = package.GAU(
        dim=WIDTH,
        query_key_dim=SIZE,
        causal=causal,
        laplace_attn_fn=laplace,
        norm_klass=package.ScaleNorm if norm == "scale" else nn.LayerNorm,
    ).double()
    weights = "laplace" if laplace else "relu2_n2_bias"
    options: dict[str, Any] = {"weights": weights, "position": "t5", "norm": norm, "divisor": length}
    ours = make("gau", width=WIDTH, key_size=SIZE, causal=causal, bias=True, **options).double()
    copy_weights(ours, theirs)
    theirs.offsetscale.load_state_dict({"gamma": ours.heads.gamma, "beta": ours.heads.beta})
    # Theirs scales the table, and in laplace divides it by the length.
    scale = WIDTH**0.5 / (length if laplace else 1)
    ours.position.parts[0].weight.data = theirs.rel_pos_bias.relative_attention_bias.weight.data * scale
    label = f"FLASH-pytorch, {weights}, {norm} norm, {'causal' if causal else 'bidirectional'}, T={length}"
    x = torch.randn(2, length, WIDTH, dtype=torch.float64)
    return Comparison(label, lambda x: x + ours(x)[0], theirs, x, bound=1e-9)


def copy_weights(ours: Any, theirs: Any) -> None:
    """The weights around the attention, from theirs; those of the norm from ours."""
    hidden, shared = theirs.to_hidden[0], theirs.to_qk[0]
    out = theirs.to_out[0] if isinstance(theirs.to_out, nn.Sequential) else theirs.to_out
    for own, weight, bias in (
        (ours.v, hidden.weight.chunk(2)[0], hidden.bias.chunk(2)[0]),
        (ours.gate, hidden.weight.chunk(2)[1], hidden.bias.chunk(2)[1]),
        (ours.z, shared.weight, shared.bias),
        (ours.o, out.weight, out.bias),
    ):
        own.weight.data, own.bias.data = weight.data, bias.data
    for name, parameter in theirs.norm.named_parameters():
        parameter.data = getattr(ours.norm, "weight" if name == "g" else name).data.view_as(parameter)


def _dense(weights: str, length: int, causal: bool) -> Comparison:
    ours = make("gau", width=WIDTH, key_size=SIZE, weights=weights, relative_bias="rotary_bias", causal=causal).double()
    seen = torch.ones(length, length, dtype=torch.float64)
    seen = seen.tril() if causal else seen
    count, place = seen.sum(1, keepdim=True), torch.arange(length, dtype=torch.float64)
    bias = ours.position.parts[1]

    def turned(y: Tensor) -> Tensor:
        """Pairs of channels as complex numbers."""
        half = torch.complex(*y.chunk(2, -1))
        angles = place[:, None] * 10_000 ** (-torch.arange(0, SIZE, 2, dtype=torch.float64) / SIZE)
        half = half * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([half.real, half.imag], -1)

    def theirs(x: Tensor) -> Tensor:
        normed = x / x.square().mean(-1, keepdim=True).sqrt() * ours.norm.weight
        u, v, z = (F.silu(F.linear(normed, project.weight)) for project in (ours.gate, ours.v, ours.z))
        q, k = (turned(z * ours.heads.gamma[i] + ours.heads.beta[i]) for i in range(2))
        scores = q @ k.mT
        added = turned(bias.a.expand(length, -1)) @ turned(bias.b.expand(length, -1)).mT
        if weights == "relu2_n2":
            matrix = (scores / count + added).relu().square() * seen
        elif weights == "relu2_ns":
            matrix = (scores + added).relu().square() / (count * SIZE) * seen
        else:
            scale = count.clamp_min(16).log() / math.log(512) if weights == "softmax_plus" else torch.ones_like(count)
            matrix = (scores * scale / SIZE**0.5 + added).masked_fill(seen == 0, -torch.inf).softmax(-1)
        return F.linear(u * (matrix @ v), ours.o.weight)

    x = torch.randn(2, length, WIDTH, dtype=torch.float64)
    label = f"dense, {weights}, {'causal' if causal else 'bidirectional'}, T={length}"
    return Comparison(label, lambda x: ours(x)[0], theirs, x, bound=1e-9)

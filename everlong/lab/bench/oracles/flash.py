"""FLASH against FLASH-pytorch's layer, and with the divisor of earlier chunks that is its own as a dense matrix."""

import importlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from everlong.lab.bench.comparison import Comparison, make
from everlong.lab.bench.oracles.gau import SIZE, WIDTH, copy_weights

ORACLE = "FLASH-pytorch, FLASH; the sum over earlier chunks by the number of tokens as a dense matrix"


def comparisons() -> Iterator[Comparison]:
    """FLASH-pytorch's layer within one chunk and beyond; then the default divisor."""
    for length in (1, 7, 16, 130):
        yield _lucidrains(length, causal=True)
    for length in (7, 37):
        yield _lucidrains(length, causal=False)
    # Up to the second chunk there is no difference between the divisors.
    yield _lucidrains(32, causal=True, divisor="visible")
    yield _lucidrains(37, causal=True, norm="scale", laplace=True)
    for length in (7, 37, 130):
        yield _dense(length)


def _lucidrains(
    length: int, *, causal: bool, norm: str = "layer", laplace: bool = False, divisor: str = "chunk"
) -> Comparison:
    package, turning = importlib.import_module("flash_pytorch.flash_pytorch"), 6
    rotation = importlib.import_module("rotary_embedding_torch").RotaryEmbedding(dim=turning)
    theirs = package.FLASH(
        dim=WIDTH,
        group_size=16,
        query_key_dim=SIZE,
        causal=causal,
        rotary_pos_emb=rotation,
        laplace_attn_fn=laplace,
        norm_klass=package.ScaleNorm if norm == "scale" else torch.nn.LayerNorm,
    ).double()
    # Theirs has its frequencies in float32.
    rotation.freqs.data = 10_000 ** (-torch.arange(0, turning, 2, dtype=torch.float64) / turning)
    ours = make(
        "flash",
        width=WIDTH,
        key_size=SIZE,
        chunk=16,
        weights="laplace" if laplace else "relu2_n2",
        position={"position": "rope", "layout": "interleaved", "fraction": turning / SIZE},
        relative_bias="t5",
        norm=norm,
        causal=causal,
        bias=True,
        linear_divisor=divisor,
    ).double()
    copy_weights(ours, theirs)
    order = [0, 2, 1, 3]  # theirs: both queries, then both keys
    theirs.qk_offset_scale.load_state_dict({"gamma": ours.heads.gamma[order], "beta": ours.heads.beta[order]})
    table = theirs.rel_pos_bias.relative_attention_bias.weight.data
    ours.position.parts[1].weight.data = table * SIZE**0.5
    way = f"{'causal' if causal else 'bidirectional'}, divisor {divisor}"
    label = f"FLASH-pytorch, {ours.config.weights}, {norm} norm, {way}, T={length}"
    x = torch.randn(2, length, WIDTH, dtype=torch.float64)
    return Comparison(label, lambda x: x + ours(x)[0], theirs, x, bound=1e-9)


def _dense(length: int) -> Comparison:
    size = 8
    ours = make("flash", width=WIDTH, key_size=SIZE, chunk=size, weights="relu2_ns", position="none").double()
    chunk = torch.arange(length) // size
    same = (chunk[:, None] == chunk).tril()
    before = (chunk[:, None] > chunk).double()
    mean = before / before.sum(1, keepdim=True).clamp_min(1)

    def theirs(x: Tensor) -> Tensor:
        normed = x / x.square().mean(-1, keepdim=True).sqrt() * ours.norm.weight
        u, v, z = (F.silu(F.linear(normed, project.weight)) for project in (ours.gate, ours.v, ours.z))
        q, k, linear_q, linear_k = (z * ours.heads.gamma[i] + ours.heads.beta[i] for i in range(4))
        near = (q @ k.mT).relu().square() / (size * SIZE) * same
        return F.linear(u * ((near + linear_q @ linear_k.mT * mean) @ v), ours.o.weight)

    x = torch.randn(2, length, WIDTH, dtype=torch.float64)
    return Comparison(f"dense, relu2_ns, T={length}", lambda x: ours(x)[0], theirs, x, bound=1e-9)

"""Softmax attention against transformers' Llama, and without rotation against torch's own."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from everlong.lab.bench.comparison import Comparison, make

ORACLE = "transformers, LlamaAttention; torch, scaled_dot_product_attention"


def comparisons() -> Iterator[Comparison]:
    """Grouped heads with rotation at three lengths; both directions without."""
    for length in (1, 7, 130):
        yield _llama(length)
    for causal in (True, False):
        yield _sdpa(causal)


def _llama(length: int) -> Comparison:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=48, num_attention_heads=6, num_key_value_heads=2, head_dim=8, attn_implementation="eager"
    )
    theirs = LlamaAttention(config, 0)
    ours = make("attention", width=48, num_heads=6, num_kv_heads=2)
    for name in "qkvo":
        getattr(theirs, f"{name}_proj").weight = getattr(ours, name).weight
    mask = torch.full((length, length), float("-inf")).triu(1)[None, None]

    def run(x: Tensor) -> Tensor:
        place = LlamaRotaryEmbedding(config)(x, torch.arange(length)[None])
        y: Tensor = theirs(x, position_embeddings=place, attention_mask=mask)[0]
        return y

    return Comparison(f"Llama's, T={length}", lambda x: ours(x)[0], run, torch.randn(2, length, 48))


def _sdpa(causal: bool) -> Comparison:
    ours = make("attention", width=24, num_heads=2, position="none", causal=causal).double()

    def run(x: Tensor) -> Tensor:
        q, k, v = (getattr(ours, label)(x).unflatten(-1, (2, -1)).transpose(1, 2) for label in "qkv")
        y: Tensor = ours.o(F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(-2))
        return y

    x = torch.randn(2, 65, 24, dtype=torch.float64)
    return Comparison("causal" if causal else "bidirectional", lambda x: ours(x)[0], run, x, bound=1e-9)

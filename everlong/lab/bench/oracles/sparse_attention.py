"""Sparse attention against transformers' Longformer and Mistral, and every pattern against torch's own under a mask."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from everlong.lab.bench.comparison import Comparison, make

ORACLE = "transformers: Longformer, Mistral; torch, scaled_dot_product_attention under masks made by loops"

PATTERNS: list[dict[str, Any]] = [
    {"pattern": "window", "window": 20},
    {"pattern": "strided", "stride": 12},
    {"pattern": "strided", "stride": 9, "compose": "heads"},
    {"pattern": "fixed", "stride": 12, "summary": 3},
    {"pattern": "fixed", "stride": 9, "summary": 2, "compose": "heads"},
    {"pattern": "atrous", "stride": 7},
    {"pattern": "sparse", "stride": 7},
]


def comparisons() -> Iterator[Comparison]:
    """A window at three lengths; Longformer's layer with and without global tokens; all patterns in both directions."""
    for length in (1, 7, 130):
        yield _mistral(length)
    for global_tokens in (0, 3):
        yield _longformer(global_tokens)
    for options in PATTERNS:
        for causal in (True, False):
            for global_tokens in (0, 3):
                yield _masked({**options, "causal": causal, "global_tokens": global_tokens})


def _mistral(length: int) -> Comparison:
    from transformers import MistralConfig
    from transformers.masking_utils import create_sliding_window_causal_mask
    from transformers.models.mistral.modeling_mistral import MistralAttention, MistralRotaryEmbedding

    config = MistralConfig(
        hidden_size=48,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=11,
        attn_implementation="eager",
    )
    theirs = MistralAttention(config, 0)
    ours = make("sparse_attention", width=48, num_heads=6, num_kv_heads=2, pattern="window", window=11)
    for name in "qkvo":
        getattr(theirs, f"{name}_proj").weight = getattr(ours, name).weight

    def run(x: Tensor) -> Tensor:
        where = torch.arange(length)[None]
        place = MistralRotaryEmbedding(config)(x, where)
        mask = create_sliding_window_causal_mask(config, x, None, None, where)
        y: Tensor = theirs(x, position_embeddings=place, attention_mask=mask)[0]
        return y

    return Comparison(f"Mistral's, T={length}", lambda x: ours(x)[0], run, torch.randn(2, length, 48))


def _longformer(global_tokens: int) -> Comparison:
    from transformers.models.longformer.modeling_longformer import LongformerConfig, LongformerSelfAttention

    config = LongformerConfig(
        hidden_size=24, num_attention_heads=3, attention_window=[10], attention_probs_dropout_prob=0.0
    )
    theirs = LongformerSelfAttention(config, 0)
    projections = "own" if global_tokens else "shared"
    ours = make(
        "sparse_attention",
        width=24,
        num_heads=3,
        pattern="window",
        window=6,  # theirs has as many on either side as half of the window, and the token itself
        global_tokens=global_tokens,
        global_projections=projections,
        causal=False,
        bias=True,
        position="none",
    )
    pairs = [("query", "q"), ("key", "k"), ("value", "v")]
    if global_tokens:
        pairs += [(f"{name}_global", f"global_{letter}") for name, letter in pairs]
    for name, letter in pairs:
        setattr(theirs, name, getattr(ours, letter))

    def run(x: Tensor) -> Tensor:
        own = torch.zeros(x.shape[:2])
        own[:, :global_tokens] = 10_000.0  # that is how theirs is told
        y = theirs(
            x,
            attention_mask=own,
            is_index_masked=own < 0,
            is_index_global_attn=own > 0,
            is_global_attn=global_tokens > 0,
        )[0]
        out: Tensor = ours.o(y)
        return out

    return Comparison(
        f"Longformer's, {global_tokens} global tokens, T=130", lambda x: ours(x)[0], run, torch.randn(2, 130, 24)
    )


def _masked(options: dict[str, Any]) -> Comparison:
    length, heads = 137, 2
    ours = make("sparse_attention", width=16, num_heads=heads, position="none", **options).double()
    parts = ["near", "far"] if options.get("compose") == "heads" else ["union"] * heads
    mask = torch.zeros(heads, length, length, dtype=torch.bool)
    for head, part in enumerate(parts):
        for i in range(length):
            for j in _index_set(i, length, part, **options):
                mask[head, i, j] = True

    def run(x: Tensor) -> Tensor:
        q, k, v = (getattr(ours, name)(x).unflatten(-1, (heads, -1)).transpose(1, 2) for name in "qkv")
        with sdpa_kernel(SDPBackend.MATH):
            o = scaled_dot_product_attention(q, k, v, attn_mask=mask)
        y: Tensor = ours.o(o.transpose(1, 2).flatten(-2))
        return y

    label = ", ".join(f"{name} {value}" for name, value in options.items())
    x = torch.randn(2, length, 16, dtype=torch.float64)
    return Comparison(label, lambda x: ours(x)[0], run, x, bound=1e-9)


def _index_set(
    i: int,
    length: int,
    part: str,
    *,
    pattern: str,
    causal: bool,
    global_tokens: int,
    window: int = 0,
    stride: int = 0,
    summary: int = 0,
    compose: str = "",
) -> set[int]:
    """The keys of query i as the papers list them."""
    near: set[int] = set()
    far: set[int] = set()
    reach = {"window": window, "strided": stride, "sparse": stride + 1}.get(pattern, 0)
    near |= set(range(i - reach + 1, i + reach))
    if pattern in {"strided", "atrous", "sparse"}:
        far |= set(range(i, -1, -stride)) | set(range(i, length, stride))
    if pattern == "fixed":
        block = i // stride
        near |= set(range(block * stride, (block + 1) * stride))
        for end in range(stride, length + stride, stride):
            far |= set(range(end - summary, end))
    seen = {"near": near, "far": far}.get(part, near | far) | set(range(global_tokens))
    if i < global_tokens:
        seen = set(range(length))
    return {j for j in seen if 0 <= j < length and (j <= i or not causal)}

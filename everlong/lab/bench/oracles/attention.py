"""Softmax attention against transformers' layers, one for each encoding of positions, and against torch's own."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from everlong.lab.bench.comparison import Comparison, make

ORACLE = "transformers: Llama, T5, Wav2Vec2-BERT, XLNet, DeBERTa 1 and 2; torch, scaled_dot_product_attention"


def comparisons() -> Iterator[Comparison]:
    """Grouped heads with rotation at three lengths; the other encodings; both directions without."""
    for length in (1, 7, 130):
        yield _llama(length, "default")
    for kind in ("linear", "yarn", "llama3"):
        yield _llama(130, kind)
    yield _dynamic()
    for causal in (True, False):
        yield _t5(causal)
        yield _sdpa(causal)
    yield _shaw()
    yield _xlnet(causal=False)
    yield _xlnet(causal=True)
    yield _deberta()
    for shared in (True, False):
        yield _deberta2(shared)


def _llama_config(kind: str) -> Any:
    from transformers import LlamaConfig

    scaling = {"rope_type": kind, "rope_theta": 10_000.0}
    if kind != "default":
        scaling |= {"factor": 4.0}
    if kind in {"yarn", "llama3"}:
        scaling |= {"original_max_position_embeddings": 32}
    if kind == "llama3":
        scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return LlamaConfig(
        hidden_size=48,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        attn_implementation="eager",
        max_position_embeddings=128 if kind in {"yarn", "llama3"} else 32,
        rope_parameters=scaling,
    )


def _llama_pair(kind: str) -> tuple[Any, Callable[[Tensor], Tensor]]:
    """Our layer, and theirs with its weights."""
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

    config = _llama_config(kind)
    theirs = LlamaAttention(config, 0)
    options = {} if kind == "default" else {"scaling": kind, "factor": 4.0, "original_length": 32}
    ours = make("attention", width=48, num_heads=6, num_kv_heads=2, position={"position": "rope", **options})
    for name in "qkvo":
        getattr(theirs, f"{name}_proj").weight = getattr(ours, name).weight

    def run(x: Tensor) -> Tensor:
        length = x.shape[1]
        place = LlamaRotaryEmbedding(config)(x, torch.arange(length)[None])
        y: Tensor = theirs(x, position_embeddings=place, attention_mask=_future(length))[0]
        return y

    return ours, run


def _llama(length: int, kind: str) -> Comparison:
    ours, run = _llama_pair(kind)
    label = "Llama's" if kind == "default" else f"Llama's, {kind}"
    return Comparison(f"{label}, T={length}", lambda x: ours(x)[0], run, torch.randn(2, length, 48))


def _dynamic() -> Comparison:
    """Theirs turns a whole text by the frequencies of its length: the last token of each beginning is what we give."""
    ours, run = _llama_pair("dynamic")

    def theirs(x: Tensor) -> Tensor:
        return torch.cat([run(x[:, : t + 1])[:, -1:] for t in range(x.shape[1])], dim=1)

    return Comparison("Llama's, dynamic, token by token", lambda x: ours(x)[0], theirs, torch.randn(2, 45, 48))


def _t5(causal: bool) -> Comparison:
    from transformers import T5Config
    from transformers.models.t5.modeling_t5 import T5Attention

    config = T5Config(d_model=24, d_kv=8, num_heads=3, is_decoder=causal, dropout_rate=0.0, attn_implementation="eager")
    theirs = T5Attention(config, has_relative_attention_bias=True, layer_idx=0)
    ours = make("attention", width=24, num_heads=3, position="t5", causal=causal)
    for name in "qkvo":
        getattr(theirs, name).weight = getattr(ours, name).weight
    theirs.relative_attention_bias.weight = ours.position.weight

    def run(x: Tensor) -> Tensor:
        y: Tensor = theirs(x, mask=_future(x.shape[1]) if causal else None)[0]
        return y

    label = "causal" if causal else "bidirectional"
    return Comparison(f"T5's bias, {label}, T=300", lambda x: ours(x)[0], run, torch.randn(2, 300, 24))


def _shaw() -> Comparison:
    from transformers.models.wav2vec2_bert.modeling_wav2vec2_bert import Wav2Vec2BertConfig, Wav2Vec2BertSelfAttention

    config = Wav2Vec2BertConfig(
        hidden_size=24,
        num_attention_heads=3,
        position_embeddings_type="relative_key",
        left_max_position_embeddings=9,
        right_max_position_embeddings=9,
        attention_dropout=0.0,
        attn_implementation="eager",
    )
    theirs = Wav2Vec2BertSelfAttention(config)
    position = {"position": "shaw", "max_distance": 9, "values": False}
    ours = make("attention", width=24, num_heads=3, bias=True, causal=False, position=position)
    for label, name in zip(("q", "k", "v", "out"), "qkvo", strict=True):
        part, own = getattr(theirs, f"linear_{label}"), getattr(ours, name)
        part.weight, part.bias = own.weight, own.bias
    theirs.distance_embedding.weight = ours.position.keys
    return Comparison("Shaw's keys, T=65", lambda x: ours(x)[0], lambda x: theirs(x)[0], torch.randn(2, 65, 24))


def _xlnet(*, causal: bool) -> Comparison:
    from transformers import XLNetConfig, XLNetModel

    config = XLNetConfig(vocab_size=9, d_model=24, n_layer=1, n_head=3, d_inner=24, dropout=0.0)
    model = XLNetModel(config).eval()
    theirs = model.layer[0].rel_attn
    ours = make("attention", width=24, num_heads=3, position="transformer_xl", causal=causal)

    def heads(weight: Tensor) -> Tensor:
        return weight.T.reshape(24, 3, 8)

    def run(x: Tensor) -> Tensor:
        length, rows = x.shape[1], x.transpose(0, 1)
        theirs.r_w_bias, theirs.r_r_bias = ours.position.u, ours.position.v
        q, k, v = (torch.einsum("ibh,hnd->ibnd", rows, heads(getattr(ours, name).weight)) for name in "qkv")
        distances = model.relative_positional_encoding(length, length, bsz=x.shape[0])
        r = torch.einsum("ibh,hnd->ibnd", distances, heads(ours.position.r.weight))
        mask = torch.ones(length, length).triu(1)[:, :, None, None] if causal else None
        o = theirs.rel_attn_core(q, k, v, r, attn_mask=mask)
        y: Tensor = ours.o(o.flatten(-2)).transpose(0, 1)
        return y

    label = "causal" if causal else "bidirectional"
    return Comparison(f"XLNet's core, {label}, T=65", lambda x: ours(x)[0], run, torch.randn(2, 65, 24))


def _deberta() -> Comparison:
    from transformers import DebertaConfig
    from transformers.models.deberta.modeling_deberta import DisentangledSelfAttention, build_relative_position

    config = DebertaConfig(
        hidden_size=24,
        num_attention_heads=3,
        relative_attention=True,
        max_relative_positions=16,
        pos_att_type=["c2p", "p2c"],
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    theirs = DisentangledSelfAttention(config)
    position = {"position": "deberta", "max_distance": 16}
    ours = make("attention", width=24, num_heads=3, causal=False, position=position)
    stacked = torch.stack([getattr(ours, name).weight.view(3, 8, 24) for name in "qkv"], dim=1)  # by head, then q, k, v
    theirs.in_proj.weight = torch.nn.Parameter(stacked.reshape(-1, 24))
    theirs.pos_proj, theirs.pos_q_proj = ours.position.position_k, ours.position.position_q

    def run(x: Tensor) -> Tensor:
        length = x.shape[1]
        mask = torch.ones(1, 1, length, length, dtype=torch.bool)
        distance = build_relative_position(x, x)
        y: Tensor = ours.o(theirs(x, mask, relative_pos=distance, rel_embeddings=ours.position.weight)[0])
        return y

    return Comparison("DeBERTa's, T=65", lambda x: ours(x)[0], run, torch.randn(2, 65, 24))


def _deberta2(shared: bool) -> Comparison:
    from transformers import DebertaV2Config
    from transformers.models.deberta_v2.modeling_deberta_v2 import DisentangledSelfAttention

    config = DebertaV2Config(
        hidden_size=24,
        num_attention_heads=3,
        relative_attention=True,
        max_relative_positions=40,
        position_buckets=8,
        share_att_key=shared,
        pos_att_type=["c2p", "p2c"],
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    theirs = DisentangledSelfAttention(config)
    position = {"position": "deberta", "max_distance": 40, "buckets": 8, "share_projections": shared}
    ours = make("attention", width=24, num_heads=3, bias=True, causal=False, position=position)
    theirs.query_proj, theirs.key_proj, theirs.value_proj = ours.q, ours.k, ours.v
    if not shared:
        theirs.pos_query_proj, theirs.pos_key_proj.weight = ours.position.position_q, ours.position.position_k.weight

    def run(x: Tensor) -> Tensor:
        mask = torch.ones(1, 1, x.shape[1], x.shape[1], dtype=torch.bool)
        y: Tensor = ours.o(theirs(x, mask, rel_embeddings=ours.position.weight)[0])
        return y

    label = "shared projections" if shared else "projections of its own"
    return Comparison(f"DeBERTa 2's, {label}, T=65", lambda x: ours(x)[0], run, torch.randn(2, 65, 24))


def _future(length: int) -> Tensor:
    """What is added to scores so that no token sees those to come."""
    return torch.full((length, length), float("-inf")).triu(1)[None, None]


def _sdpa(causal: bool) -> Comparison:
    ours = make("attention", width=24, num_heads=2, position="none", causal=causal).double()

    def run(x: Tensor) -> Tensor:
        q, k, v = (getattr(ours, label)(x).unflatten(-1, (2, -1)).transpose(1, 2) for label in "qkv")
        y: Tensor = ours.o(F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(-2))
        return y

    x = torch.randn(2, 65, 24, dtype=torch.float64)
    return Comparison("causal" if causal else "bidirectional", lambda x: ours(x)[0], run, x, bound=1e-9)

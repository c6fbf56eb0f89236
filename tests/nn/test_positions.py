"""Position encodings: what they promise of distances, against transformers' rotary embedding, and who takes them."""

import os

import pytest
import torch

from everlong.nn import positions


def scores(encoding, q, k, shift):
    where = torch.arange(q.shape[1])[None] + shift
    q, k = encoding.rotate(q, where), encoding.rotate(k, where)
    return torch.einsum("bthk,bshk->bhts", q, k)


@pytest.mark.parametrize("name", positions.names())
@pytest.mark.parametrize("shift", [1, 1000])
def test_only_distances_matter(name, shift):
    encoding = positions.load(name)(3, 8)
    q, k = torch.randn(2, 2, 9, 3, 8, dtype=torch.float64)
    torch.testing.assert_close(scores(encoding, q, k, 0), scores(encoding, q, k, shift), atol=1e-9, rtol=1e-9)
    where = torch.arange(9)
    assert torch.equal(encoding.score_bias(where, where), encoding.score_bias(where + shift, where + shift))


def test_rope_keeps_lengths():
    x = torch.randn(2, 9, 3, 8, dtype=torch.float64)
    y = positions.Rope(3, 8).rotate(x, torch.arange(9)[None])
    torch.testing.assert_close(x.norm(dim=-1), y.norm(dim=-1))


def test_rope_is_llamas():
    os.environ["HF_HUB_OFFLINE"] = "1"
    pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaConfig, LlamaRotaryEmbedding, apply_rotary_pos_emb

    config = LlamaConfig(hidden_size=32, num_attention_heads=2, head_dim=16)
    x = torch.randn(2, 2, 700, 16)
    where = torch.randint(0, 5000, (2, 700))
    cos, sin = LlamaRotaryEmbedding(config)(x, where)
    theirs, _ = apply_rotary_pos_emb(x, x, cos, sin)
    ours = positions.Rope(2, 16).rotate(x.transpose(1, 2), where).transpose(1, 2)
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=2e-4)


def test_rope_counts_beyond_256_in_bfloat16():
    x = torch.ones(1, 2, 1, 8, dtype=torch.bfloat16)
    y = positions.Rope(1, 8).rotate(x, torch.tensor([[1000, 1001]]))
    assert not torch.equal(y[:, 0], y[:, 1])


def test_the_methods_that_an_encoding_lacks_do_nothing():
    nothing = positions.NoPosition(2, 4)
    x = torch.randn(1, 3, 2, 4)
    assert torch.equal(nothing.rotate(x, torch.arange(3)[None]), x)
    assert not nothing.score_bias(torch.arange(3), torch.arange(5)).any()


def test_an_encoding_that_cannot_act_is_refused_with_those_that_can():
    with pytest.raises(ValueError, match="has no score bias .* It takes: none, rope"):
        positions.attach("alibi", num_heads=2, size=8, offered=frozenset({"rotation"}), mixer="linear_attention")
    with pytest.raises(ValueError, match="Nearest: `rope`"):
        positions.load("rop")
    with pytest.raises(ValueError, match="must be even, got 7"):
        positions.load("rope")(2, 7)

"""The language model: equal to a Llama with the same weights, in one pass and step by step, packed and padded."""

import os

import pytest
import torch

from everlong import LanguageModel, ModelConfig, generate
from everlong.config import from_dict, to_dict
from everlong.mixers.base import Context
from everlong.nn.layers import linear_cross_entropy

HYBRID = ("gated_deltanet", "mamba2", {"mixer": "attention", "window": 8}, "linear_attention")


def build(layers=HYBRID, **options):
    torch.manual_seed(0)
    return LanguageModel(ModelConfig(vocab_size=61, width=32, num_layers=4, layers=layers, **options)).double()


def test_it_is_a_llama():
    os.environ["HF_HUB_OFFLINE"] = "1"
    transformers = pytest.importorskip("transformers")
    shape = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    )
    theirs = transformers.LlamaForCausalLM(shape).double().eval()
    layer = {"mixer": "attention", "num_heads": 6, "num_kv_heads": 2}
    config = ModelConfig(vocab_size=97, width=48, num_layers=3, layers=(layer,), feed_forward=80, tie_embeddings=False)
    ours = LanguageModel(config).double().eval()
    names = {"self_attn.": "mixer.", "_proj": "", "mlp.": "feed_forward.", "input_layernorm": "mixer_norm"}
    names |= {"post_attention_layernorm": "feed_forward_norm", "layers": "blocks", "lm_head": "head"}
    names |= {"embed_tokens": "embedding", "model.": ""}
    weights = {}
    for name, value in theirs.state_dict().items():
        for old, new in names.items():
            name = name.replace(old, new)
        weights[name] = value
    ours.load_state_dict(weights)
    tokens = torch.randint(97, (2, 33))
    expected = theirs(tokens).logits
    torch.testing.assert_close(ours(tokens).logits, expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(
        ours.loss(tokens[:, :-1], tokens[:, 1:]), theirs(tokens, labels=tokens).loss.double(), atol=1e-6, rtol=1e-6
    )


LEARNED = pytest.mark.parametrize("learned_positions", [None, 30])


@LEARNED
@pytest.mark.parametrize("block", ["pre", "post", "parallel"])
def test_prefix_and_rest_make_the_whole(block, learned_positions):
    model = build(block=block, learned_positions=learned_positions)
    tokens = torch.randint(61, (2, 30))
    whole = model(tokens).logits
    left, state = model(tokens[:, :13])
    right, _ = model(tokens[:, 13:], state)
    torch.testing.assert_close(torch.cat([left, right], 1), whole, atol=1e-9, rtol=1e-9)


@LEARNED
def test_padding_and_packing_give_what_single_rows_give(learned_positions):
    model = build(learned_positions=learned_positions)
    rows = [torch.randint(61, (1, length)) for length in (5, 9, 1)]
    padded, real = torch.zeros(3, 9, dtype=torch.long), torch.zeros(3, 9, dtype=torch.bool)
    for i, row in enumerate(rows):
        padded[i, 9 - row.shape[1] :], real[i, 9 - row.shape[1] :] = row[0], True
    logits, state = model(padded, None, Context(padding=real))
    packed = model(torch.cat(rows, 1), None, Context(cu_seqlens=torch.tensor([0, 5, 14, 15]))).logits
    step = torch.randint(61, (3, 1))
    follow = model(step, state).logits
    for i, row in enumerate(rows):
        expected, own = model(row)
        torch.testing.assert_close(logits[i, 9 - row.shape[1] :], expected[0], atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(follow[i], model(step[i : i + 1], own).logits[0], atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(packed, torch.cat([model(row).logits for row in rows], 1), atol=1e-9, rtol=1e-9)


def test_learned_positions_tell_places_apart_and_end():
    model = build(layers=({"mixer": "attention", "position": "none"},), learned_positions=30)
    tokens = torch.full((1, 30), 7)
    logits, state = model(tokens)
    assert (logits[0, 1:] - logits[0, :-1]).abs().amax(-1).min() > 1e-4
    with pytest.raises(ValueError, match="has learned 30 positions, and reads no longer text: got 31 tokens"):
        model(tokens[:, :1], state)
    with pytest.raises(ValueError, match="got a prompt of 29 tokens, and 3 to follow"):
        generate(model, tokens[:, :29], max_new_tokens=3)
    assert generate(model, tokens[:, :29], max_new_tokens=2).shape == (1, 2)


@LEARNED
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("block", ["pre", "post", "parallel"])
@pytest.mark.parametrize("tie", [False, True])
def test_cost_counts_every_parameter(bias, block, tie, learned_positions):
    model = build(bias=bias, block=block, tie_embeddings=tie, learned_positions=learned_positions)
    assert model.cost(10).parameters == sum(p.numel() for p in model.parameters())
    has = any(name.endswith("down.bias") for name, _ in model.named_parameters())
    assert has == bias


def test_the_loss_is_cross_entropy_with_its_gradients(monkeypatch):
    monkeypatch.setattr("everlong.nn.layers._rows", lambda weight: 7)
    x, weight = torch.randn(23, 8, dtype=torch.float64), torch.randn(50, 8, dtype=torch.float64)
    bias, targets = torch.randn(50, dtype=torch.float64), torch.randint(-1, 50, (23,))
    results = []
    for loss in (
        lambda x, w, b: linear_cross_entropy(x, w, targets, bias=b) * 3,
        lambda x, w, b: torch.nn.functional.cross_entropy(x @ w.T + b, targets, ignore_index=-1) * 3,
    ):
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        value = loss(*leaves)
        results.append([value, *torch.autograd.grad(value, leaves)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
    each = linear_cross_entropy(x, weight, targets, bias=bias, reduction="none")
    assert torch.equal(each == 0, targets < 0)
    torch.testing.assert_close(each.sum() / (targets >= 0).sum() * 3, results[0][0])


def test_no_target_is_no_loss():
    model = build()
    assert model.loss(torch.zeros(1, 4, dtype=torch.long), torch.full((1, 4), -1)).item() == 0.0


@pytest.mark.parametrize("block", ["pre", "post", "parallel"])
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_norms_are_of_the_kind_asked_for_and_counted(block, norm):
    model = build(block=block, norm=norm)
    assert model.cost(3).parameters == sum(parameter.numel() for parameter in model.parameters())
    tokens = torch.randint(61, (2, 9))
    before = model.hidden(tokens)[0]
    torch.testing.assert_close(before.square().mean(-1), torch.ones(2, 9).double(), atol=1e-3, rtol=1e-3)
    assert (before.mean(-1).abs().max() < 1e-9) == (norm == "layer")


def test_config_survives_json():
    config = build().config
    assert from_dict(ModelConfig, to_dict(config)) == config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": ("gated_deltnet",)}, "Nearest: `gated_deltanet`"),
        ({"layers": ({"mixer": "attention", "windw": 4},)}, "Nearest: `window`"),
        ({"layers": ({"mixer": "attention", "num_heads": 7},)}, "must be a multiple of `num_heads`"),
        ({"layers": ({"mixer": "linear_attention", "position": "alibi"},)}, "It takes: none, rope"),
        ({"layers": ()}, "at least one mixer"),
        ({"width": 0}, "`width` must be at least 1"),
        ({"learned_positions": 0}, "`learned_positions` must be at least 1"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(options, message):
    with pytest.raises(ValueError, match=message) as error:
        LanguageModel(from_dict(ModelConfig, {"vocab_size": 10, "width": 32, "num_layers": 1, **options}))
    assert "\n" not in str(error.value)

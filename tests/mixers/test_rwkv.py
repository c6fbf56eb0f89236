"""RWKV beyond the laws of all mixers: the stable sums of version 4, and what a model's layers share."""

import pytest
import torch

from everlong.config import from_dict
from everlong.mixers import rwkv4
from everlong.mixers.base import Context
from everlong.mixers.rwkv7 import VALUES
from everlong.models.lm import LanguageModel, ModelConfig

LAYERS = [
    {"mixer": "rwkv4"},
    {"mixer": "rwkv6", "num_heads": 2},
    {"mixer": "rwkv6", "variant": "eagle", "num_heads": 4},
    {"mixer": "rwkv7", "num_heads": 2, "value_rank": 3},
]
every = pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: "-".join(map(str, layer.values())))


def build(*layers, **options):
    model = LanguageModel(ModelConfig(vocab_size=31, width=32, num_layers=3, layers=layers, **options)).double()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def start(count, width):
    return torch.zeros(count, width), torch.zeros(count, width), torch.full((count, width), rwkv4.NEVER)


@pytest.mark.parametrize("rate", [1e-4, 1.0, 20.0, 1e5])
@pytest.mark.parametrize("size", [1.0, 30.0, 1e4])
def test_sums_of_version_4_hold_for_any_key_and_rate(rate, size):
    k, v = size * torch.randn(2, 3_000, 5), torch.randn(2, 3_000, 5)
    k.requires_grad_()
    rates, bonus = torch.full((5,), rate), torch.randn(5)
    y, sums = rwkv4.chunk(k, v, rates, bonus, start(2, 5), None)
    expected, same = rwkv4.steps(k.double(), v.double(), rates, bonus, tuple(x.double() for x in start(2, 5)), None)
    torch.testing.assert_close(y.double(), expected, atol=1e-4, rtol=1e-3)
    assert (y.abs() <= v.abs().max()).all()  # a mean lies among what it is the mean of
    assert all(torch.isfinite(x).all() for x in sums)
    torch.testing.assert_close(sums[0].double() / sums[1], same[0] / same[1], atol=1e-4, rtol=1e-3)
    y.sum().backward()
    assert torch.isfinite(k.grad).all()


def test_gradients_of_version_4_agree_through_the_state():
    cut = torch.tensor([0, 4, 4, 11, 12])
    leaves = [torch.randn(1, 12, 3), torch.randn(1, 12, 3), torch.rand(3), torch.randn(3), *torch.rand(3, 4, 3)]
    leaves = [x.double().requires_grad_() for x in leaves]
    found = []
    for run in (rwkv4.chunk, rwkv4.steps):
        k, v, rate, bonus, *sums = leaves
        y, sums = run(k, v, rate, bonus, tuple(sums), cut)
        z, (a, b, p) = run(k[:, :4] + 1, v[:, :4], rate, bonus, sums, torch.arange(5))
        total = (a / b).sum() + p.sum() * 0
        found.append([y, z, *torch.autograd.grad((y * y).sum() + (z * z * z).sum() + total, leaves)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-9)


@every
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_cost_counts_what_each_layer_has(layer, norm):
    model = build(layer, norm=norm)
    assert model.cost(7).parameters == sum(parameter.numel() for parameter in model.parameters())
    assert [block.mixer.embedding_norm is not None for block in model.blocks] == [True, False, False]


@every
def test_a_model_is_the_same_in_one_call_in_several_and_packed(layer):
    model = build(layer)
    tokens = torch.randint(31, (1, 23))
    whole = model(tokens).logits
    state, parts = None, []
    for piece in tokens.split([1, 9, 0, 13], 1):
        logits, state = model(piece, state)
        parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-9, rtol=1e-9)
    packed = model(torch.cat([tokens, tokens[:, :5]], 1), None, Context(cu_seqlens=torch.tensor([0, 23, 23, 28])))
    torch.testing.assert_close(packed.logits, torch.cat([whole, whole[:, :5]], 1), atol=1e-9, rtol=1e-9)


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_half_precision(layer, dtype):
    model = build(layer, norm="layer").float()
    tokens = torch.randint(31, (2, 23))
    exact = model(tokens).logits
    rough, state = model.to(dtype)(tokens)
    assert ((rough - exact).norm() / exact.norm()).item() < 3e-2
    follow, _ = model(tokens[:, :1], state)
    (rough.sum() + follow.sum()).backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


def test_later_layers_mix_the_first_ones_values_in():
    model = build(LAYERS[-1])
    tokens = torch.randint(31, (2, 9))
    values = model.blocks[1].mixer.v.weight

    def moved():
        before = model(tokens).logits
        values.data.mul_(-2)
        after = model(tokens).logits
        values.data.div_(-2)
        return not torch.equal(before, after)

    assert moved()
    for block in model.blocks[1:]:
        block.mixer.share.base.data.fill_(1e3)  # nothing but the first layer's
    assert not moved()
    loss = model(tokens).logits.square().sum()
    loss.backward()
    assert (model.blocks[0].mixer.v.weight.grad != 0).any()


def test_after_another_mixer_the_first_of_version_7_offers_its_values():
    model = build("linear_attention", LAYERS[-1], LAYERS[-1])
    model(torch.randint(31, (1, 6))).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert (model.blocks[2].mixer.share.base.grad != 0).any()
    context, x = Context(first={}), torch.randn(1, 6, 32, dtype=torch.float64)
    mixer = model.blocks[1].mixer
    alone, _ = mixer(x)
    offered, _ = mixer(x, None, context)
    assert torch.equal(alone, offered)
    assert context.first[VALUES].shape == x.shape


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ({"mixer": "rwkv4", "feed_forward": 0}, "`feed_forward` must be at least 1"),
        ({"mixer": "rwkv6", "mix_rank": 0}, "mix_rank=0"),
        ({"mixer": "rwkv6", "num_heads": 5}, "`width` must be a multiple of `num_heads`"),
        ({"mixer": "rwkv6", "variant": "swift"}, "'finch' or 'eagle'"),
        ({"mixer": "rwkv7", "gate_rank": -1}, "ranks must be at least 1"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(layer, message):
    with pytest.raises(ValueError, match=message) as error:
        from_dict(ModelConfig, {"vocab_size": 31, "width": 32, "layers": [layer]})
    assert "\n" not in str(error.value)

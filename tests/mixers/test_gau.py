"""What is particular to gated attention units: weights of single scores, positions with gaps, FLASH's chunks."""

import pytest
import torch

from everlong.config import from_dict
from everlong.mixers.base import Context
from everlong.mixers.flash import Flash
from everlong.mixers.flash import Options as FlashOptions
from everlong.mixers.gau import GAU, Options
from everlong.models.lm import LanguageModel, ModelConfig
from everlong.nn import elementwise_attention as parts
from everlong.nn import gated
from everlong.nn.elementwise_attention import elementwise_attention

BIASES = [None, "distances", "one row", "rows"]


def make(kind, options, **more):
    torch.manual_seed(0)
    mixer = kind(from_dict(options, {"width": 12, "key_size": 6, **more})).double()
    for parameter in mixer.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return mixer


def inputs(bias, causal, batch=3, queries=5, keys=9):
    torch.manual_seed(0)
    shapes = {
        None: None,
        "distances": (keys if causal else keys + queries - 1,),
        "one row": (1, queries, keys),
        "rows": (batch, queries, keys),
    }
    tensors = [torch.randn(batch, n, size, dtype=torch.float64) for n, size in ((queries, 4), (keys, 4), (keys, 3))]
    tensors.append(None if shapes[bias] is None else torch.randn(shapes[bias], dtype=torch.float64))
    return [x if x is None else x.requires_grad_() for x in tensors]


def dense(q, k, v, bias, function, gain, causal):
    """The same out of torch's own functions, all scores at once."""
    place = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1]
    ahead = torch.arange(k.shape[1]) - place
    scores = q @ k.mT
    if bias is not None:
        added = bias[(ahead + k.shape[1] - 1).clamp_max(len(bias) - 1)] if bias.dim() == 1 else bias
        scores = scores + added * (1.0 if gain is None else gain[..., None])
    weights = scores.relu() ** 2
    if function == "laplace":
        normal = torch.distributions.Normal(*torch.tensor([0.5, 1 / (4 * torch.pi)], dtype=torch.float64).sqrt())
        weights = normal.cdf(scores)
    return (weights * (ahead <= 0 if causal else 1.0)) @ v


@pytest.mark.parametrize("function", ["relu2", "laplace"])
@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("causal", [True, False])
def test_parts_are_the_whole(monkeypatch, function, bias, causal):
    leaves = inputs(bias, causal)
    gain = None if bias is None else torch.rand(len(leaves[0]) if bias == "rows" else 1, 5, dtype=torch.float64)
    expected = dense(*leaves, function, gain, causal)
    cotangent = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, [x for x in leaves if x is not None], cotangent)
    for rows, scores in ((64, 1 << 20), (2, 20), (3, 1)):
        monkeypatch.setattr(parts, "ROWS", rows)
        monkeypatch.setattr(parts, "SCORES", scores)
        for form in ("auto", "parallel", "recurrent"):
            q, k, v, b = leaves
            found = elementwise_attention(q, k, v, function=function, bias=b, gain=gain, causal=causal, form=form)
            torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
            gradients = torch.autograd.grad(found, [x for x in leaves if x is not None], cotangent)
            torch.testing.assert_close(gradients, wanted, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("weights", ["relu2_n2", "relu2_n2_bias", "relu2_ns", "laplace", "softmax", "softmax_plus"])
@pytest.mark.parametrize(("kind", "options"), [(GAU, Options), (Flash, FlashOptions)])
@pytest.mark.parametrize("causal", [True, False])
def test_given_positions_are_those_counted(monkeypatch, kind, options, weights, causal):
    more = {} if kind is GAU else {"chunk": 5}
    mixer = make(kind, options, weights=weights, position="rope", relative_bias="t5", causal=causal, **more)
    monkeypatch.setattr(gated, "LIMIT", 40)  # biases of pairs are made for a few queries at a time
    x, where = torch.randn(2, 13, 12, dtype=torch.float64, requires_grad=True), torch.arange(13).expand(2, -1)
    expected = mixer(x)[0]
    found = mixer(x, None, Context(positions=where + 4))[0]
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)
    one, other = (torch.autograd.grad(y.square().sum(), x)[0] for y in (found, expected))
    torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(("kind", "options"), [(GAU, Options), (Flash, FlashOptions)])
def test_positions_with_gaps_go_through_the_state(kind, options):
    more = {} if kind is GAU else {"chunk": 5}
    mixer = make(kind, options, relative_bias="t5", **more)
    x = torch.randn(2, 13, 12, dtype=torch.float64)
    where = torch.stack([torch.arange(13) * 2, torch.arange(13) + (torch.arange(13) > 6) * 9])
    expected = mixer(x, None, Context(positions=where))[0]
    assert not torch.allclose(expected, mixer(x)[0])
    for sizes in ((6, 7), (1,) * 13, (4, 1, 8)):
        state, outputs = mixer.init_state(2), []
        for y, places in zip(x.split(sizes, 1), where.split(sizes, 1), strict=True):
            output, state = mixer(y, state, Context(positions=places))
            outputs.append(output)
        torch.testing.assert_close(torch.cat(outputs, 1), expected, atol=1e-10, rtol=1e-10)


def test_at_512_tokens_softmax_plus_is_softmax():
    plain, plus = (make(GAU, Options, weights=weights, causal=False) for weights in ("softmax", "softmax_plus"))
    x = torch.randn(1, 512, 12, dtype=torch.float64)
    torch.testing.assert_close(plain(x)[0], plus(x)[0], atol=1e-12, rtol=1e-12)
    assert not torch.allclose(plain(x[:, :100])[0], plus(x[:, :100])[0])


@pytest.mark.parametrize("weights", ["relu2_n2", "relu2_ns", "laplace", "softmax_plus"])
def test_within_its_first_chunk_flash_is_the_unit(weights):
    flash = make(Flash, FlashOptions, weights=weights, chunk=20, relative_bias="rotary_bias")
    unit = make(GAU, Options, weights=weights, divisor=20, relative_bias="rotary_bias")
    weights = flash.state_dict()
    weights |= {name: weights[name][:2] for name in ("heads.gamma", "heads.beta")}
    unit.load_state_dict(weights)
    x = torch.randn(2, 20, 12, dtype=torch.float64)
    torch.testing.assert_close(flash(x)[0], unit(x)[0], atol=1e-12, rtol=1e-12)


def test_earlier_chunks_are_averaged_and_the_first_reads_none():
    """Chunks that are alike leave the same memory, however many there are."""
    mixer = make(Flash, FlashOptions, chunk=4, position="none")
    x = torch.randn(1, 4, 12, dtype=torch.float64)
    first, second, third, fourth = mixer(x.repeat(1, 4, 1))[0].split(4, 1)
    assert not torch.allclose(first, second)
    torch.testing.assert_close(second, third)
    torch.testing.assert_close(second, fourth)
    state = mixer.init_state(1)
    filled = state._replace(memory=torch.full_like(state.memory, torch.nan))
    assert torch.equal(mixer(x, state)[0], mixer(x, filled)[0])


def test_a_finished_chunk_leaves_no_keys():
    mixer = make(Flash, FlashOptions, chunk=4, relative_bias="t5")
    x = torch.randn(2, 8, 12, dtype=torch.float64)
    for sizes in ((8,), (4, 4), (3, 5), (1,) * 8):
        state = mixer.init_state(2)
        for part in x.split(sizes, 1):
            _, state = mixer(part, state)
        assert not any(leaf.any() for leaf in (state.pending, state.keys, state.values, state.positions))
        assert state.length.tolist() == [8, 8]


def test_only_what_is_a_rotation_or_a_bias_is_taken():
    with pytest.raises(ValueError, match="`gau` has no .*score.* for the position encoding `shaw`"):
        Options(width=8, position="shaw")
    with pytest.raises(ValueError, match="relative_bias` has no rotation for the position encoding `rope`"):
        Options(width=8, relative_bias="rope")
    with pytest.raises(ValueError, match="`chunk` must be at least 1: got 0"):
        FlashOptions(width=8, chunk=0)
    with pytest.raises(ValueError, match="`divisor` must be at least 1: got 0"):
        Options(width=8, divisor=0)
    with pytest.raises(ValueError, match="`expansion` must leave at least one channel"):
        Options(width=8, expansion=0.1)


@pytest.mark.parametrize("name", ["gau", "flash"])
def test_a_block_is_the_unit_alone(name):
    """Without a feed-forward; where the block norms the sum, the unit's own norm can be left out."""
    layer = {"mixer": name, "key_size": 8, "norm": "none"}
    model = LanguageModel(ModelConfig(vocab_size=9, width=12, num_layers=2, layers=(layer,), block="post"))
    assert model.blocks[0].feed_forward is None
    assert {label.split(".")[0] for label, _ in model.blocks[0].named_parameters()} == {"mixer", "mixer_norm"}
    assert model.cost(3).parameters == sum(parameter.numel() for parameter in model.parameters())

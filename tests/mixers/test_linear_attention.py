"""What is particular to linear attention: which maps go with what."""

import pytest
import torch

from everlong.config import from_dict
from everlong.mixers.linear_attention import LinearAttention, Options


def make(**options):
    torch.manual_seed(0)
    return LinearAttention(from_dict(Options, {"width": 12, "num_heads": 2, **options})).double()


def test_efficient_attention_reads_both_ways_only():
    with pytest.raises(ValueError, match="use causal=False, or one of cosformer, cosine, elu"):
        make(feature_map="softmax")
    make(feature_map="softmax", causal=False)


@pytest.mark.parametrize("name", ["exp", "cosformer"])
def test_maps_that_no_turn_may_follow_refuse_it(name):
    with pytest.raises(ValueError, match=f"linear_attention with {name}.* no rotation .* It takes: none"):
        make(feature_map=name, position="rope")


def test_small_heads_for_maps_that_square_them():
    assert make(feature_map="taylor", width=128).q.out_features == 32
    assert make(feature_map="taylor", width=128, feature_size=5).q.out_features == 10
    assert make(width=128).q.out_features == 128
    with pytest.raises(ValueError, match="`feature_size` and `max_length` must be at least 1"):
        make(feature_size=0)


@pytest.mark.parametrize("name", ["taylor", "cosine", "quadratic"])
def test_a_rotation_before_the_map_leaves_averages(name):
    """Of constant values there is no other average, wherever the tokens stand."""
    mixer = make(feature_map=name, position="rope", bias=True)
    mixer.v.weight.data.zero_()
    y, _ = mixer(torch.randn(1, 30, 12, dtype=torch.float64))
    torch.testing.assert_close(y, y[:, :1].expand_as(y))


def test_a_query_without_any_key_gives_nothing():
    mixer = make(feature_map="relu", bias=True)
    mixer.q.weight.data.zero_()
    mixer.q.bias.data.fill_(-1.0)
    x = torch.randn(1, 4, 12, dtype=torch.float64, requires_grad=True)
    y, _ = mixer(x)
    torch.testing.assert_close(y, mixer.o.bias.expand_as(y))
    assert torch.isfinite(torch.autograd.grad(y.sum(), x)[0]).all()


def test_bidirectional_calls_do_not_read_a_state():
    mixer = make(feature_map="cosformer", causal=False)
    x = torch.randn(2, 6, 12, dtype=torch.float64)
    y, state = mixer(x)
    assert torch.equal(mixer(x, state)[0], y)

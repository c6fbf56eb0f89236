"""Products of features are the similarities that the papers name, wherever the inputs lie."""

import math

import pytest
import torch

from everlong.nn import feature_maps
from everlong.nn.feature_maps import direction, products

CHANNELS = 5


@pytest.mark.parametrize("name", sorted(set(feature_maps.names()) - {"softmax"}))
def test_features_multiply_to_the_similarity(name):
    feature_map = feature_maps.load(name)(CHANNELS, max_length=50)
    q, k = torch.randn(2, 9, 3, CHANNELS, dtype=torch.float64)
    place = torch.arange(9)
    phi_q, phi_k = feature_map(q, place), feature_map(k, place)
    assert phi_q.shape == (9, 3, feature_map.size)
    for i, j in [(0, 0), (3, 8), (8, 1)]:
        product = (phi_q[i] + phi_k[j]).exp() if feature_map.logarithmic else phi_q[i] * phi_k[j]
        torch.testing.assert_close(product.sum(-1), feature_map.similarity(q[i], k[j], i - j))


@pytest.mark.parametrize("name", sorted(feature_maps.names()))
def test_features_are_in_float32_at_least(name):
    feature_map = feature_maps.load(name)(CHANNELS, max_length=50)
    x = torch.randn(4, 2, CHANNELS)
    assert feature_map(x.bfloat16(), torch.arange(4)).dtype == torch.float32
    assert feature_map(x.double(), torch.arange(4)).dtype == torch.float64


@pytest.mark.parametrize("name", ["elu", "relu", "squared_relu", "taylor", "quadratic", "cosine", "cosformer"])
def test_weights_that_are_divided_by_their_sum_are_not_negative(name):
    feature_map = feature_maps.load(name)(CHANNELS, max_length=50)
    q, k = 10 * torch.randn(2, 50, 1, CHANNELS, dtype=torch.float64)
    place = torch.arange(50)
    weights = torch.einsum("thf,shf->ts", feature_map(q, place), feature_map(k, place))
    assert weights.min() > -1e-9


def test_elu_stays_positive_far_below_zero():
    x = torch.tensor([[-80.0]], requires_grad=True)
    y = feature_maps.Elu(1)(x)
    assert 0 < y.item() < 1e-30
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, y.detach())


def test_efficient_attentions_keys_are_distributions_over_each_sequence():
    k = torch.randn(1, 10, 2, CHANNELS, dtype=torch.float64)
    keys = feature_maps.Softmax.over_length(k, torch.tensor([0, 3, 3, 10]))
    for start, stop in [(0, 3), (3, 10)]:
        torch.testing.assert_close(keys[:, start:stop], k[:, start:stop].softmax(1))


def test_products_are_those_of_outer_products():
    q, k = torch.randn(2, 7, CHANNELS, dtype=torch.float64)
    torch.testing.assert_close((products(q) * products(k)).sum(-1), (q * k).sum(-1).square())


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_a_direction_has_length_one_at_any_scale(scale):
    x = torch.randn(4, CHANNELS)
    torch.testing.assert_close(direction(x * scale), torch.nn.functional.normalize(x, dim=-1))


def test_the_direction_of_nothing_is_nothing():
    x = torch.zeros(2, CHANNELS, requires_grad=True)
    y = direction(x)
    assert torch.equal(y, torch.zeros_like(y))
    assert torch.isfinite(torch.autograd.grad(y.sum(), x)[0]).all()


def test_cosformer_ends_at_its_length():
    feature_map = feature_maps.CosFormer(CHANNELS, max_length=6)
    x = torch.ones(6, 1, CHANNELS)
    first, last = feature_map(x, torch.arange(6))[[0, 5]]
    assert float((first * last).sum()) == pytest.approx(CHANNELS * math.cos(math.pi * 5 / 12), abs=1e-5)
    with pytest.raises(ValueError, match="max_length=6 and 7 tokens"):
        feature_map(torch.ones(7, 1, CHANNELS), torch.arange(7))


def test_an_unknown_map_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match="Nearest: `taylor`"):
        feature_maps.load("tailor")

"""Random features: their products are right in the mean, and how far from it they are."""

import math

import pytest
import torch

from everlong.nn.random_features import draw_rows, exponents, scores, trigonometric

SIZE = 8
DRAWS = 400


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def pair(product):
    """Two vectors of length about 1.2 with this product."""
    q = torch.randn(SIZE, dtype=torch.float64, generator=generator(1))
    q = 1.2 * q / q.norm()
    other = torch.randn(SIZE, dtype=torch.float64, generator=generator(2))
    other = other - q * (q @ other) / (q @ q)
    return q, q * product / 1.44 + other / other.norm() * math.sqrt(1.44 - product**2 / 1.44)


def phi(kind):
    return trigonometric if kind == "trigonometric" else lambda x, rows: exponents(x, rows, kind).exp()


def estimates(kind, draw, count, product, draws=DRAWS):
    q, k = pair(product)
    random = generator()
    found = []
    for _ in range(draws):
        rows = draw_rows(count, SIZE, draw=draw, generator=random)
        found.append(phi(kind)(q, rows) @ phi(kind)(k, rows))
    return torch.stack(found)


@pytest.mark.parametrize("kind", ["positive", "hyperbolic", "trigonometric"])
@pytest.mark.parametrize("draw", ["orthogonal", "independent"])
@pytest.mark.parametrize("product", [-1.0, 0.0, 1.0])
def test_the_mean_is_the_exponential(kind, draw, product):
    found = estimates(kind, draw, 16, product)
    error = (found.mean() - math.exp(product)).abs()
    assert error < 4 * found.std() / DRAWS**0.5


@pytest.mark.parametrize("kind", ["positive", "hyperbolic"])
def test_the_error_falls_with_the_root_of_the_rows(kind):
    few, many = (estimates(kind, "independent", count, -1.0).std() for count in (8, 128))
    assert 0.75 * 4 < few / many < 1.3 * 4


@pytest.mark.parametrize("count", [6, 8])
def test_orthogonal_rows_vary_less(count):
    orthogonal, independent = (
        estimates("positive", draw, count, -1.0, draws=5000).var() for draw in ("orthogonal", "independent")
    )
    assert orthogonal < 0.95 * independent


def test_hyperbolic_features_vary_less_than_as_many_rows_of_positive_ones():
    assert estimates("hyperbolic", "independent", 16, -1.0).var() < estimates("positive", "independent", 16, -1.0).var()


def test_positive_features_are_surer_than_trigonometric_ones_where_the_exponential_is_small():
    small = -1.44
    positive, trigonometric = (estimates(kind, "independent", 16, small) for kind in ("positive", "trigonometric"))
    assert positive.var() < trigonometric.var()
    assert positive.min() > 0 > trigonometric.min()


def test_scores_are_what_tokens_do_not_share():
    x, rows = torch.randn(5, SIZE, dtype=torch.float64), draw_rows(6, SIZE, generator=generator())
    for kind in ("positive", "hyperbolic"):
        difference = scores(x, rows, kind) - exponents(x, rows, kind)
        torch.testing.assert_close(difference, difference[:, :1].expand_as(difference))


@pytest.mark.parametrize("count", [1, 5, 8, 21])
@pytest.mark.parametrize("draw", ["orthogonal", "regularized"])
def test_rows_of_a_block_are_orthogonal(count, draw):
    rows = draw_rows(count, SIZE, draw=draw, generator=generator())
    assert rows.shape == (count, SIZE)
    for block in rows.split(SIZE):
        products = block @ block.T
        torch.testing.assert_close(products, products.diagonal().diag(), atol=1e-9, rtol=0)
    if draw == "regularized":
        torch.testing.assert_close(rows.norm(dim=-1), torch.full((count,), SIZE**0.5, dtype=torch.float64))


def test_lengths_are_those_of_normal_vectors():
    """The square of a normal vector's length has mean K and variance 2 K."""
    squares = draw_rows(20_000, SIZE, generator=generator()).square().sum(-1)
    assert abs(squares.mean() - SIZE) < 0.1
    assert abs(squares.var() - 2 * SIZE) < 0.8


def test_directions_prefer_no_sign():
    """Without the signs of R's diagonal, QR as LAPACK has it gives first entries of one sign."""
    random = generator()
    matrices = torch.stack([draw_rows(4, 4, generator=random) for _ in range(2000)])
    share = (matrices > 0).double().mean(0)
    assert (share - 0.5).abs().max() < 0.05


def test_the_generator_decides():
    one, again, other = (draw_rows(9, SIZE, generator=generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)

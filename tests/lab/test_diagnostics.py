"""The measurements of attention maps are what their formulas say."""

import pytest
import torch

from everlong.config import from_dict
from everlong.lab.diagnostics import attention_map, dilution_curve, gradient_bound_report, score_gradient
from everlong.mixers import load
from everlong.mixers.base import Mixer

WEIGHTS = {"softmax": lambda s: s.softmax(-1), "linear": lambda s: s / s.sum(-1, keepdim=True)}


@pytest.mark.parametrize("kind", sorted(WEIGHTS))
def test_the_gradient_of_weights_is_autograds(kind):
    scores = torch.rand(3, 7, dtype=torch.float64) + 0.01
    expected = torch.stack([torch.autograd.functional.jacobian(WEIGHTS[kind], row) for row in scores])
    torch.testing.assert_close(score_gradient(scores, kind), expected)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e2])
def test_bounds_hold_and_the_largest_is_the_largest(causal, scale):
    torch.manual_seed(0)
    q, k, v = scale * torch.randn(3, 2, 12, 5, dtype=torch.float64)
    for found in gradient_bound_report(q, k, v, causal=causal):
        assert 0 <= found.largest <= found.bound
    elu = torch.nn.functional.elu
    scores = {"softmax": q @ k.mT / 5**0.5, "linear": (elu(q) + 1) @ (elu(k) + 1).mT}
    for kind, found in zip(WEIGHTS, gradient_bound_report(q, k, v, causal=causal), strict=False):
        rows = scores[kind].flatten(0, 1)
        whole = [score_gradient(row[: i % 12 + 1] if causal else row, kind).abs().max() for i, row in enumerate(rows)]
        assert found.largest == pytest.approx(max(whole).item())


def test_only_linear_attentions_gradient_grows_without_end():
    """Features of 0.01 make scores of 5e-4, all alike."""
    x = torch.full((6, 5), 0.01).log()
    softmax, linear, norm = gradient_bound_report(x, x, torch.randn(6, 5))
    assert softmax.largest < 0.26
    assert linear.largest > 100
    assert linear.bound == pytest.approx(0.25 / 5e-4, rel=1e-3)
    assert norm.largest <= norm.bound < 1e4


def test_a_map_that_does_not_tell_near_from_far_has_its_share():
    even = torch.ones(40, 40).tril()
    even = even / even.sum(-1, keepdim=True)
    ratios = torch.tensor([0.25, 0.5, 1.0])
    torch.testing.assert_close(dilution_curve(even, ratios), ratios, atol=0.02, rtol=0)
    torch.testing.assert_close(dilution_curve(torch.full((40, 40), 1 / 40), ratios, causal=False), ratios)


def test_a_map_that_looks_at_itself_has_all():
    for causal in (True, False):
        assert dilution_curve(torch.eye(30), torch.tensor([0.01, 0.5, 1.0]), causal=causal).tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("attention", {"num_kv_heads": 1, "qk_norm": True}),
        ("attention", {"window": 4}),
        ("attention", {"causal": False}),
        ("linear_attention", {}),
        ("linear_attention", {"feature_map": "exp"}),
        ("linear_attention", {"feature_map": "cosformer"}),
        ("linear_attention", {"feature_map": "taylor", "causal": False}),
        ("transnormer", {"kind": "diag", "block_size": 5}),
        ("transnormer", {"kind": "diag", "block_size": 5, "variant": "T1"}),
        ("transnormer", {"kind": "norm"}),
    ],
)
def test_the_map_is_what_the_layer_reads_its_values_with(name, options):
    torch.manual_seed(0)
    found = load(name)
    options = {"width": 12, "num_heads": 2, "position": "none", **options}
    mixer = found(from_dict(found.Config, options)).double()
    x = torch.randn(13, 12, dtype=torch.float64)
    weights = attention_map(mixer, x)
    sums = weights.sum(-1)
    assert ((sums - 1).abs().lt(1e-9) | (sums == 0)).all()
    v = mixer.v(x).unflatten(-1, (-1, 6)).transpose(0, 1)
    o = (weights @ v.repeat_interleave(2 // len(v), 0)).transpose(0, 1).flatten(1)
    y = mixer(x[None])[0][0]
    if name == "transnormer" and mixer.config.norms:  # equal up to the size of each head's, which the map has not
        own, expected = (t.unflatten(-1, (2, -1)) for t in (read(mixer, x), o))
        similar = torch.nn.functional.cosine_similarity(own, expected, dim=-1)
        assert (similar[expected.norm(dim=-1) > 0] > 1 - 1e-9).all()
    else:
        torch.testing.assert_close(y, mixer.o(o))


def read(mixer: Mixer, x):
    """What the output's projection is given."""
    given = []
    handle = mixer.o.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    mixer(x[None])
    handle.remove()
    return given[0][0]


def test_maps_that_are_not_known_are_refused():
    mamba, turned = load("mamba2"), load("attention")
    with pytest.raises(ValueError, match="got mamba2"):
        attention_map(mamba(mamba.Config(width=8)), torch.randn(3, 8))
    with pytest.raises(ValueError, match="without positions"):
        attention_map(turned(turned.Config(width=8, position="rope")), torch.randn(3, 8))

"""The delta rule and diagonal plus low rank: the laws of memories, other people's implementations, and their own."""

import math

import pytest
import torch
from memory_laws import Case, H, K, MemoryLaws, V, chunks_of, compile_all, gates, normal  # noqa: F401
from oracles import fla, rms
from torch.nn.functional import normalize

from everlong.lab.bench import errors
from everlong.ops import delta_rule, dplr
from everlong.ops.decays import inverse


def unit(b, t, heads):
    return normalize(normal(b, t, heads, K), dim=-1)


def make(name, operator, heads=H, decay=None, **options):
    """A case with `heads` of queries and keys, and log-decays of that shape after [B, T]."""
    tokens = {
        "q": lambda b, t: normal(b, t, heads, K),
        "k": lambda b, t: unit(b, t, heads),
        "v": lambda b, t: normal(b, t, H, V),
    }
    if operator is delta_rule:
        tokens["beta"] = lambda b, t: 2 * torch.rand(b, t, H)
    else:
        tokens["a"] = lambda b, t: -unit(b, t, heads)
        tokens["b"] = lambda b, t: unit(b, t, H) * torch.rand(b, t, H, 1)
    if decay is not None:
        tokens["log_decay"] = lambda b, t: gates(b, t, *decay)
    return Case(name, operator, tokens, {}, options)


CASES = [
    make("delta rule, grouped heads", delta_rule, heads=2, scale=0.3),
    make("delta rule, decay of tokens", delta_rule, decay=(H,)),
    make("delta rule, decay of channels, grouped heads", delta_rule, heads=1, decay=(H, K)),
    make("low rank", dplr),
    make("low rank, decay of channels, grouped heads", dplr, heads=2, decay=(H, K)),
]


@pytest.fixture(params=CASES, ids=str)
def case(request):
    return request.param


class TestLaws(MemoryLaws):
    pass


@pytest.mark.parametrize(
    "oracle", [o for o in errors.ORACLES if o.operator != "linear_attention"], ids=lambda o: o.name
)
def test_agrees_with_flash_linear_attention(oracle):
    fla("fla/ops/gla/naive.py")
    for name, inputs, state, bounds in errors.cases(oracle):
        theirs = oracle.theirs if bounds is None else errors.separately(oracle, bounds)
        expected = errors.with_gradients(theirs, inputs, state)
        for form in errors.FORMS:
            found = errors.with_gradients(lambda x, s, f=form, b=bounds: oracle.ours(x, s, f, b), inputs, state)
            for key in expected:
                assert errors.relative(found[key], expected[key]) < 1e-5, (name, form, key)


def test_compiles_without_warnings():
    compile_all(__file__)


@pytest.mark.parametrize("form", ["chunk", "recurrent"])
def test_full_correction_recalls_the_last_value(form):
    """With beta = 1 and unit keys, a key reads what was last written under it, whatever else was written."""
    keys = normalize(normal(7, K).double(), dim=-1)
    which = torch.randint(7, (100,))
    k, v = keys[which].view(1, 100, 1, K), normal(1, 100, 1, V).double()
    o, _ = delta_rule(k, k, v, torch.ones(1, 100, 1).double(), scale=1.0, form=form)
    assert rms(o, v) < 1e-12


def test_reflections_stay_bounded():
    """With beta = 2 every step is a reflection: the worst case for powers of the system, harmless for substitution."""
    k = torch.ones(1, 512, 1, K) * K**-0.5
    v, beta = normal(1, 512, 1, V), torch.full((1, 512, 1), 2.0)
    found, _ = delta_rule(k, k, v, beta, scale=1.0, form="chunk")
    expected, _ = delta_rule(k.double(), k.double(), v.double(), beta.double(), scale=1.0, backend="reference")
    assert rms(found, expected) < 1e-4


def test_delta_rule_is_a_case_of_low_rank():
    q, k, v, beta, g = (
        normal(2, 70, H, K),
        unit(2, 70, H),
        normal(2, 70, H, V),
        torch.rand(2, 70, H, 1),
        gates(2, 70, H, K),
    )
    q, k, v, beta, g = (x.double() for x in (q, k, v, beta, g))
    o, state = delta_rule(q, k, v, beta[..., 0], log_decay=g)
    other, last = dplr(q, beta * k, v, -g.exp() * k, beta * k, log_decay=g)
    assert rms(other, o) < 1e-12
    assert rms(last, state) < 1e-12


def test_inverse_of_triangular_systems():
    lower = normal(6, 32, 32).double().tril(-1)
    identity = torch.eye(32, dtype=torch.float64)
    assert rms(inverse(lower) @ (identity - lower), identity.expand(6, 32, 32)) < 1e-9
    assert torch.equal(inverse(lower).triu(1), torch.zeros_like(lower))


def test_keys_that_overflow_do_not_reach_back():
    """Keys whose products are no float32 numbers spoil what follows them, not what came before in their chunk."""
    q, k, v, beta = normal(1, 40, H, K), unit(1, 40, H), normal(1, 40, H, V), torch.rand(1, 40, H)
    before, _ = delta_rule(q, k, v, beta, form="chunk")
    k[:, 21:] *= 1e25
    after, _ = delta_rule(q, k, v, beta, form="chunk")
    assert torch.equal(after[:, :21], before[:, :21])
    assert not after[:, 39:].isfinite().any()


def test_operators_of_the_chunk_form_keep_torchs_rules():
    """Schemas, fake shapes and the registration of gradients, as torch itself checks them."""
    q, k, a, b = (torch.randn(1, 11, 2, K).requires_grad_() for _ in range(4))
    v, beta = torch.randn(1, 11, H, V).requires_grad_(), torch.rand(1, 11, H).requires_grad_()
    packed, state = torch.tensor([0, 2, 2, 11]), torch.randn(3, H, K, V).requires_grad_()
    alone = torch.randn(1, H, K, V).requires_grad_()
    operator = torch.ops.everlong.low_rank_chunk.default
    for g in (None, gates(1, 11, H).requires_grad_(), gates(1, 11, H, K).requires_grad_()):
        torch.library.opcheck(operator, (q, k, v, beta, None, None, g, state, packed, 0.5, 4))
    torch.library.opcheck(operator, (q, k, v, None, a, b, g, alone, None, 0.5, 4))


@pytest.mark.parametrize("operator", [delta_rule, dplr])
def test_errors_say_what_is_wrong(operator):
    q, k, v, beta = torch.zeros(2, 5, 2, K), torch.zeros(2, 5, 2, K), torch.zeros(2, 5, 3, V), torch.zeros(2, 5, 3)
    rest = (beta,) if operator is delta_rule else (q, k)
    with pytest.raises(ValueError, match="the heads of `v` must be a multiple of those of `q` and `k`: got 3 and 2"):
        operator(q, k, v, *rest)
    with pytest.raises(ValueError, match="unknown form `chunks`. Nearest: `chunk`"):
        operator(q, k, v, *rest, form="chunks")
    q, k, v, rest = q[:1], k[:1], v[:1, :, :2], tuple(x[:1, :, :2] for x in rest)
    for form in ("chunk", "recurrent"):
        with pytest.raises(ValueError, match=r"`cu_seqlens` must rise from 0 to T = 5: got \[0, 7\]"):
            operator(q, k, v, *rest, cu_seqlens=torch.tensor([0, 7]), form=form)
    assert math.isfinite(operator(q, k, v, *rest)[0].sum())

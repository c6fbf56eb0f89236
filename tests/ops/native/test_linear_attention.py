"""The kernels of linear attention: the laws of all kernels, and what only these have."""

import itertools
import math

import kernel_laws as laws
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from everlong.ops import linear_attention
from everlong.ops.native.linear_attention import _backward, _forward, _inference

DECAYS = ("none", "head", "token", "channel")
PACKED = torch.tensor([0, 0, 3, 4, 40, 42, 42, 60, 200])


def gates(*shape):
    """Log-decays from nearly nothing to a strong decay."""
    return -(torch.rand(*shape) ** 4) * 3


def inputs(
    length,
    decay="token",
    *,
    batch=2,
    h=2,
    H=4,
    K=5,
    V=3,
    bonus=False,
    normalize=False,
    packed=None,
    dtype=torch.float32,
):
    positive = torch.exp if normalize else lambda x: x
    count = batch if packed is None else len(packed) - 1
    shape = {"none": (0,), "head": (H,), "token": (batch, length, H), "channel": (batch, length, H, K)}[decay]
    return {
        "q": positive(torch.randn(batch, length, h, K)).to(dtype),
        "k": positive(torch.randn(batch, length, h, K)).to(dtype),
        "v": torch.randn(batch, length, H, V).to(dtype),
        "log_decay": None if decay == "none" else gates(*shape),
        "bonus": positive(torch.randn(H, K)) if bonus else None,
        "state": torch.randn(count, H, K, V).abs(),
        "total": torch.rand(count, H, K) if normalize else None,
        "cu_seqlens": packed,
    }


def run(state, total, **rest):
    normalize = total is not None
    return linear_attention(**rest, normalize=normalize, initial_state=(state, total) if normalize else state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("length", [0, 1, 2, 4, 5, 15, 16, 17, 63, 65])
def test_the_reference_is_met(length, decay, dtype):
    laws.check(run, inputs(length, decay, dtype=dtype))


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize(("bonus", "normalize"), [(False, False), (True, False), (False, True), (True, True)])
def test_long_sequences_with_all_that_there_is(decay, bonus, normalize):
    laws.check(run, inputs(300, decay, bonus=bonus, normalize=normalize))


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize(("K", "V"), [(64, 64), (16, 37), (1, 1), (40, 130)])
def test_channels(decay, K, V):
    laws.check(run, inputs(40, decay, batch=1, K=K, V=V))
    laws.check(run, inputs(3, decay, batch=1, K=K, V=V, bonus=True))


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize(("bonus", "normalize"), [(False, False), (True, False), (False, True)])
def test_packed_sequences(decay, bonus, normalize):
    laws.check(run, inputs(200, decay, batch=1, packed=PACKED, bonus=bonus, normalize=normalize))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    length=st.integers(0, 150),
    decay=st.sampled_from(DECAYS),
    sizes=st.tuples(*[st.integers(2, 40)] * 2),  # with one key channel a normalised output does not depend on q
    heads=st.tuples(*[st.integers(1, 3)] * 2),
    batch=st.integers(1, 3),
    bonus=st.booleans(),
    normalize=st.booleans(),
)
def test_any_shape(length, decay, sizes, heads, batch, bonus, normalize):
    (K, V), (h, groups) = sizes, heads
    options = {"bonus": bonus, "normalize": normalize}
    laws.check(run, inputs(length, decay, batch=batch, h=h, H=h * groups, K=K, V=V, **options))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(0, 70), min_size=1, max_size=6), decay=st.sampled_from(DECAYS))
def test_any_packing(lengths, decay):
    bounds = torch.tensor([0, *itertools.accumulate(lengths)])
    laws.check(run, inputs(sum(lengths), decay, batch=1, packed=bounds))


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("sequences", [1, 2])
def test_neither_threads_nor_repetition_change_a_bit(decay, sequences):
    """One head on two threads is shared out by columns and by groups of tokens, four heads are not."""
    for options in ({}, {"bonus": True, "normalize": True}):
        laws.check_repeatable(run, inputs(300, decay, batch=sequences, h=1, H=1, K=20, V=50, **options))


def test_rows_of_a_batch_do_not_depend_on_each_other():
    given = inputs(70, "token", batch=3, H=2, dtype=torch.bfloat16)
    o, state = run(**given)
    alone = {name: x[1:2] if x is not None and name != "bonus" else x for name, x in given.items()}
    other, last = run(**alone)
    assert torch.equal(o[1:2], other)
    assert torch.equal(state[1:2], last)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("length", [3, 40])
def test_numbers_may_lie_anywhere(decay, length):
    given = inputs(length, decay, bonus=True, normalize=True)
    apart = {name: x if x is None else laws.scattered(x) for name, x in given.items()}
    laws.check(run, apart)
    turned = given | {name: given[name].transpose(1, 2).contiguous().transpose(1, 2) for name in ("q", "k", "v")}
    laws.check(run, turned | {"q": torch.stack([given["q"]] * 2, -1)[..., 0]})


@pytest.mark.parametrize("narrow", ["q", "k", "v", "log_decay", "bonus"])
def test_types_may_be_mixed(narrow):
    given = inputs(40, "channel", bonus=True)
    given[narrow] = given[narrow].bfloat16()
    laws.check(run, given, bound=1e-2)


ADVERSARIES = {
    "nothing fades": torch.zeros_like,
    "resets": lambda g: torch.full_like(g, -math.inf),
    "strong": lambda g: -20 * torch.rand_like(g),
    "growing": lambda g: 0.2 * torch.rand_like(g),
    "mixed": lambda g: torch.tensor([0.0, -1e-4, -0.1, -3.0, -90.0, -1e4, -math.inf])[torch.randint(7, g.shape)],
}


@pytest.mark.parametrize("decay", ["head", "token", "channel"])
@pytest.mark.parametrize("name", ADVERSARIES)
@pytest.mark.parametrize("bonus", [False, True])
def test_decays_of_any_strength(decay, name, bonus):
    given = inputs(70, decay, bonus=bonus)
    given["log_decay"] = ADVERSARIES[name](given["log_decay"])
    laws.check(run, given)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("future", [math.inf, math.nan])
def test_later_tokens_do_not_reach_earlier_ones(decay, future):
    given = inputs(40, decay, normalize=True)
    before, _ = run(**given)
    for now in (1, 6, 21):
        changed = {name: x if x is None else x.clone() for name, x in given.items()}
        for name in ("q", "k", "v"):
            changed[name][:, now:] = future
        after, _ = run(**changed)
        assert torch.equal(after[:, :now], before[:, :now])


@pytest.mark.parametrize("decay", DECAYS)
def test_a_state_continues_a_sequence(decay):
    given = {name: x for name, x in inputs(50, decay).items() if name not in ("state", "total")}
    whole, last = linear_attention(**given, backend="native")
    state, parts = None, []
    for start, stop in ((0, 30), (30, 31), (31, 34), (34, 50)):
        cut = {
            n: x if x is None or (n == "log_decay" and decay == "head") else x[:, start:stop] for n, x in given.items()
        }
        o, state = linear_attention(**cut, initial_state=state, backend="native")
        parts.append(o)
    assert laws.error(torch.cat(parts, 1), whole) < 1e-6
    assert laws.error(state, last) < 1e-6


def test_results_larger_than_the_cache():
    """They are written past it."""
    given = inputs(2100, "token", batch=1, h=8, H=8, K=16, V=64)
    weights = []
    exact = {name: x if x is None else x.double() for name, x in given.items()}
    expected = laws.outcome(run, exact, "torch", weights)
    for name, found in laws.outcome(run, given, "native", weights).items():
        assert laws.error(found, expected[name]) < laws.BOUND[torch.float32], name


def test_weak_decays_keep_their_digits():
    length = 100_000
    ones = torch.ones(1, length, 1, 1)
    o, _ = linear_attention(ones, ones, ones, log_decay=torch.full((1,), -1e-6), scale=1.0, backend="native")
    expected = torch.exp(-1e-6 * torch.arange(length, dtype=torch.float64)).cumsum(0)
    assert laws.error(o.flatten(), expected) < 1e-6


@pytest.mark.parametrize("decay", DECAYS)
def test_torch_knows_the_operators(decay):
    for normalize in (False, True):
        given = inputs(20, decay, bonus=True, normalize=normalize)
        leaves = {name: x if x is None else x.requires_grad_() for name, x in given.items()}
        torch.library.opcheck(_forward, (*leaves.values(), 0.5, normalize))
        q, k, v, log_decay, bonus, state, total, cu_seqlens = (x if x is None else x.detach() for x in leaves.values())
        plain = (q, k, v, log_decay, bonus, state, total, cu_seqlens, 0.5, normalize)
        torch.library.opcheck(_inference, plain)
        o, _, _, *saved = _forward(*plain)
        gradients = (torch.randn_like(o), torch.randn_like(state), None if total is None else torch.randn_like(total))
        torch.library.opcheck(_backward, (q, k, v, log_decay, bonus, cu_seqlens, o, *saved, *gradients, 0.5, normalize))


@pytest.mark.parametrize("length", [3, 40])
def test_without_gradients_it_gives_the_same(length):
    given = inputs(length, "channel", bonus=True, normalize=True)
    o, state = run(**given)
    q = given["q"].clone().requires_grad_()
    other, last = run(**given | {"q": q})
    assert torch.equal(o, other)
    assert all(torch.equal(*pair) for pair in zip(state, last, strict=True))
    with torch.no_grad():
        assert torch.equal(run(**given | {"q": q})[0], o)


def test_bad_bounds_are_refused_before_the_kernel_runs():
    given = inputs(9, "token", batch=1, packed=torch.tensor([0, 12]))
    with pytest.raises(ValueError, match="must rise from 0 to T = 9"):
        run(**given)

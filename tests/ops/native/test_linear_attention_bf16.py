"""The kernels of linear attention in bfloat16: the laws of all kernels, and rows that do not see each other."""

import kernel_laws as laws
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from everlong.ops import linear_attention
from everlong.ops.native.linear_attention_bf16 import _backward, _forward, linear_attention_bf16

BF16 = torch.bfloat16
DECAYS = ["none", "head", "token"]
PACKED = torch.tensor([0, 0, 3, 4, 40, 42, 42, 345])


def operator(q, k, v, log_decay=None, initial_state=None, cu_seqlens=None):
    options = {"log_decay": log_decay, "initial_state": initial_state, "cu_seqlens": cu_seqlens, "scale": 0.3}
    return linear_attention_bf16(q, k, v, **options) if v.dtype == BF16 else linear_attention(q, k, v, **options)


# The gradient of a head's decay sums numbers of either sign over all tokens: it may be near 0 by chance, but not for
# all of several heads.
def inputs(length, heads=6, keys=32, values=32, *, decay="token", shared=None, batch=1, packed=None, speed=0.1):
    gates = {"none": None, "head": -torch.rand(heads) * speed, "token": -torch.rand(batch, length, heads) * speed}
    qk = (batch, length, shared or heads, keys)
    return {
        "q": torch.randn(qk).to(BF16),
        "k": torch.randn(qk).to(BF16),
        "v": torch.randn(batch, length, heads, values).to(BF16),
        "log_decay": gates[decay],
        "initial_state": torch.randn(batch if packed is None else len(packed) - 1, heads, keys, values),
        "cu_seqlens": packed,
    }


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("length", [0, 1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 256, 257, 300])
def test_the_reference_is_met(length, decay):
    laws.check(operator, inputs(length, decay=decay))


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize(("keys", "values"), [(64, 64), (128, 128), (64, 128), (1, 1), (5, 40), (37, 16)])
def test_any_channels(keys, values, decay):
    laws.check(operator, inputs(150, 6, keys, values, decay=decay, batch=2))


@pytest.mark.parametrize("decay", DECAYS)
def test_packed_sequences(decay):
    laws.check(operator, inputs(345, decay=decay, packed=PACKED))
    laws.check(operator, inputs(345, decay=decay, packed=PACKED.int()))


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("shared", [1, 3])
def test_heads_that_share_queries_and_keys(shared, decay):
    laws.check(operator, inputs(130, decay=decay, shared=shared, batch=2))


def test_more_heads_than_take_turns():
    laws.check(operator, inputs(70, 19, batch=2))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.integers(0, 300),
    st.integers(1, 3),
    st.sampled_from([1, 2, 4]),
    st.integers(1, 70),
    st.integers(1, 70),
    st.sampled_from(["none", "token"]),
    st.integers(0, 1000),
)
def test_any_shape(length, batch, heads, keys, values, decay, seed):
    torch.manual_seed(seed)
    laws.check(operator, inputs(length, heads, keys, values, decay=decay, shared=1, batch=batch))


GATES = {
    "closed": lambda g: torch.full_like(g, -torch.inf),
    "some closed": lambda g: torch.where(torch.rand_like(g) < 0.1, -torch.inf, g),
    "all but closed": lambda g: torch.full_like(g, -20.0),
    "of all sizes": lambda g: -(10 ** (torch.rand_like(g) * 6 - 4)),
    "open": torch.zeros_like,
    "growing": lambda g: -g * 0.2,
}


@pytest.mark.parametrize("name", GATES)
def test_adversarial_gates(name):
    extreme = inputs(200)
    extreme["log_decay"] = GATES[name](extreme["log_decay"])
    laws.check(operator, extreme)


def test_gates_may_be_rounded():
    rounded = inputs(90)
    rounded["log_decay"] = rounded["log_decay"].to(BF16)
    laws.check(operator, rounded)


@pytest.mark.parametrize("value", [3.0, torch.inf, torch.nan])
@pytest.mark.parametrize("name", ["q", "k", "v", "log_decay"])
def test_a_changed_future_leaves_the_past_bit_for_bit(name, value):
    before = inputs(150)
    after = {key: x if x is None else x.clone() for key, x in before.items()}
    expected, _ = operator(**before)
    for t, column in ((149, 0), (130, 1), (77, 0), (70, 1), (3, 0)):
        after[name][:, t, :, ..., *((column,) if name != "log_decay" else ())] = value
        found, _ = operator(**after)
        assert torch.equal(found[:, :t], expected[:, :t]), t
        if name == "v":
            assert torch.equal(found[..., 2:], expected[..., 2:]), "other channels"


def test_an_infinite_value_reaches_what_follows():
    spoilt = inputs(100)
    spoilt["v"][0, 40, 0, 3] = torch.inf
    o, state = operator(**spoilt)
    assert not o[0, 40:, 0, 3].isfinite().any()
    assert not state[0, 0, :, 3].isfinite().any()


def test_a_row_does_not_depend_on_the_others():
    both = inputs(100, batch=2)
    alone = {name: x if x is None else x[1:] for name, x in both.items()}
    for together, single in zip(operator(**both), operator(**alone), strict=True):
        assert torch.equal(together[1:], single)


@pytest.mark.parametrize("decay", DECAYS)
def test_neither_threads_nor_repetition_change_a_bit(decay):
    laws.check_repeatable(operator, inputs(300, 3, 40, 40, decay=decay, batch=2))


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("packed", [None, torch.tensor([0, 0, 600, 601, 900])])
def test_fewer_heads_than_threads_change_no_bit(packed, decay):
    few = inputs(900, 1, 40, 70, decay=decay, packed=packed)
    before = torch.get_num_threads()
    weights, outcomes = [], []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            outcomes.append(laws.outcome(operator, few, "native", weights))
    finally:
        torch.set_num_threads(before)
    for other in outcomes[1:]:
        for name, expected in outcomes[0].items():
            assert torch.equal(other[name], expected), name


def test_numbers_may_lie_anywhere():
    given = inputs(70, keys=31, values=64)
    laws.check(operator, {name: x if x is None else laws.scattered(x) for name, x in given.items()})
    turned = {name: x if x is None else x.transpose(-1, -2).contiguous().transpose(-1, -2) for name, x in given.items()}
    laws.check(operator, turned)


def test_torch_knows_the_operators():
    x = inputs(70, 4, shared=2)
    for name in ("q", "k", "v", "log_decay", "initial_state"):
        x[name].requires_grad_()
    torch.library.opcheck(_forward, (*x.values(), 0.3, True))
    q, k, v, log_decay, state, _ = (y if y is None else y.detach() for y in x.values())
    _, last, saved = _forward(q, k, v, log_decay, state, None, 0.3, True)
    torch.library.opcheck(_backward, (q, k, v, log_decay, None, saved, v, last, 0.3))


def test_compiled():
    given = inputs(70)
    compiled = torch.compile(operator, backend="aot_eager", fullgraph=True)
    for ours, expected in zip(compiled(**given), operator(**given), strict=True):
        assert torch.equal(ours, expected)


def test_bad_bounds_are_refused_before_the_kernel_runs():
    with pytest.raises(ValueError, match="must rise from 0 to T = 9"):
        operator(**inputs(9, packed=torch.tensor([0, 12])))

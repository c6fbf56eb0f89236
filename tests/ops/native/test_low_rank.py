"""The kernels of the delta rule and of diagonal plus low rank: the laws of all kernels."""

import math

import kernel_laws as laws
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_laws import ADVERSARIES
from torch.nn.functional import normalize

from everlong.ops import delta_rule, dplr
from everlong.ops.native.low_rank import GROUP, _backward, _forward, _inference

PACKED = torch.tensor([0, 0, 3, 4, 40, 42, 42, 110])
KINDS = ["delta rule", "delta rule, decay of tokens", "delta rule, decay of channels", "low rank", "low rank, decay"]


def case(kind, length, *, batch=2, shared=2, heads=2, keys=16, values=16, dtype=torch.float32, packed=None):
    """An operator and its inputs; the heads of q, k (and a) are `heads / shared`."""
    operator = delta_rule if kind.startswith("delta") else dplr
    made = {name: torch.randn(batch, length, heads // shared, keys) for name in ("q", "k")}
    made["k"] = normalize(made["k"], dim=-1)
    made["v"] = torch.randn(batch, length, heads, values)
    if operator is delta_rule:
        made["beta"] = 2 * torch.rand(batch, length, heads)
    else:
        made["a"] = -normalize(torch.randn_like(made["q"]), dim=-1)
        made["b"] = normalize(torch.randn(batch, length, heads, keys), dim=-1) * torch.rand(batch, length, heads, 1)
    if "decay" in kind:
        shape = (batch, length, heads) if "tokens" in kind else (batch, length, heads, keys)
        made["log_decay"] = -(torch.rand(shape) ** 4) * 3
    made = {name: x.to(dtype) for name, x in made.items()}
    made["initial_state"] = torch.randn(batch if packed is None else len(packed) - 1, heads, keys, values)
    return operator, made | {"cu_seqlens": packed}


@pytest.mark.parametrize("length", [0, 1, 2, 5, 15, 16, 17, 31, 33, 63, 65, 300])
@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_is_met(kind, length):
    laws.check(*case(kind, length, batch=1))


@pytest.mark.parametrize("length", [1, 3, 40])
@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_is_widened_first(kind, length):
    """Results of the same rounded numbers are off by their own rounding alone, half a unit in the last of 8 bits."""
    laws.check(*case(kind, length, dtype=torch.bfloat16), bound=2.0**-8)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(KINDS),
    length=st.integers(1, 90),
    keys=st.integers(1, 70),
    values=st.integers(1, 140),
    shared=st.integers(1, 3),
    groups=st.integers(1, 2),
)
def test_any_shape(kind, length, keys, values, shared, groups):
    torch.manual_seed(length)
    shape = {"shared": shared, "heads": shared * groups, "keys": keys, "values": values}
    laws.check(*case(kind, length, **shape))


@pytest.mark.parametrize("kind", KINDS)
def test_packed_sequences(kind):
    laws.check(*case(kind, 110, batch=1, packed=PACKED))
    laws.check(*case(kind, 110, batch=1, packed=PACKED.int()))


@pytest.mark.parametrize("kind", KINDS)
def test_packed_sequences_of_several_groups(kind):
    bounds = torch.tensor([0, GROUP, GROUP, 3 * GROUP + 2, 3 * GROUP + 30, 4 * GROUP + 29])
    laws.check(*case(kind, int(bounds[-1]), batch=1, packed=bounds))
    laws.check_repeatable(
        *case(kind, 3 * GROUP + 5, batch=1, heads=1, shared=1, packed=torch.tensor([0, 3 * GROUP + 5]))
    )


@pytest.mark.parametrize("name", ADVERSARIES)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if "decay" in kind])
def test_decays_of_any_strength(kind, name):
    operator, inputs = case(kind, 70)
    laws.check(operator, inputs | {"log_decay": ADVERSARIES[name](inputs["log_decay"])})


@pytest.mark.parametrize("correction", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("kind", KINDS[:3])
def test_one_key_again_and_again(kind, correction):
    """With 2 each step is a reflection, with 0 nothing is written at all: and yet there is a gradient of beta."""
    operator, inputs = case(kind, 100)
    one = inputs["k"][:, :1].expand_as(inputs["k"])
    laws.check(operator, inputs | {"k": one, "beta": torch.full_like(inputs["beta"], correction)})


@pytest.mark.parametrize("kind", KINDS)
def test_neither_threads_nor_repetition_change_a_bit(kind):
    laws.check_repeatable(*case(kind, 600, batch=1, shared=1, heads=1, values=40))
    laws.check_repeatable(*case(kind, 70, heads=4))


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_does_not_depend_on_others(kind):
    operator, inputs = case(kind, 40, batch=3)
    o, state = operator(**inputs, backend="native")
    alone = {name: x if x is None else x[1:2] for name, x in inputs.items()}
    assert all(torch.equal(found[0], all_[1]) for found, all_ in zip(operator(**alone), (o, state), strict=True))


@pytest.mark.parametrize("future", [1e3, math.inf, math.nan])
@pytest.mark.parametrize("kind", KINDS)
def test_the_future_is_out_of_reach(kind, future):
    operator, inputs = case(kind, 90)
    before, _ = operator(**inputs, backend="native")
    for now in (1, 37, 64):
        changed = dict(inputs)
        for name in inputs.keys() - {"initial_state", "cu_seqlens"}:
            changed[name] = inputs[name].clone()
            changed[name][:, now:] = torch.randn_like(inputs[name][:, now:]) * future
        after, _ = operator(**changed, backend="native")
        assert torch.equal(after[:, :now], before[:, :now])


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_may_lie_anywhere(kind):
    operator, inputs = case(kind, 33)
    apart = {name: x if x is None else laws.scattered(x) for name, x in inputs.items()}
    laws.check(operator, apart)
    turned = {name: x if x is None else x.transpose(1, 2).contiguous().transpose(1, 2) for name, x in inputs.items()}
    laws.check(operator, turned)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_one_by_one(kind):
    operator, inputs = case(kind, 20)
    o, last = operator(**inputs, backend="native")
    state, steps = inputs.pop("initial_state"), []
    for t in range(20):
        token = {name: x if x is None else x[:, t : t + 1] for name, x in inputs.items()}
        step, state = operator(**token, initial_state=state, backend="native")
        steps.append(step)
    assert laws.error(torch.cat(steps, 1), o) < 1e-6
    assert laws.error(state, last) < 1e-6


def test_torch_knows_the_operators():
    for kind, packed in ((KINDS[1], PACKED), (KINDS[4], None)):
        _, x = case(kind, 110, batch=1, shared=1, packed=packed)
        state = x.pop("initial_state")
        names = ("q", "k", "v", "beta", "a", "b", "log_decay")
        inputs = [x[name].requires_grad_() if name in x else None for name in names]
        torch.library.opcheck(_forward, (*inputs, state, packed, 0.5))
        inputs = [x if x is None else x.detach() for x in inputs]
        torch.library.opcheck(_inference, (*inputs, state, packed, 0.5))
        o, last, starts = _forward(*inputs, state, packed, 0.5)
        torch.library.opcheck(_backward, (*inputs, packed, starts, torch.randn_like(o), last, 0.5))
        torch.library.opcheck(_backward, (*inputs, packed, starts, None, last, 0.5))


def test_bad_bounds_are_refused_before_the_kernel_runs():
    operator, inputs = case(KINDS[0], 9, batch=1, packed=torch.tensor([0, 12]))
    with pytest.raises(ValueError, match="must rise from 0 to T = 9"):
        operator(**inputs, backend="native")

"""The kernel of the short causal convolution: the laws of all kernels."""

import functools

import kernel_laws as laws
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from everlong.ops import causal_conv1d
from everlong.ops.native.causal_conv1d import _backward, _forward

PACKED = torch.tensor([0, 0, 3, 4, 40, 42, 42, 70])
activated = functools.partial(causal_conv1d, activation="silu")


def inputs(length, channels, taps, dtype=torch.float32, batch=2, packed=None):
    return {
        "x": torch.randn(batch, length, channels).to(dtype),
        "weight": torch.randn(channels, taps),
        "bias": torch.randn(channels),
        "state": torch.randn(batch if packed is None else len(packed) - 1, taps - 1, channels),
        "cu_seqlens": packed,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [0, 1, 2, 3, 4, 63, 65, 300])
@pytest.mark.parametrize("channels", [3, 16, 37])
def test_the_reference_is_met(length, channels, dtype):
    laws.check(activated, inputs(length, channels, 4, dtype))


@pytest.mark.parametrize("length", [0, 1, 5, 40])
@pytest.mark.parametrize("taps", [1, 2, 3, 4, 5, 6, 7, 8, 31])
def test_any_number_of_taps(taps, length):
    laws.check(activated, inputs(length, 20, taps))
    laws.check(causal_conv1d, inputs(length, 20, taps) | {"bias": None})


def test_many_channels():
    laws.check(activated, inputs(9, 1100, 4))


@pytest.mark.parametrize("operator", [causal_conv1d, activated])
def test_packed_sequences(operator):
    laws.check(operator, inputs(70, 21, 4, batch=1, packed=PACKED))


@given(
    seed=st.integers(0, 1 << 30),
    channels=st.integers(1, 80),
    taps=st.integers(1, 9),
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=8),
)
@settings(max_examples=15, deadline=None, derandomize=True)
def test_any_packing(seed, channels, taps, lengths):
    torch.manual_seed(seed)
    packed = torch.tensor([0, *torch.tensor(lengths).cumsum(0)])
    laws.check(activated, inputs(sum(lengths), channels, taps, batch=1, packed=packed))


def test_types_may_be_mixed():
    given = inputs(33, 20, 4)
    laws.check(activated, given | {name: given[name].to(torch.bfloat16) for name in ("weight", "bias")}, bound=1e-2)


def test_neither_threads_nor_repetition_change_a_bit():
    laws.check_repeatable(activated, inputs(60, 150, 4, batch=3))
    laws.check_repeatable(activated, inputs(70, 70, 4, batch=1, packed=PACKED))


def test_numbers_may_lie_anywhere():
    given = inputs(33, 19, 4)
    apart = {name: laws.scattered(x) if x is not None and x.dim() > 1 else x for name, x in given.items()}
    laws.check(activated, apart)
    turned = {name: x.mT.contiguous().mT if x is not None and x.dim() > 1 else x for name, x in given.items()}
    laws.check(activated, turned)


@pytest.mark.parametrize("later", [float("nan"), float("inf")])
def test_what_comes_later_does_not_touch_what_was(later):
    given = inputs(40, 20, 4) | {"state": None}
    before, _ = activated(**given, backend="native")
    given["x"][:, 17:] = later
    assert torch.equal(activated(**given, backend="native")[0][:, :17], before[:, :17])


def test_torch_knows_the_operators():
    given = inputs(9, 5, 4)
    leaves = [given[name].requires_grad_() for name in ("x", "weight", "bias", "state")]
    y, last = (x.detach() for x in _forward(*leaves, None, True))
    constants = [x.detach() for x in leaves]
    torch.library.opcheck(_forward, (*leaves, None, True))
    torch.library.opcheck(_backward, (*constants, None, y, last, True))
    x, weight, _, state = leaves
    torch.library.opcheck(_forward, (x, weight, None, state, None, False))


def test_bad_bounds_are_refused_before_the_kernel_runs():
    given = inputs(9, 5, 4, batch=1, packed=torch.tensor([0, 12]))
    with pytest.raises(ValueError, match="must rise from 0 to T = 9"):
        activated(**given, backend="native")

"""The kernel of the selective scan: the laws of all kernels."""

import functools
import subprocess
import sys

import kernel_laws as laws
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from everlong.ops import selective_scan
from everlong.ops.native.selective_scan import _backward, _forward

PACKED = torch.tensor([0, 0, 3, 4, 40, 42, 42, 70])
scan = functools.partial(selective_scan, dt_softplus=True)


def inputs(length, channels, states, dtype=torch.float32, batch=2, packed=None, bare=False):
    def normal(*shape):
        return torch.randn(*shape).to(dtype)

    given = {
        "u": normal(batch, length, channels),
        "dt": normal(batch, length, channels),
        "A": -torch.rand(channels, states) * 4,
        "B": normal(batch, length, states),
        "C": normal(batch, length, states),
        "initial_state": torch.randn(batch if packed is None else len(packed) - 1, channels, states),
        "cu_seqlens": packed,
    }
    if bare:
        return given
    return given | {"D": torch.randn(channels), "z": normal(batch, length, channels), "dt_bias": torch.randn(channels)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [0, 1, 2, 15, 16, 17, 63, 65, 300])
@pytest.mark.parametrize("channels", [3, 16, 37])
def test_the_reference_is_met(length, channels, dtype):
    laws.check(scan, inputs(length, channels, 16, dtype))


@pytest.mark.parametrize("states", [1, 2, 3, 7, 8, 13, 17, 33, 64, 128])
def test_any_number_of_states(states):
    laws.check(scan, inputs(35, 20, states))
    laws.check(scan, inputs(35, 1, states))


def test_many_groups_of_channels():
    laws.check(scan, inputs(40, 150, 5))
    laws.check(scan, inputs(20, 1100, 3))


def test_nothing_but_what_is_needed():
    laws.check(selective_scan, inputs(40, 20, 4, bare=True) | {"dt": torch.rand(2, 40, 20)})


def test_packed_sequences():
    laws.check(scan, inputs(70, 21, 5, batch=1, packed=PACKED))


@given(
    seed=st.integers(0, 1 << 30),
    channels=st.integers(1, 80),
    states=st.integers(1, 40),
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@settings(max_examples=15, deadline=None, derandomize=True)
def test_any_packing(seed, channels, states, lengths, dtype):
    torch.manual_seed(seed)
    packed = torch.tensor([0, *torch.tensor(lengths).cumsum(0)])
    laws.check(scan, inputs(sum(lengths), channels, states, dtype, batch=1, packed=packed))


def test_types_may_be_mixed():
    given = inputs(33, 20, 5)
    half = {"u", "B", "z", "D", "A"}
    mixed = {name: x.to(torch.bfloat16) if name in half else x for name, x in given.items()}
    laws.check(scan, mixed)
    laws.check(scan, given | {name: given[name].to(torch.bfloat16) for name in ("dt", "C", "dt_bias")}, bound=1e-2)


@pytest.mark.parametrize("scale", [0.0, 1e-3, 30.0, 1e4])
def test_decays_of_any_strength(scale):
    given = inputs(50, 20, 5, bare=True)
    laws.check(selective_scan, given | {"dt": torch.rand(2, 50, 20) * 0.5, "A": given["A"] * scale})


def test_states_may_grow():
    given = inputs(50, 20, 5, bare=True)
    laws.check(selective_scan, given | {"dt": torch.rand(2, 50, 20) * 0.5, "A": -given["A"]})


def test_neither_threads_nor_repetition_change_a_bit():
    laws.check_repeatable(scan, inputs(60, 150, 5, batch=1))
    laws.check_repeatable(scan, inputs(70, 70, 5, batch=1, packed=PACKED))


def test_numbers_may_lie_anywhere():
    given = inputs(33, 19, 5)
    apart = {name: laws.scattered(x) if x is not None and x.dim() > 1 else x for name, x in given.items()}
    laws.check(scan, apart)
    turned = {name: x.mT.contiguous().mT if x is not None and x.dim() > 1 else x for name, x in given.items()}
    laws.check(scan, turned)


def test_without_gradients_nothing_is_kept():
    given = inputs(33, 19, 5)
    kept = [
        torch.equal(x, y)
        for x, y in zip(scan(**given), scan(**given | {"u": given["u"].requires_grad_()}), strict=True)
    ]
    assert kept == [True, True]


def test_torch_knows_the_operators():
    given = inputs(20, 7, 3)
    names = ("u", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state")
    leaves = [given[name].requires_grad_() for name in names]
    torch.library.opcheck(_forward, (*leaves, None, True, True))
    y, last, before = (x.detach() for x in _forward(*leaves, None, True, True))
    constants = [x.detach() for x in leaves[:8]]
    torch.library.opcheck(_backward, (*constants, before, None, y, last, True, 2))
    bare = [None if name in {"D", "z", "dt_bias"} else x for name, x in zip(names, leaves, strict=True)]
    torch.library.opcheck(_forward, (*bare, None, False, True))


COMPILED = """
import torch
from everlong.ops import causal_conv1d, linear_scan, selective_scan, use_backend

def everything(x, dt, A, B, C, weight, bias, bounds):
    x, after = causal_conv1d(x, weight, bias=bias, activation="silu", cu_seqlens=bounds)
    y, state = selective_scan(x, dt, -A.exp(), B, C, D=bias, z=x, dt_bias=bias, dt_softplus=True, cu_seqlens=bounds)
    h, last = linear_scan(torch.sigmoid(dt), y, cu_seqlens=bounds)
    return h.square().sum() + after.sum() + state.sum() + last.sum()

torch.manual_seed(0)
compiled = torch.compile(everything, backend="aot_eager", fullgraph=True)
with use_backend("native"):
    for T, bounds in ((70, [0, 40, 41, 70]), (33, None)):
        shapes = (1, T, 8), (1, T, 8), (8, 4), (1, T, 4), (1, T, 4), (8, 3), (8,)
        inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
        bounds = None if bounds is None else torch.tensor(bounds)
        results = [(y, *torch.autograd.grad(y, inputs)) for y in (f(*inputs, bounds) for f in (compiled, everything))]
        torch.testing.assert_close(*results)
"""


def test_under_compile():
    # In a process of its own, as beartype's checks cannot be compiled.
    subprocess.run([sys.executable, "-c", COMPILED], check=True, timeout=300)


def test_bad_bounds_are_refused_before_the_kernel_runs():
    given = inputs(9, 5, 2, batch=1, packed=torch.tensor([0, 12]))
    with pytest.raises(ValueError, match="must rise from 0 to T = 9"):
        scan(**given, backend="native")

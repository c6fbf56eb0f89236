"""Scans and convolutions: their backends agree, and each agrees with somebody else's; then the laws that all keep."""

import importlib.util
import inspect
import itertools
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from everlong.ops import convolution, scan_chunk
from everlong.ops.scan import (
    causal_conv1d,
    linear_scan,
    long_convolution,
    selective_scan,
    sliding_window_max,
)

LENGTHS = [0, 1, 2, 63, 65, 300]
PACKED = [0, 0, 3, 4, 40, 42, 42, 70]  # sequences of 0, 3, 1, 36, 2, 0 and 28 tokens
D, N, W = 3, 2, 4


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@dataclass(frozen=True)
class Case:
    """One operator with all its options: what goes along time, what does not, and its state."""

    call: Callable
    sequences: dict[str, Callable[[int, int], torch.Tensor]]
    constants: dict[str, Callable[[], torch.Tensor]]
    state: tuple[int, ...]
    state_name: str = "initial_state"

    def inputs(self, B, T):
        """Everything that has a gradient, by name, with the state of `B` sequences."""
        made = {name: make(B, T) for name, make in self.sequences.items()}
        made |= {name: make() for name, make in self.constants.items()} | {"state": normal(B, *self.state)}
        return {name: x.requires_grad_() for name, x in made.items()}

    def __call__(self, inputs, **options):
        state = {self.state_name: inputs["state"]} if inputs.get("state") is not None else {}
        return self.call(**{name: x for name, x in inputs.items() if name != "state"}, **state, **options)

    def cut(self, inputs, time, state):
        """The same at some of the times, from another state."""
        return {name: x[:, time] if name in self.sequences else x for name, x in inputs.items()} | {"state": state}


def plain(B, T):
    return normal(B, T, D)


def steps(B, T):
    return torch.rand(B, T, D, dtype=torch.float64)


def projections(B, T):
    return normal(B, T, N)


def channels():
    return normal(D)


CASES = {
    "linear": Case(linear_scan, {"a": lambda B, T: normal(B, T, D).tanh(), "b": plain}, {}, (D,)),
    "complex": Case(
        linear_scan,
        {"a": lambda B, T: normal(B, T, D, 2).tanh() / 1.5, "b": lambda B, T: normal(B, T, D, 2)},
        {},
        (D, 2),
    ),
    "selective": Case(
        lambda **inputs: selective_scan(dt_softplus=True, **inputs),
        {"u": plain, "dt": plain, "B": projections, "C": projections, "z": plain},
        {"A": lambda: -torch.rand(D, N, dtype=torch.float64), "D": channels, "dt_bias": channels},
        (D, N),
    ),
    "bare selective": Case(
        selective_scan,
        {"u": plain, "dt": steps, "B": projections, "C": projections},
        {"A": lambda: -torch.rand(D, N, dtype=torch.float64)},
        (D, N),
    ),
    "conv": Case(
        lambda **inputs: causal_conv1d(activation="silu", **inputs),
        {"x": plain},
        {"weight": lambda: normal(D, W), "bias": channels},
        (W - 1, D),
        "state",
    ),
    "bare conv": Case(causal_conv1d, {"x": plain}, {"weight": lambda: normal(D, W)}, (W - 1, D), "state"),
    "one tap": Case(causal_conv1d, {"x": plain}, {"weight": lambda: normal(D, 1)}, (0, D), "state"),
}

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
every_backend = pytest.mark.parametrize("backend", ["torch", "reference"])


@pytest.fixture(params=["default sizes", "smallest sizes"])
def sizes(request, monkeypatch):
    """The fast forms in pieces as they come, and in as many as possible."""
    if request.param == "smallest sizes":
        monkeypatch.setattr(scan_chunk, "STEP", 2 * D)
        monkeypatch.setattr(scan_chunk, "PIECE", 1)
        monkeypatch.setattr(convolution, "BLOCK", 5 * D)
        monkeypatch.setattr(convolution, "SPECTRUM", 1)


def gradients(outputs, inputs):
    """Of some fixed combination of all outputs, for all inputs."""
    torch.manual_seed(1)
    total = sum((x * torch.randn(x.shape, dtype=x.dtype)).sum() for x in outputs)
    found = torch.autograd.grad(total, list(inputs.values()), retain_graph=True, materialize_grads=True)
    return dict(zip(inputs, found, strict=True))


def same(found, expected, inputs, tolerance=1e-10):
    """The outputs and the gradients of all inputs agree."""
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    pair = gradients(found, inputs), gradients(expected, inputs)
    torch.testing.assert_close(*pair, rtol=tolerance, atol=tolerance)


@every_case
@pytest.mark.parametrize("T", LENGTHS)
def test_backends_agree(case, T, sizes):
    inputs = case.inputs(2, T)
    same(case(inputs, backend="torch"), case(inputs, backend="reference"), inputs)


@every_case
def test_backends_agree_without_a_state(case):
    inputs = {name: x for name, x in case.inputs(2, 20).items() if name != "state"}
    same(case(inputs, backend="torch"), case(inputs, backend="reference"), inputs)


@every_case
@every_backend
def test_packed_is_separate(case, backend, sizes):
    T, count = PACKED[-1], len(PACKED) - 1
    inputs = case.inputs(1, T) | {"state": normal(count, *case.state).requires_grad_()}
    found = case(inputs, cu_seqlens=torch.tensor(PACKED), backend=backend)
    pieces = [
        case(case.cut(inputs, slice(PACKED[n], PACKED[n + 1]), inputs["state"][n : n + 1]), backend=backend)
        for n in range(count)
    ]
    outputs, states = zip(*pieces, strict=True)
    same(found, (torch.cat(outputs, 1), torch.cat(states)), inputs)


@every_case
@every_backend
@pytest.mark.parametrize("T", [0, 1, 5])
def test_a_packed_row_may_be_one_sequence_or_none_but_empty_ones(case, backend, T):
    inputs = case.inputs(1, T)
    same(case(inputs, cu_seqlens=torch.tensor([0, T]), backend=backend), case(inputs, backend=backend), inputs)


@every_case
@every_backend
@pytest.mark.parametrize("cut", [0, 1, 2, 3, 37, 66, 69, 70])
def test_the_state_continues(case, backend, cut, sizes):
    inputs = case.inputs(2, 70)
    first, state = case(case.cut(inputs, slice(0, cut), inputs["state"]), backend=backend)
    second, state = case(case.cut(inputs, slice(cut, None), state), backend=backend)
    same((torch.cat([first, second], 1), state), case(inputs, backend=backend), inputs)


@every_case
@every_backend
def test_the_future_leaves_the_past_bit_for_bit(case, backend):
    inputs = case.inputs(2, 90)
    before = case(inputs, backend=backend)[0]
    for t in (1, 37, 89):
        changed = {name: x.detach().clone() for name, x in inputs.items()}
        for name in case.sequences:
            changed[name][:, t:] = torch.nan
        assert torch.equal(case(changed, backend=backend)[0][:, :t], before[:, :t])


@every_case
def test_sequences_do_not_touch_each_other(case):
    bounds = torch.tensor([0, 20, 45, 60])
    inputs = case.inputs(1, 60) | {"state": normal(3, *case.state).requires_grad_()}
    before, states = case(inputs, cu_seqlens=bounds)
    changed = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    with torch.no_grad():
        for name in case.sequences:
            changed[name][:, 20:45] = torch.nan
    after, others = case(changed, cu_seqlens=bounds)
    kept = [*range(20), *range(45, 60)]
    assert torch.equal(before[:, kept], after[:, kept])
    assert torch.equal(states[[0, 2]], others[[0, 2]])
    found, expected = (gradients((y[:, kept],), x) for y, x in ((after, changed), (before, inputs)))
    for name in case.sequences:
        assert torch.equal(found[name][:, kept], expected[name][:, kept])


@every_case
def test_rows_do_not_touch_each_other(case, sizes):
    inputs = case.inputs(3, 40)
    whole = case(inputs)
    for row in range(3):
        alone = {name: x if name in case.constants else x[row : row + 1] for name, x in inputs.items()}
        for found, expected in zip(case(alone), whole, strict=True):
            torch.testing.assert_close(found, expected[row : row + 1], rtol=1e-12, atol=1e-12)


@every_case
def test_any_strides(case):
    inputs = case.inputs(2, 17)
    odd = {}
    for name, x in inputs.items():
        kept = x[:, :1].expand_as(x) if name in case.sequences and name != "b" else x
        odd[name] = kept.movedim(-1, 0).contiguous().movedim(0, -1) if kept is x else kept
    dense = {name: x.contiguous() for name, x in odd.items()}
    same(case(odd), case(dense), inputs)


@every_case
@pytest.mark.parametrize("packed", [None, [0, 2, 2, 7]], ids=["batch", "packed"])
def test_gradients_are_those_of_finite_differences(case, packed):
    inputs = case.inputs(2 if packed is None else 1, 7)
    options = {}
    if packed is not None:
        inputs["state"] = normal(3, *case.state).requires_grad_()
        options = {"cu_seqlens": torch.tensor(packed)}
    names = list(inputs)
    torch.autograd.gradcheck(
        lambda *tensors: case(dict(zip(names, tensors, strict=True)), **options), list(inputs.values()), eps=1e-6
    )


@every_case
def test_second_derivatives_are_refused_by_name(case):
    inputs = case.inputs(1, 5)
    y = case(inputs)[0]
    name = next(iter(case.sequences))
    (gradient,) = torch.autograd.grad(y.square().sum(), inputs[name], create_graph=True)
    with pytest.raises(RuntimeError, match=r"everlong.*backward.*no autograd formula"):
        gradient.sum().backward()


@every_case
@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(case, backend, dtype):
    inputs = {name: x.detach().to(dtype).requires_grad_() for name, x in case.inputs(2, 70).items()}
    outputs = case(inputs, backend=backend)
    wide = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    expected = case(wide, backend="reference")
    assert [x.dtype for x in outputs] == [dtype, torch.float32]
    exact = 1e-5
    rounding = exact + torch.finfo(dtype).eps
    torch.testing.assert_close(outputs[0].double(), expected[0], rtol=rounding, atol=exact)
    torch.testing.assert_close(outputs[1].double(), expected[1], rtol=exact, atol=exact)
    found, wanted = gradients([x.double() for x in outputs], inputs), gradients(expected, wide)
    for name, x in found.items():
        assert x.dtype == dtype
        error = (x.double() - wanted[name]).norm() / (1e-9 + wanted[name].norm())
        assert error < 2 * rounding, name


@every_case
def test_autocast_leaves_the_arithmetic_alone(case):
    inputs = {name: x.detach().float().requires_grad_() for name, x in case.inputs(2, 70).items()}
    expected = case(inputs)
    with torch.autocast("cpu", torch.bfloat16):
        found = case(inputs)
        pair = gradients(found, inputs), gradients(expected, inputs)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert all(torch.equal(x, pair[1][name]) for name, x in pair[0].items())


@every_case
def test_a_call_changes_none_of_its_inputs(case):
    inputs = case.inputs(2, 30)
    before = {name: x.detach().clone() for name, x in inputs.items()}
    gradients(case(inputs), inputs)
    assert all(torch.equal(x, before[name]) for name, x in inputs.items())


def test_the_memory_is_linear_and_not_that_of_all_states():
    size, B, T, N = 64, 2, 2048, 32
    tensors = [
        torch.rand(*shape, requires_grad=True)
        for shape in ((B, T, size), (B, T, size), (size, N), (B, T, N), (B, T, N))
    ]
    biggest = 0

    def seen(x):
        nonlocal biggest
        biggest = max(biggest, x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(seen, lambda x: x):
        selective_scan(*tensors)[0].sum().backward()
    assert biggest <= B * T * size


# Somebody else's.


def fla_naive(path):
    """A module of fla-core loaded by its path, as the package itself needs triton."""
    package = importlib.util.find_spec("fla")
    if package is None:
        pytest.skip("needs fla-core: pip install --no-deps fla-core")
    place = Path(package.submodule_search_locations[0]) / path
    spec = importlib.util.spec_from_file_location(place.stem, place)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("T", [1, 2, 63, 65, 300])
def test_linear_scan_against_fla(T):
    naive = fla_naive("ops/hgrn/naive.py").naive_recurrent_hgrn
    log_decay, x = F.logsigmoid(torch.randn(2, T, D)).requires_grad_(), torch.randn(2, T, D).requires_grad_()
    state = torch.randn(2, D).requires_grad_()
    inputs = {"log_decay": log_decay, "x": x, "state": state}
    found = linear_scan(log_decay.exp(), x, initial_state=state)
    same(found, naive(x, log_decay, initial_state=state, output_final_state=True), inputs, tolerance=2e-5)


@every_backend
@pytest.mark.parametrize("kind", [torch.float64, torch.complex128], ids=["real", "complex"])
def test_linear_scan_is_a_triangular_matrix(backend, kind):
    """h = L [h_0 ; b] with L_ts = a_{s+1} ... a_t, over gates that are 0, negative, above 1."""
    T = 40
    gates = torch.randn(1, T, D, dtype=kind)
    gates[0, 7] = 0
    gates[0, 20, 0] = 3
    a, b, state = (x.requires_grad_() for x in (gates, torch.randn(1, T, D, dtype=kind), torch.randn(1, D, dtype=kind)))
    products = [torch.stack([a[0, s + 1 : t + 1].prod(0) for s in range(-1, t + 1)]) for t in range(T)]
    everything = torch.cat([state, b[0]])
    expected = torch.stack([(row * everything[: len(row)]).sum(0) for row in products])[None]
    pairs = torch.view_as_real if kind.is_complex else torch.clone
    found = linear_scan(pairs(a), pairs(b), initial_state=pairs(state), backend=backend)
    same(found, (pairs(expected), pairs(expected[:, -1])), {"a": a, "b": b, "state": state})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("T", [1, 2, 63, 65, 300])
def test_selective_scan_against_transformers(T, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    mamba = pytest.importorskip("transformers.models.mamba.modeling_mamba", reason="pip install transformers")
    u, dt, z = (torch.randn(2, T, D).requires_grad_() for _ in range(3))
    B, C = (torch.randn(2, T, N).requires_grad_() for _ in range(2))
    A, skip, bias = (
        (-torch.rand(D, N)).requires_grad_(),
        torch.randn(D).requires_grad_(),
        torch.randn(D).requires_grad_(),
    )
    inputs = {"u": u, "dt": dt, "z": z, "B": B, "C": C, "A": A, "skip": skip, "bias": bias}
    y, state = mamba.mamba_selective_scan(
        *(x.mT if x.dim() == 3 else x for x in (u, dt, A, B, C)),
        D=skip,
        z=z.mT,
        delta_bias=bias,
        delta_softplus=True,
        return_last_state=True,
    )
    found = selective_scan(u, dt, A, B, C, D=skip, z=z, dt_bias=bias, dt_softplus=True)
    same(found, (y.mT, state), inputs, tolerance=1e-4)


@every_backend
@pytest.mark.parametrize("taps", [1, 2, 4, 7])
@pytest.mark.parametrize("T", [1, 2, 65])
def test_causal_conv1d_against_torch(backend, taps, T):
    x, weight, bias = normal(2, T, D), normal(D, taps), normal(D)
    inputs = {"x": x, "weight": weight, "bias": bias, "state": normal(2, taps - 1, D)}
    for tensor in inputs.values():
        tensor.requires_grad_()
    whole = torch.cat([inputs["state"], x], 1)
    expected = F.silu(F.conv1d(whole.mT, weight[:, None], bias, groups=D)).mT
    found = causal_conv1d(x, weight, bias=bias, activation="silu", state=inputs["state"], backend=backend)
    same(found, (expected, whole[:, T:]), inputs)


@pytest.mark.parametrize("taps", [1, 5, 65, 80])
@pytest.mark.parametrize("T", [0, 1, 2, 65])
def test_long_convolution_against_torch(T, taps, sizes):
    u, kernel = normal(2, T, D).requires_grad_(), normal(D, taps).requires_grad_()
    expected = F.conv1d(F.pad(u.mT, (taps - 1, 0)), kernel.flip(1)[:, None], groups=D).mT if T else u
    found = long_convolution(u, kernel)
    if T:
        same((found,), (expected,), {"u": u, "kernel": kernel})
    assert found.shape == expected.shape


@every_backend
def test_long_convolution_with_powers_is_a_scan(backend):
    T, decay = 100, torch.rand(D, dtype=torch.float64)
    u = normal(2, T, D)
    kernel = decay[:, None] ** torch.arange(T)
    torch.testing.assert_close(
        long_convolution(u, kernel), linear_scan(decay.expand(2, T, D), u, backend=backend)[0], rtol=1e-10, atol=1e-10
    )


# Laws of one operator.


def test_long_convolution_packed_is_separate():
    u, kernel = normal(1, PACKED[-1], D).requires_grad_(), normal(D, 20).requires_grad_()
    pieces = [long_convolution(u[:, a:b], kernel) for a, b in itertools.pairwise(PACKED)]
    found = long_convolution(u, kernel, cu_seqlens=torch.tensor(PACKED))
    same((found,), (torch.cat(pieces, 1),), {"u": u, "kernel": kernel})


def test_long_convolution_is_causal_and_checks_by_differences():
    u, kernel = normal(2, 100, D), normal(D, 100)
    before, changed = long_convolution(u, kernel), u.clone()
    changed[:, 50:] = normal(2, 50, D)
    after = long_convolution(changed, kernel)
    assert (after - before)[:, :50].abs().max() < 1e-12 * before.abs().max()
    torch.autograd.gradcheck(long_convolution, (normal(2, 6, 2).requires_grad_(), normal(2, 4).requires_grad_()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_convolution_keeps_the_dtype(dtype):
    u, kernel = normal(2, 40, D).to(dtype).requires_grad_(), normal(D, 40).to(dtype).requires_grad_()
    y = long_convolution(u, kernel)
    expected = long_convolution(u.double(), kernel.double())
    gradient = torch.autograd.grad(y.sum(), [u, kernel])
    assert {x.dtype for x in (y, *gradient)} == {dtype}
    torch.testing.assert_close(y.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-4)


@every_backend
def test_gates_that_overflow_multiplied_do_no_harm_to_nothing(backend):
    """Products of these gates leave float32 within a few steps; the states, which are 0 where they grow, do not."""
    T = 256
    a, b = torch.full((1, T, D), 1e5), torch.zeros(1, T, D)
    a[:, 100:] = 0.5
    b[:, 99:] = 1.0
    h, last = linear_scan(a, b, backend=backend)
    assert torch.equal(h[:, :99], torch.zeros(1, 99, D))
    torch.testing.assert_close(last, torch.full((1, D), 2.0))


@pytest.mark.parametrize("decay", [1e-8, 1e-3, 0.5, 0.999, 1.0])
def test_linear_scan_is_exact_for_any_decay(decay):
    a, b = torch.full((1, 500, D), decay), torch.randn(1, 500, D)
    expected = linear_scan(a.double(), b.double(), backend="reference")
    for found, wanted in zip(linear_scan(a, b), expected, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("step", [0.0, 1e-4, 5.0, 50.0])
def test_selective_scan_is_exact_for_any_step(step):
    B, C = torch.randn(1, 80, N), torch.randn(1, 80, N)
    inputs = torch.randn(1, 80, D), torch.full((1, 80, D), step), -16 * torch.rand(D, N), B, C
    expected = selective_scan(*(x.double() for x in inputs), backend="reference")
    for found, wanted in zip(selective_scan(*inputs), expected, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=2e-5, atol=2e-5 * (1 + step))


def test_short_sequences_leave_parts_of_the_state_that_was_given():
    x, state = torch.arange(1.0, 4.0).view(1, 3, 1), torch.tensor([-3.0, -2.0, -1.0]).view(1, 3, 1).repeat(3, 1, 1)
    last = causal_conv1d(x, torch.ones(1, 4), state=state, cu_seqlens=torch.tensor([0, 1, 1, 3]))[1]
    assert last[:, :, 0].tolist() == [[-2, -1, 1], [-3, -2, -1], [-1, 2, 3]]


# The maximum of a window.


@pytest.mark.parametrize("window", [1, 2, 3, 5, 9, 10])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.int8, torch.uint8])
def test_window_maximum_against_unfold(window, dtype):
    x = (20 * torch.rand(4, 10)).to(dtype)
    assert torch.equal(sliding_window_max(x, window), x.unfold(-1, window, 1).amax(-1))
    assert torch.equal(sliding_window_max(x.T, window, dim=0), x.T.unfold(0, window, 1).amax(-1))


def test_window_maximum_of_extremes():
    x = torch.tensor([-torch.inf, -torch.inf, 1.0, torch.nan, 2.0, 5.0, torch.inf, -1.0, -2.0])
    torch.testing.assert_close(sliding_window_max(x, 2), x.unfold(0, 2, 1).amax(-1), equal_nan=True, rtol=0, atol=0)
    low = torch.full((7,), torch.iinfo(torch.int32).min, dtype=torch.int32)
    assert torch.equal(sliding_window_max(low, 3), low[:5])
    negative = -torch.rand(11)
    assert torch.equal(sliding_window_max(negative, 4), negative.unfold(0, 4, 1).amax(-1))


def test_window_maximum_has_gradients():
    x = torch.randperm(30).double().view(2, 15).requires_grad_()
    found, expected = sliding_window_max(x, 4), x.unfold(-1, 4, 1).amax(-1)
    same((found,), (expected,), {"x": x})


@pytest.mark.parametrize("window", [0, -1, 6])
def test_window_maximum_of_too_much(window):
    with pytest.raises(ValueError, match=f"between 1 and the 5 numbers along axis -1: got {window}"):
        sliding_window_max(torch.zeros(2, 5), window)


# How they are called.


COMPILED = """
import torch
from everlong.ops.scan import causal_conv1d, linear_scan, long_convolution, selective_scan, sliding_window_max

def everything(x, dt, A, B, C, weight, bias, bounds):
    x, after = causal_conv1d(x, weight, bias=bias, activation="silu", cu_seqlens=bounds)
    y, state = selective_scan(x, dt, A, B, C, D=bias, z=x, dt_bias=bias, dt_softplus=True, cu_seqlens=bounds)
    h, last = linear_scan(torch.sigmoid(dt), y, cu_seqlens=bounds)
    pairs, _ = linear_scan(torch.stack([dt, -dt], -1).tanh() / 2, torch.stack([y, y], -1), cu_seqlens=bounds)
    z = long_convolution(h + pairs.sum(-1), weight, cu_seqlens=bounds)
    return (z.square().sum() + sliding_window_max(z, 5, dim=1).sum() + after.sum() + state.sum() + last.sum())

torch.manual_seed(0)
compiled = torch.compile(everything, backend="aot_eager")
for T, bounds in ((70, [0, 40, 41, 70]), (33, None)):
    shapes = (1, T, 8), (1, T, 8), (8, 4), (1, T, 4), (1, T, 4), (8, 3), (8,)
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    bounds = None if bounds is None else torch.tensor(bounds)
    results = [(y, *torch.autograd.grad(y, inputs)) for y in (f(*inputs, bounds) for f in (compiled, everything))]
    torch.testing.assert_close(*results)
"""


def test_under_compile():
    # In a process of its own, as beartype's checks cannot be compiled. The warning is torch's, at any break of a graph.
    options = ["-W", "error", "-W", "ignore:The .grad attribute of a Tensor"]
    subprocess.run([sys.executable, *options, "-c", COMPILED], check=True, timeout=300)


BAD = {
    "a of another shape": (linear_scan, {"a": (2, 5, 4), "b": (2, 5, 3)}, {}, "`a` and `b` are both"),
    "triples": (
        linear_scan,
        {"a": (2, 5, 4, 3), "b": (2, 5, 4, 3)},
        {},
        r"\[B, T, D, 2\] if complex: got \[2, 5, 4, 3\]",
    ),
    "state": (
        linear_scan,
        {"a": (2, 5, 4), "b": (2, 5, 4), "initial_state": (1, 4)},
        {},
        r"`initial_state` must be \[2, 4\] here: got \[1, 4\]",
    ),
    "backend": (linear_scan, {"a": (2, 5, 4), "b": (2, 5, 4)}, {"backend": "torsh"}, "Nearest: `torch`"),
    "packed batch": (
        linear_scan,
        {"a": (2, 5, 4), "b": (2, 5, 4)},
        {"cu_seqlens": torch.tensor([0, 5])},
        "one row, B = 1: got a batch of 2",
    ),
    "no bounds": (linear_scan, {"a": (1, 5, 4), "b": (1, 5, 4)}, {"cu_seqlens": torch.tensor([5])}, r"N \+ 1 integers"),
    "A": (
        selective_scan,
        {"u": (1, 5, 4), "dt": (1, 5, 4), "A": (3, 2), "B": (1, 5, 2), "C": (1, 5, 2)},
        {},
        r"`A` is \[D, N\].*got u \[1, 5, 4\], dt \[1, 5, 4\], A \[3, 2\]",
    ),
    "dt": (
        selective_scan,
        {"u": (1, 5, 4), "dt": (1, 5, 1), "A": (4, 2), "B": (1, 5, 2), "C": (1, 5, 2)},
        {},
        r"`u`, `dt` and `z` are all \[B, T, D\]",
    ),
    "skip": (
        selective_scan,
        {"u": (1, 5, 4), "dt": (1, 5, 4), "A": (4, 2), "B": (1, 5, 2), "C": (1, 5, 2), "D": (3,)},
        {},
        r"`D` has a number for each channel, \[4\]: got \[3\]",
    ),
    "weight": (
        causal_conv1d,
        {"x": (1, 5, 4), "weight": (3, 4)},
        {},
        r"`weight` \[D, W\], W at least 1: got \[1, 5, 4\]",
    ),
    "activation": (causal_conv1d, {"x": (1, 5, 4), "weight": (4, 4)}, {"activation": "silo"}, "Nearest: `silu`"),
    "window": (
        causal_conv1d,
        {"x": (1, 5, 4), "weight": (4, 4), "state": (1, 4, 4)},
        {},
        r"`state` must be \[1, 3, 4\]",
    ),
    "kernel": (long_convolution, {"u": (1, 5, 4), "kernel": (3, 5)}, {}, r"`kernel` \[D, L\]"),
}


@pytest.mark.parametrize(("call", "shapes", "options", "message"), BAD.values(), ids=BAD)
def test_errors_in_one_line(call, shapes, options, message):
    tensors = {name: torch.zeros(shape) for name, shape in shapes.items()}
    # What a user meets who runs without the checks of shapes that the tests run under.
    with pytest.raises(ValueError, match=message) as caught:
        inspect.unwrap(call)(**tensors, **options)
    assert "\n" not in str(caught.value)


@every_case
@every_backend
@pytest.mark.parametrize("bounds", [[0, 4], [1, 5], [0, 3, 2, 5], [0, 6]])
def test_bounds_that_do_not_fit(case, backend, bounds):
    inputs = case.inputs(1, 5) | {"state": None}
    with pytest.raises(ValueError, match="`cu_seqlens` must rise from 0 to T = 5: got"):
        case(inputs, cu_seqlens=torch.tensor(bounds), backend=backend)

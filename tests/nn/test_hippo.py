"""HiPPO against integrals: what its numbers are projections of, and how well a signal comes back from them."""

import math

import numpy as np
import pytest
import torch

from everlong.nn import hippo
from everlong.nn.hippo import Memory

pytest.importorskip("scipy", reason="pip install scipy")
import scipy.linalg
import scipy.signal
import scipy.special

RULES = {"forward": "euler", "backward": "backward_diff", "bilinear": "bilinear", "zoh": "zoh"}


def band_limited(length, cycles=4):
    """A sum of sines of at most so many periods over the whole length, at the middle of each sample's interval."""
    s = (torch.arange(length, dtype=torch.float64) + 0.5) / length
    return sum(torch.sin(2 * math.pi * k * s + k * k) / k for k in range(1, cycles + 1))


def legendre(n, s):
    return np.sqrt(2 * n + 1) * scipy.special.eval_legendre(n, 2 * s - 1)


def projected(measure, order, u, t, window):
    """The integrals that define the coefficients at time t, of a function u."""
    if measure == "lagt":
        s, weights = scipy.special.roots_laguerre(order + 8)
        values = [scipy.special.eval_laguerre(n, s) for n in range(order)]
        return np.array([np.sum(weights * u(t - s * window) * value) for value in values])
    s, weights = scipy.special.roots_legendre(order + 8)
    s, weights = (s + 1) / 2, weights / 2
    time = t * s if measure == "legs" else t - window * (1 - s)
    return np.array([np.sum(weights * u(time) * legendre(n, s)) for n in range(order)])


@pytest.mark.parametrize("measure", ["legs", "legt", "lagt"])
@pytest.mark.parametrize("order", [1, 2, 3, 8])
def test_the_matrices_move_the_projections_of_polynomials(measure, order):
    window, t, step = 2.5, 3.0, 1e-4
    made = {"legs": hippo.legs, "legt": hippo.legt, "lagt": hippo.lagt}[measure]
    A, B = made(order) if measure == "legs" else made(order, window)
    u = np.polynomial.Polynomial([0.3, -1.0, 0.5, 0.1][: order or 1])  # LegT knows what leaves for these only
    before, now, after = (projected(measure, order, u, time, window) for time in (t - step, t, t + step))
    slope = A.numpy() @ now + B.numpy() * u(t)
    np.testing.assert_allclose((after - before) / (2 * step), slope / t if measure == "legs" else slope, atol=1e-6)


@pytest.mark.parametrize(("alpha", "beta"), [(0.0, 0.0), (0.5, 1.0), (-0.5, 2.0)])
def test_laguerres_general_form(alpha, beta):
    """The impulse response is L_n^alpha(s) e^(-(1 + beta) s / 2) over the polynomials' norms."""
    order = 6
    A, B = hippo.lagt(order, 2.0, alpha=alpha, beta=beta)
    n = np.arange(order)
    norm = np.sqrt(scipy.special.gamma(n + alpha + 1) / scipy.special.gamma(n + 1))
    for s in (0.0, 0.3, 2.0, 7.0):
        expected = scipy.special.eval_genlaguerre(n, alpha, s) * np.exp(-(1 + beta) * s / 2) / norm / 2.0
        # scipy 1.17's expm is some per cent off for this triangular matrix.
        np.testing.assert_allclose(torch.linalg.matrix_exp(A * s * 2.0) @ B, expected, atol=1e-12)
    with pytest.raises(ValueError, match="alpha=-1"):
        hippo.lagt(2, alpha=-1.0)


@pytest.mark.parametrize("order", [1, 2, 3, 64])
def test_legs_is_the_matrix_of_the_paper(order):
    A, B = hippo.legs(order)
    for n in range(order):
        assert B[n] == pytest.approx(math.sqrt(2 * n + 1))
        for k in range(order):
            expected = -math.sqrt((2 * n + 1) * (2 * k + 1)) if n > k else -(n + 1) if n == k else 0
            assert A[n, k] == pytest.approx(expected)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("measure", [hippo.legs, hippo.legt, hippo.lagt])
def test_discretisations_are_scipys(rule, measure):
    A, B = measure(12)
    found = hippo.discretize(A, B, 0.01, rule)
    system = (A.numpy(), B[:, None].numpy(), np.zeros((1, 12)), np.zeros((1, 1)))
    transition, entry, *_ = scipy.signal.cont2discrete(system, 0.01, method=RULES[rule])
    np.testing.assert_allclose(found[0], transition, atol=1e-12)
    np.testing.assert_allclose(found[1], entry[:, 0], atol=1e-12)


@pytest.mark.parametrize("order", [1, 5, 64])
@pytest.mark.parametrize("count", [1, 2, 1000])
def test_legs_exact_step_is_the_exponential(order, count):
    A, B = (x.numpy() for x in hippo.legs(order))
    transition, entry = hippo.stretched(order, count)
    exponential = scipy.linalg.expm(A * math.log((count + 1) / count))
    np.testing.assert_allclose(transition, exponential, atol=1e-12)
    np.testing.assert_allclose(entry, np.linalg.solve(A, (exponential - np.eye(order)) @ B), atol=1e-12)


def test_legs_is_the_projection_of_what_was_seen():
    order, length = 20, 150
    signal = torch.randn(length, dtype=torch.float64)
    now, trail = Memory(order).compress(signal)
    n = np.arange(order)
    for seen in (1, 2, 7, length):
        x = 2 * np.arange(seen + 1) / seen - 1  # the integral of P_n is (P_{n+1} - P_{n-1}) / (2 n + 1)
        high, low = (scipy.special.eval_legendre(m[:, None], x) for m in (n + 1, np.maximum(n - 1, 0)))
        low = np.where(n[:, None] == 0, -1.0, low)
        integral = np.diff(high - low) / (2 * n[:, None] + 1) / 2 * np.sqrt(2 * n[:, None] + 1)
        np.testing.assert_allclose(trail[seen - 1], integral @ signal[:seen].numpy(), atol=1e-12)
    assert torch.equal(now.values, trail[-1])


@pytest.mark.parametrize("measure", ["legs", "legt", "lagt"])
def test_a_signal_can_come_in_parts_and_in_batches(measure):
    memory = Memory(9, measure, window=20.0)
    signal = torch.randn(2, 3, 50, dtype=torch.float64)
    whole, trail = memory.compress(signal)
    part, first = memory.compress(signal[..., :17])
    nothing, empty = memory.compress(signal[..., :0], part)
    assert empty.shape == (2, 3, 0, 9)
    end, second = memory.compress(signal[..., 17:], nothing)
    torch.testing.assert_close(torch.cat([first, second], -2), trail, atol=1e-12, rtol=0)
    assert end.seen == whole.seen == 50
    alone, _ = memory.compress(signal[1, 2])
    torch.testing.assert_close(alone.values, whole.values[1, 2], atol=1e-12, rtol=0)
    assert memory.reconstruct(whole, 20).shape == (2, 3, 20)
    assert memory.reconstruct(memory.compress(signal[..., :0])[0], 0).shape == (2, 3, 0)


def error(memory, signal, length):
    kept, _ = memory.compress(signal)
    rebuilt = memory.reconstruct(kept, length)
    return ((rebuilt - signal[-length:]).square().mean() / signal[-length:].square().mean()).sqrt().item()


def test_legs_rebuilds_everything_better_with_more_numbers():
    signal = band_limited(1000)
    errors = [error(Memory(order), signal, 1000) for order in (4, 8, 16, 24)]
    assert errors == sorted(errors, reverse=True)
    # Beyond pi numbers a period the error falls faster than any power of N.
    for found, bound in zip(errors, (0.7, 0.25, 1e-2, 1e-4), strict=True):
        assert found < bound
    # What is left then is that the signal is no constant between samples: O(1 / T^2).
    assert error(Memory(24), band_limited(2000), 2000) < 0.3 * errors[-1]


def test_a_projection_is_never_longer_than_the_signal():
    """Bessel: the energy of what is rebuilt is at most that of the signal, whatever that is."""
    for order in (4, 32, 64):
        signal = torch.randn(5, 300, dtype=torch.float64)
        kept, _ = Memory(order).compress(signal)
        energy = signal.square().mean(-1)
        assert (kept.values.square().sum(-1) <= energy + 1e-12).all()


def test_legt_rebuilds_its_window_and_refuses_more():
    signal = band_limited(1000, cycles=8)
    errors = [error(Memory(order, "legt", window=250.0), signal, 250) for order in (4, 8, 16)]
    for found, bound in zip(errors, (0.4, 0.05, 1e-4), strict=True):
        assert found < bound
    kept, _ = Memory(8, "legt", window=250.0).compress(signal)
    with pytest.raises(ValueError, match="at most 250"):
        Memory(8, "legt", window=250.0).reconstruct(kept, 251)


def test_lagt_rebuilds_the_recent_past_best():
    signal = band_limited(2000, cycles=8)
    memory = Memory(24, "lagt", window=50.0)
    kept, _ = memory.compress(signal)
    wrong = (memory.reconstruct(kept, 400) - signal[-400:]).abs()
    assert wrong[-100:].max() < 0.02
    assert wrong[-100:].max() < wrong[:100].max()


@pytest.mark.parametrize(
    ("measure", "rule"),
    [("legs", "zoh"), *((measure, rule) for measure in ("legt", "lagt") for rule in ("backward", "bilinear", "zoh"))],
)
def test_a_constant_is_remembered_by_its_mean_alone(measure, rule):
    kept, _ = Memory(8, measure, window=100.0, rule=rule).compress(
        torch.full((300 if measure == "legs" else 4000,), 3.0, dtype=torch.float64)
    )
    torch.testing.assert_close(kept.values, torch.eye(8, dtype=torch.float64)[0] * 3.0, atol=1e-9, rtol=0)


@pytest.mark.parametrize("measure", ["legs", "legt"])
def test_the_rules_come_closer_to_the_exact_one_with_finer_samples(measure):
    """With twice the samples of the same signal, Euler's errors are halved, and LegT's bilinear ones quartered."""
    for rule in ("forward", "backward", "bilinear"):
        errors = []
        for length in (250, 500, 1000):
            signal = band_limited(length)
            window = length / 2
            exact, _ = Memory(6, measure, window).compress(signal)
            found, _ = Memory(6, measure, window, rule).compress(signal)
            errors.append((found.values - exact.values).abs().max().item())
        share = 0.7 if measure == "legs" else 0.27 if rule == "bilinear" else 0.52  # the first samples count in LegS
        assert errors[1] < share * errors[0]
        assert errors[2] < share * errors[1]


@pytest.mark.parametrize("order", [1, 2, 7, 64])
def test_legs_is_normal_plus_low_rank(order):
    A, B = hippo.legs(order)
    found = hippo.normal_plus_low_rank(order)
    eye = torch.eye(order, dtype=torch.complex128)
    torch.testing.assert_close(found.V.mH @ found.V, eye, atol=1e-12, rtol=0)
    middle = torch.diag(found.eigenvalues) - torch.outer(found.P, found.P.conj())
    torch.testing.assert_close(found.V @ middle @ found.V.mH, A + 0j, atol=1e-10, rtol=0)
    torch.testing.assert_close(found.V @ found.B, B + 0j, atol=1e-10, rtol=0)
    torch.testing.assert_close(found.eigenvalues.flip(0).conj(), found.eigenvalues, atol=1e-10, rtol=0)


def test_the_upper_half_is_all_of_a_real_system():
    """Twice the real part of one half is the sum over both."""
    order = 10
    A, B = hippo.legs(order)
    found = hippo.normal_plus_low_rank(order)
    C = torch.randn(order, dtype=torch.float64)
    half = slice(order // 2, None)
    whole = C @ torch.linalg.solve(torch.eye(order) * 2.0 - A, B)
    # The low-rank term joins the halves, so it is the normal part that is compared.
    p = (torch.arange(order, dtype=torch.float64) + 0.5).sqrt()
    normal = C @ torch.linalg.solve(torch.eye(order, dtype=torch.float64) * 2.0 - A - torch.outer(p, p), B)
    c = (C + 0j) @ found.V
    parts = (c * found.B / (2.0 - found.eigenvalues))[half]
    torch.testing.assert_close(2 * parts.real.sum(), normal, atol=1e-10, rtol=1e-10)
    assert abs(whole - normal) > 1e-3


def test_what_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="unknown rule `zho`. Nearest: `zoh`"):
        hippo.discretize(*hippo.legs(2), 0.1, "zho")
    with pytest.raises(ValueError, match="unknown measure `legx`"):
        Memory(4, "legx")
    with pytest.raises(ValueError, match="order=0"):
        Memory(0)
    with pytest.raises(ValueError, match="got 0"):
        hippo.legs(0)
    kept, _ = Memory(4).compress(torch.zeros(3, dtype=torch.float64))
    with pytest.raises(ValueError, match="at most 3"):
        Memory(4).reconstruct(kept, 4)

"""The linear recurrent unit: where its states turn, and that they neither explode nor fade at the start."""

import math

import pytest
import torch

from everlong.mixers.lru import LRU, Options


def eigenvalues(mixer):
    return torch.exp(torch.complex(-mixer.log_rate.exp(), mixer.log_phase.exp()))


@pytest.mark.parametrize(("low", "high", "phase"), [(0.0, 1.0, 2 * math.pi), (0.5, 0.6, 0.1), (0.99, 1.0, 1.0)])
def test_eigenvalues_begin_evenly_spread_over_the_ring(low, high, phase):
    found = eigenvalues(LRU(Options(width=2, state_size=20_000, min_radius=low, max_radius=high, max_phase=phase)))
    squared, angle = found.abs().square(), found.angle() % (2 * math.pi)
    assert low - 1e-6 <= found.abs().min() <= found.abs().max() <= high
    assert angle.max() <= phase
    for value, start, stop in ((squared, low**2, high**2), (angle, 0.0, phase)):
        shares = torch.histc((value - start) / (stop - start), bins=10, min=0.0, max=1.0) / len(value)
        assert (shares - 0.1).abs().max() < 0.01


def test_no_weights_make_it_explode():
    mixer = LRU(Options(width=4, state_size=100))
    with torch.no_grad():
        mixer.log_rate.copy_(torch.linspace(-100, 100, 100))
        mixer.log_phase.copy_(torch.linspace(50, -100, 100))
    x = torch.zeros(1, 1000, 4)
    x[:, 0] = 1.0
    y, state = mixer(x)
    assert torch.isfinite(y).all()
    start = mixer(x[:, :1])[1].memory.norm(dim=-1)
    assert (state.memory.norm(dim=-1) <= start * (1 + 1e-4)).all()


def test_white_noise_gives_states_of_its_own_variance():
    mixer = LRU(Options(width=64, state_size=256, max_radius=0.99))
    states = [mixer(torch.randn(16, 400, 64))[1].memory for _ in range(4)]
    variance = torch.cat(states).square().sum(-1).mean()
    assert 0.9 < variance < 1.1


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="0 <= `min_radius` < `max_radius` <= 1: got min_radius=0.9, max_radius=0.5"):
        Options(width=4, min_radius=0.9, max_radius=0.5)
    with pytest.raises(ValueError, match="up to 2 pi: got 7"):
        Options(width=4, max_phase=7.0)
    with pytest.raises(ValueError, match="must be at least 1: got width=4, state_size=0"):
        Options(width=4, state_size=0)

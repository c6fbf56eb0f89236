"""The real-gated linear recurrent unit where its gates close, and at the start."""

import pytest
import torch
from torch.nn.functional import softplus

from everlong.mixers.rg_lru import RGLRU, Options


def filled(dtype, gate):
    """A block whose recurrence gate's sums are about `gate`."""
    torch.manual_seed(0)
    mixer = RGLRU(Options(width=8, num_heads=2))
    with torch.no_grad():
        mixer.recurrence_gate.bias.fill_(gate)
    return mixer.to(dtype)


@pytest.mark.parametrize("gate", [-5.0, -20.0, -60.0, -1e4])
def test_a_closing_gate_keeps_its_digits(gate):
    """a = exp(-tiny) is 1 in float32; 1 - a^2 is not 0, and its root has a slope."""
    x = torch.randn(1, 30, 8, dtype=torch.float64)
    found = {}
    for dtype in (torch.float32, torch.float64):
        mixer = filled(dtype, gate)
        own = x.to(dtype).requires_grad_()
        y, _ = mixer(own)
        y.square().sum().backward()
        found[dtype] = [y, own.grad, mixer.rate.grad, mixer.recurrence_gate.weight.grad]
    for rough, exact in zip(found[torch.float32], found[torch.float64], strict=True):
        assert torch.isfinite(rough).all()
        assert (rough.double() - exact).abs().max() <= 1e-4 * exact.abs().max()


def test_with_open_gates_channels_begin_by_keeping_nine_tenths_or_more():
    kept = torch.exp(-8 * softplus(RGLRU(Options(width=2, hidden=4_000)).rate))
    assert 0.9 - 1e-5 <= kept.min() <= 0.905
    assert 0.998 <= kept.max() <= 0.999 + 1e-5


def test_inputs_of_variance_one_give_states_of_at_most_that():
    mixer = RGLRU(Options(width=32, kernel=1))
    with torch.no_grad():
        mixer.v.weight.copy_(torch.eye(32))
        mixer.v_conv.weight.fill_(1.0)
        mixer.input_gate.bias.fill_(50.0)  # open
    _, state = mixer(torch.randn(64, 600, 32))
    assert 0.8 < state.memory.square().mean() < 1.2


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="`hidden` must be a multiple of `num_heads`: got hidden=10, num_heads=4"):
        Options(width=8, hidden=10, num_heads=4)
    with pytest.raises(ValueError, match="must be at least 1: got width=8, kernel=0"):
        Options(width=8, kernel=0)

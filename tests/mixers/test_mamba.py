"""Mamba: how it begins, and what its selection can do."""

import pytest
import torch
from torch.nn.functional import softplus

from everlong.mixers.mamba import Mamba, Options


def test_steps_begin_between_a_thousandth_and_a_tenth():
    mixer = Mamba(Options(width=4, expansion=1000.0))
    steps = softplus(mixer.step_bias)
    assert 0.001 - 1e-6 <= steps.min() < 0.0012
    assert 0.09 < steps.max() <= 0.1 + 1e-6


@pytest.mark.parametrize(("bias", "kept"), [(-30.0, 1.0), (30.0, 0.0)])
def test_a_step_of_zero_keeps_the_state_and_a_large_one_forgets_it(bias, kept):
    mixer = Mamba(Options(width=8, kernel=1))
    with torch.no_grad():
        mixer.step_bias.fill_(bias)
        mixer.step[1].weight.zero_()
        mixer.k.weight.zero_()  # nothing is written
    state = mixer.init_state(1)
    state = state._replace(memory=torch.ones_like(state.memory))
    _, after = mixer(torch.randn(1, 20, 8), state)
    torch.testing.assert_close(after.memory, torch.full_like(after.memory, kept))


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="`expansion` must leave at least one channel of width=4: got 0.1"):
        Options(width=4, expansion=0.1)
    with pytest.raises(ValueError, match="must be at least 1: got kernel=4, state_size=0, step_rank=1"):
        Options(width=4, state_size=0)

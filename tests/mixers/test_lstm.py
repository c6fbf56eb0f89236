"""The gated recurrent layers: how they begin, and what holds whatever the weights are."""

import pytest
import torch

from everlong.mixers import load
from everlong.mixers.base import Context


@pytest.mark.parametrize("name", ["rnn", "lstm", "gru"])
def test_every_gate_begins_orthogonal(name):
    mixer = load(name)(load(name).Config(width=12, hidden=9))
    for gate in mixer.cells.weight_hh.split(9):
        torch.testing.assert_close(gate @ gate.mT, torch.eye(9))


@pytest.mark.parametrize(("forget_bias", "kept"), [(1.0, 0.7311), (0.0, 0.5), (50.0, 1.0)])
def test_at_the_start_a_cell_keeps_what_the_forget_bias_says(forget_bias, kept):
    lstm = load("lstm")
    mixer = lstm(lstm.Config(width=6, forget_bias=forget_bias))
    state = mixer.init_state(1)
    state = state._replace(cell=torch.full_like(state.cell, 3.0))
    _, after = mixer(torch.zeros(1, 1, 6), state)
    torch.testing.assert_close(after.cell, torch.full_like(after.cell, 3.0 * kept), atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_hidden_states_stay_between_minus_one_and_one(name):
    mixer = load(name)(load(name).Config(width=6))
    with torch.no_grad():
        for parameter in mixer.cells.parameters():
            parameter.mul_(30.0)
    _, state = mixer(100 * torch.randn(3, 200, 6))
    assert state.hidden.abs().max() <= 1


@pytest.mark.parametrize("name", ["rnn", "lstm", "gru"])
@pytest.mark.parametrize("packed", [False, True])
def test_states_stay_in_float32_under_autocast(name, packed):
    mixer = load(name)(load(name).Config(width=8, output="none"))
    x, bounds = torch.randn(1, 20, 8), torch.tensor([0, 8, 8, 20]) if packed else None
    exact, expected = mixer(x, None, Context(cu_seqlens=bounds))
    with torch.autocast("cpu", torch.bfloat16):
        y, state = mixer(x, None, Context(cu_seqlens=bounds))
    torch.testing.assert_close(y, exact, atol=0, rtol=0)
    for one, other in zip(state, expected, strict=True):
        torch.testing.assert_close(one, other, atol=0, rtol=0)


@pytest.mark.parametrize("name", ["rnn", "lstm", "gru"])
def test_gradients_flow_in_evaluation_too(name):
    mixer = load(name)(load(name).Config(width=8)).eval()
    x = torch.randn(2, 5, 8).requires_grad_()
    mixer(x)[0].sum().backward()
    assert (x.grad != 0).all()

"""The simple recurrent network: its gradients as the textbook writes them, and what becomes of them over time."""

import numpy as np
import pytest
import torch

from everlong.mixers.rnn import RNN, Options


def backpropagation_through_time(U, W, b, V, x, targets, truncate):
    """Gradients of sum_t cross entropy(V h_t, target_t), h_t = tanh(U x_t + W h_{t-1} + b), in numpy.

    delta_t = dL/dh_t = V^T (p_t - y_t) + W^T diag(1 - h_{t+1}^2) delta_{t+1}, where no delta crosses a multiple of
    `truncate`.
    """
    h = np.zeros((len(x) + 1, len(W)))
    for t in range(len(x)):
        h[t] = np.tanh(U @ x[t] + W @ h[t - 1] + b)  # h[-1] stays 0
    found = {name: np.zeros_like(p) for name, p in zip("UWbV", (U, W, b, V), strict=True)}
    through_time = np.zeros(len(W))
    for t in reversed(range(len(x))):
        scores = V @ h[t]
        error = np.exp(scores - scores.max())
        error /= error.sum()
        error[targets[t]] -= 1
        if (t + 1) % truncate == 0:
            through_time = np.zeros(len(W))
        slope = (1 - h[t] ** 2) * (V.T @ error + through_time)
        found["V"] += np.outer(error, h[t])
        found["U"] += np.outer(slope, x[t])
        found["W"] += np.outer(slope, h[t - 1])
        found["b"] += slope
        through_time = W.T @ slope
    return found


@pytest.mark.parametrize("truncate", [1, 4, 23, 100])
def test_gradients_are_those_of_the_textbook(truncate):
    length, width = 23, 6
    mixer = RNN(Options(width=width, hidden=5)).double()
    x, targets = torch.randn(length, width, dtype=torch.float64), torch.randint(width, (length,))
    state, loss = None, 0.0
    for start in range(0, length, truncate):
        part = slice(start, start + truncate)
        y, state = mixer(x[None, part], state)
        loss = loss + torch.nn.functional.cross_entropy(y[0], targets[part], reduction="sum")
        state = state._replace(hidden=state.hidden.detach())
    loss.backward()
    cells = mixer.cells
    weights = (cells.weight_ih, cells.weight_hh, cells.bias_ih + cells.bias_hh, mixer.o.weight)
    found = backpropagation_through_time(*(p.detach().numpy() for p in weights), x.numpy(), targets.numpy(), truncate)
    for name, parameter in zip("UWbV", (cells.weight_ih, cells.weight_hh, cells.bias_ih, mixer.o.weight), strict=True):
        np.testing.assert_allclose(parameter.grad.numpy(), found[name], rtol=1e-12, atol=1e-12)
    assert torch.equal(cells.bias_ih.grad, cells.bias_hh.grad)


@pytest.mark.parametrize("scale", [0.5, 1.0, 1.5])
def test_a_gradient_vanishes_or_explodes_by_the_scale_of_the_matrix(scale):
    """Near h = 0, where tanh is the identity, an orthogonal matrix times `scale` multiplies it by that in each step."""
    mixer = RNN(Options(width=8, output="none")).double()
    with torch.no_grad():
        mixer.cells.weight_hh *= scale
    x = torch.zeros(1, 31, 8, dtype=torch.float64).requires_grad_()
    y, _ = mixer(x)
    direction = torch.randn(8, dtype=torch.float64)
    gradient = torch.autograd.grad((y[0, -1] * direction).sum(), x)[0][0]
    norms = (gradient @ torch.linalg.pinv(mixer.cells.weight_ih.detach())).norm(dim=-1)
    assert (norms[0] / norms[-1]).item() == pytest.approx(scale**30, rel=1e-4)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="without an output matrix `hidden` must be `width`: got width=8, hidden=4"):
        Options(width=8, hidden=4, output="none")
    with pytest.raises(ValueError, match="`width` and `hidden` must be at least 1"):
        Options(width=8, hidden=0)

"""Backpropagation through time by hand, against numbers and against what autograd makes of torch's kernels."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence, unpack_sequence

from everlong.nn.recurrent import Cells
from everlong.nn.unrolled import unrolled

GATES = {"tanh": 1, "relu": 1, "gru": 3}
# Rounds of a batch, of one sequence, and of sequences that end one after another.
ROUNDS = {"batch": [2, 2, 2], "one": [1, 1, 1, 1], "packed": [3, 2, 2, 1], "an empty one": [2, 1]}


@pytest.mark.parametrize("rounds", ROUNDS)
@pytest.mark.parametrize("kind", GATES)
def test_gradients_of_everything(kind, rounds):
    sizes, size = ROUNDS[rounds], 3
    starts = [sum(sizes[:t]) for t in range(len(sizes))]
    slices = tuple(slice(start, start + n) for start, n in zip(starts, sizes, strict=True))
    sequences = sizes[0] + (rounds == "an empty one")
    rows = GATES[kind] * size
    shapes = [(sum(sizes), rows), (sequences, size), (rows, size), (rows,)]
    leaves = [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes]
    assert torch.autograd.gradcheck(lambda *leaves: unrolled(kind, *leaves, slices), leaves)


@pytest.mark.parametrize(
    ("kind", "layer"),
    [
        ("tanh", nn.RNN(6, 5)),
        ("relu", nn.RNN(6, 5, nonlinearity="relu")),
        ("lstm", nn.LSTM(6, 5)),
        ("gru", nn.GRU(6, 5)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_weights_get_the_gradients_that_torch_gives_them(kind, layer):
    """Over packed sequences with a state before them; the last state has a part in the loss."""
    lengths, layer = [4, 9, 1], layer.double()
    ours = Cells(kind, 6, 5, "uniform").double()
    ours.load_state_dict({name.removesuffix("_l0"): weight for name, weight in layer.state_dict().items()})
    x = torch.randn(sum(lengths), 6, dtype=torch.float64)
    start = tuple(torch.randn(3, 5, dtype=torch.float64) for _ in range(2 if kind == "lstm" else 1))
    before = tuple(state[None] for state in start)
    packed, last = layer(pack_sequence(x.split(lengths), enforce_sorted=False), before if kind == "lstm" else before[0])
    y, after = ours(x[None], start, torch.tensor([0, 4, 13, 14]))
    torch.testing.assert_close(y[0], torch.cat(unpack_sequence(packed)))
    last = last if kind == "lstm" else (last,)
    for own, expected in zip(after, last, strict=True):
        torch.testing.assert_close(own, expected[0])
    for hidden, states in ((y[0], after), (torch.cat(unpack_sequence(packed)), last)):
        (hidden.square().sum() + sum((state**3).sum() for state in states)).backward()
    for name, weight in ours.named_parameters():
        torch.testing.assert_close(weight.grad, getattr(layer, f"{name}_l0").grad)

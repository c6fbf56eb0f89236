"""What the classical recurrent layers are compared with: torch's cells stepped in Python, and torch's whole layers."""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence, unpack_sequence

from everlong.lab.bench.comparison import BOUND, Comparison, make
from everlong.mixers.base import Context

WIDTH = 24
PACKED = (5, 1, 70, 12)


def comparisons(name: str, cell: type[nn.RNNCellBase], layer: type[nn.RNNBase], **options: Any) -> Iterator[Comparison]:
    """The cell at three lengths, in another size and in float32; the layer from torch's beginning, and packed.

    `options` are those that a cell and a layer of torch have too.
    """
    for length in (1, 7, 130):
        yield _cell(f"{cell.__name__}, T={length}", name, cell, length, options)
    yield _cell(f"{cell.__name__}, 11 channels", name, cell, 33, options, hidden=11)
    yield _cell(f"{cell.__name__}, float32, T=130", name, cell, 130, options, torch.float32)
    yield _layer(f"{layer.__name__}, T=130", name, layer, options)
    yield _packed(f"{layer.__name__}, packed {'+'.join(map(str, PACKED))}", name, layer, options)


def _cell(
    case: str,
    name: str,
    cell: type[nn.RNNCellBase],
    length: int,
    theirs: dict[str, Any],
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> Comparison:
    ours = make(name, width=WIDTH, **options, **_renamed(theirs)).to(dtype)
    step: Any = cell(WIDTH, ours.config.size, **theirs).to(dtype)
    step.load_state_dict(ours.cells.state_dict())

    def run(x: Tensor) -> Tensor:
        state, outputs = None, []
        for x_t in x.unbind(1):
            state = step(x_t, state)
            outputs.append(ours.o(state[0] if isinstance(state, tuple) else state))
        return torch.stack(outputs, 1)

    x = torch.randn(2, length, WIDTH, dtype=dtype)
    return Comparison(case, lambda x: ours(x)[0], run, x, bound=1e-9 if dtype == torch.float64 else BOUND)


def _layer(case: str, name: str, layer: type[nn.RNNBase], theirs: dict[str, Any]) -> Comparison:
    ours = make(name, width=WIDTH, output="none", initialization="uniform", **_renamed(theirs)).double()
    whole = _filled(layer, ours, theirs)
    x = torch.randn(2, 130, WIDTH, dtype=torch.float64)
    return Comparison(case, lambda x: ours(x)[0], lambda x: whole(x)[0], x, bound=1e-9)


def _packed(case: str, name: str, layer: type[nn.RNNBase], theirs: dict[str, Any]) -> Comparison:
    """The outputs of sequences in one row, and behind them the hidden state that each of them ends with."""
    ours = make(name, width=WIDTH, output="none", **_renamed(theirs)).double()
    whole = _filled(layer, ours, theirs)
    bounds = torch.tensor([0, *itertools.accumulate(PACKED)])

    def run_ours(x: Tensor) -> Tensor:
        y, state = ours(x, None, Context(cu_seqlens=bounds))
        return torch.cat([y[0], state.hidden])

    def run_theirs(x: Tensor) -> Tensor:
        y, last = whole(pack_sequence(list(torch.split(x[0], list(PACKED))), enforce_sorted=False))
        hidden = last[0] if isinstance(last, tuple) else last
        return torch.cat([*unpack_sequence(y), hidden[0]])

    return Comparison(case, run_ours, run_theirs, torch.randn(1, sum(PACKED), WIDTH, dtype=torch.float64), bound=1e-9)


def _filled(layer: type[nn.RNNBase], ours: Any, theirs: dict[str, Any]) -> nn.RNNBase:
    """Their layer with our weights."""
    build: Any = layer
    whole: nn.RNNBase = build(WIDTH, ours.config.size, batch_first=True, **theirs).double()
    whole.load_state_dict({f"{label}_l0": weight for label, weight in ours.cells.state_dict().items()})
    return whole


def _renamed(theirs: dict[str, Any]) -> dict[str, Any]:
    return {{"nonlinearity": "activation"}[key]: value for key, value in theirs.items()}

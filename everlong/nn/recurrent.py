"""What the classical recurrent layers share: options, weights with their beginnings, and the way through time.

All compute the inputs' products for all steps at once. The rest goes step by step: for the LSTM in torch's kernel,
which is oneDNN's in float32, for the others in unrolled.py.
"""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import linear

from everlong.config import config
from everlong.nn.unrolled import unrolled
from everlong.ops.chunks import Layout, plan, without_autocast
from everlong.ops.scoring import uncompiled

Kind = Literal["tanh", "relu", "lstm", "gru"]
GATES: dict[Kind, int] = {"tanh": 1, "relu": 1, "lstm": 4, "gru": 3}


@config
class CellOptions:
    """What the options of all classical recurrent layers begin with."""

    width: int
    hidden: int | None = None
    """Channels of the state; None: as many as `width`."""
    output: Literal["linear", "none"] = "linear"
    """"none" gives the hidden state itself, which has to be as wide as the input."""
    initialization: Literal["orthogonal", "uniform"] = "orthogonal"
    """"orthogonal" keeps the length of what goes from step to step (Saxe et al. 2013, arXiv 1312.6120), with Glorot's
    scale for the input and biases of 0; "uniform" is torch's own."""

    def __post_init__(self) -> None:
        if self.width < 1 or self.size < 1:
            raise ValueError(f"`width` and `hidden` must be at least 1: got width={self.width}, hidden={self.size}")
        if self.output == "none" and self.size != self.width:
            raise ValueError(
                f"without an output matrix `hidden` must be `width`: got width={self.width}, hidden={self.size}. "
                f'Leave `hidden` out, or take output="linear"'
            )

    @property
    def size(self) -> int:
        return self.width if self.hidden is None else self.hidden


class Cells(nn.Module):
    """The weights of one recurrent layer, called and laid out as torch's `nn.RNNCell`, `LSTMCell` and `GRUCell` do."""

    def __init__(self, kind: Kind, inputs: int, size: int, initialization: str) -> None:
        super().__init__()
        self.kind, self.size = kind, size
        rows = GATES[kind] * size
        self.weight_ih = nn.Parameter(torch.empty(rows, inputs))
        self.weight_hh = nn.Parameter(torch.empty(rows, size))
        self.bias_ih = nn.Parameter(torch.zeros(rows))
        self.bias_hh = nn.Parameter(torch.zeros(rows))
        if initialization == "uniform":
            for parameter in self.parameters():
                nn.init.uniform_(parameter, -(size**-0.5), size**-0.5)
            return
        with torch.no_grad():
            for gate in torch.split(self.weight_ih, size):
                nn.init.xavier_uniform_(gate)
            for gate in torch.split(self.weight_hh, size):
                nn.init.orthogonal_(gate)

    def forward(
        self, x: Float[Tensor, "B T D"], states: tuple[Tensor, ...], cu_seqlens: Int[Tensor, " N_plus_1"] | None
    ) -> tuple[Float[Tensor, "B T S"], tuple[Tensor, ...]]:
        """The hidden state of every step, and the states `[N, S]` after the last, from the `states [N, S]` before."""
        if x.shape[1] == 0:
            return x.new_zeros(*x.shape[:2], self.size), states
        y, after = uncompiled(self._steps)(x, states, cu_seqlens)
        return y, after

    def _steps(
        self, x: Tensor, states: tuple[Tensor, ...], cu_seqlens: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        layout = plan(x.shape[0], x.shape[1], cu_seqlens, 1)
        with without_autocast(x):  # in the states' dtype: what rounding adds in a step goes through all later ones
            dtype = states[0].dtype
            weights = [weight.to(dtype) for weight in (self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)]
            run = self._lstm if self.kind == "lstm" else self._unrolled
            y, after = run(x.to(dtype), tuple(layout.sort(state) for state in states), weights, layout)
        return y.to(x.dtype), tuple(layout.unsort(state) for state in after)

    def _unrolled(
        self, x: Tensor, states: tuple[Tensor, ...], weights: list[Tensor], layout: Layout
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        assert self.kind != "lstm"
        weight_ih, weight_hh, bias_ih, bias_hh = weights
        rows = linear(in_rounds(x, layout), weight_ih, bias_ih)
        h, last = unrolled(self.kind, rows, states[0], weight_hh, bias_hh, layout.rounds)
        return in_sequences(h, layout), (last,)

    def _lstm(
        self, x: Tensor, states: tuple[Tensor, ...], weights: list[Tensor], layout: Layout
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        # What the kernel calls training is only whether it keeps what the backward pass needs.
        plain = (weights, True, 1, 0.0, torch.is_grad_enabled(), False)
        if layout.order is None:
            h, *last = torch.lstm(x, [state[None] for state in states], *plain, True)
            return h, tuple(state[0] for state in last)
        sizes = torch.tensor([step.stop - step.start for step in layout.rounds])
        alive = int(sizes[0])  # torch knows no empty sequences
        h, *last = torch.lstm(in_rounds(x, layout), sizes, [state[None, :alive] for state in states], *plain)
        joined = (torch.cat([new[0], old[alive:]]) for new, old in zip(last, states, strict=True))
        return in_sequences(h, layout), tuple(joined)


def in_rounds(x: Float[Tensor, "B T D"], layout: Layout) -> Float[Tensor, "M D"]:
    """The first tokens of all sequences, then the second ..."""
    return x.transpose(0, 1).flatten(0, 1) if layout.token is None else x[0].index_select(0, layout.token)


def in_sequences(rows: Float[Tensor, "M D"], layout: Layout) -> Float[Tensor, "B T D"]:
    """The inverse of `in_rounds`."""
    if layout.slot is None:
        return torch.unflatten(rows, 0, (layout.length, layout.batch)).transpose(0, 1)
    return rows.index_select(0, layout.slot)[None]

"""What the classical recurrent layers share: options, weights with their beginnings, and torch's kernels for time.

The kernels compute the inputs' products for all steps at once and the rest step by step in C++; the LSTM's are oneDNN's.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from everlong.config import config
from everlong.ops.chunks import plan, without_autocast

Kernel = Literal["rnn_tanh", "rnn_relu", "lstm", "gru"]
GATES: dict[Kernel, int] = {"rnn_tanh": 1, "rnn_relu": 1, "lstm": 4, "gru": 3}


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

    def __init__(self, kernel: Kernel, inputs: int, size: int, initialization: str) -> None:
        super().__init__()
        self.kernel, self.size = kernel, size
        rows = GATES[kernel] * size
        self.weight_ih = nn.Parameter(torch.empty(rows, inputs))
        self.weight_hh = nn.Parameter(torch.empty(rows, size))
        self.bias_ih = nn.Parameter(torch.zeros(rows))
        self.bias_hh = nn.Parameter(torch.zeros(rows))
        if initialization == "uniform":
            for parameter in self.parameters():
                nn.init.uniform_(parameter, -(size**-0.5), size**-0.5)
            return
        with torch.no_grad():
            for gate in self.weight_ih.split(size):
                nn.init.xavier_uniform_(gate)
            for gate in self.weight_hh.split(size):
                nn.init.orthogonal_(gate)

    @torch.compiler.disable  # which would unroll all steps
    def forward(
        self, x: Float[Tensor, "B T D"], states: tuple[Tensor, ...], cu_seqlens: Int[Tensor, " N_plus_1"] | None
    ) -> tuple[Float[Tensor, "B T S"], tuple[Tensor, ...]]:
        """The hidden state of every step, and the states `[N, S]` after the last, from the `states [N, S]` before."""
        if x.shape[1] == 0:
            return x.new_zeros(*x.shape[:2], self.size), states
        with without_autocast(x):  # in the states' dtype: what rounding adds in a step goes through all later ones
            dtype = states[0].dtype
            weights = [weight.to(dtype) for weight in (self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)]
            if cu_seqlens is None:
                y, after = self._run(weights, states, x.to(dtype))
            else:
                y, after = self._packed(weights, states, x[0].to(dtype), cu_seqlens)
        return y.to(x.dtype), after

    def _packed(
        self, weights: list[Tensor], states: tuple[Tensor, ...], x: Tensor, cu_seqlens: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Sequences of unequal lengths in one row: torch wants their first tokens, longest first, then the second ..."""
        layout = plan(1, len(x), cu_seqlens, 1)
        assert layout.order is not None
        assert layout.token is not None
        assert layout.slot is not None
        counts = torch.tensor([step.stop - step.start for step in layout.rounds])
        states = tuple(state[layout.order] for state in states)
        alive = int(counts[0])  # torch knows no empty sequences
        y, after = self._run(weights, tuple(state[:alive] for state in states), x[layout.token], counts)
        back = layout.order.argsort()
        joined = (torch.cat([new, old[alive:]])[back] for new, old in zip(after, states, strict=True))
        return y[layout.slot][None], tuple(joined)

    def _run(
        self, weights: list[Tensor], states: tuple[Tensor, ...], x: Tensor, counts: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """One layer in one direction, without dropout; with `counts` over packed steps."""
        run: Callable[..., Any] = getattr(torch, self.kernel)
        layers = [state[None] for state in states]
        start = layers if self.kernel == "lstm" else layers[0]
        # What the kernels call training is only whether they keep what the backward pass needs.
        plain = (weights, True, 1, 0.0, torch.is_grad_enabled(), False)
        y, *after = run(x, start, *plain, True) if counts is None else run(x, counts, start, *plain)
        return y, tuple(state[0] for state in after)

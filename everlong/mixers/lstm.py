"""Long short-term memory: a cell that is added to, and three gates that say what enters, what stays and what is seen.

    c_t = f_t * c_{t-1} + i_t * g_t        h_t = o_t * tanh(c_t)        y_t = W_o h_t
    i, f, o = sigmoid(W x_t + U h_{t-1} + b)        g = tanh(W_g x_t + U_g h_{t-1} + b_g)

Shapes    x [B, T, D] -> y [B, T, D];  h, c, i, f, g, o [B, T, S], the gates' weights stacked in the order i, f, g, o
State     h and c [B, S]: 8 S bytes a sequence, whatever its length
Cost      FLOPs a token: 8 S (D + S) for the gates + 2 S D for the output
Source    Hochreiter and Schmidhuber 1997, "Long Short-Term Memory", Neural Computation 9; the forget gate is of Gers
          et al. 2000, "Learning to Forget", Neural Computation 12
Deviates  two biases, which add up, as torch keeps them
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from everlong.config import config
from everlong.mixers.base import Context, Cost, Mixer, Traits, unpadded
from everlong.nn.recurrent import CellOptions, Cells


class State(NamedTuple):
    """What the memory keeps of a sequence."""

    hidden: Float[Tensor, "N S"]
    cell: Float[Tensor, "N S"]


@config
class Options(CellOptions):
    """Options of long short-term memory."""

    forget_bias: float = 1.0
    """Added to the forget gate's bias at the start, so that cells first remember (Jozefowicz et al. 2015)."""


class LSTM(Mixer):
    """Long short-term memory under the contract."""

    Config = Options
    traits = Traits(forms=frozenset({"recurrent"}), causal=True, bidirectional=False, growth="constant")

    def __init__(self, config: Options, *, layer: int = 0, depth: int = 1) -> None:
        super().__init__(config, layer=layer, depth=depth)
        self.cells = Cells("lstm", config.width, config.size, config.initialization)
        self.o = nn.Linear(config.size, config.width, bias=False) if config.output == "linear" else nn.Identity()
        with torch.no_grad():
            self.cells.bias_ih[config.size : 2 * config.size] += config.forget_bias

    def init_state(self, batch: int) -> State:
        return State(*(self.new_state(batch, self.config.size) for _ in range(2)))

    @unpadded
    def forward(
        self, x: Float[Tensor, "B T D"], state: State | None = None, context: Context = Context()
    ) -> tuple[Float[Tensor, "B T D"], State]:
        state = self.init_state(context.sequences(x)) if state is None else state
        h, (hidden, cell) = self.cells(x, (state.hidden, state.cell), context.cu_seqlens)
        return self.o(h), State(hidden, cell)

    @classmethod
    def cost(cls, config: Options, length: int) -> Cost:
        d, s = config.width, config.size
        output = s * d if config.output == "linear" else 0
        return Cost(
            flops_per_token=8 * s * (d + s) + 2 * output,
            state_bytes=8 * s,
            parameters=4 * s * (d + s + 2) + output,
        )

    def reference(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        cells = self.cells
        h = c = x.new_zeros(cells.size)
        outputs = []
        for x_t in x:
            i, f, g, o = (cells.weight_ih @ x_t + cells.bias_ih + cells.weight_hh @ h + cells.bias_hh).chunk(4)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            outputs.append(self.o(h))
        return torch.stack(outputs)

"""The gated recurrent unit: a hidden vector, of which one gate says what stays and another what the new part sees.

    h_t = z_t * h_{t-1} + (1 - z_t) * n_t        n_t = tanh(W_n x_t + b_n + r_t * (U_n h_{t-1} + c_n))
    r, z = sigmoid(W x_t + b + U h_{t-1} + c)        y_t = W_o h_t                             (eq. 5 to 8)

Shapes    x [B, T, D] -> y [B, T, D];  h, r, z, n [B, T, S], the gates' weights stacked in the order r, z, n
State     h [B, S]: 4 S bytes a sequence, whatever its length
Cost      FLOPs a token: 6 S (D + S) for the gates + 2 S D for the output
Source    Cho et al. 2014, "Learning Phrase Representations using RNN Encoder-Decoder", arXiv 1406.1078
Deviates  the gate r comes after the product with U_n, not before it, and there are biases b and c, as in torch's GRU
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from everlong.config import config
from everlong.mixers.base import Context, Cost, Mixer, Traits, unpadded
from everlong.nn.recurrent import CellOptions, Cells


class State(NamedTuple):
    """What the unit keeps of a sequence."""

    hidden: Float[Tensor, "N S"]


@config
class Options(CellOptions):
    """Options of the gated recurrent unit."""


class GRU(Mixer):
    """The gated recurrent unit under the contract."""

    Config = Options
    traits = Traits(forms=frozenset({"recurrent"}), causal=True, bidirectional=False, growth="constant")

    def __init__(self, config: Options, *, layer: int = 0, depth: int = 1) -> None:
        super().__init__(config, layer=layer, depth=depth)
        self.cells = Cells("gru", config.width, config.size, config.initialization)
        self.o = nn.Linear(config.size, config.width, bias=False) if config.output == "linear" else nn.Identity()

    def init_state(self, batch: int) -> State:
        return State(self.new_state(batch, self.config.size))

    @unpadded
    def forward(
        self, x: Float[Tensor, "B T D"], state: State | None = None, context: Context = Context()
    ) -> tuple[Float[Tensor, "B T D"], State]:
        state = self.init_state(context.sequences(x)) if state is None else state
        h, (hidden,) = self.cells(x, (state.hidden,), context.cu_seqlens)
        return self.o(h), State(hidden)

    @classmethod
    def cost(cls, config: Options, length: int) -> Cost:
        d, s = config.width, config.size
        output = s * d if config.output == "linear" else 0
        return Cost(
            flops_per_token=6 * s * (d + s) + 2 * output,
            state_bytes=4 * s,
            parameters=3 * s * (d + s + 2) + output,
        )

    def reference(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        c = self.cells
        h, outputs = x.new_zeros(c.size), []
        for x_t in x:
            from_input, from_hidden = c.weight_ih @ x_t + c.bias_ih, c.weight_hh @ h + c.bias_hh
            r, z, _ = torch.sigmoid(from_input + from_hidden).chunk(3)
            n = torch.tanh(from_input.chunk(3)[2] + r * from_hidden.chunk(3)[2])
            h = z * h + (1 - z) * n
            outputs.append(self.o(h))
        return torch.stack(outputs)

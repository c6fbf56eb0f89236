"""The simple recurrent network: one hidden vector, rewritten at every step.

    h_t = tanh(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)        y_t = W_o h_t

Shapes    x [B, T, D] -> y [B, T, D];  h [B, T, S]
State     h [B, S]: 4 S bytes a sequence, whatever its length
Cost      FLOPs a token: 2 S (D + S) for the step + 2 S D for the output
Source    Elman 1990, "Finding Structure in Time", Cognitive Science 14
Deviates  tanh in place of the logistic function; two biases, which add up, as torch keeps them
"""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from everlong.config import config
from everlong.mixers.base import Context, Cost, Mixer, Traits, unpadded
from everlong.nn.recurrent import CellOptions, Cells


class State(NamedTuple):
    """What the network keeps of a sequence."""

    hidden: Float[Tensor, "N S"]


@config
class Options(CellOptions):
    """Options of the simple recurrent network."""

    activation: Literal["tanh", "relu"] = "tanh"
    """"relu" bounds nothing: a state can grow from step to step until it overflows."""


class RNN(Mixer):
    """The simple recurrent network under the contract."""

    Config = Options
    traits = Traits(forms=frozenset({"recurrent"}), causal=True, bidirectional=False, growth="constant")

    def __init__(self, config: Options, *, layer: int = 0, depth: int = 1) -> None:
        super().__init__(config, layer=layer, depth=depth)
        self.cells = Cells(config.activation, config.width, config.size, config.initialization)
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
            flops_per_token=2 * s * (d + s) + 2 * output,
            state_bytes=4 * s,
            parameters=s * (d + s + 2) + output,
        )

    def reference(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        c = self.cells
        h, outputs = x.new_zeros(c.size), []
        for x_t in x:
            h = c.weight_ih @ x_t + c.bias_ih + c.weight_hh @ h + c.bias_hh
            h = torch.tanh(h) if self.config.activation == "tanh" else torch.relu(h)
            outputs.append(self.o(h))
        return torch.stack(outputs)

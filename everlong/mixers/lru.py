"""The linear recurrent unit: complex states that only turn and fade, each at a learned rate of its own.

    h_t = lambda * h_{t-1} + gamma * (B x_t)        y_t = Re(C h_t) + skip * x_t               (eq. 7; appendix A)
    lambda = exp(-exp(log_rate) + i exp(log_phase))        gamma = exp(log_gain)

Shapes    x [B, T, D] -> y [B, T, D];  h, lambda [B, T, N] complex, as pairs of real numbers;  B = v, C = o
State     h [B, N, 2]: 8 N bytes a sequence, whatever its length
Cost      FLOPs a token: 8 D N for B and C + 8 N for the recurrence
Source    Orvieto et al. 2023, "Resurrecting Recurrent Neural Networks for Long Sequences", arXiv 2303.06349
Deviates  the gated linear unit after it is the block's feed-forward
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from everlong.config import config
from everlong.mixers.base import Context, Cost, Mixer, Traits, unpadded
from everlong.nn.layers import exact
from everlong.ops import linear_scan


class State(NamedTuple):
    """What the unit keeps of a sequence."""

    memory: Float[Tensor, "N S 2"]


@config
class Options:
    """Options of the linear recurrent unit."""

    width: int
    state_size: int | None = None
    """N, the complex states; None: as many as `width`."""
    min_radius: float = 0.0
    """At the start, lambda is spread evenly over the ring from this distance from 0 ..."""
    max_radius: float = 1.0
    """... to this one. Near 1 the unit remembers about 1 / (1 - radius) tokens."""
    max_phase: float = 2 * math.pi
    """At the start, the largest angle of lambda; a small one keeps the states from turning fast, for long inputs."""

    def __post_init__(self) -> None:
        if self.width < 1 or self.states < 1:
            raise ValueError(
                f"`width` and `state_size` must be at least 1: got width={self.width}, state_size={self.states}"
            )
        if not 0 <= self.min_radius < self.max_radius <= 1:
            raise ValueError(
                "the ring must have 0 <= `min_radius` < `max_radius` <= 1: "
                f"got min_radius={self.min_radius}, max_radius={self.max_radius}"
            )
        if not 0 < self.max_phase <= 2 * math.pi:
            raise ValueError(f"`max_phase` is an angle above 0 and up to 2 pi: got {self.max_phase}")

    @property
    def states(self) -> int:
        return self.width if self.state_size is None else self.state_size


class LRU(Mixer):
    """The linear recurrent unit under the contract."""

    Config = Options
    traits = Traits(forms=frozenset({"chunk", "recurrent"}), causal=True, bidirectional=False, growth="constant")

    def __init__(self, config: Options, *, layer: int = 0, depth: int = 1) -> None:
        super().__init__(config, layer=layer, depth=depth)
        d, states = config.width, config.states
        self.v = nn.Linear(d, 2 * states, bias=False)
        self.o = nn.Linear(2 * states, d, bias=False)  # its columns are Re C and -Im C in turn
        nn.init.normal_(self.v.weight, std=(2 * d) ** -0.5)
        nn.init.normal_(self.o.weight, std=states**-0.5)
        self.skip = nn.Parameter(torch.randn(d))
        log_rate, log_phase = ring(config)
        self.log_rate, self.log_phase = nn.Parameter(log_rate), nn.Parameter(log_phase)
        # gamma = sqrt(1 - |lambda|^2): white noise comes in, and the states have its variance.
        self.log_gain = nn.Parameter((-torch.expm1(-2 * log_rate.exp())).log() / 2)

    def init_state(self, batch: int) -> State:
        return State(self.new_state(batch, self.config.states, 2))

    @unpadded
    def forward(
        self, x: Float[Tensor, "B T D"], state: State | None = None, context: Context = Context()
    ) -> tuple[Float[Tensor, "B T D"], State]:
        state = self.init_state(context.sequences(x)) if state is None else state
        radius, phase, gain = exact(self.log_rate).exp().neg().exp(), exact(self.log_phase).exp(), self.log_gain.exp()
        turn = torch.stack([radius * phase.cos(), radius * phase.sin()], -1)
        b = exact(self.v(x).unflatten(-1, (-1, 2))) * gain[:, None]
        h, memory = linear_scan(
            turn.to(b.dtype).expand_as(b),
            b,
            initial_state=state.memory,
            cu_seqlens=context.cu_seqlens,
            backend="reference" if context.form == "recurrent" else "auto",
        )
        return self.o(h.flatten(-2).to(x.dtype)) + self.skip.to(x.dtype) * x, State(memory)

    @classmethod
    def cost(cls, config: Options, length: int) -> Cost:
        d, states = config.width, config.states
        return Cost(
            flops_per_token=8 * d * states + 8 * states,
            state_bytes=8 * states,
            parameters=4 * d * states + d + 3 * states,
        )

    def reference(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        turn = torch.exp(torch.complex(-self.log_rate.exp(), self.log_phase.exp()))
        B = torch.complex(self.v.weight[0::2], self.v.weight[1::2])
        C = torch.complex(self.o.weight[:, 0::2], -self.o.weight[:, 1::2])
        h, outputs = torch.zeros_like(turn), []
        for x_t in x:
            h = turn * h + self.log_gain.exp() * (B @ x_t.to(B.dtype))
            outputs.append((C @ h).real + self.skip * x_t)
        return torch.stack(outputs)


def ring(config: Options) -> tuple[Float[Tensor, " S"], Float[Tensor, " S"]]:
    """The logarithms of a rate and of a phase for each state, lambda evenly spread over the ring (lemma 3.2)."""
    inside, outside = config.min_radius**2, config.max_radius**2
    # Neither a radius of 0, which nothing leaves, nor one of 1, which nothing enters: their logarithms are infinite.
    squared = (inside + (outside - inside) * torch.rand(config.states)).clamp(1e-6, 1 - 1e-6)
    phase = (config.max_phase * torch.rand(config.states)).clamp_min(1e-6)
    return (-0.5 * squared.log()).log(), phase.log()

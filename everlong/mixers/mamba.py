"""Mamba (S6): a diagonal state-space layer that chooses, token by token, what to write, what to keep and what to read.

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t        y_t = C_t . h_t + skip * x_t               (eq. 2; algorithm 2)
    x_t = silu(conv(W_v u)_t)        B_t = W_k x_t        C_t = W_q x_t        dt_t = softplus(W_up W_down x_t + b)
    out_t = W_o [ y_t * silu(W_gate u_t) ]        A = -exp(log_rate)

Shapes    u [B, T, D] -> out [B, T, D];  x, dt (and h's rows) have I = expansion D channels, each with N states;
          B, C (here k, q) [B, T, N];  W_down, W_up meet in R channels
State     h [B, I, N] and the last W - 1 inputs of the convolution: 4 I (N + W - 1) bytes, whatever the length
Cost      FLOPs a token: 6 D I + 4 I (N + R) for the projections + 2 W I for the convolution + 4 I N for the scan
Source    Gu and Dao 2023, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", arXiv 2312.00752
Deviates  A is discretised by a zero-order hold and B by Euler's step, as the authors' code does and eq. 4 does not;
          what that code keeps in one matrix stands here in parts: v and gate, and step, k and q
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from everlong.config import config
from everlong.mixers.base import Context, Cost, Mixer, Traits, unpadded
from everlong.nn.layers import LowRank, ShortConvolution, initial_steps
from everlong.ops import selective_scan


class State(NamedTuple):
    """What Mamba keeps of a sequence."""

    memory: Float[Tensor, "N I S"]
    v: Float[Tensor, "N W I"]  # the convolution's last inputs


@config
class Options:
    """Options of Mamba."""

    width: int
    expansion: float = 2.0
    """Channels inside over `width`."""
    state_size: int = 16
    """N, the states of each channel."""
    kernel: int = 4
    """Taps of the short convolution."""
    step_rank: int | None = None
    """Channels between the two matrices of the step sizes; None: width / 16, rounded up."""
    bias: bool = False
    """Biases in the projections from and to the residual stream."""

    def __post_init__(self) -> None:
        if self.inner < 1:
            raise ValueError(f"`expansion` must leave at least one channel of width={self.width}: got {self.expansion}")
        if self.kernel < 1 or self.state_size < 1 or self.rank < 1:
            raise ValueError(
                "`kernel`, `state_size` and `step_rank` must be at least 1: "
                f"got kernel={self.kernel}, state_size={self.state_size}, step_rank={self.rank}"
            )

    @property
    def inner(self) -> int:
        return int(self.width * self.expansion)

    @property
    def rank(self) -> int:
        return -(-self.width // 16) if self.step_rank is None else self.step_rank


class Mamba(Mixer):
    """Mamba under the contract."""

    Config = Options
    traits = Traits(forms=frozenset({"chunk", "recurrent"}), causal=True, bidirectional=False, growth="constant")

    def __init__(self, config: Options, *, layer: int = 0, depth: int = 1) -> None:
        super().__init__(config, layer=layer, depth=depth)
        d, inner, states = config.width, config.inner, config.state_size
        self.v = nn.Linear(d, inner, bias=config.bias)
        self.gate = nn.Linear(d, inner, bias=config.bias)
        self.q = nn.Linear(inner, states, bias=False)
        self.k = nn.Linear(inner, states, bias=False)
        self.step = LowRank(inner, config.rank, inner)
        self.o = nn.Linear(inner, d, bias=config.bias)
        self.v_conv = ShortConvolution(inner, config.kernel, bias=True)
        # The n-th state forgets at rate n: the diagonal of HiPPO's LegS, real (section 3.6).
        self.log_rate = nn.Parameter(torch.arange(1.0, states + 1).log().repeat(inner, 1))
        self.step_bias = nn.Parameter(initial_steps(inner))
        self.skip = nn.Parameter(torch.ones(inner))

    def init_state(self, batch: int) -> State:
        c = self.config
        return State(self.new_state(batch, c.inner, c.state_size), self.new_state(batch, c.kernel - 1, c.inner))

    @unpadded
    def forward(
        self, x: Float[Tensor, "B T D"], state: State | None = None, context: Context = Context()
    ) -> tuple[Float[Tensor, "B T D"], State]:
        state = self.init_state(context.sequences(x)) if state is None else state
        v, last_v = self.v_conv(self.v(x), state.v, context.cu_seqlens)
        y, memory = selective_scan(
            v,
            self.step(v),
            -self.log_rate.exp(),
            self.k(v),
            self.q(v),
            D=self.skip,
            z=self.gate(x),
            dt_bias=self.step_bias,  # added in float32: in bfloat16 the smallest steps would lose their size
            dt_softplus=True,
            initial_state=state.memory,
            cu_seqlens=context.cu_seqlens,
            backend="reference" if context.form == "recurrent" else "auto",
        )
        return self.o(y), State(memory, last_v)

    @classmethod
    def cost(cls, config: Options, length: int) -> Cost:
        d, inner, states = config.width, config.inner, config.state_size
        weights = 3 * d * inner + 2 * inner * (states + config.rank)
        return Cost(
            flops_per_token=2 * weights + 2 * config.kernel * inner + 4 * inner * states,
            state_bytes=4 * inner * (states + config.kernel - 1),
            parameters=weights + inner * (config.kernel + states + 3) + (2 * inner + d if config.bias else 0),
        )

    def reference(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        h, outputs = torch.zeros_like(self.log_rate), []
        for u, v in zip(x, self.v_conv.reference(self.v(x)), strict=True):
            step = torch.log1p(torch.exp(self.step(v) + self.step_bias))
            decay = torch.exp(-step[:, None] * self.log_rate.exp())
            h = decay * h + (step * v)[:, None] * self.k(v)
            y = (h * self.q(v)).sum(1) + self.skip * v
            outputs.append(self.o(y * F.silu(self.gate(u))))
        return torch.stack(outputs)

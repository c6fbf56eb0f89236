"""Gated DeltaNet: a fading memory that overwrites what a key stood for, instead of adding to it.

    S_t = alpha_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T       o_t = S_t^T q_t / sqrt(K)      (eq. 10)
    alpha_t = exp(-A softplus(w_a x_t + b))      beta_t = sigmoid(w_b x_t)
    y_t = W_o [ norm(o_t) * silu(W_gate x_t) ]

With `decay` = channel this is Kimi Delta Attention: alpha_t is diagonal, a rate for each key channel, projected through
V channels as the gate then is, which has a sigmoid in the place of silu.

Shapes    x [B, T, D] -> y [B, T, D];  q, k [B, T, G, K], normalised;  v [B, T, H, V] with G <= H
State     S [B, H, K, V] and the last W - 1 inputs of three convolutions: 4 (H K V + (W - 1)(2 G K + H V)) bytes
Cost      FLOPs a token: 4 D (G K + H V) + 2 D H (V + 2) for the projections + 2 W (2 G K + H V) for the
          convolutions + 6 H K V for the memory
Source    Yang et al. 2024, "Gated Delta Networks", arXiv 2412.06464; Kimi Team 2025, "Kimi Linear", arXiv 2510.26692,
          eq. 1 and section 4 (channel)
Deviates  the state stands as K x V, so that products with it are transposed against the paper's
"""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from everlong.config import config, divisible
from everlong.mixers.base import Context, Cost, HeadOptions, Mixer, Traits, unpadded
from everlong.nn.fused import swiglu
from everlong.nn.layers import HeadNorm, LowRank, ShortConvolution, exact, initial_steps, unit_heads
from everlong.ops import delta_rule


class State(NamedTuple):
    """What Gated DeltaNet keeps of a sequence."""

    memory: Float[Tensor, "N H K V"]
    q: Float[Tensor, "N W GK"]  # the convolutions' last inputs
    k: Float[Tensor, "N W GK"]
    v: Float[Tensor, "N W HV"]


@config
class Options(HeadOptions):
    """Options of Gated DeltaNet; `num_heads` are those of values and of the memory."""

    num_key_heads: int | None = None
    """Heads of queries and keys, each shared by a group of value heads; None: as many as `num_heads`."""
    key_size: int | None = None
    """Channels of a query or key head; None: width / num_heads."""
    value_expansion: float = 1.0
    """Channels of a value head over width / num_heads."""
    kernel: int = 4
    """Taps of the short convolutions of q, k and v."""
    eigenvalues: Literal["positive", "both"] = "positive"
    """"both" doubles beta, which lets the memory flip signs and track state (Grazzi et al. 2024, arXiv 2411.12537)."""
    decay: Literal["head", "channel"] = "head"
    """What fades alike: a head's whole memory, or each of its key channels (Kimi Delta Attention)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        divisible("num_heads", self.heads, "num_key_heads", self.key_heads)
        if self.head_keys < 1:
            raise ValueError(f"`key_size` must be at least 1: got {self.head_keys}")
        if self.kernel < 1 or self.value_size < 1:
            raise ValueError(
                f"`kernel` and a head's values must be at least 1: got kernel={self.kernel}, {self.value_size} values"
            )

    @property
    def key_heads(self) -> int:
        return self.heads if self.num_key_heads is None else self.num_key_heads

    @property
    def head_keys(self) -> int:
        return self.head_size if self.key_size is None else self.key_size

    @property
    def value_size(self) -> int:
        return int(self.head_size * self.value_expansion)


class GatedDeltaNet(Mixer):
    """Gated DeltaNet under the contract."""

    Config = Options
    traits = Traits(
        forms=frozenset({"parallel", "chunk", "recurrent"}), causal=True, bidirectional=False, growth="constant"
    )

    def __init__(self, config: Options, *, layer: int = 0, depth: int = 1) -> None:
        super().__init__(config, layer=layer, depth=depth)
        d, keys, values = config.width, config.key_heads * config.head_keys, config.heads * config.value_size
        self.q = nn.Linear(d, keys, bias=False)
        self.k = nn.Linear(d, keys, bias=False)
        self.v = nn.Linear(d, values, bias=False)
        self.o = nn.Linear(values, d, bias=False)
        self.gate: nn.Module
        self.step: nn.Module  # w_a
        if config.decay == "head":
            rates = config.heads
            self.gate, self.step = nn.Linear(d, values, bias=False), nn.Linear(d, rates, bias=False)
        else:
            rates = config.heads * config.head_keys
            self.gate, self.step = LowRank(d, config.value_size, values), LowRank(d, config.value_size, rates)
        self.beta = nn.Linear(d, config.heads, bias=False)
        self.q_conv, self.k_conv, self.v_conv = (ShortConvolution(n, config.kernel) for n in (keys, keys, values))
        self.norm = HeadNorm(1, config.value_size)
        self.log_rate = nn.Parameter(torch.empty(config.heads).uniform_(1, 16).log())  # log A
        self.step_bias = nn.Parameter(initial_steps(rates))

    def init_state(self, batch: int) -> State:
        c = self.config
        keys, values = c.key_heads * c.head_keys, c.heads * c.value_size
        memory = self.new_state(batch, c.heads, c.head_keys, c.value_size)
        return State(memory, *(self.new_state(batch, c.kernel - 1, n) for n in (keys, keys, values)))

    @unpadded
    def forward(
        self, x: Float[Tensor, "B T D"], state: State | None = None, context: Context = Context()
    ) -> tuple[Float[Tensor, "B T D"], State]:
        c = self.config
        state = self.init_state(context.sequences(x)) if state is None else state
        q, last_q = self.q_conv(self.q(x), state.q, context.cu_seqlens)
        k, last_k = self.k_conv(self.k(x), state.k, context.cu_seqlens)
        v, last_v = self.v_conv(self.v(x), state.v, context.cu_seqlens)
        beta = torch.sigmoid(exact(self.beta(x))) * (2.0 if c.eigenvalues == "both" else 1.0)
        o, memory = delta_rule(
            unit_heads(q.unflatten(-1, (c.key_heads, -1))),
            unit_heads(k.unflatten(-1, (c.key_heads, -1))),
            v.unflatten(-1, (c.heads, -1)),
            beta,
            log_decay=self.log_decay(x),
            initial_state=state.memory,
            cu_seqlens=context.cu_seqlens,
            form=context.form,
        )
        y = self.o(self.opened(x, self.norm(o).flatten(-2)))
        return y, State(memory, last_q, last_k, last_v)

    def log_decay(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B H"] | Float[Tensor, "*B H K"]:
        """ln alpha, of a head or of each of its key channels."""
        step: Tensor = F.softplus(exact(self.step(x)) + self.step_bias)
        if self.config.decay == "head":
            return -self.log_rate.exp() * step
        return -self.log_rate.exp()[:, None] * step.view(*step.shape[:-1], self.config.heads, self.config.head_keys)

    def opened(self, x: Float[Tensor, "*B D"], o: Float[Tensor, "*B HV"]) -> Float[Tensor, "*B HV"]:
        """What the gate leaves of the output."""
        gate: Tensor = self.gate(x)
        return swiglu(gate, o) if self.config.decay == "head" else o * torch.sigmoid(gate)

    @classmethod
    def cost(cls, config: Options, length: int) -> Cost:
        d, h, memory = config.width, config.heads, config.heads * config.head_keys * config.value_size
        keys, values, taps = config.key_heads * config.head_keys, h * config.value_size, config.kernel
        rates = h if config.decay == "head" else h * config.head_keys
        gates = d * (values + rates) if config.decay == "head" else config.value_size * (2 * d + values + rates)
        weights = d * (2 * keys + 2 * values + h) + gates
        channels = 2 * keys + values
        return Cost(
            flops_per_token=2 * weights + 2 * taps * channels + 6 * memory,
            state_bytes=4 * (memory + (taps - 1) * channels),
            parameters=weights + taps * channels + config.value_size + h + rates,
        )

    def reference(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        c = self.config
        q = self.q_conv.reference(self.q(x)).view(len(x), c.key_heads, -1)
        k = self.k_conv.reference(self.k(x)).view(len(x), c.key_heads, -1)
        v = self.v_conv.reference(self.v(x)).view(len(x), c.heads, -1)
        q, k = (y.repeat_interleave(c.heads // c.key_heads, dim=1) for y in (q, k))
        memory, outputs = x.new_zeros(c.heads, c.head_keys, c.value_size), []
        for t, x_t in enumerate(x):
            q_t, k_t = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q[t], k[t]))
            step = torch.log1p(torch.exp(self.step(x_t) + self.step_bias)).view(c.heads, -1)
            alpha = torch.exp(-self.log_rate.exp()[:, None] * step)
            beta = torch.sigmoid(self.beta(x_t)) * (2.0 if c.eigenvalues == "both" else 1.0)
            memory = alpha[:, :, None] * memory
            found = (memory * k_t[:, :, None]).sum(1)
            memory = memory + k_t[:, :, None] * (beta[:, None] * (v[t] - found))[:, None]
            o = (memory * q_t[:, :, None]).sum(1) * c.head_keys**-0.5
            o = self.norm.reference(o)
            outputs.append(self.o(self.opened(x_t, o.flatten())))
        return torch.stack(outputs)

"""Gated linear attention: every channel of the memory fades at a rate that the token decides.

    S_t = diag(alpha_t) S_{t-1} + k_t v_t^T          o_t = S_t^T q_t / sqrt(K)               (eq. 3)
    alpha_t = sigmoid(W_2 W_1 x_t + b)^(1/16)                                                (section 4.4)
    y_t = W_o [ norm(o_t) * silu(W_gate x_t) ]

Shapes    x [B, T, D] -> y [B, T, D];  q, k, alpha [B, T, H, K];  v [B, T, H, V], H K = D / 2, H V = D by default
State     S [B, H, K, V]: 4 H K V bytes a sequence, whatever its length; convolutions add 4 (W - 1)(2 H K + H V)
Cost      FLOPs a token: 2 D H (2 K + 3 V) + 2 rank (D + H K) for the projections + 4 H K V for the memory; convolutions
          of W taps add 2 W (2 H K + H V)
Source    Yang et al. 2023, "Gated Linear Attention Transformers", arXiv 2312.06635
Deviates  the gate before the output has no bias; optional short convolutions of q, k, v with silu, as the authors' code
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from everlong.config import config
from everlong.mixers.base import Context, Cost, HeadOptions, Mixer, Traits, unpadded
from everlong.nn.fused import swiglu
from everlong.nn.layers import HeadNorm, LowRank, ShortConvolution, Unfiltered, exact
from everlong.ops import linear_attention


class State(NamedTuple):
    """What gated linear attention keeps of a sequence."""

    memory: Float[Tensor, "N H K V"]
    q: Float[Tensor, "N W HK"]  # the convolutions' last inputs; W = 0 without
    k: Float[Tensor, "N W HK"]
    v: Float[Tensor, "N W HV"]


@config
class Options(HeadOptions):
    """Options of gated linear attention."""

    key_expansion: float = 0.5
    """Channels of a query or key head over width / num_heads."""
    value_expansion: float = 1.0
    """Channels of a value head over width / num_heads."""
    gate_rank: int = 16
    """Channels through which the decays are projected."""
    gate_temperature: float = 16.0
    """The decay is the sigmoid to the power of 1 / temperature: the larger, the longer is remembered."""
    kernel: int | None = None
    """Taps of short convolutions of q, k and v; None: there are none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.key_size < 1 or self.value_size < 1 or self.gate_rank < 1:
            raise ValueError(
                f"a head's keys and values and `gate_rank` must be at least 1: got {self.key_size} keys, "
                f"{self.value_size} values, gate_rank={self.gate_rank}"
            )
        if self.gate_temperature <= 0:
            raise ValueError(f"`gate_temperature` must be above 0: got {self.gate_temperature}")
        if self.kernel is not None and self.kernel < 1:
            raise ValueError(f"`kernel` must be at least 1, or None for no convolutions: got {self.kernel}")

    @property
    def key_size(self) -> int:
        return max(1, int(self.head_size * self.key_expansion)) if self.key_expansion > 0 else 0

    @property
    def value_size(self) -> int:
        return int(self.head_size * self.value_expansion)


class GLA(Mixer):
    """Gated linear attention under the contract."""

    Config = Options
    traits = Traits(
        forms=frozenset({"parallel", "chunk", "recurrent"}), causal=True, bidirectional=False, growth="constant"
    )

    def __init__(self, config: Options, *, layer: int = 0, depth: int = 1) -> None:
        super().__init__(config, layer=layer, depth=depth)
        d, keys, values = config.width, config.heads * config.key_size, config.heads * config.value_size
        self.q = nn.Linear(d, keys, bias=False)
        self.k = nn.Linear(d, keys, bias=False)
        self.v = nn.Linear(d, values, bias=False)
        self.gate = nn.Linear(d, values, bias=False)
        self.o = nn.Linear(values, d, bias=False)
        self.decay = LowRank(d, config.gate_rank, keys, bias=True)
        self.q_conv, self.k_conv, self.v_conv = (
            Unfiltered() if config.kernel is None else ShortConvolution(n, config.kernel) for n in (keys, keys, values)
        )
        self.norm = HeadNorm(1, config.value_size)

    def init_state(self, batch: int) -> State:
        c = self.config
        keys, values = c.heads * c.key_size, c.heads * c.value_size
        kept = 0 if c.kernel is None else c.kernel - 1
        memory = self.new_state(batch, c.heads, c.key_size, c.value_size)
        return State(memory, *(self.new_state(batch, kept, n) for n in (keys, keys, values)))

    @unpadded
    def forward(
        self, x: Float[Tensor, "B T D"], state: State | None = None, context: Context = Context()
    ) -> tuple[Float[Tensor, "B T D"], State]:
        c = self.config
        state = self.init_state(context.sequences(x)) if state is None else state
        q, last_q = self.q_conv(self.q(x), state.q, context.cu_seqlens)
        k, last_k = self.k_conv(self.k(x), state.k, context.cu_seqlens)
        v, last_v = self.v_conv(self.v(x), state.v, context.cu_seqlens)
        q, k, v, gate, decay = (y.unflatten(-1, (c.heads, -1)) for y in (q, k, v, self.gate(x), self.decay(x)))
        o, memory = linear_attention(
            q,
            k,
            v,
            log_decay=F.logsigmoid(exact(decay)) / c.gate_temperature,
            initial_state=state.memory,
            cu_seqlens=context.cu_seqlens,
            form=context.form,
        )
        assert isinstance(memory, Tensor)  # a pair comes with `normalize` only
        return self.o(swiglu(gate, self.norm(o)).flatten(-2)), State(memory, last_q, last_k, last_v)

    @classmethod
    def cost(cls, config: Options, length: int) -> Cost:
        d, keys, values = config.width, config.heads * config.key_size, config.heads * config.value_size
        memory, channels, taps = keys * config.value_size, 2 * keys + values, config.kernel or 0
        weights = d * (2 * keys + 3 * values) + config.gate_rank * (d + keys)
        return Cost(
            flops_per_token=2 * weights + 2 * taps * channels + 4 * memory,
            state_bytes=4 * (memory + max(0, taps - 1) * channels),
            parameters=weights + taps * channels + keys + config.value_size,
        )

    def reference(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        c = self.config
        q, k, v = (
            convolve(project(x)).view(len(x), c.heads, -1)
            for project, convolve in (
                (self.q, self.q_conv.reference),
                (self.k, self.k_conv.reference),
                (self.v, self.v_conv.reference),
            )
        )
        memory, outputs = x.new_zeros(c.heads, c.key_size, c.value_size), []
        for t, x_t in enumerate(x):
            alpha = torch.sigmoid(self.decay(x_t)).view(c.heads, -1) ** (1 / c.gate_temperature)
            memory = alpha[:, :, None] * memory + k[t][:, :, None] * v[t][:, None]
            o = (memory * q[t][:, :, None]).sum(1) * c.key_size**-0.5
            outputs.append(self.o(self.norm.reference(o).flatten() * F.silu(self.gate(x_t))))
        return torch.stack(outputs)

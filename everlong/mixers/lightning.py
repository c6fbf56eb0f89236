"""Lightning attention: linear attention with a fixed decay for each head and layer, normed and gated.

    S_t = lambda S_{t-1} + k_t v_t^T             o_t = S_t^T q_t                             (eq. 10)
    y_t = W_o [ norm(o_t) * U x_t ]              q, k = silu(W x), v = W x                   (eq. 12)
    lambda = exp(-(8 h / H)(1 - l / L)), h = 0 .. H - 1, in layer l of L                     (eq. 6)
    in the first layer q_ti k_si is weighed by cos((t - s) theta_i), theta learnt: LRPE-d, the real part of eq. 4

Shapes    x [B, T, D] -> y [B, T, D];  q, k, v [B, T, H, K], H K = D;  the norm is over all heads' channels
State     S [B, H, K, K] and a count: 4 H K^2 + 8 bytes a sequence, whatever its length; with LRPE-d S [B, H, 2 K, K]
Cost      FLOPs a token: 10 D^2 for the projections + 4 H K^2 for the memory; with LRPE-d 8 H K^2; of a low-rank gate
          8 D^2 + 4 rank D for the projections
Source    Qin et al. 2023, "TransNormerLLM", arXiv 2307.14995; in blocks: Qin et al. 2024, "Lightning Attention-2",
          arXiv 2401.04658
Deviates  the released models and MiniMax-01 (arXiv 2501.08313) take other parts, here options: decay = alibi, lambda =
          exp(-2^(-8 (h + 1) / H) (1 - l / (L - 1) + 1e-5)), whatever H; silu on v; a sigmoid in the gate, which may be
          of low rank; a norm with gain; no rotation
"""

import dataclasses
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from everlong.config import config
from everlong.mixers.base import Context, Cost, HeadOptions, Mixer, Traits, unpadded
from everlong.nn.fused import rms_norm
from everlong.nn.layers import LowRank
from everlong.nn.positions.rotary import waves
from everlong.ops import linear_attention

EPS = 1e-6  # of the norm


class State(NamedTuple):
    """What lightning attention keeps of a sequence."""

    memory: Float[Tensor, "N H K V"]
    length: Int[Tensor, " N"]


@config
class Options(HeadOptions):
    """Options of lightning attention."""

    decay: Literal["paper", "alibi"] = "paper"
    """The law of lambda: the paper's, by which the first head never forgets, or that of its code, by ALiBi's slopes."""
    rotation: Literal["first", "all", "none"] = "first"
    """The layers whose channels turn with the position by learnt angles."""
    values: Literal["linear", "silu"] = "linear"
    """What values go through."""
    gate: Literal["linear", "sigmoid"] = "linear"
    """What the gate goes through."""
    gate_rank: int | None = None
    """Channels through which the gate is projected; None: one matrix."""
    gain: bool = False
    """Whether the norm has a gain for each channel."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gate_rank is not None and self.gate_rank < 1:
            raise ValueError(f"`gate_rank` must be at least 1: got {self.gate_rank}")

    @property
    def key_size(self) -> int:
        """Channels of a key in the memory: a cosine and a sine of each where they turn."""
        return self.head_size if self.rotation == "none" else 2 * self.head_size


class Lightning(Mixer):
    """Lightning attention under the contract. The layer's place decides its decays and whether it rotates."""

    Config = Options
    traits = Traits(
        forms=frozenset({"parallel", "chunk", "recurrent"}), causal=True, bidirectional=False, growth="constant"
    )

    def __init__(self, config: Options, *, layer: int = 0, depth: int = 1) -> None:
        if config.rotation == "first":
            config = dataclasses.replace(config, rotation="none" if layer else "all")
        super().__init__(config, layer=layer, depth=depth)
        d = config.width
        self.q, self.k, self.v, self.o = (nn.Linear(d, d, bias=False) for _ in range(4))
        self.gate = nn.Linear(d, d, bias=False) if config.gate_rank is None else LowRank(d, config.gate_rank, d)
        self.gain = nn.Parameter(torch.ones(d)) if config.gain else None
        self.theta: nn.Parameter | None = None
        if config.rotation == "all":
            self.theta = nn.Parameter((1e4 ** (-2 * torch.arange(d) / d)).view(config.heads, -1))

    def init_state(self, batch: int) -> State:
        c = self.config
        memory = self.new_state(batch, c.heads, c.key_size, c.head_size)
        return State(memory, self.new_state(batch, dtype=torch.long))

    @unpadded
    def forward(
        self, x: Float[Tensor, "B T D"], state: State | None = None, context: Context = Context()
    ) -> tuple[Float[Tensor, "B T D"], State]:
        c = self.config
        state = self.init_state(context.sequences(x)) if state is None else state
        q, k, v = (project(x).unflatten(-1, (c.heads, -1)) for project in (self.q, self.k, self.v))
        q, k = F.silu(q), F.silu(k)
        if self.theta is not None:
            cos, sin = waves(context.count_from(state.length, x), self.theta, q.dtype)
            q, k = (torch.cat([y * cos, y * sin], -1) for y in (q, k))
        o, memory = linear_attention(
            q,
            k,
            v if c.values == "linear" else F.silu(v),
            log_decay=self.log_decay(state.memory),
            scale=1.0,
            initial_state=state.memory,
            cu_seqlens=context.cu_seqlens,
            form=context.form,
        )
        assert isinstance(memory, Tensor)  # a pair comes with `normalize` only
        gate = self.gate(x) if c.gate == "linear" else torch.sigmoid(self.gate(x))
        y = self.o(rms_norm(o.flatten(-2), self.gain, EPS) * gate)
        return y, State(memory, state.length + context.lengths(x))

    def log_decay(self, like: Tensor) -> Float[Tensor, " H"]:
        """ln lambda of each head, in this layer."""
        heads = self.config.heads
        index: Tensor = torch.arange(heads, dtype=like.dtype, device=like.device)
        if self.config.decay == "paper":
            slopes: Tensor = (8 * index / heads) * (1 - self.layer / self.depth)
        else:  # the small number keeps the last layer's memories from lasting for ever, and one layer from 0 / 0
            slopes = torch.exp2(-8 * (index + 1) / heads) * (1 - self.layer / (self.depth - 1 + 1e-5) + 1e-5)
        return -slopes

    @classmethod
    def cost(cls, config: Options, length: int) -> Cost:
        d, memory = config.width, config.width * config.key_size
        weights = 4 * d * d + (d * d if config.gate_rank is None else 2 * d * config.gate_rank)
        turning = d if config.rotation != "none" else 0
        return Cost(
            flops_per_token=2 * weights + 4 * memory,
            state_bytes=4 * memory + 8,
            parameters=weights + turning + (d if config.gain else 0),
        )

    def reference(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        c, h = self.config, torch.arange(self.config.heads, dtype=x.dtype)
        if c.decay == "paper":
            decay = torch.exp(-(8 * h / c.heads) * (1 - self.layer / self.depth))
        else:
            decay = torch.exp(-(2 ** (-8 * (h + 1) / c.heads)) * (1 - self.layer / (self.depth - 1 + 1e-5) + 1e-5))
        turning = x.new_zeros(c.heads, c.head_size) if self.theta is None else self.theta
        memory, outputs = x.new_zeros(c.heads, c.head_size, c.head_size), []
        for t, x_t in enumerate(x):
            q, k, v = (project(x_t).view(c.heads, -1) for project in (self.q, self.k, self.v))
            q, k, v = q * torch.sigmoid(q), k * torch.sigmoid(k), v if c.values == "linear" else v * torch.sigmoid(v)
            wave = torch.polar(torch.ones_like(turning), t * turning)
            memory = decay[:, None, None] * memory + (k * wave.conj())[:, :, None] * v[:, None]
            o = (memory * (q * wave)[:, :, None]).real.sum(1).flatten()
            o = o * torch.rsqrt(o.square().mean() + EPS) * (1 if self.gain is None else self.gain)
            gate = self.gate(x_t)
            outputs.append(self.o(o * (gate if c.gate == "linear" else torch.sigmoid(gate))))
        return torch.stack(outputs)

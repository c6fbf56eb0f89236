"""Gated DeltaNet: a fading memory that overwrites what a key stood for, instead of adding to it.

    S_t = alpha_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T       o_t = S_t^T q_t / sqrt(K)      (eq. 10)
    alpha_t = exp(-A softplus(w_a x_t + b))      beta_t = sigmoid(w_b x_t)
    y_t = W_o [ norm(o_t) * silu(W_gate x_t) ]

Shapes    x [B, T, D] -> y [B, T, D];  q, k [B, T, G, K], normalised;  v [B, T, H, V] with G <= H
State     S [B, H, K, V] and the last W - 1 inputs of three convolutions: 4 (H K V + (W - 1)(2 G K + H V)) bytes
Cost      FLOPs a token: 4 D (G K + H V) + 2 D H (V + 2) for the projections + 2 W (2 G K + H V) for the
          convolutions + 6 H K V for the memory
Source    Yang et al. 2024, "Gated Delta Networks", arXiv 2412.06464
Deviates  the state stands as K x V, so that products with it are transposed against the paper's
"""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from everlong.config import config, divisible
from everlong.mixers.base import Context, Cost, Mixer, Traits, default_heads, unpadded
from everlong.nn.layers import HeadNorm, ShortConvolution, exact, initial_steps
from everlong.ops import delta_rule


class State(NamedTuple):
    """What Gated DeltaNet keeps of a sequence."""

    memory: Float[Tensor, "N H K V"]
    q: Float[Tensor, "N W GK"]  # the convolutions' last inputs
    k: Float[Tensor, "N W GK"]
    v: Float[Tensor, "N W HV"]


@config
class Options:
    """Options of Gated DeltaNet."""

    width: int
    num_heads: int | None = None
    """Heads of values and of the memory; None: heads of about 64 channels."""
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

    def __post_init__(self) -> None:
        divisible("width", self.width, "num_heads", self.heads)
        divisible("num_heads", self.heads, "num_key_heads", self.key_heads)
        if self.head_keys < 1:
            raise ValueError(f"`key_size` must be at least 1: got {self.head_keys}")
        if self.kernel < 1 or self.value_size < 1:
            raise ValueError(
                f"`kernel` and a head's values must be at least 1: got kernel={self.kernel}, {self.value_size} values"
            )

    @property
    def heads(self) -> int:
        return default_heads(self.width) if self.num_heads is None else self.num_heads

    @property
    def key_heads(self) -> int:
        return self.heads if self.num_key_heads is None else self.num_key_heads

    @property
    def head_keys(self) -> int:
        return self.width // self.heads if self.key_size is None else self.key_size

    @property
    def value_size(self) -> int:
        return int(self.width // self.heads * self.value_expansion)


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
        self.gate = nn.Linear(d, values, bias=False)
        self.o = nn.Linear(values, d, bias=False)
        self.step = nn.Linear(d, config.heads, bias=False)  # w_a
        self.beta = nn.Linear(d, config.heads, bias=False)
        self.q_conv, self.k_conv, self.v_conv = (ShortConvolution(n, config.kernel) for n in (keys, keys, values))
        self.norm = HeadNorm(1, config.value_size)
        self.log_rate = nn.Parameter(torch.empty(config.heads).uniform_(1, 16).log())  # log A
        self.step_bias = nn.Parameter(initial_steps(config.heads))

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
        log_decay = -self.log_rate.exp() * F.softplus(exact(self.step(x)) + self.step_bias)
        o, memory = delta_rule(
            normalize(q.unflatten(-1, (c.key_heads, -1))),
            normalize(k.unflatten(-1, (c.key_heads, -1))),
            v.unflatten(-1, (c.heads, -1)),
            beta,
            log_decay=log_decay,
            initial_state=state.memory,
            cu_seqlens=context.cu_seqlens,
            form=context.form,
        )
        y = self.o((self.norm(o) * F.silu(self.gate(x).unflatten(-1, (c.heads, -1)))).flatten(-2))
        return y, State(memory, last_q, last_k, last_v)

    @classmethod
    def cost(cls, config: Options, length: int) -> Cost:
        d, h, memory = config.width, config.heads, config.heads * config.head_keys * config.value_size
        keys, values, taps = config.key_heads * config.head_keys, h * config.value_size, config.kernel
        weights = d * (2 * keys + 3 * values + 2 * h)
        channels = 2 * keys + values
        return Cost(
            flops_per_token=2 * weights + 2 * taps * channels + 6 * memory,
            state_bytes=4 * (memory + (taps - 1) * channels),
            parameters=weights + taps * channels + config.value_size + 2 * h,
        )

    @staticmethod
    def reference(
        q: Float[Tensor, "T K"],
        k: Float[Tensor, "T K"],
        v: Float[Tensor, "T V"],
        beta: Float[Tensor, " T"],
        log_decay: Float[Tensor, " T"],
    ) -> Float[Tensor, "T V"]:
        """Equation 10 for one sequence and one head, one token after another, in float64."""
        q, k, v, beta, log_decay = (t.double() for t in (q, k, v, beta, log_decay))
        memory, eye, outputs = q.new_zeros(q.shape[1], v.shape[1]), torch.eye(q.shape[1], dtype=q.dtype), []
        for q_t, k_t, v_t, beta_t, g_t in zip(q, k, v, beta, log_decay, strict=True):
            memory = g_t.exp() * (eye - beta_t * torch.outer(k_t, k_t)) @ memory + beta_t * torch.outer(k_t, v_t)
            outputs.append(memory.T @ q_t * q.shape[1] ** -0.5)
        return torch.stack(outputs)


def normalize(x: Float[Tensor, "B T H K"]) -> Float[Tensor, "B T H K"]:
    """Heads of length one; a head of zeros stays zero."""
    return x * torch.rsqrt(exact(x).square().sum(-1, keepdim=True) + 1e-6).to(x.dtype)

"""Mamba-2: a state-space layer whose transition is one number a head, which makes it linear attention with a decay.

    S_t = exp(dt_t A) S_{t-1} + B_t (dt_t x_t)^T        y_t = S_t^T C_t + skip * x_t          (eq. 16, section 7)
    dt_t = softplus(W_dt u_t + b)        out_t = W_o norm(y_t * silu(W_gate u_t))

Shapes    u [B, T, D] -> out [B, T, D];  C, B (here q, k) [B, T, G, N];  x (here v) [B, T, H, P], H P = expansion D
State     S [B, H, N, P] and the last W - 1 inputs of three convolutions: 4 (H N P + (W - 1)(2 G N + H P)) bytes
Cost      FLOPs a token: 4 D G N + 6 D H P + 2 D H for the projections + 2 W (2 G N + H P) for the convolutions
          + 4 H N P for the memory
Source    Dao and Gu 2024, "Transformers are SSMs", arXiv 2405.21060
Deviates  the one input projection and the one convolution are kept as a part for each of C, B, x, gate and dt
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from everlong.config import config, divisible
from everlong.mixers.base import Context, Cost, Mixer, Traits, default_heads, unpadded
from everlong.nn.fused import swiglu
from everlong.nn.layers import HeadNorm, ShortConvolution, exact, initial_steps
from everlong.ops import linear_attention


class State(NamedTuple):
    """What Mamba-2 keeps of a sequence."""

    memory: Float[Tensor, "N H S P"]
    q: Float[Tensor, "N W GS"]  # the convolutions' last inputs
    k: Float[Tensor, "N W GS"]
    v: Float[Tensor, "N W HP"]


@config
class Options:
    """Options of Mamba-2."""

    width: int
    expansion: float = 2.0
    """Channels inside over `width`."""
    num_heads: int | None = None
    """None: heads of about 64 inner channels."""
    num_groups: int = 1
    """Groups of heads that share B and C."""
    state_size: int = 64
    """N, the rows of a head's memory."""
    kernel: int = 4
    """Taps of the short convolutions of C, B and x."""

    def __post_init__(self) -> None:
        if self.inner < 1:
            raise ValueError(f"`expansion` must leave at least one channel of width={self.width}: got {self.expansion}")
        divisible("width * expansion", self.inner, "num_heads", self.heads)
        divisible("num_heads", self.heads, "num_groups", self.num_groups)
        if self.kernel < 1 or self.state_size < 1:
            raise ValueError(
                f"`kernel` and `state_size` must be at least 1: got kernel={self.kernel}, state_size={self.state_size}"
            )

    @property
    def inner(self) -> int:
        return int(self.width * self.expansion)

    @property
    def heads(self) -> int:
        return default_heads(self.inner) if self.num_heads is None else self.num_heads


class Mamba2(Mixer):
    """Mamba-2 under the contract."""

    Config = Options
    traits = Traits(
        forms=frozenset({"parallel", "chunk", "recurrent"}), causal=True, bidirectional=False, growth="constant"
    )

    def __init__(self, config: Options, *, layer: int = 0, depth: int = 1) -> None:
        super().__init__(config, layer=layer, depth=depth)
        d, inner, shared = config.width, config.inner, config.num_groups * config.state_size
        self.q = nn.Linear(d, shared, bias=False)
        self.k = nn.Linear(d, shared, bias=False)
        self.v = nn.Linear(d, inner, bias=False)
        self.gate = nn.Linear(d, inner, bias=False)
        self.step = nn.Linear(d, config.heads, bias=False)
        self.o = nn.Linear(inner, d, bias=False)
        self.q_conv, self.k_conv, self.v_conv = (
            ShortConvolution(n, config.kernel, bias=True) for n in (shared, shared, inner)
        )
        self.norm = HeadNorm(config.num_groups, inner // config.num_groups)
        self.log_rate = nn.Parameter(torch.empty(config.heads).uniform_(1, 16).log())  # log -A
        self.step_bias = nn.Parameter(initial_steps(config.heads))
        self.skip = nn.Parameter(torch.ones(config.heads))

    def init_state(self, batch: int) -> State:
        c = self.config
        shared = c.num_groups * c.state_size
        memory = self.new_state(batch, c.heads, c.state_size, c.inner // c.heads)
        return State(memory, *(self.new_state(batch, c.kernel - 1, n) for n in (shared, shared, c.inner)))

    @unpadded
    def forward(
        self, x: Float[Tensor, "B T D"], state: State | None = None, context: Context = Context()
    ) -> tuple[Float[Tensor, "B T D"], State]:
        c = self.config
        state = self.init_state(context.sequences(x)) if state is None else state
        q, last_q = self.q_conv(self.q(x), state.q, context.cu_seqlens)
        k, last_k = self.k_conv(self.k(x), state.k, context.cu_seqlens)
        v, last_v = self.v_conv(self.v(x), state.v, context.cu_seqlens)
        v = v.unflatten(-1, (c.heads, -1))
        step = F.softplus(exact(self.step(x)) + self.step_bias)
        o, memory = linear_attention(
            q.unflatten(-1, (c.num_groups, -1)),
            k.unflatten(-1, (c.num_groups, -1)),
            v * step[..., None].to(v.dtype),
            log_decay=-self.log_rate.exp() * step,
            scale=1.0,
            initial_state=state.memory,
            cu_seqlens=context.cu_seqlens,
            form=context.form,
        )
        assert isinstance(memory, Tensor)  # a pair comes with `normalize` only
        o = o + self.skip[:, None].to(v.dtype) * v
        gated = swiglu(self.gate(x), o.flatten(-2))
        y = self.o(self.norm(torch.unflatten(gated, -1, (c.num_groups, -1))).flatten(-2))
        return y, State(memory, last_q, last_k, last_v)

    @classmethod
    def cost(cls, config: Options, length: int) -> Cost:
        d, h, inner, shared = config.width, config.heads, config.inner, config.num_groups * config.state_size
        weights = d * (2 * shared + 3 * inner + h)
        channels = 2 * shared + inner
        memory = config.state_size * inner
        return Cost(
            flops_per_token=2 * weights + 2 * config.kernel * channels + 4 * memory,
            state_bytes=4 * (memory + (config.kernel - 1) * channels),
            parameters=weights + (config.kernel + 1) * channels + inner + 3 * h,
        )

    def reference(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        c = self.config
        q = self.q_conv.reference(self.q(x)).view(len(x), c.num_groups, -1)
        k = self.k_conv.reference(self.k(x)).view(len(x), c.num_groups, -1)
        v = self.v_conv.reference(self.v(x)).view(len(x), c.heads, -1)
        q, k = (y.repeat_interleave(c.heads // c.num_groups, dim=1) for y in (q, k))
        memory, outputs = x.new_zeros(c.heads, c.state_size, v.shape[-1]), []
        for t, x_t in enumerate(x):
            step = torch.log1p(torch.exp(self.step(x_t) + self.step_bias))
            decay = torch.exp(-self.log_rate.exp() * step)
            memory = decay[:, None, None] * memory + k[t][:, :, None] * (step[:, None] * v[t])[:, None]
            o = (memory * q[t][:, :, None]).sum(1) + self.skip[:, None] * v[t]
            o = (o.flatten() * F.silu(self.gate(x_t))).view(c.num_groups, -1)
            o = self.norm.reference(o)
            outputs.append(self.o(o.flatten()))
        return torch.stack(outputs)

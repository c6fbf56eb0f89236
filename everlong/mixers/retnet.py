"""Retention: linear attention whose memory fades at a fixed rate for each head.

    S_t = gamma_h S_{t-1} + k_t v_t^T            o_t = S_t^T q_t / sqrt(K)                   (eq. 6)
    y_t = W_o [ norm(o_t) * silu(W_gate x_t) ]                                               (eq. 8)
    channels 2i, 2i + 1 of q_t, k_t turn by the angle t theta_i, theta_i = 10000^(-i / (K/2 - 1)), i = 0 .. K/2 - 1

Shapes    x [B, T, D] -> y [B, T, D];  q, k [B, T, H, K];  v [B, T, H, V], H K = D, H V = expansion D
State     S [B, H, K, V] and a count: 4 H K V + 8 bytes a sequence, whatever its length
Cost      FLOPs a token: 2 D (2 D + 3 H V) for the projections + 4 H K V for the memory
Source    Sun et al. 2023, "Retentive Network: A Successor to Transformer", arXiv 2307.08621
Deviates  the matrix of decays is not normalised (section 2.1), which the norm of each head cancels up to its epsilon:
          without it all forms give the same before the norm as well. That norm is the root mean square, without gain
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from everlong.config import config
from everlong.mixers.base import Context, Cost, HeadOptions, Mixer, Traits, unpadded
from everlong.nn.fused import swiglu, turn
from everlong.nn.layers import HeadNorm
from everlong.nn.positions.rotary import halves, waves
from everlong.ops import linear_attention


class State(NamedTuple):
    """What retention keeps of a sequence."""

    memory: Float[Tensor, "N H K V"]
    length: Int[Tensor, " N"]


@config
class Options(HeadOptions):
    """Options of retention."""

    value_expansion: float = 2.0
    """Channels of a value head over width / num_heads."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head_size % 2:
            raise ValueError(
                f"retention turns pairs of channels: the size of a head must be even, got {self.head_size}"
            )
        if self.value_size < 1:
            raise ValueError(
                f"`value_expansion` must leave a head at least one channel of {self.head_size}: got "
                f"{self.value_expansion}"
            )

    @property
    def value_size(self) -> int:
        return int(self.head_size * self.value_expansion)


class RetNet(Mixer):
    """Retention under the contract."""

    Config = Options
    traits = Traits(
        forms=frozenset({"parallel", "chunk", "recurrent"}), causal=True, bidirectional=False, growth="constant"
    )

    def __init__(self, config: Options, *, layer: int = 0, depth: int = 1) -> None:
        super().__init__(config, layer=layer, depth=depth)
        d, values = config.width, config.heads * config.value_size
        self.q = nn.Linear(d, d, bias=False)
        self.k = nn.Linear(d, d, bias=False)
        self.v = nn.Linear(d, values, bias=False)
        self.gate = nn.Linear(d, values, bias=False)
        self.o = nn.Linear(values, d, bias=False)
        self.norm = HeadNorm(config.heads, config.value_size, affine=False)

    def init_state(self, batch: int) -> State:
        c = self.config
        memory = self.new_state(batch, c.heads, c.head_size, c.value_size)
        return State(memory, self.new_state(batch, dtype=torch.long))

    @unpadded
    def forward(
        self, x: Float[Tensor, "B T D"], state: State | None = None, context: Context = Context()
    ) -> tuple[Float[Tensor, "B T D"], State]:
        state = self.init_state(context.sequences(x)) if state is None else state
        q, k, v, gate = (y(x).unflatten(-1, (self.config.heads, -1)) for y in (self.q, self.k, self.v, self.gate))
        q, k = self._rotate(q, k, context.count_from(state.length, x))
        o, memory = linear_attention(
            q,
            k,
            v,
            log_decay=self.log_decay(state.memory),
            initial_state=state.memory,
            cu_seqlens=context.cu_seqlens,
            form=context.form,
        )
        assert isinstance(memory, Tensor)  # a pair comes with `normalize` only
        y = self.o(swiglu(gate, self.norm(o)).flatten(-2))
        return y, State(memory, state.length + context.lengths(x))

    def log_decay(self, like: Tensor) -> Float[Tensor, " H"]:
        """ln gamma: from 1 - 2^-5 to nearly 1, so that the slowest head remembers thousands of tokens."""
        head = torch.arange(self.config.heads, dtype=like.dtype, device=like.device)
        return torch.log1p(-torch.exp2(-5.0 - head))

    def _rotate(self, q: Tensor, k: Tensor, positions: Int[Tensor, "rows T"]) -> tuple[Tensor, Tensor]:
        exact = torch.promote_types(q.dtype, torch.float32)
        theta = torch.exp(
            -math.log(1e4) * torch.linspace(0, 1, self.config.head_size // 2, dtype=exact, device=q.device)
        )
        cos, sin = waves(positions, theta, q.dtype)
        return turn(halves(q), cos, sin), turn(halves(k), cos, sin)

    @classmethod
    def cost(cls, config: Options, length: int) -> Cost:
        d, values = config.width, config.heads * config.value_size
        memory = config.head_size * values
        weights = d * (2 * d + 3 * values)
        return Cost(flops_per_token=2 * weights + 4 * memory, state_bytes=4 * memory + 8, parameters=weights)

    def reference(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        c = self.config
        theta = 1e4 ** -torch.linspace(0, 1, c.head_size // 2, dtype=x.dtype)
        gamma = 1 - 2.0 ** (-5 - torch.arange(c.heads, dtype=x.dtype))
        memory, outputs = x.new_zeros(c.heads, c.head_size, c.value_size), []
        for t, x_t in enumerate(x):
            turned = torch.polar(torch.ones_like(theta), t * theta)
            q, k = (torch.view_as_complex(y(x_t).view(c.heads, -1, 2)) * turned for y in (self.q, self.k))
            q, k = (torch.view_as_real(y).flatten(1) for y in (q, k))
            v, gate = self.v(x_t).view(c.heads, -1), self.gate(x_t)
            memory = gamma[:, None, None] * memory + k[:, :, None] * v[:, None]
            o = (memory * q[:, :, None]).sum(1) * c.head_size**-0.5
            outputs.append(self.o(self.norm.reference(o).flatten() * F.silu(gate)))
        return torch.stack(outputs)

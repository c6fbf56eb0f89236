"""HGRN2, the smallest gated linear recurrence: what a token lets in is what it makes the memory forget.

    S_t = diag(f_t) S_{t-1} + (1 - f_t) v_t^T          o_t = S_t^T q_t                      (eq. 12)
    f_t = sigmoid(W_f x_t)      q_t = silu(W_q x_t)      y_t = W_o norm(o_t)

Shapes    x [B, T, D] -> y [B, T, D];  q, f, v [B, T, H, K], H K = D
State     S [B, H, K, K]: 4 H K^2 bytes a sequence, whatever its length
Cost      FLOPs a token: 8 D^2 for the projections + 4 H K^2 for the memory
Source    Qin et al. 2024, "HGRN2: Gated Linear RNNs with State Expansion", arXiv 2404.07904
Deviates  f has no lower bound that grows with the layer; each head is normed.
          docs/new_mixer.md builds this file step by step
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from everlong.config import config
from everlong.mixers.base import Context, Cost, HeadOptions, Mixer, Traits, unpadded
from everlong.nn.layers import HeadNorm, exact
from everlong.ops import linear_attention


class State(NamedTuple):
    """What HGRN2 keeps of a sequence."""

    memory: Float[Tensor, "N H K V"]


@config
class Options(HeadOptions):
    """Options of HGRN2."""


class Minimal(Mixer):
    """HGRN2 under the contract."""

    Config = Options
    traits = Traits(
        forms=frozenset({"parallel", "chunk", "recurrent"}), causal=True, bidirectional=False, growth="constant"
    )

    def __init__(self, config: Options, *, layer: int = 0, depth: int = 1) -> None:
        super().__init__(config, layer=layer, depth=depth)
        d = config.width
        self.q, self.f, self.v, self.o = (nn.Linear(d, d, bias=False) for _ in range(4))
        self.norm = HeadNorm(1, config.head_size)

    def init_state(self, batch: int) -> State:
        c = self.config
        return State(self.new_state(batch, c.heads, c.head_size, c.head_size))

    @unpadded
    def forward(
        self, x: Float[Tensor, "B T D"], state: State | None = None, context: Context = Context()
    ) -> tuple[Float[Tensor, "B T D"], State]:
        state = self.init_state(context.sequences(x)) if state is None else state
        q, f, v = (project(x).unflatten(-1, (self.config.heads, -1)) for project in (self.q, self.f, self.v))
        o, memory = linear_attention(
            F.silu(q),
            torch.sigmoid(-f),  # 1 - f, without the loss of digits where f is nearly 1
            v,
            log_decay=F.logsigmoid(exact(f)),
            scale=1.0,
            initial_state=state.memory,
            cu_seqlens=context.cu_seqlens,
            form=context.form,
        )
        assert isinstance(memory, Tensor)  # a pair comes with `normalize` only
        return self.o(self.norm(o).flatten(-2)), State(memory)

    @classmethod
    def cost(cls, config: Options, length: int) -> Cost:
        weights, memory = 4 * config.width**2, config.width * config.head_size
        return Cost(
            flops_per_token=2 * weights + 4 * memory,
            state_bytes=4 * memory,
            parameters=weights + config.head_size,
        )

    def reference(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        heads, size = self.config.heads, self.config.head_size
        memory, outputs = x.new_zeros(heads, size, size), []
        for x_t in x:
            q, f, v = (project(x_t).view(heads, size) for project in (self.q, self.f, self.v))
            q, f = q * torch.sigmoid(q), torch.sigmoid(f)
            memory = f[:, :, None] * memory + (1 - f)[:, :, None] * v[:, None]
            o = (memory * q[:, :, None]).sum(1)
            outputs.append(self.o(self.norm.reference(o).flatten()))
        return torch.stack(outputs)

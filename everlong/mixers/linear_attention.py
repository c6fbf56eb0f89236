"""Linear attention: softmax's exponential replaced by a product of features, so that the past fits into one matrix.

    S_t = S_{t-1} + phi(k_t) v_t^T        z_t = z_{t-1} + phi(k_t)                       (eq. 18, 19)
    o_t = S_t^T phi(q_t) / (z_t^T phi(q_t))                                              (eq. 20)

Shapes    x [B, T, D] -> y [B, T, D];  q, k, v [B, T, H, K]
State     S [B, H, K, K], z [B, H, K, 1] and a count: 4 H K (K + 1) + 8 bytes a sequence, whatever its length
Cost      FLOPs a token: 8 D^2 for the projections + 4 H K (K + 1) for the memory
Source    Katharopoulos et al. 2020, "Transformers are RNNs", arXiv 2006.16236
Deviates  a rotation of positions enters the numerator only, so that the denominator stays positive (Su 2021,
          arXiv 2104.09864, eq. 19); the identity as feature map has no denominator
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from everlong.config import config
from everlong.mixers.base import Context, Cost, HeadOptions, Mixer, Traits, unpadded
from everlong.nn import feature_maps, positions
from everlong.ops import linear_attention


class State(NamedTuple):
    """What linear attention keeps of a sequence."""

    memory: Float[Tensor, "N H K V"]
    normalizer: Float[Tensor, "N H K 1"]
    length: Int[Tensor, " N"]


@config
class Options(HeadOptions):
    """Options of linear attention."""

    feature_map: str = "elu"
    position: positions.Position = "none"
    causal: bool = True
    bias: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        feature_maps.load(self.feature_map)


class LinearAttention(Mixer):
    """Linear attention under the contract."""

    Config = Options
    traits = Traits(
        forms=frozenset({"parallel", "chunk", "recurrent"}),
        causal=True,
        bidirectional=True,
        growth="constant",
        positions=frozenset({"rotation"}),
    )

    def __init__(self, config: Options, *, layer: int = 0, depth: int = 1) -> None:
        super().__init__(config, layer=layer, depth=depth)
        self.q, self.k, self.v, self.o = (nn.Linear(config.width, config.width, bias=config.bias) for _ in range(4))
        self.feature_map = feature_maps.load(config.feature_map)
        self.position = positions.attach(
            config.position,
            num_heads=config.heads,
            size=config.head_size,
            offered=self.traits.positions,
            mixer="linear_attention",
        )

    def init_state(self, batch: int) -> State:
        h, k = self.config.heads, self.config.head_size
        return State(
            self.new_state(batch, h, k, k), self.new_state(batch, h, k, 1), self.new_state(batch, dtype=torch.long)
        )

    @unpadded
    def forward(
        self, x: Float[Tensor, "B T D"], state: State | None = None, context: Context = Context()
    ) -> tuple[Float[Tensor, "B T D"], State]:
        state = self.init_state(context.sequences(x)) if state is None else state
        where = context.count_from(state.length, x)
        q, k, v = (project(x).unflatten(-1, (self.config.heads, -1)) for project in (self.q, self.k, self.v))
        q, k = self.feature_map(q), self.feature_map(k)
        o, memory = self._sum(self.position.rotate(q, where), self.position.rotate(k, where), v, state.memory, context)
        normalizer = state.normalizer
        if self.config.feature_map != "identity":
            weight, normalizer = self._sum(q, k, torch.ones_like(v[..., :1]), state.normalizer, context)
            # Where nothing has been seen, the numerator is zero as well.
            o = o / weight.masked_fill(weight == 0, 1.0)
        return self.o(o.flatten(-2)), State(memory, normalizer, state.length + context.lengths(x))

    def _sum(
        self, q: Tensor, k: Tensor, v: Tensor, state: Tensor, context: Context
    ) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "N H K V"]]:
        """Values weighted by q^T k, over all tokens that q may see."""
        causal = self.config.causal
        weighted, after = linear_attention(
            q.to(v.dtype),
            k.to(v.dtype),
            v,
            scale=1.0,
            causal=causal,
            initial_state=state if causal else None,
            cu_seqlens=context.cu_seqlens,
            form=context.form,
        )
        assert isinstance(after, Tensor)  # a pair comes with `normalize` only
        return weighted, after

    @classmethod
    def cost(cls, config: Options, length: int) -> Cost:
        h, k, d = config.heads, config.head_size, config.width
        values = k if config.feature_map == "identity" else k + 1
        return Cost(
            flops_per_token=8 * d * d + 4 * h * k * values,
            state_bytes=4 * h * k * (k + 1) + 8,
            parameters=4 * d * d + (4 * d if config.bias else 0),
        )

    def reference(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        where = torch.arange(len(x))[None]
        q, k, v = (project(x).unflatten(-1, (self.config.heads, -1)) for project in (self.q, self.k, self.v))
        q, k = self.feature_map(q), self.feature_map(k)
        turned_q, turned_k = (self.position.rotate(y[None], where)[0] for y in (q, k))
        memory, normalizer, outputs = v.new_zeros(*q.shape[1:], v.shape[-1]), torch.zeros_like(q[0]), []
        if not self.config.causal:
            memory, normalizer = (turned_k[..., None] * v[:, :, None]).sum(0), k.sum(0)
        for t in range(len(x)):
            if self.config.causal:
                memory = memory + turned_k[t, :, :, None] * v[t, :, None]
                normalizer = normalizer + k[t]
            o = (turned_q[t, :, :, None] * memory).sum(1)
            if self.config.feature_map != "identity":
                o = o / (q[t] * normalizer).sum(-1, keepdim=True)
            outputs.append(o)
        y: Tensor = self.o(torch.stack(outputs).flatten(-2))
        return y

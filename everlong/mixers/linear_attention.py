"""Linear attention: softmax's exponential replaced by a product of features, so that the past fits into one matrix.

    S_t = S_{t-1} + phi(k_t) v_t^T        z_t = z_{t-1} + phi(k_t)                       (eq. 18, 19)
    o_t = S_t^T phi(q_t) / (z_t^T phi(q_t))                                              (eq. 20)

Shapes    x [B, T, D] -> y [B, T, D];  q, k [B, T, H, K];  phi(q), phi(k) [B, T, H, F];  v [B, T, H, V]
State     S [B, H, F, V], z [B, H, F, 1] and a count: 4 H F (V + 1) + 8 bytes a sequence, whatever its length; with the
          exponential as feature map also the largest exponents, 4 H F bytes
Cost      FLOPs a token: 4 D (H K + D) for the projections + 4 H F (V + 1) for the memory
Source    Katharopoulos et al. 2020, "Transformers are RNNs", arXiv 2006.16236; feature maps: nn/feature_maps.py
Deviates  a rotation of positions enters the numerator only, so that the denominator stays positive (Su 2021,
          arXiv 2104.09864, eq. 19), or comes before a feature map that is a function of q^T k; nothing is added to the
          denominator: where it is 0, so is the output; the identity and Efficient Attention's softmax have no
          denominator; the exponential's sums are held as nn/exponentials.py says
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from everlong.config import config
from everlong.mixers.base import Context, Cost, HeadOptions, Mixer, Traits, unpadded
from everlong.nn import exponentials, feature_maps, positions
from everlong.ops import linear_attention


class State(NamedTuple):
    """What linear attention keeps of a sequence."""

    memory: Float[Tensor, "N H F V"]
    normalizer: Float[Tensor, "N H F one"]  # of size 0 where there is no denominator
    maximum: Float[Tensor, "N H maxima"]  # of the exponents of each feature; of size 0 where there are none
    length: Int[Tensor, " N"]


@config
class Options(HeadOptions):
    """Options of linear attention."""

    feature_map: str = "elu"
    """What queries and keys go through: elu, relu, squared_relu, exp, taylor, quadratic, cosine, cosformer, identity,
    or softmax, which needs causal = false."""
    feature_size: int | None = None
    """Channels of a query or key head; None: width / num_heads, but 16 at most where the map squares them (taylor,
    quadratic)."""
    max_length: int = 4096
    """M of cosformer, in tokens: no text may be longer."""
    position: positions.Position = "none"
    causal: bool = True
    bias: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        found = feature_maps.load(self.feature_map)
        if self.key_size < 1 or self.max_length < 1:
            raise ValueError(
                f"`feature_size` and `max_length` must be at least 1: got {self.key_size} and {self.max_length}"
            )
        if self.causal and not found.causal:
            fitting = ", ".join(name for name in feature_maps.names() if feature_maps.load(name).causal)
            raise ValueError(
                f"the feature map `{self.feature_map}` needs the whole sequence before its first output: use "
                f"causal=False, or one of {fitting}"
            )

    @property
    def key_size(self) -> int:
        if self.feature_size is None:
            return min(16, self.head_size) if self.feature_map in ("taylor", "quadratic") else self.head_size
        return self.feature_size

    @property
    def features(self) -> feature_maps.FeatureMap:
        return feature_maps.load(self.feature_map)(self.key_size, self.max_length)


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
        keys = config.heads * config.key_size
        self.q, self.k = (nn.Linear(config.width, keys, bias=config.bias) for _ in range(2))
        self.v, self.o = (nn.Linear(config.width, config.width, bias=config.bias) for _ in range(2))
        self.feature_map = config.features
        turns = self.feature_map.rotation != "nowhere"
        self.position = positions.attach(
            config.position,
            num_heads=config.heads,
            size=config.key_size,
            offered=self.traits.positions if turns else frozenset(),
            mixer="linear_attention" if turns else f"linear_attention with {config.feature_map}",
        )

    def init_state(self, batch: int) -> State:
        h, f, v = self.config.heads, self.feature_map.size, self.config.head_size
        return State(
            self.new_state(batch, h, f, v),
            self.new_state(batch, h, f, 1 if self.feature_map.normalized else 0),
            exponentials.nothing(self.new_state(batch, h, f if self.feature_map.logarithmic else 0)),
            self.new_state(batch, dtype=torch.long),
        )

    @unpadded
    def forward(
        self, x: Float[Tensor, "B T D"], state: State | None = None, context: Context = Context()
    ) -> tuple[Float[Tensor, "B T D"], State]:
        c = self.config
        state = self.init_state(context.sequences(x)) if state is None or not c.causal else state
        where = context.count_from(state.length, x)
        q, k, v = (project(x).unflatten(-1, (c.heads, -1)) for project in (self.q, self.k, self.v))
        if self.feature_map.rotation == "before":
            q, k = self.position.rotate(q, where), self.position.rotate(k, where)
        q = self.feature_map(q, where)
        if self.feature_map.normalized and not self.feature_map.logarithmic:
            # A query's scale cancels: without it, products of small numbers stay away from the smallest there are.
            q = q / largest(q)
        if isinstance(self.feature_map, feature_maps.Softmax):
            k = self.feature_map.over_length(k, context.cu_seqlens)
        else:
            k = self.feature_map(k, where)
        o, sums = self._read(q, k, v, where, state, context)
        return self.o(o.flatten(-2)), State(*sums, state.length + context.lengths(x))

    def _read(
        self, q: Tensor, k: Tensor, v: Tensor, where: Tensor, state: State, context: Context
    ) -> tuple[Float[Tensor, "B T H V"], exponentials.Sums]:
        """What each query finds in the memory, and the sums after the last token."""
        past = exponentials.Sums(*state[:3])
        if self.feature_map.logarithmic:
            return exponentials.average(
                q, k, v, past, causal=self.config.causal, cu_seqlens=context.cu_seqlens, form=context.form
            )
        ones = v.new_ones(*v.shape[:-1], past.normalizer.shape[-1])
        sizes = [v.shape[-1], ones.shape[-1]]
        if self.feature_map.rotation == "after" and self.position.hooks:
            turned_q, turned_k = self.position.rotate(q, where), self.position.rotate(k, where)
            o, memory = self._sum(turned_q, turned_k, v, past.memory, context)
            if not self.feature_map.normalized:
                return o, past._replace(memory=memory)
            weight, normalizer = self._sum(q, k, ones, past.normalizer, context)
        else:  # numerator and denominator have the same weights: the latter is the sum of one more value, always 1
            both = torch.cat([past.memory, past.normalizer], -1)
            sums, both = self._sum(q, k, torch.cat([v, ones], -1), both, context)
            (o, weight), (memory, normalizer) = (torch.split(y, sizes, -1) for y in (sums, both))
        if self.feature_map.normalized:
            none = weight.abs() < torch.finfo(weight.dtype).tiny ** 0.75  # no key has a weight
            o = torch.where(none, 0.0, o / weight.masked_fill(none, 1.0))
        return o, exponentials.Sums(memory, normalizer, past.maximum)

    def _sum(
        self, q: Tensor, k: Tensor, v: Tensor, state: Tensor, context: Context
    ) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "N H F V"]]:
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
        h, v, d, features = config.heads, config.head_size, config.width, config.features
        keys, values = h * config.key_size, v + (1 if features.normalized else 0)
        maxima = features.size if features.logarithmic else 0
        return Cost(
            flops_per_token=4 * d * (keys + d) + 4 * h * features.size * values,
            state_bytes=4 * h * (features.size * values + maxima) + 8,
            parameters=2 * d * (keys + d) + (2 * (keys + d) if config.bias else 0),
        )

    def reference(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        c, features, where = self.config, self.feature_map, torch.arange(len(x))[None]
        q, k, v = (project(x).unflatten(-1, (c.heads, -1)) for project in (self.q, self.k, self.v))
        if features.rotation == "before":
            q, k = (self.position.rotate(y[None], where)[0] for y in (q, k))
        outputs = []
        for i in range(len(x)):
            seen = range(i + 1 if c.causal else len(x))
            if isinstance(features, feature_maps.Softmax):
                q_i, keys = q[i].softmax(-1), k.exp() / k.exp().sum(0)
                weights = torch.stack([q_i * keys[j] for j in seen]).sum(-1)
            else:
                weights = torch.stack([features.similarity(q[i], k[j], i - j) for j in seen])  # [S, H]
            turned = weights
            if features.rotation == "after" and self.position.hooks:
                q_i, keys = features(q[i]), features(k)
                if isinstance(features, feature_maps.Softmax):
                    keys = k.exp() / k.exp().sum(0)
                q_i = self.position.rotate(q_i[None, None], where[:, i : i + 1])[0, 0]
                keys = self.position.rotate(keys[None], where)[0]
                turned = torch.stack([(q_i * keys[j]).sum(-1) for j in seen])
            o = (turned[..., None] * v[: len(seen)]).sum(0)
            total = weights.sum(0)[:, None]
            outputs.append(o / total.masked_fill(total == 0, 1.0) if features.normalized else o)
        y: Tensor = self.o(torch.stack(outputs).flatten(-2))
        return y


def largest(features: Float[Tensor, "B T H F"]) -> Float[Tensor, "B T H one"]:
    """The largest size of a feature of each head, 1 where all are 0; a constant for gradients."""
    size = features.detach().abs().amax(-1, keepdim=True)
    return size.masked_fill(size == 0, 1.0)

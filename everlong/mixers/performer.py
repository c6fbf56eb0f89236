"""Performer: softmax attention in linear time, its exponential estimated by random features.

    exp(q^T k) = E_w [ phi_w(q) phi_w(k) ]       phi_w(x) = exp(w^T x - |x|^2 / 2),  w ~ N(0, I)            (lemma 1)
    o_t = sum_{s <= t} phi(q_t)^T phi(k_s) v_s / sum_{s <= t} phi(q_t)^T phi(k_s)                           (eq. 3, 8)

with q and k scaled by K^(-1/4) each, and phi the features of m rows w that are drawn once and kept as a buffer.

Shapes    x [B, T, D] -> y [B, T, D];  q, k, v [B, T, H, K];  phi(q), phi(k) [B, T, H, F];  F = m or 2 m;  rows [m, K]
State     S [B, H, F, K], z [B, H, F, 1], the largest exponents [B, H, F] and two counts: 4 H F (K + 2) + 16 bytes a
          sequence, whatever its length; 4 H F less with relu
Cost      FLOPs a token: 8 D^2 for the projections + 4 H K m for the features + 4 H F (K + 1) for the memory
Source    Choromanski et al. 2020, "Rethinking Attention with Performers", arXiv 2009.14794: FAVOR+, its hyperbolic
          features and its generalised attention with relu
Deviates  nothing is added to the features (the released code adds 1e-4 after the exponential), and the stabiliser of
          the keys is not their maximum over the whole text, by which the future would show in the past. It is each
          feature's maximum so far (nn/exponentials.py), under which all sums are exact: they need no added constant,
          are never zero, and are causal bit for bit. Rows are drawn with Haar's measure (nn/random_features.py).
          Trigonometric features are left out: their averages have no bound
"""

import math
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from everlong.config import config
from everlong.mixers.base import Context, Cost, HeadOptions, Mixer, Traits, unpadded
from everlong.nn import exponentials, positions, random_features
from everlong.nn.layers import exact
from everlong.ops import linear_attention

RELU_FLOOR = 1e-3  # added to relu's features, as in the paper: a query always finds something


class State(NamedTuple):
    """What a Performer keeps of a sequence."""

    memory: Float[Tensor, "N H F V"]
    normalizer: Float[Tensor, "N H F 1"]
    maximum: Float[Tensor, "N H maxima"]  # of the exponents of each feature; of size 0 with relu
    draw: Int[Tensor, " N"]  # under which its features were made
    length: Int[Tensor, " N"]


@config
class Options(HeadOptions):
    """Options of the Performer."""

    features: Literal["positive", "hyperbolic", "relu"] = "positive"
    """Estimates of softmax attention, hyperbolic with two features for each row and less variance; or relu(w^T x), an
    attention of its own."""
    num_features: int | None = None
    """Rows that are drawn; None: K ln K for heads of K channels."""
    draw: random_features.Draw = "orthogonal"
    """Of the rows: orthogonal and as long as normal vectors, regularized (orthogonal, all of the same length), or
    independent."""
    position: positions.Position = "none"
    causal: bool = True
    bias: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rows < 1:
            raise ValueError(f"`num_features` must be at least 1: got {self.rows}")

    @property
    def rows(self) -> int:
        if self.num_features is None:
            return max(1, int(self.head_size * math.log(self.head_size)))
        return self.num_features

    @property
    def feature_size(self) -> int:
        return 2 * self.rows if self.features == "hyperbolic" else self.rows


class Performer(Mixer):
    """The Performer under the contract. `redraw` replaces its random rows while training."""

    Config = Options
    traits = Traits(
        forms=frozenset({"parallel", "chunk", "recurrent"}),
        causal=True,
        bidirectional=True,
        growth="constant",
        positions=frozenset({"rotation"}),
    )
    rows: Tensor
    draw: Tensor

    def __init__(self, config: Options, *, layer: int = 0, depth: int = 1) -> None:
        super().__init__(config, layer=layer, depth=depth)
        self.q, self.k, self.v, self.o = (nn.Linear(config.width, config.width, bias=config.bias) for _ in range(4))
        self.position = positions.attach(
            config.position,
            num_heads=config.heads,
            size=config.head_size,
            offered=self.traits.positions,
            mixer="performer",
        )
        rows = random_features.draw_rows(config.rows, config.head_size, draw=config.draw)
        self.register_buffer("rows", rows.to(self.q.weight.dtype))
        self.register_buffer("draw", torch.zeros((), dtype=torch.long))  # counts `redraw`

    @torch.no_grad()
    def redraw(self, generator: torch.Generator | None = None) -> None:
        """Replaces the rows, as every few hundred updates of a training, so that weights do not settle on one draw.

        States made before are refused from then on.

        Raises:
            ValueError: the layer is in eval mode, in which what it computes must not change.
        """
        if not self.training:
            raise ValueError(
                "random features are redrawn while training only, and this layer is in eval mode: call train()"
            )
        c = self.config
        self.rows.copy_(random_features.draw_rows(c.rows, c.head_size, draw=c.draw, generator=generator))
        self.draw += 1

    def init_state(self, batch: int) -> State:
        h, k, f = self.config.heads, self.config.head_size, self.config.feature_size
        return State(
            self.new_state(batch, h, f, k),
            self.new_state(batch, h, f, 1),
            exponentials.nothing(self.new_state(batch, h, 0 if self.config.features == "relu" else f)),
            self.draw.repeat(batch),
            self.new_state(batch, dtype=torch.long),
        )

    @unpadded
    def forward(
        self, x: Float[Tensor, "B T D"], state: State | None = None, context: Context = Context()
    ) -> tuple[Float[Tensor, "B T D"], State]:
        c = self.config
        state = self.init_state(context.sequences(x)) if state is None or not c.causal else state
        self._check(state)
        where = context.count_from(state.length, x)
        q, k, v = (project(x).unflatten(-1, (c.heads, -1)) for project in (self.q, self.k, self.v))
        q, k = self.position.rotate(q, where), self.position.rotate(k, where)
        q, k = (exact(y) * c.head_size**-0.25 for y in (q, k))
        past = exponentials.Sums(*state[:3])
        if c.features == "relu":
            o, sums = self._relu(q, k, v, past, context)
        else:
            with torch.autocast(x.device.type, enabled=False):  # an error in an exponent is one of the whole weight
                q = random_features.scores(q, self.rows, c.features)
                k = random_features.exponents(k, self.rows, c.features)
            o, sums = exponentials.average(
                q, k, v, past, causal=c.causal, cu_seqlens=context.cu_seqlens, form=context.form
            )
        return self.o(o.flatten(-2)), State(*sums, self.draw.repeat(len(state.draw)), state.length + context.lengths(x))

    def _relu(
        self, q: Tensor, k: Tensor, v: Tensor, past: exponentials.Sums, context: Context
    ) -> tuple[Float[Tensor, "B T H V"], exponentials.Sums]:
        q, k = (((y @ self.rows.T.to(y.dtype)).relu() + RELU_FLOOR).to(v.dtype) for y in (q, k))
        o, (memory, normalizer) = linear_attention(
            q,
            k,
            v,
            normalize=True,
            scale=1.0,
            causal=self.config.causal,
            initial_state=(past.memory, past.normalizer[..., 0]) if self.config.causal else None,
            cu_seqlens=context.cu_seqlens,
            form=context.form,
        )
        return o, exponentials.Sums(memory, normalizer[..., None], past.maximum)

    def _check(self, state: State) -> None:
        """Raises ValueError where a state holds sums of other features than those that would read it."""
        if torch.compiler.is_compiling():
            return
        other = (state.draw != self.draw) & (state.length > 0)
        if bool(other.any()):
            raise ValueError(
                f"a state can only be continued under the random features that made it: got one of draw "
                f"{int(state.draw[other][0])}, and the layer is at draw {int(self.draw)}. Read the text again"
            )

    @classmethod
    def cost(cls, config: Options, length: int) -> Cost:
        h, k, d, f = config.heads, config.head_size, config.width, config.feature_size
        maxima = 0 if config.features == "relu" else f
        return Cost(
            flops_per_token=8 * d * d + 4 * h * k * config.rows + 4 * h * f * (k + 1),
            state_bytes=4 * h * (f * (k + 1) + maxima) + 16,
            parameters=4 * d * d + (4 * d if config.bias else 0),
        )

    def reference(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        c, where = self.config, torch.arange(len(x))[None]
        q, k, v = (project(x).unflatten(-1, (c.heads, -1)) for project in (self.q, self.k, self.v))
        q, k = (self.position.rotate(y[None], where)[0] * c.head_size**-0.25 for y in (q, k))

        def phi(y: Tensor) -> Tensor:
            along = torch.einsum("mk,hk->hm", self.rows, y)
            if c.features == "relu":
                return along.relu() + RELU_FLOOR
            both = torch.cat([along, -along], -1) if c.features == "hyperbolic" else along
            return torch.exp(both - (y * y).sum(-1, keepdim=True) / 2)

        outputs = []
        for i in range(len(x)):
            seen = range(i + 1 if c.causal else len(x))
            weights = torch.stack([(phi(q[i]) * phi(k[j])).sum(-1) for j in seen])  # [S, H]
            outputs.append((weights[..., None] * v[: len(seen)]).sum(0) / weights.sum(0)[:, None])
        y: Tensor = self.o(torch.stack(outputs).flatten(-2))
        return y

"""RWKV-7 (Goose): a memory that takes back what a key stood for before it writes, at a rate of each channel's own.

    S_t = (diag(w_t) - (a_t * kappa_t) kappa_t^T) S_{t-1} + k_t v_t^T            o_t = S_t^T q_t
    w_t = exp(-e^{-1/2} sigmoid(d + W tanh(W' x_t^w)))              a_t = sigmoid(a + A A' x_t^a)
    kappa_t = k'_t * xi / |k'_t * xi| in each head      k_t = k'_t * (1 + (a_t - 1) * alpha)      k'_t = W_k x_t^k
    v_t = v'_t + (v'_t of the first layer - v'_t) * sigmoid(nu + N N' x_t^v)        v'_t = W_v x_t^v
    y_t = W_o [ (group_norm(o_t) + (q_t . (rho * k_t)) v_t) * (G sigmoid(G' x_t^g)) ]
    z_t = channel mix of x_t + y_t, without gate;  x_t^i = x_t + (x_{t-1} - x_t) * mu_i

q is what RWKV calls the receptance. What is taken back is what S_{t-1} held before it faded. It is the whole branch of
its block, norms included, and gives y + z; the first layer of a model also norms the embedding.

Shapes    x [B, T, D] -> y + z [B, T, D];  q, k, v, w, a, kappa, o [B, T, H, N], H N = D;  F
          channels inside of the channel mix
State     S [B, H, N, N] and the last inputs of both shifts: 4 (D N + 2 D) bytes
Cost      FLOPs a token: 8 D D + 4 D F + 4 D (sum of the ranks) for the projections + 8 D N for the memory
Source    Peng et al. 2025, "RWKV-7 Goose with Expressive Dynamic State Evolution", arXiv 2503.14456, section 4
Deviates  the state stands as K x V, so that products with it are transposed against the paper's; 1e-12 is added to
          kappa's squared length. Where a model begins with another mixer, its first RWKV-7 offers values to the others
"""

import dataclasses
import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from everlong.config import config
from everlong.mixers.base import Context, Cost, HeadOptions, Mixer, Traits, unpadded
from everlong.nn.layers import exact
from everlong.nn.rwkv import ChannelMix, GroupNorm, LowRank, blended, depth_ratios, line, orthogonal, ramp, shifted
from everlong.ops import dplr

VALUES = "rwkv7.values"  # under which name a call's layers find the first one's values
FASTEST = math.exp(-0.5)  # the largest rate of decay: a channel keeps 55 % of itself, or more


class State(NamedTuple):
    """What RWKV-7 keeps of a sequence."""

    memory: Float[Tensor, "N H K V"]
    last: Float[Tensor, "N D"]  # the input before, after the norm
    feed_forward: Float[Tensor, "N D"]  # that of the channel mix


@config
class Options(HeadOptions):
    """Options of RWKV-7. A rank that is None is that of the released trainer: a multiple of 32 near to c D^(1/2)."""

    decay_rank: int | None = None
    """Rank of what a token adds to its decay; None: c = 2.5."""
    rate_rank: int | None = None
    """Rank of what a token adds to the rate of taking back; None: c = 2.5."""
    value_rank: int | None = None
    """Rank of what a token adds to the share of the first layer's values; None: c = 1.7."""
    gate_rank: int | None = None
    """Rank of the output's gate; None: c = 5."""
    feed_forward: int | None = None
    """Channels inside of the channel mix; None: 4 times the width."""
    first: bool | None = None
    """Whether the layer norms the embedding and has values to offer; None: where it is the model's first."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden < 1 or min(self.ranks) < 1:
            raise ValueError(
                f"`feed_forward` and all ranks must be at least 1: got feed_forward={self.feed_forward}, "
                f"ranks of decay, rate, value and gate {self.ranks}"
            )

    @property
    def hidden(self) -> int:
        return 4 * self.width if self.feed_forward is None else self.feed_forward

    @property
    def ranks(self) -> tuple[int, int, int, int]:
        """Of the decay, the rate, the values and the gate."""

        def rank(given: int | None, factor: float) -> int:
            return max(32, round(factor * self.width**0.5 / 32) * 32) if given is None else given

        return (
            rank(self.decay_rank, 2.5),
            rank(self.rate_rank, 2.5),
            rank(self.value_rank, 1.7),
            rank(self.gate_rank, 5.0),
        )


class RWKV7(Mixer):
    """RWKV-7 under the contract."""

    Config = Options
    traits = Traits(
        forms=frozenset({"parallel", "chunk", "recurrent"}),
        causal=True,
        bidirectional=False,
        growth="constant",
        owns_feed_forward=True,
    )

    def __init__(self, config: Options, *, layer: int = 0, depth: int = 1) -> None:
        if config.first is None:
            config = dataclasses.replace(config, first=layer == 0)
        super().__init__(config, layer=layer, depth=depth)
        d, h, n, (up, down) = config.width, config.heads, config.head_size, depth_ratios(layer, depth)
        self.embedding_norm = nn.LayerNorm(d) if config.first else None
        self.norm = nn.LayerNorm(d)
        self.q, self.k, self.v, self.o = (nn.Linear(d, d, bias=False) for _ in range(4))
        powers = (0.2, 0.9, 0.7, 0.7, 0.9, 0.2)  # of q, decay, k, v, rate, gate
        self.mix = nn.Parameter(1 - torch.stack([ramp(d, power * down) for power in powers]))
        centred, bow = line(d) - 0.5, (2 * line(n) - 1) * (2 * line(n) - 1).abs()
        decay_rank, rate_rank, value_rank, gate_rank = config.ranks
        decay = 6 * line(d) ** (1 + up**0.3) - 5.5 + 2.5 * bow.repeat(h)
        self.decay = LowRank(d, decay_rank, activation=torch.tanh, base=decay)
        self.rate = LowRank(d, rate_rank, base=0.3 * bow.repeat(h) + 0.4 * centred - 0.19)
        self.share = None if config.first else LowRank(d, value_rank, base=0.73 - 0.4 * centred)
        self.gate = LowRank(d, gate_rank, activation=torch.sigmoid)
        self.k_scale = nn.Parameter(0.71 - 0.1 * centred)  # xi
        self.k_rate = nn.Parameter(torch.full((d,), 1.02))  # alpha
        self.bonus = nn.Parameter(torch.full((h, n), -0.04))  # rho
        self.group_norm = GroupNorm(h, n, gain=((layer + 1) / depth) ** 0.7)
        self.feed_forward = ChannelMix(d, config.hidden, depth=depth, mix=1 - ramp(d, down**4)[None])
        for linear, scale in ((self.q, 1.0), (self.k, 0.1), (self.v, 1.0)):
            orthogonal(linear, scale)

    def init_state(self, batch: int) -> State:
        c = self.config
        memory = self.new_state(batch, c.heads, c.head_size, c.head_size)
        return State(memory, self.new_state(batch, c.width), self.new_state(batch, c.width))

    @unpadded
    def forward(
        self, x: Float[Tensor, "B T D"], state: State | None = None, context: Context = Context()
    ) -> tuple[Float[Tensor, "B T D"], State]:
        heads = (self.config.heads, -1)
        state = self.init_state(context.sequences(x)) if state is None else state
        stream = x if self.embedding_norm is None else self.embedding_norm(x)
        y = self.norm(stream)
        before, last = shifted(y, state.last, context.cu_seqlens)
        to_q, to_decay, to_k, to_v, to_rate, to_gate = blended(y, before, self.mix)
        q, k, v = self.q(to_q), self.k(to_k), self.values(to_v, context)
        rate = torch.sigmoid(self.rate(to_rate))
        kappa = normalize((k * self.k_scale).unflatten(-1, heads))
        k = (k * torch.lerp(torch.ones_like(rate), rate, exact(self.k_rate))).to(v.dtype)
        q, k, v, rate = (torch.unflatten(y, -1, heads) for y in (q, k, v, rate))
        o, memory = dplr(
            q,
            k,
            v,
            -kappa.to(v.dtype),
            (kappa * rate).to(v.dtype),
            log_decay=torch.unflatten(-FASTEST * torch.sigmoid(self.decay(to_decay)), -1, heads),
            scale=1.0,
            initial_state=state.memory,
            cu_seqlens=context.cu_seqlens,
            form=context.form,
        )
        o = self.group_norm(o) + (q * k * self.bonus).sum(-1, keepdim=True).to(v.dtype) * v
        y = self.o(o.flatten(-2) * self.gate(to_gate))
        mixed = stream + y
        z, feed_forward = self.feed_forward(mixed, state.feed_forward, context.cu_seqlens)
        return (y + z if stream is x else mixed + z - x), State(memory, last, feed_forward)

    def values(self, x: Float[Tensor, "B T D"], context: Context) -> Float[Tensor, "B T D"]:
        """The values, mixed with those that the first layer offers in this call."""
        v: Tensor = self.v(x)
        if self.share is None:
            if context.first is not None:
                context.first[VALUES] = v
            return v
        first = v if context.first is None else context.first.setdefault(VALUES, v)
        return torch.lerp(v, first.to(v.dtype), torch.sigmoid(self.share(x)).to(v.dtype))

    @classmethod
    def cost(cls, config: Options, length: int) -> Cost:
        d, memory, first = config.width, config.width * config.head_size, config.first is not False
        decay, rate, value, gate = config.ranks
        ranks = decay + rate + gate + (0 if first else value)
        weights = 4 * d * d + 2 * d * ranks + ChannelMix.weights(d, config.hidden, gated=False)
        vectors = 6 + 2 + 3 + 2 + 1 + (6 if first else 5)  # shifts, bases, k and bonus, group norm, channel mix, norms
        return Cost(
            flops_per_token=2 * weights + 8 * memory,
            state_bytes=4 * (memory + 2 * d),
            parameters=weights + vectors * d,
        )

    def reference(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        """The equations, one token after another, in the dtype of x; of a layer that has its own values only."""
        size, outputs = self.config.head_size, [x[:0]]
        stream = x if self.embedding_norm is None else self.embedding_norm(x)
        last, memory = torch.zeros_like(x[:1]).sum(0), x.new_zeros(self.config.heads, size, size)

        def low_rank(part: LowRank, y: Tensor) -> Tensor:
            return part.up.weight @ y if part.base is None else part.base + part.up.weight @ y

        for row in self.norm(stream):
            to_q, to_decay, to_k, to_v, to_rate, to_gate = row + (last - row) * self.mix
            last = row
            q, k, v = self.q.weight @ to_q, self.k.weight @ to_k, (self.v.weight @ to_v).view(-1, size)
            decay = low_rank(self.decay, torch.tanh(self.decay.down.weight @ to_decay))
            decay = torch.exp(-math.exp(-0.5) * torch.sigmoid(decay)).view(-1, size)
            rate = torch.sigmoid(low_rank(self.rate, self.rate.down.weight @ to_rate)).view(-1, size)
            gate = low_rank(self.gate, torch.sigmoid(self.gate.down.weight @ to_gate))
            kappa = (k * self.k_scale).view(-1, size)
            kappa = kappa / (kappa.square().sum(1, keepdim=True) + 1e-12).sqrt()
            q, k = q.view(-1, size), k.view(-1, size) * (1 + (rate - 1) * self.k_rate.view(-1, size))
            transition = torch.diag_embed(decay) - (rate * kappa)[:, :, None] * kappa[:, None, :]
            memory = transition @ memory + k[:, :, None] * v[:, None, :]
            o = (q[:, :, None] * memory).sum(1)
            o = (o - o.mean(1, keepdim=True)) / (o.var(1, keepdim=True, unbiased=False) + 64e-5).sqrt()
            o = o * self.group_norm.weight + self.group_norm.bias
            o = (o + (q * k * self.bonus).sum(1, keepdim=True) * v).flatten()
            outputs.append((self.o.weight @ (o * gate))[None])
        mixed = stream + torch.cat(outputs)
        return mixed + self.feed_forward.reference(mixed) - x


def normalize(x: Float[Tensor, "B T H K"]) -> Float[Tensor, "B T H K"]:
    """Heads of length one, in float32 at least; a head of zeros stays zero."""
    x = exact(x)
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-12)

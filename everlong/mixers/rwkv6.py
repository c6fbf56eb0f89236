"""RWKV-6 (Finch), and RWKV-5.2 (Eagle): a memory of keys and values whose every channel of keys fades at its own rate.

    o_t = S_{t-1}^T q_t + (q_t . (u * k_t)) v_t         S_t = diag(w_t) S_{t-1} + k_t v_t^T               (eq. 19 to 22)
    w_t = exp(-exp(d_t))       d_t = d + W tanh(W' x_t^w); Eagle: d_t = d                                 (eq. 17, 18)
    x_t^i = x_t + (x_{t-1} - x_t) * (mu_i + W_i tanh(W'_i x_t^x)); Eagle: mu_i alone                   (eq. 14, 15; 3)
    y_t = W_o [ group_norm(o_t) * silu(W_gate x_t^gate) ]            z_t = channel mix of x_t + y_t   (eq. 20; 10 to 13)

q is what RWKV calls the receptance, u the bonus of a token for itself. It is the whole branch of its block, norms
included, and gives y + z; the first layer of a model also norms the embedding.

Shapes    x [B, T, D] -> y + z [B, T, D];  q, k, v, w, o [B, T, H, N], H N = D;  F channels inside of the channel mix
State     S [B, H, N, N] and the last inputs of both shifts: 4 (D N + 2 D) bytes
Cost      FLOPs a token: 12 D D + 4 D F + 4 D N for the memory; Finch also 20 D R + 4 D R' for ranks R of the shift and
          R' of the decay
Source    Peng et al. 2024, "Eagle and Finch", arXiv 2404.05892
Deviates  the low-rank matrices of all shifts read one input, that of mu_x, as the released models have it
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from everlong.config import config
from everlong.mixers.base import Context, Cost, HeadOptions, Mixer, Traits, unpadded
from everlong.nn.fused import swiglu
from everlong.nn.layers import exact
from everlong.nn.rwkv import ChannelMix, GroupNorm, LowRank, blended, depth_ratios, line, orthogonal, ramp, shifted
from everlong.ops import linear_attention


class State(NamedTuple):
    """What RWKV-6 keeps of a sequence."""

    memory: Float[Tensor, "N H K V"]
    last: Float[Tensor, "N D"]  # the input before, after the norm
    feed_forward: Float[Tensor, "N D"]  # that of the channel mix


@config
class Options(HeadOptions):
    """Options of RWKV-6."""

    variant: Literal["finch", "eagle"] = "finch"
    """"finch", version 6: decay and token shift depend on the token; "eagle", version 5.2: they are learned numbers."""
    mix_rank: int = 32
    """Rank of what a token adds to the weights of its shift."""
    decay_rank: int = 64
    """Rank of what a token adds to its decay."""
    feed_forward: int | None = None
    """Channels inside of the channel mix; None: 3.5 times the width, rounded down to a multiple of 32."""
    group_norm_eps: float = 64e-5
    """1e-5 times the square of the trainer's `head_size_divisor`, which is 8."""
    first: bool | None = None
    """Whether the layer norms the embedding; None: it does where it is the model's first."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden < 1 or self.mix_rank < 1 or self.decay_rank < 1:
            raise ValueError(
                "`feed_forward`, `mix_rank` and `decay_rank` must be at least 1: got "
                f"feed_forward={self.feed_forward}, mix_rank={self.mix_rank}, decay_rank={self.decay_rank}"
            )

    @property
    def hidden(self) -> int:
        if self.feed_forward is not None:
            return self.feed_forward
        return 7 * self.width // 2 // 32 * 32 or 7 * self.width // 2


class RWKV6(Mixer):
    """RWKV-6 and RWKV-5.2 under the contract."""

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
        d, h, (up, down) = config.width, config.heads, depth_ratios(layer, depth)
        self.embedding_norm = nn.LayerNorm(d) if config.first else None
        self.norm = nn.LayerNorm(d)
        self.q, self.k, self.v, self.gate, self.o = (nn.Linear(d, d, bias=False) for _ in range(5))
        long, short = ramp(d, down), ramp(d, down / 2)
        decay = 5 * line(d) ** (0.7 + 1.3 * up) - 6
        if config.variant == "finch":
            self.mix = nn.Parameter(1 - torch.stack([long, long, long + 0.3 * up, short, short]))  # w, k, v, q, gate
            self.mix_down = nn.Linear(d, 5 * config.mix_rank, bias=False)
            self.mix_up = nn.Parameter(torch.empty(5, config.mix_rank, d).uniform_(-0.01, 0.01))
            self.mix_base = nn.Parameter(1 - long)
            self.decay = LowRank(d, config.decay_rank, activation=torch.tanh, base=decay)
            nn.init.zeros_(self.mix_down.weight)
            nn.init.uniform_(self.decay.up.weight, -0.01, 0.01)
        else:
            self.mix = nn.Parameter(1 - torch.stack([long, long + 0.3 * up, short, short]))  # k, v, q, gate
            self.log_rate = nn.Parameter(decay)
        zigzag = 0.1 * ((torch.arange(d) + 1) % 3 - 1)
        self.bonus = nn.Parameter((up * (1 - line(d)) + zigzag).view(h, -1))
        self.group_norm = GroupNorm(h, config.head_size, gain=((layer + 1) / depth) ** 0.7, eps=config.group_norm_eps)
        self.feed_forward = ChannelMix(d, config.hidden, depth=depth, mix=1 - long.repeat(2, 1))
        for linear, scale in ((self.q, 1.0), (self.k, 0.1), (self.v, 1.0), (self.gate, 0.1)):
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
        *to_decay, to_k, to_v, to_q, to_gate = self.inputs(y, before)
        log_rate = self.decay(to_decay[0]) if to_decay else self.log_rate.expand_as(x)
        o, memory = linear_attention(
            self.q(to_q).unflatten(-1, heads),
            self.k(to_k).unflatten(-1, heads),
            self.v(to_v).unflatten(-1, heads),
            log_decay=torch.unflatten(-exact(log_rate).exp(), -1, heads),
            bonus=self.bonus,
            scale=1.0,
            initial_state=state.memory,
            cu_seqlens=context.cu_seqlens,
            form=context.form,
        )
        assert isinstance(memory, Tensor)  # a pair comes with `normalize` only
        y = self.o(swiglu(self.gate(to_gate), self.group_norm(o).flatten(-2)))
        mixed = stream + y
        z, feed_forward = self.feed_forward(mixed, state.feed_forward, context.cu_seqlens)
        return (y + z if stream is x else mixed + z - x), State(memory, last, feed_forward)

    def inputs(self, x: Float[Tensor, "B T D"], before: Float[Tensor, "B T D"]) -> Sequence[Float[Tensor, "B T D"]]:
        """What each projection reads: the token mixed with the one before it."""
        if self.config.variant == "eagle":
            return blended(x, before, self.mix)
        (base,) = blended(x, before, self.mix_base[None])
        ranks = torch.tanh(self.mix_down(base)).view(-1, 5, self.config.mix_rank).transpose(0, 1)
        mix = torch.baddbmm(self.mix[:, None], ranks, self.mix_up)
        return blended(x, before, mix.view(5, *x.shape))

    @classmethod
    def cost(cls, config: Options, length: int) -> Cost:
        d, memory = config.width, config.width * config.head_size
        weights = 5 * d * d + ChannelMix.weights(d, config.hidden, gated=True)
        vectors = 10 if config.variant == "eagle" else 12  # shifts, also of the channel mix, decay, bonus, group norm
        if config.variant == "finch":
            weights += 10 * d * config.mix_rank + 2 * d * config.decay_rank
        norms = 4 if config.first is False else 6
        return Cost(
            flops_per_token=2 * weights + 4 * memory,
            state_bytes=4 * (memory + 2 * d),
            parameters=weights + (norms + vectors) * d,
        )

    def reference(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        """The equations, one token after another, in the dtype of x."""
        size, outputs = self.config.head_size, [x[:0]]
        stream = x if self.embedding_norm is None else self.embedding_norm(x)
        last, memory = torch.zeros_like(x[:1]).sum(0), x.new_zeros(self.config.heads, size, size)
        for row in self.norm(stream):
            step = last - row
            if self.config.variant == "finch":
                ranks = torch.tanh(self.mix_down.weight @ (row + step * self.mix_base)).view(5, -1)
                mix = torch.stack([mu + w.T @ rank for mu, w, rank in zip(self.mix, self.mix_up, ranks, strict=True)])
                rate = self.decay.up.weight @ torch.tanh(self.decay.down.weight @ (row + step * mix[0]))
                rate = torch.exp(rate if self.decay.base is None else rate + self.decay.base)
            else:
                mix, rate = self.mix + 0.0, torch.exp(self.log_rate)
            to_k, to_v, to_q, to_gate = row + step * mix[-4:]
            last = row
            q, k, v = (
                (linear.weight @ y).view(-1, size) for linear, y in ((self.q, to_q), (self.k, to_k), (self.v, to_v))
            )
            pair = k[:, :, None] * v[:, None, :]
            o = (q[:, :, None] * (memory + self.bonus[:, :, None] * pair)).sum(1)
            memory = torch.exp(-rate).view(-1, size, 1) * memory + pair
            o = (o - o.mean(1, keepdim=True)) / (
                o.var(1, keepdim=True, unbiased=False) + self.config.group_norm_eps
            ).sqrt()
            o = (o * self.group_norm.weight + self.group_norm.bias).flatten()
            outputs.append((self.o.weight @ (o * F.silu(self.gate.weight @ to_gate)))[None])
        mixed = stream + torch.cat(outputs)
        return mixed + self.feed_forward.reference(mixed) - x

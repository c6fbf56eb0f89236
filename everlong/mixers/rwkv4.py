"""RWKV-4: each channel's mean of all values so far, weighted by the exponential of keys that fade with time.

    wkv_t = (sum_{i<t} e^{k_i - (t-1-i) w} v_i + e^{u + k_t} v_t) / (sum_{i<t} e^{k_i - (t-1-i) w} + e^{u + k_t})   (16)
    y_t = W_o [ sigmoid(W_gate x~_t) * wkv_t ]            z_t = channel mix of x_t + y_t                  (eq. 17, 18)

with w = exp(decay) > 0 and u = bonus, a number for each channel; k, v and the gate read x, normed, each through its own
shift of tokens. It is the whole branch of its block, norms included, and gives y + z; the first layer of a model also
norms the embedding.

Shapes    x [B, T, D] -> y + z [B, T, D];  k, v, wkv [B, T, D];  F channels inside of the channel mix
State     numerator a, denominator b and exponent p, both sums being e^p times those kept: 3 D numbers; and the last
          inputs of both shifts: 20 D bytes
Cost      FLOPs a token: 10 D D + 4 D F; the recurrence is elementwise. A sequence takes one scan and log2(T) maxima
Source    Peng et al. 2023, "RWKV: Reinventing RNNs for the Transformer Era", arXiv 2305.13048; the stable form is its
          appendix D
Deviates  the weights of the token shift are those of the token before, 1 - mu
"""

import dataclasses
import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from everlong.config import config
from everlong.mixers.base import Context, Cost, Mixer, Traits, unpadded
from everlong.nn.layers import exact
from everlong.nn.rwkv import ChannelMix, blended, depth_ratios, line, orthogonal, ramp, shifted
from everlong.ops import linear_scan
from everlong.ops.chunks import STEPS, without_autocast
from everlong.ops.spans import spans

NEVER = -1e38  # the exponent of an empty sum: below all others, and finite, so that differences are no NaN


class State(NamedTuple):
    """What RWKV-4 keeps of a sequence."""

    numerator: Float[Tensor, "N D"]
    denominator: Float[Tensor, "N D"]
    exponent: Float[Tensor, "N D"]
    last: Float[Tensor, "N D"]  # the input before, after the norm
    feed_forward: Float[Tensor, "N D"]  # that of the channel mix


@config
class Options:
    """Options of RWKV-4."""

    width: int
    feed_forward: int | None = None
    """Channels inside of the channel mix; None: 4 times the width."""
    first: bool | None = None
    """Whether the layer norms the embedding; None: it does where it is the model's first."""

    def __post_init__(self) -> None:
        if self.width < 1 or self.hidden < 1:
            raise ValueError(
                f"`width` and `feed_forward` must be at least 1: got width={self.width}, "
                f"feed_forward={self.feed_forward}"
            )

    @property
    def hidden(self) -> int:
        return 4 * self.width if self.feed_forward is None else self.feed_forward


class RWKV4(Mixer):
    """RWKV-4 under the contract."""

    Config = Options
    traits = Traits(
        forms=frozenset({"chunk", "recurrent"}),
        causal=True,
        bidirectional=False,
        growth="constant",
        owns_feed_forward=True,
    )

    def __init__(self, config: Options, *, layer: int = 0, depth: int = 1) -> None:
        if config.first is None:
            config = dataclasses.replace(config, first=layer == 0)
        super().__init__(config, layer=layer, depth=depth)
        d, (up, down) = config.width, depth_ratios(layer, depth)
        self.embedding_norm = nn.LayerNorm(d) if config.first else None
        self.norm = nn.LayerNorm(d)
        self.k, self.v, self.gate, self.o = (nn.Linear(d, d, bias=False) for _ in range(4))
        self.mix = nn.Parameter(1 - torch.stack([ramp(d, down), ramp(d, down) + 0.3 * up, ramp(d, down / 2)]))
        self.decay = nn.Parameter(8 * line(d) ** (0.7 + 1.3 * up) - 5)
        self.bonus = nn.Parameter(math.log(0.3) + 0.5 * ((torch.arange(d) + 1) % 3 - 1))
        self.feed_forward = ChannelMix(d, config.hidden, depth=depth, mix=1 - ramp(d, down).repeat(2, 1))
        orthogonal(self.v)
        for linear in (self.k, self.gate):
            nn.init.zeros_(linear.weight)

    def init_state(self, batch: int) -> State:
        state = State(*(self.new_state(batch, self.config.width) for _ in range(5)))
        return state._replace(exponent=state.exponent + NEVER)

    @unpadded
    def forward(
        self, x: Float[Tensor, "B T D"], state: State | None = None, context: Context = Context()
    ) -> tuple[Float[Tensor, "B T D"], State]:
        state = self.init_state(context.sequences(x)) if state is None else state
        stream = x if self.embedding_norm is None else self.embedding_norm(x)
        y = self.norm(stream)
        before, last = shifted(y, state.last, context.cu_seqlens)
        to_k, to_v, to_gate = blended(y, before, self.mix)
        k, v, sums = exact(self.k(to_k)), exact(self.v(to_v)), state[:3]
        few = context.form == "auto" and context.cu_seqlens is None and x.shape[1] <= STEPS
        run = steps if context.form == "recurrent" or few else chunk
        with without_autocast(x):
            wkv, sums = run(k, v, exact(self.decay).exp(), exact(self.bonus), sums, context.cu_seqlens)
        gate = torch.sigmoid(self.gate(to_gate))
        y = self.o(gate * wkv.to(gate.dtype))
        mixed = stream + y
        z, feed_forward = self.feed_forward(mixed, state.feed_forward, context.cu_seqlens)
        return (y + z if stream is x else mixed + z - x), State(*sums, last, feed_forward)

    @classmethod
    def cost(cls, config: Options, length: int) -> Cost:
        d, f = config.width, config.hidden
        weights = 4 * d * d + ChannelMix.weights(d, f, gated=True)
        norms = 4 if config.first is False else 6
        return Cost(flops_per_token=2 * weights, state_bytes=20 * d, parameters=weights + (norms + 7) * d)

    def reference(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        """Equations 11 to 18 as sums over all earlier tokens, in the dtype of x."""
        stream = x if self.embedding_norm is None else self.embedding_norm(x)
        last, rate, keys, values, outputs = torch.zeros_like(x[:1]), self.decay.exp(), [], [], [x[:0]]
        for t, row in enumerate(self.norm(stream)[:, None]):
            to_k, to_v, to_gate = (row + mu * (last - row) for mu in self.mix)
            last = row
            keys.append(to_k @ self.k.weight.T)
            values.append(to_v @ self.v.weight.T)
            age = (t - 1 - torch.arange(t + 1, dtype=x.dtype)).clamp_min(0)[:, None]
            k, v = torch.cat([*keys[:t], keys[t] + self.bonus]), torch.cat(values)
            weights = (k - age * rate).softmax(0)
            wkv = (weights * v).sum(0, keepdim=True)
            outputs.append((torch.sigmoid(to_gate @ self.gate.weight.T) * wkv) @ self.o.weight.T)
        mixed = stream + torch.cat(outputs)
        return mixed + self.feed_forward.reference(mixed) - x


Sums = tuple[Float[Tensor, "N D"], Float[Tensor, "N D"], Float[Tensor, "N D"]]  # numerator, denominator, exponent


def steps(
    k: Float[Tensor, "B T D"],
    v: Float[Tensor, "B T D"],
    rate: Float[Tensor, " D"],
    bonus: Float[Tensor, " D"],
    sums: Sums,
    cu_seqlens: Int[Tensor, " N_plus_1"] | None,
) -> tuple[Float[Tensor, "B T D"], Sums]:
    """wkv, one token after another, and the sums after the last.

    What is divided does not depend on the exponents that are taken out of it: none of them carries a gradient, but for
    those of the given state. Nor does it matter how they are rounded, where a rate is taken from a difference of two.
    """
    outputs, after = [v[:, :0]], []
    for span in spans(k.shape[1], cu_seqlens):
        a, b, p = (x[span.sequences] for x in sums)
        for t in range(span.start, span.stop):
            key, value = k[:, t], v[:, t]
            top = torch.maximum(p, bonus + key).detach()
            old, new = torch.exp(p - top), torch.exp(bonus + key - top)
            outputs.append(((old * a + new * value) / (old * b + new))[:, None])
            top = torch.maximum(p - rate, key).detach()
            old, new = torch.exp(p - top - rate), torch.exp(key - top)
            a, b, p = old * a + new * value, old * b + new, top
        after.append((a, b, p))
    a, b, p = (torch.cat(parts) for parts in zip(*after, strict=True))
    return torch.cat(outputs, 1), (a, b, p)


def chunk(
    k: Float[Tensor, "B T D"],
    v: Float[Tensor, "B T D"],
    rate: Float[Tensor, " D"],
    bonus: Float[Tensor, " D"],
    sums: Sums,
    cu_seqlens: Int[Tensor, " N_plus_1"] | None,
) -> tuple[Float[Tensor, "B T D"], Sums]:
    """The same by one linear scan of both sums, under exponents that are known before it."""
    if k.shape[1] == 0:
        return v, sums
    a, b, p = sums
    top = exponents(k, rate, p, cu_seqlens)
    before, _ = shifted(top, p, cu_seqlens)
    fade, weight = torch.exp(before - top - rate), torch.exp(k - top)
    both, last = linear_scan(
        torch.cat([fade, fade], -1),
        torch.cat([weight * v, weight], -1),
        initial_state=torch.cat([a, b], -1),
        cu_seqlens=cu_seqlens,
    )
    past, _ = shifted(both, torch.cat([a, b], -1), cu_seqlens)
    numerator, denominator = past.chunk(2, -1)
    most = torch.maximum(before, bonus + k).detach()
    old, new = torch.exp(before - most), torch.exp(bonus + k - most)
    _, end = shifted(top, p, cu_seqlens)
    a, b = last.chunk(2, -1)
    return (old * numerator + new * v) / (old * denominator + new), (a, b, end)


@torch.no_grad()
def exponents(
    k: Float[Tensor, "B T D"],
    rate: Float[Tensor, " D"],
    start: Float[Tensor, "N D"],
    cu_seqlens: Int[Tensor, " N_plus_1"] | None,
) -> Float[Tensor, "B T D"]:
    """p_t = max(p_{t-1} - w, k_t) of all tokens by doubling the stretch that each has seen."""
    length = k.shape[1]
    before, _ = shifted(torch.full_like(k, -torch.inf), start, cu_seqlens)
    p = torch.maximum(k, before - rate)
    place, longest = None, length
    if cu_seqlens is not None:
        lengths = cu_seqlens.diff()
        longest = int(lengths.max())
        token = torch.arange(length, device=k.device)
        place = (token - cu_seqlens[:-1].repeat_interleave(lengths, output_size=length))[:, None]
    stretch = 1
    while stretch < longest:
        seen = p[:, :-stretch] - stretch * rate
        if place is not None:
            seen = torch.where(place[stretch:] >= stretch, seen, -torch.inf)
        p = torch.cat([p[:, :stretch], torch.maximum(p[:, stretch:], seen)], 1)
        stretch *= 2
    return p

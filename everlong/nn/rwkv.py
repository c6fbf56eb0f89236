"""What all versions of RWKV share: the token shift, the channel mix, the norm of heads, projections of low rank.

    x~_t = x_t + mu * (x_{t-1} - x_t)                                       the token shift; x before the first is 0
    y_t = sigmoid(W_gate x~_t) * W_down relu(W_up x~_t)^2                   the channel mix, from version 7 without gate

Source    Peng et al. 2023, arXiv 2305.13048, section 3.1, whose mu is 1 minus this one; the released trainer for what
          weights start from
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from everlong.nn.layers import exact


def shifted(
    x: Float[Tensor, "B T D"], last: Float[Tensor, "N D"], cu_seqlens: Int[Tensor, " N_plus_1"] | None
) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "N D"]]:
    """The vector before each of `x`, for the first of a sequence `last`; and the last one of each sequence."""
    if x.shape[1] == 0:
        return x, last
    if cu_seqlens is None:
        return torch.cat([last[:, None].to(x.dtype), x[:, :-1]], 1), x[:, -1].to(last.dtype)
    filled = cu_seqlens.diff() > 0
    before = torch.cat([x[:, :1], x[:, :-1]], 1)
    before = before.index_copy(1, cu_seqlens[:-1][filled].long(), last[filled][None].to(x.dtype))
    ends = x[0].index_select(0, (cu_seqlens[1:] - 1).clamp_min(0)).to(last.dtype)
    return before, torch.where(filled[:, None], ends, last)


def blended(
    x: Float[Tensor, "B T D"], before: Float[Tensor, "B T D"], mix: Float[Tensor, "n *rows D"]
) -> Sequence[Float[Tensor, "B T D"]]:
    """x + mix_i * (before - x) for each i: of a number for each channel, or `[B, T, D]` of them.

    On a CPU these passes over memory cost as much as the products that read them, so that forward and backward pass
    take as few as they can; they cannot be differentiated twice.
    """
    if torch.compiler.is_compiling():
        return [x + weight * (before - x) for weight in mix.to(x.dtype)]
    result: Sequence[Tensor] = _Blended.apply(x, before, mix)  # type: ignore[no-untyped-call]
    return result


class _Blended(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, before: Tensor, mix: Tensor) -> tuple[Tensor, ...]:
        step = before - x
        ctx.save_for_backward(step, mix)
        ctx.set_materialize_grads(False)
        return tuple(torch.addcmul(x, step, weight) for weight in mix.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *slopes: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        step, mix = ctx.saved_tensors
        d_step, total, d_mix = torch.zeros_like(step), torch.zeros_like(step), torch.zeros_like(mix)
        product = torch.empty_like(step)
        for slope, weight, d_weight in zip(slopes, mix.to(step.dtype), d_mix, strict=True):
            if slope is not None:
                total += slope
                d_step.addcmul_(slope, weight)
                torch.mul(slope, step, out=product)
                d_weight.copy_(product.sum((0, 1)) if d_weight.dim() == 1 else product)
        return total.sub_(d_step), d_step, d_mix


class LowRank(nn.Module):
    """base + W_up f(W_down x): a vector for all tokens and what a token adds to it. The sum is in float32 at least.

    `down` starts near the trainer's 0: at 0 what tunes `up` from outside, such as LoRA, would be given no gradient.
    """

    def __init__(
        self,
        width: int,
        rank: int,
        *,
        activation: Callable[[Tensor], Tensor] | None = None,
        base: Float[Tensor, " D"] | None = None,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.down = nn.Linear(width, rank, bias=False)
        self.up = nn.Linear(rank, width, bias=False)
        self.base = None if base is None else nn.Parameter(base)
        nn.init.uniform_(self.down.weight, -0.01, 0.01)
        orthogonal(self.up, 0.1)

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        y: Tensor = self.down(x)
        y = self.up(y if self.activation is None else self.activation(y))
        return y if self.base is None else exact(y) + self.base


class GroupNorm(nn.Module):
    """Layer normalisation of each head's channels, with a gain and a bias for each channel of each head.

    The trainer of version 5 divides its input by 8 and adds 1e-5 to the variance; to add 64e-5 is the same.
    """

    def __init__(self, num_heads: int, size: int, *, gain: float, eps: float = 64e-5) -> None:
        super().__init__()
        self.size, self.eps = size, eps
        self.weight = nn.Parameter(torch.full((num_heads, size), gain))
        self.bias = nn.Parameter(torch.zeros(num_heads, size))

    def forward(self, x: Float[Tensor, "B T H V"]) -> Float[Tensor, "B T H V"]:
        y = F.layer_norm(exact(x), (self.size,), eps=self.eps)
        return torch.addcmul(self.bias, y, self.weight).to(x.dtype)


class ChannelMix(nn.Module):
    """The feed-forward of RWKV, with its norm: what is added to the stream."""

    def __init__(self, width: int, hidden: int, *, mix: Float[Tensor, "n D"], depth: int) -> None:
        """Makes one with a gate where `mix` has a row for what the gate reads, beside that for `up`.

        The trainer starts `down` at 0. What a model starts its other writers with, smaller the more of its `depth`
        layers there are, trains faster: after 150 steps on bytes the loss is 0.02 to 0.05 nats lower.
        """
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mix = nn.Parameter(mix)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)
        self.gate = nn.Linear(width, width, bias=False) if len(mix) == 2 else None
        orthogonal(self.up)
        nn.init.normal_(self.down.weight, std=(2 * depth * hidden) ** -0.5)
        if self.gate is not None:
            nn.init.zeros_(self.gate.weight)

    def forward(
        self, x: Float[Tensor, "B T D"], last: Float[Tensor, "N D"], cu_seqlens: Int[Tensor, " N_plus_1"] | None
    ) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "N D"]]:
        """The output, and the last input that a sequence goes on from."""
        x = self.norm(x)
        before, last = shifted(x, last, cu_seqlens)
        inputs = blended(x, before, self.mix)
        y: Tensor = self.down(F.relu(self.up(inputs[0])).square())
        return (y if self.gate is None else torch.sigmoid(self.gate(inputs[1])) * y), last

    def reference(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        """The equation, one token after another."""
        last, outputs = x.new_zeros(x.shape[1]), [x[:0]]
        for row in x:
            now = self.norm(row)
            to_up, *to_gate = (now + mu * (last - now) for mu in self.mix)
            y = self.down.weight @ F.relu(self.up.weight @ to_up) ** 2
            for z in to_gate:
                assert self.gate is not None
                y = torch.sigmoid(self.gate.weight @ z) * y
            outputs.append(y[None])
            last = now
        return torch.cat(outputs)

    @staticmethod
    def weights(width: int, hidden: int, *, gated: bool) -> int:
        """How many numbers its matrices hold."""
        return 2 * width * hidden + (width * width if gated else 0)


def orthogonal(linear: nn.Linear, scale: float = 1.0) -> None:
    """Starts a projection as a rotation, times `scale` and, where it widens, the root of by how much."""
    gain = max(1.0, math.sqrt(linear.out_features / linear.in_features))
    nn.init.orthogonal_(linear.weight, gain=scale * gain)


def depth_ratios(layer: int, depth: int) -> tuple[float, float]:
    """How far up a layer stands: from 0 to 1, and from 1 to nearly 0."""
    return layer / max(depth - 1, 1), 1 - layer / depth


def ramp(width: int, power: float = 1.0) -> Float[Tensor, " D"]:
    """(i / width)^power for each channel i."""
    return (torch.arange(width) / width) ** power


def line(width: int) -> Float[Tensor, " D"]:
    """From 0 to 1 over the channels."""
    return torch.arange(width) / max(width - 1, 1)

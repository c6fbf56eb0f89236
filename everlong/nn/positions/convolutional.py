"""Positions from a convolution: what stands near the edge of a text is told by the zeros beyond it.

    y_t = x_t + b + sum_w weight_w x_{t + w - offset}                       each channel for itself

padding   causal      offset W - 1: a token sees those before it, zeros before the first
          zero        offset (W - 1) / 2: both sides, zeros before the first and after the last
          circular    the same on a ring, which has no edge: it knows the order of neighbours and no position
Source    Chu et al. 2021, "Conditional Positional Encodings", arXiv 2102.10882, section 3.2; why zeros tell positions:
          Islam et al. 2020, arXiv 2001.08248; over time: Baevski et al. 2020, wav2vec 2.0, arXiv 2006.11477
Deviates  one dimension, before the first layer; causal padding, which the papers have no need of
"""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from everlong.config import config
from everlong.nn.positions.base import Kept, PositionEncoding, positive
from everlong.ops import causal_conv1d


@config
class ConvolutionalOptions:
    """Options of positions from a convolution."""

    kernel: int = 5
    """W, taps of a channel."""
    padding: Literal["causal", "zero", "circular"] = "causal"

    def __post_init__(self) -> None:
        positive(self, "kernel")
        if self.padding != "causal" and self.kernel % 2 == 0:
            raise ValueError(f"`kernel` must be odd where both sides are seen: got {self.kernel}")

    @property
    def causal(self) -> bool:
        return self.padding == "causal"


class Convolutional(PositionEncoding):
    """A convolution of each channel over its neighbours, added to the embedding."""

    Options = ConvolutionalOptions
    hooks = frozenset({"embedding"})
    relative = False

    def make(self) -> None:
        bound = self.options.kernel**-0.5
        self.weight = nn.Parameter(torch.empty(self.size, self.options.kernel).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(self.size))

    def init_kept(self, batch: int) -> Kept:
        if not self.options.causal:
            return ()
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        return (self.weight.new_zeros(batch, self.options.kernel - 1, self.size, dtype=dtype),)

    def embed(
        self,
        x: Float[Tensor, "B T D"],
        positions: Int[Tensor, "rows T"],
        *,
        tokens: Int[Tensor, "B T"] | None = None,
        kept: Kept = (),
        cu_seqlens: Int[Tensor, " N_plus_1"] | None = None,
    ) -> tuple[Float[Tensor, "B T D"], Kept]:
        if self.options.causal:
            past = kept[0] if kept else None
            y, last = causal_conv1d(x, self.weight, bias=self.bias, state=past, cu_seqlens=cu_seqlens)
            return x + y, (last,)
        return x + self._both_sides(x, cu_seqlens), ()

    def _both_sides(self, x: Float[Tensor, "B T D"], cu_seqlens: Int[Tensor, " N_plus_1"] | None) -> Tensor:
        place = torch.arange(x.shape[1], device=x.device)
        start, length = torch.zeros_like(place), torch.full_like(place, x.shape[1])
        if cu_seqlens is not None:
            lengths = cu_seqlens.diff()
            start, length = (y.repeat_interleave(lengths, output_size=len(place)) for y in (cu_seqlens[:-1], lengths))
        y = self.bias.to(x.dtype).expand_as(x)
        for tap, weight in enumerate(self.weight.to(x.dtype).unbind(-1)):
            other = place - start + tap - (self.options.kernel - 1) // 2
            inside = (other >= 0) & (other < length)
            read = x[:, start + (other % length if len(place) else other)]
            y = y + weight * (read if self.options.padding == "circular" else read * inside[:, None])
        return y

    def flops(self, queries: int, keys: int, kv_heads: int) -> int:
        return 2 * queries * self.weight.numel()

"""Complex order: words are complex numbers that turn with the position, each channel at a learned frequency.

    f(word, t) = r exp(i (w t + theta))                                                                        (eq. 6)

A token's embedding is r exp(i theta) as real and imaginary parts, the first and the second half of the channels; the
turn by w t mixes them. w belongs to each word and channel, to each word, or to each channel (section 3.2).

Source    Wang et al. 2020, "Encoding word order in complex embeddings", arXiv 1912.12333
Deviates  amplitude and phase are learned as real and imaginary part; the layers above are real and read both parts side
          by side; with an odd width the last channel does not turn
"""

import math
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from everlong.config import config
from everlong.nn.positions.base import Kept, PositionEncoding


@config
class ComplexOptions:
    """Options of complex order."""

    frequencies: Literal["channel", "word", "word and channel"] = "channel"
    """What has a frequency of its own."""
    base: float = 10_000.0
    """Frequencies begin between 1 and 1 / base radians a token."""

    def __post_init__(self) -> None:
        if not self.base > 1:
            raise ValueError(f"`base` must be above 1: got {self.base}")


class ComplexOrder(PositionEncoding):
    """The embedding as complex numbers, which turn with the position at learned frequencies."""

    Options = ComplexOptions
    hooks = frozenset({"embedding"})
    relative = False

    def make(self) -> None:
        if self.size < 2:
            raise ValueError(f"`complex` turns pairs of channels: the width must be at least 2, got {self.size}")
        pairs, kind = self.size // 2, self.options.frequencies
        if kind != "channel" and self.vocab_size is None:
            raise ValueError(f"frequencies of each {kind} need a vocabulary: use frequencies=channel")
        words = 1 if kind == "channel" or self.vocab_size is None else self.vocab_size
        share = torch.rand(words, 1) if kind == "word" else torch.arange(pairs).expand(words, -1) / pairs
        self.frequency = nn.Parameter(torch.exp(-math.log(self.options.base) * share))

    def embed(
        self,
        x: Float[Tensor, "B T D"],
        positions: Int[Tensor, "rows T"],
        *,
        tokens: Int[Tensor, "B T"] | None = None,
        kept: Kept = (),
        cu_seqlens: Int[Tensor, " N_plus_1"] | None = None,
    ) -> tuple[Float[Tensor, "B T D"], Kept]:
        w: Tensor = self.frequency
        if self.options.frequencies != "channel":
            if tokens is None:
                raise ValueError(
                    f"frequencies of each {self.options.frequencies} need the tokens: got their embedding only"
                )
            w = F.embedding(tokens, w)
        exact = torch.promote_types(x.dtype, torch.float32)
        angles = positions.to(exact)[..., None] * w
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        pairs = self.size // 2
        real, imaginary, rest = x[..., :pairs], x[..., pairs : 2 * pairs], x[..., 2 * pairs :]
        return torch.cat([real * cos - imaginary * sin, imaginary * cos + real * sin, rest], dim=-1), ()

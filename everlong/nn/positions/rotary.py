"""Rotary embedding: pairs of channels turn with the position, so that products depend on distances only.

    (x_i, x_j) -> attention_factor [cos(t w_i) x_i - sin(t w_i) x_j,  cos(t w_i) x_j + sin(t w_i) x_i]
    w_i = base^(-2i/R),  i = 0 .. R/2 - 1,  for the first R = fraction K channels of a head

Texts longer than those of training need frequencies that change less than these, by `scaling` with s = factor:

    linear      w_i / s                                                    Chen et al. 2023, arXiv 2306.15595
    ntk         base s^(R/(R-2))                                           Peng et al. 2023, arXiv 2309.00071, eq. 17
    dynamic     base (s L/L0 - (s - 1))^(R/(R-2)) at L > L0 tokens         the same, section 3.3
    yarn        between w_i and w_i / s by how often a pair turns in L0    the same, eq. 18-22; cos and sin grow by
                                                                           0.1 ln s + 1
    llama3      the same, by another ramp                                  Grattafiori et al. 2024, arXiv 2407.21783

Source    Su et al. 2021, "RoFormer", arXiv 2104.09864, eq. 14-16 and 34
Deviates  `half` pairs channel i with i + R/2, as GPT-NeoX and Llama do; `interleaved` 2i with 2i + 1, as the paper.
          dynamic: a query at position t turns itself and all keys that it reads by the frequencies of L = t + 1 tokens,
          so that an output never depends on what follows it, nor on how a text is cut into calls; without causality L
          is the length of the sequence
"""

import math
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from everlong.config import config
from everlong.nn.fused import turn
from everlong.nn.positions.base import PositionEncoding, positive


@config
class RopeOptions:
    """Options of the rotary embedding."""

    base: float = 10_000.0
    fraction: float = 1.0
    """Of a head's channels that turn, the first ones."""
    layout: Literal["half", "interleaved"] = "half"
    """Which channels are a pair: i and i + R/2, or neighbours."""
    scaling: Literal["linear", "ntk", "dynamic", "yarn", "llama3"] | None = None
    factor: float = 1.0
    """s, how many times longer texts become."""
    original_length: int = 2048
    """L0, the length of the texts in training, in tokens."""
    step: int = 1
    """dynamic: L is rounded up to a multiple of so many tokens, which then share one rotation of the keys."""
    beta_fast: float = 32.0
    """yarn: pairs that turn more often than this within L0 are left as they are."""
    beta_slow: float = 1.0
    """yarn: pairs that turn less often than this within L0 are interpolated."""
    attention_factor: float | None = None
    """yarn: what cos and sin are multiplied by; None: 0.1 ln s + 1."""
    low_frequency: float = 1.0
    """llama3: pairs that turn less often than this within L0 are interpolated."""
    high_frequency: float = 4.0
    """llama3: pairs that turn more often than this within L0 are left as they are."""

    def __post_init__(self) -> None:
        positive(self, "factor", "original_length", "step")
        if not self.base > 1 or not 0 < self.fraction <= 1:
            raise ValueError(
                f"`base` must be above 1 and `fraction` above 0, at most 1: got base={self.base}, "
                f"fraction={self.fraction}"
            )
        if not self.beta_fast > self.beta_slow > 0 or not self.high_frequency > self.low_frequency > 0:
            raise ValueError(
                "`beta_fast` must be above `beta_slow` and `high_frequency` above `low_frequency`, all above 0: got "
                f"{self.beta_fast}, {self.beta_slow}, {self.high_frequency}, {self.low_frequency}"
            )
        if self.scaling is None and self.factor != 1:
            raise ValueError(
                f"`factor` needs a `scaling`, one of linear, ntk, dynamic, yarn, llama3: got factor={self.factor}"
            )


class Rope(PositionEncoding):
    """Pairs of channels of queries and keys turn with the position."""

    Options = RopeOptions
    hooks = frozenset({"rotation"})

    def make(self) -> None:
        self.turning = int(self.size * self.options.fraction)
        if self.turning % 2 or not self.turning:
            part = "the size of a head" if self.turning == self.size else "`fraction` of a head's channels"
            raise ValueError(f"`rope` turns pairs of channels: {part} must be even, got {self.turning}")
        if self.options.scaling == "dynamic":
            self.hooks = frozenset({"late rotation"})

    def frequencies(
        self, length: int | None = None, *, dtype: torch.dtype = torch.float32, device: torch.device | None = None
    ) -> Float[Tensor, " pairs"]:
        """w of each pair, in radians a token; `length` is that of the text, of which `dynamic` wants to know."""
        o, size = self.options, self.turning
        base, grows = o.base, size / (size - 2) if size > 2 else 0.0  # the first pair turns by 1, whatever the base
        if o.scaling == "ntk":
            base *= o.factor**grows
        elif o.scaling == "dynamic" and length is not None:
            base *= (o.factor * max(length, o.original_length) / o.original_length - (o.factor - 1)) ** grows
        index = torch.arange(0, size, 2, device=device, dtype=dtype)
        w: Tensor = torch.exp(index * (-math.log(base) / size))
        if o.scaling == "linear":
            w /= o.factor
        if o.scaling not in {"yarn", "llama3"}:
            return w
        kept = self._yarn_ramp(index / 2) if o.scaling == "yarn" else self._llama3_ramp(w)
        mixed: Tensor = w * kept + w / o.factor * (1 - kept)
        return mixed

    def _yarn_ramp(self, pair: Float[Tensor, " pairs"]) -> Float[Tensor, " pairs"]:
        o = self.options

        def place(turns: float) -> float:
            """The pair that turns so often within the original length."""
            return self.turning * math.log(o.original_length / (turns * 2 * math.pi)) / (2 * math.log(o.base))

        low = max(math.floor(place(o.beta_fast)), 0)
        high = min(math.ceil(place(o.beta_slow)), self.turning - 1)
        ramp: Tensor = 1 - ((pair - low) / (high - low if high != low else 1e-3)).clamp(0, 1)
        return ramp

    def _llama3_ramp(self, w: Float[Tensor, " pairs"]) -> Float[Tensor, " pairs"]:
        o = self.options
        turns = o.original_length * w / (2 * math.pi)
        ramp: Tensor = ((turns - o.low_frequency) / (o.high_frequency - o.low_frequency)).clamp(0, 1)
        return ramp

    @property
    def attention_factor(self) -> float:
        """What cos and sin are multiplied by; scores grow by its square."""
        if self.options.scaling != "yarn":
            return 1.0
        given: float | None = self.options.attention_factor
        return 0.1 * math.log(self.options.factor) + 1 if given is None else given

    def rotate(
        self, x: Float[Tensor, "B T H K"], positions: Int[Tensor, "rows T"], length: int | None = None
    ) -> Float[Tensor, "B T H K"]:
        """Queries or keys turned according to their positions, in a text of so many tokens."""
        exact = torch.promote_types(x.dtype, torch.float32)
        cos, sin = waves(
            positions, self.frequencies(length, dtype=exact, device=x.device), x.dtype, factor=self.attention_factor
        )
        turning, rest = x[..., : self.turning], x[..., self.turning :]
        if self.options.layout == "half":
            turned = turn(turning, cos, sin)
        else:
            turned = turn(halves(turning), cos, sin)
            turned = turned.view(*turned.shape[:-1], 2, self.turning // 2).mT.flatten(-2)
        if rest.shape[-1]:
            turned = torch.cat([turned, rest], dim=-1)
        return turned

    def text_length(self, positions: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
        """L of a text that ends with these positions; the same for all whose frequencies are the same."""
        step = self.options.step
        length: Tensor = torch.div(positions + step, step, rounding_mode="floor") * step
        return length.clamp_min(int(self.options.original_length))


def waves(
    positions: Int[Tensor, "rows T"],
    frequencies: Float[Tensor, "*heads pairs"],
    dtype: torch.dtype,
    *,
    factor: float = 1.0,
) -> tuple[Float[Tensor, "rows T _ pairs"], Float[Tensor, "rows T _ pairs"]]:
    """Cosine and sine of the angles at these positions, times `factor`: as pairs turn, in all heads or in each.

    Angles are float32 at least: bfloat16 cannot count beyond 256.
    """
    w = frequencies.to(torch.promote_types(frequencies.dtype, torch.float32))
    angles = positions.to(w.dtype)[..., None, None] * w
    return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)


def halves(x: Float[Tensor, "B T H K"]) -> Float[Tensor, "B T H K"]:
    """Neighbours 2i and 2i + 1 put to i and i + K / 2, where `turn` finds them."""
    return x.reshape(*x.shape[:-1], x.shape[-1] // 2, 2).mT.flatten(-2)

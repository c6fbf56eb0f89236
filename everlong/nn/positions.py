"""Position encodings, each behind the hooks through which it acts.

    embedding     x -> x + p(t), before the first layer
    rotation      q, k -> R(t) q, R(t) k, before they meet
    score bias    a number added to each score, from the two positions
    value         v -> v + p(t - s), what a pair's distance adds to the value read

A mixer's traits say which hooks it offers; `attach` refuses an encoding that needs another.
"""

import math
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from everlong.config import unknown
from everlong.nn.fused import turn

HOOKS = ("embedding", "rotation", "score bias", "value")


class PositionEncoding(nn.Module):
    """What every encoding is: its hooks, and a method for each. The methods here leave things as they are."""

    hooks: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, num_heads: int, size: int) -> None:
        super().__init__()

    def rotate(self, x: Float[Tensor, "B T H K"], positions: Int[Tensor, "rows T"]) -> Float[Tensor, "B T H K"]:
        """Queries or keys turned according to their positions."""
        return x

    def score_bias(self, queries: Int[Tensor, " T"], keys: Int[Tensor, " S"]) -> Float[Tensor, "H T S"]:
        """What is added to the scores of these positions."""
        return torch.zeros(1, len(queries), len(keys), device=queries.device)


class NoPosition(PositionEncoding):
    """No encoding: a causal mixer knows the order by what it has seen (Haviv et al. 2022, arXiv 2203.16634)."""


class Rope(PositionEncoding):
    """Rotary embedding: pairs of channels turn with the position, so that products depend on distances only.

    Channel i is paired with i + K/2 and turns by position * base^(-2i/K).
    Source: Su et al. 2021, "RoFormer", arXiv 2104.09864, eq. 14-16, in the layout of GPT-NeoX and Llama.
    """

    hooks = frozenset({"rotation"})

    def __init__(self, num_heads: int, size: int, *, base: float = 10_000.0) -> None:
        super().__init__(num_heads, size)
        if size % 2:
            raise ValueError(f"`rope` turns pairs of channels: the size of a head must be even, got {size}")
        self.size, self.base = size, base

    def rotate(self, x: Float[Tensor, "B T H K"], positions: Int[Tensor, "rows T"]) -> Float[Tensor, "B T H K"]:
        exact = torch.promote_types(x.dtype, torch.float32)  # bfloat16 cannot count beyond 256
        index = torch.arange(0, self.size, 2, device=x.device, dtype=exact)
        angles = positions.to(exact)[..., None, None] * torch.exp(index * (-math.log(self.base) / self.size))
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        return turn(x, cos, sin)


class Alibi(PositionEncoding):
    """A penalty that grows linearly with the distance, at a slope of its own for each head.

    Slopes are 2^(-8h/H), h = 1..H; for an H that is no power of two those of the next lower power, then every second
    slope of the next higher one. Source: Press et al. 2021, "Train Short, Test Long", arXiv 2108.12409.
    """

    hooks = frozenset({"score bias"})

    def __init__(self, num_heads: int, size: int) -> None:
        super().__init__(num_heads, size)
        self.num_heads = num_heads

    def slopes(self) -> list[float]:
        """One slope a head."""
        power = 2 ** int(math.log2(self.num_heads))
        first = [2.0 ** (-8 * h / power) for h in range(1, power + 1)]
        second = [2.0 ** (-4 * h / power) for h in range(1, 2 * power + 1, 2)]
        return (first + second)[: self.num_heads]

    def score_bias(self, queries: Int[Tensor, " T"], keys: Int[Tensor, " S"]) -> Float[Tensor, "H T S"]:
        distance = (queries[:, None] - keys).abs().float()
        slopes = torch.tensor(self.slopes(), device=queries.device)
        return -slopes[:, None, None] * distance


_ENCODINGS: dict[str, type[PositionEncoding]] = {"none": NoPosition, "rope": Rope, "alibi": Alibi}


def names() -> list[str]:
    """The position encodings that there are."""
    return sorted(_ENCODINGS)


def load(name: str) -> type[PositionEncoding]:
    """The encoding of that name; ValueError where there is none."""
    if name not in _ENCODINGS:
        raise unknown("position encoding", name, _ENCODINGS)
    return _ENCODINGS[name]


def attach(name: str, *, num_heads: int, size: int, offered: frozenset[str], mixer: str) -> PositionEncoding:
    """Makes the encoding for a mixer that offers these hooks.

    Raises:
        ValueError: the encoding acts through a hook that the mixer does not have; those that would work are named.
    """
    encoding = load(name)
    if not encoding.hooks <= offered:
        fitting = [other for other in names() if _ENCODINGS[other].hooks <= offered]
        raise ValueError(
            f"`{mixer}` has no {' or '.join(sorted(encoding.hooks - offered))} for the position encoding `{name}`. "
            f"It takes: {', '.join(fitting)}"
        )
    return encoding(num_heads, size)

"""What every position encoding is: the hooks through which it acts, its options, and a method for each hook.

    embedding       x -> x changed by where it stands, before the first layer
    rotation        q, k -> R(t) q, R(s) k, before they meet; a rotated key can be kept
    late rotation   the same, by frequencies of the text's length so far: keys are kept as they are, turned when read
    score bias      a number added to each score, from the two positions
    score           a number added to each score, from the two positions and the query or the key
    value           what a pair's distance adds to the value that is read

What acts on scores or values here is relative: it knows the distance t - s and neither t nor s.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from everlong.config import config

HOOKS = ("embedding", "rotation", "late rotation", "score bias", "score", "value")

# What an encoding needs the positions of the keys for when they are read.
READING = frozenset({"late rotation", "score bias", "score", "value"})

Position = str | dict[str, Any]  # an encoding's name, or {"position": name, option: value, ...}
Kept = tuple[Tensor, ...]  # what an encoding of the embedding keeps of the past, each leaf with the sequence on axis 0

# The mixer's own way from its input to queries or keys: [B, T, D] -> [B, T, heads, K]
Projection = Callable[[Tensor], Tensor]


@config
class NoOptions:
    """Of an encoding that has none."""


class PositionEncoding(nn.Module):
    """An encoding without effect: each of its methods leaves things as they are. The others say what they change."""

    Options: ClassVar[type] = NoOptions
    hooks: frozenset[str] = frozenset()
    relative: ClassVar[bool] = True
    """All positions moved by the same number give the same."""

    def __init__(
        self,
        num_heads: int,
        size: int,
        options: Any = None,
        *,
        causal: bool = True,
        vocab_size: int | None = None,
    ) -> None:
        """`size` is that of a head; an encoding of the embedding sees one head of the model's width."""
        super().__init__()
        self.num_heads, self.size, self.causal, self.vocab_size = num_heads, size, causal, vocab_size
        self.options = self.Options() if options is None else options
        self.make()

    def make(self) -> None:
        """Makes the parameters; ValueError where the options do not fit the size."""

    @property
    def scale(self) -> float | None:
        """What products of queries and keys are multiplied by; None: K^-0.5."""
        return None

    @property
    def limit(self) -> int | None:
        """How many positions there are; None: there is no last one."""
        return None

    def rotate(self, x: Float[Tensor, "B T H K"], positions: Int[Tensor, "rows T"]) -> Float[Tensor, "B T H K"]:
        """Queries or keys turned according to their positions."""
        return x

    def score_bias(self, queries: Int[Tensor, "*rows T"], keys: Int[Tensor, "*rows S"]) -> Float[Tensor, "..."]:
        """What is added to the scores of these positions: [*rows, H, T, S], or 1 in the place of H."""
        return torch.zeros(*queries.shape[:-1], 1, queries.shape[-1], keys.shape[-1], device=queries.device)

    def content(self, q: Float[Tensor, "N T H K"]) -> Float[Tensor, "N T H K"]:
        """What meets the keys in the place of the queries."""
        return q

    def score(
        self,
        q: Float[Tensor, "N T H K"],
        k: Float[Tensor, "N S G K"],
        distance: Int[Tensor, "rows T S"],
        project: tuple[Projection, Projection],
    ) -> Float[Tensor, "N H T S"]:
        """What is added to the scores, already scaled, where queries and keys are so far apart (t - s).

        `project` makes queries and keys out of vectors as wide as the layer's input.
        """
        return q.new_zeros(q.shape[0], q.shape[2], q.shape[1], k.shape[1])

    def value(
        self, weights: Float[Tensor, "N H T S"], distance: Int[Tensor, "rows T S"]
    ) -> Float[Tensor, "N H T K"] | float:
        """What the distances add to the values read with these weights."""
        return 0.0

    def embed(
        self,
        x: Float[Tensor, "B T D"],
        positions: Int[Tensor, "rows T"],
        *,
        tokens: Int[Tensor, "B T"] | None = None,
        kept: Kept = (),
        cu_seqlens: Int[Tensor, " N_plus_1"] | None = None,
    ) -> tuple[Float[Tensor, "B T D"], Kept]:
        """Embedded tokens changed by where they stand, and what continues them."""
        return x, ()

    def init_kept(self, batch: int) -> Kept:
        """What is kept of `batch` sequences before their first token."""
        return ()

    def flops(self, queries: int, keys: int, kv_heads: int) -> int:
        """Of the products that the last `queries` of `keys` tokens need beside those of the mixer."""
        return 0


def bounds(index: Int[Tensor, "..."]) -> tuple[int, int]:
    """The smallest number and one more than the largest; (0, 1) where there is none."""
    if not index.numel():
        return 0, 1
    low, high = index.aminmax()
    return int(low), int(high) + 1


def pick(products: Float[Tensor, "N H T R"], index: Int[Tensor, "rows T S"]) -> Float[Tensor, "N H T S"]:
    """For each pair the product with the row of a table that belongs to its distance."""
    return products.gather(-1, index[:, None].expand(*products.shape[:3], -1))


def positive(options: Any, *names: str) -> None:
    """Raises ValueError where an option of these names is below 1."""
    for name in names:
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"`{name}` must be at least 1: got {value}")

"""The sequences of a call, one after another: the rows of a batch together, or those packed into one row."""

import itertools
from typing import NamedTuple

from torch import Tensor


class Span(NamedTuple):
    """What is computed together: these steps of `x [B, T, ...]`, with these rows of the states `[N, ...]`."""

    start: int
    stop: int
    sequences: slice

    @property
    def time(self) -> slice:
        return slice(self.start, self.stop)


def spans(length: int, cu_seqlens: Tensor | None) -> list[Span]:
    """One span for a batch, one for each packed sequence.

    Raises:
        ValueError: `cu_seqlens` does not rise from 0 to the length.
    """
    if cu_seqlens is None:
        return [Span(0, length, slice(None))]
    bounds = cu_seqlens.tolist()
    _check(bounds, length)
    return [Span(start, stop, slice(n, n + 1)) for n, (start, stop) in enumerate(itertools.pairwise(bounds))]


def check_bounds(length: int, cu_seqlens: Tensor | None) -> None:
    """Raises ValueError where `cu_seqlens` does not rise from 0 to the length."""
    if cu_seqlens is not None:
        _check(cu_seqlens.tolist(), length)


def _check(bounds: list[int], length: int) -> None:
    if bounds != sorted(bounds) or bounds[:1] != [0] or bounds[-1] != length:
        raise ValueError(f"`cu_seqlens` must rise from 0 to T = {length}: got {bounds}")

"""What the ways to compute softmax attention share: which keys a query sees, and the scores that it sees them with."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor

BiasFunction = Callable[[Int[Tensor, " T"], Int[Tensor, " S"]], Tensor]
Result = tuple[Tensor, Tensor | None]  # o, and lse where it was computed
Function = TypeVar("Function", bound=Callable[..., Any])

UNBOUNDED = 1 << 40  # a reach beyond any length, and far from the ends of int64


@dataclass(frozen=True)
class Band:
    """Which keys a query sees by position: query i sits at p = offset + i and sees keys p - left <= j <= p + right."""

    offset: int
    left: int = UNBOUNDED
    right: int = UNBOUNDED

    def reach(self, rows: slice, num_keys: int) -> slice:
        """The keys that any of these queries sees."""
        start = min(max(self.offset + rows.start - self.left, 0), num_keys)
        stop = min(max(self.offset + rows.stop + self.right, start), num_keys)
        return slice(start, stop)

    def covers(self, rows: slice, columns: slice) -> bool:
        """Whether each of these queries sees all of these keys."""
        first, last = self.offset + rows.start, self.offset + rows.stop - 1
        return bool(last - self.left <= columns.start and columns.stop - 1 <= first + self.right)

    def visible(self, rows: slice, columns: slice, device: torch.device) -> Tensor:
        """Which of these queries sees which of these keys: boolean [R, C]."""
        position = self.offset + torch.arange(rows.start, rows.stop, device=device)[:, None]
        key = torch.arange(columns.start, columns.stop, device=device)
        return (key >= position - self.left) & (key <= position + self.right)


@dataclass(frozen=True)
class Scoring:
    """What stands between q k^T and the softmax: the scale, the band, a mask and a bias.

    `mask` and a `bias` tensor have four axes, [B, H, T, S], each of which may be 1. `origin` is the position of key 0,
    for a bias function.
    """

    scale: float
    band: Band
    mask: Tensor | None = None
    bias: Tensor | BiasFunction | None = None
    origin: int = 0

    def cut(self, rows: slice, columns: slice) -> "Scoring":
        """The same for a part of the queries and keys, counted from the part's own start."""
        return replace(
            self,
            band=replace(self.band, offset=self.band.offset + rows.start - columns.start),
            mask=None if self.mask is None else part(self.mask, rows, columns),
            bias=part(self.bias, rows, columns) if isinstance(self.bias, Tensor) else self.bias,
            origin=self.origin + columns.start,
        )

    def row(self, b: int) -> "Scoring":
        """The same for one row of the batch."""
        mask = self.mask if self.mask is None or self.mask.shape[0] == 1 else self.mask[b : b + 1]
        whole = not isinstance(self.bias, Tensor) or self.bias.shape[0] == 1
        return replace(self, mask=mask, bias=self.bias if whole else self.bias[b : b + 1])  # type: ignore[index]

    def allowed(self, rows: slice, columns: slice, device: torch.device) -> Tensor | None:
        """Where these queries may attend: boolean, broadcastable to [B, H, R, C]; None means everywhere."""
        visible = None if self.band.covers(rows, columns) else self.band.visible(rows, columns, device)
        if self.mask is None:
            return visible
        mask = part(self.mask, rows, columns)
        return mask if visible is None else mask & visible

    def added(self, rows: slice, columns: slice, device: torch.device) -> Tensor | None:
        """The bias of these queries and keys, broadcastable to [B, H, R, C]."""
        if self.bias is None or isinstance(self.bias, Tensor):
            return None if self.bias is None else part(self.bias, rows, columns)
        start = self.origin + self.band.offset
        bias = self.bias(
            torch.arange(start + rows.start, start + rows.stop, device=device),
            torch.arange(self.origin + columns.start, self.origin + columns.stop, device=device),
        )
        return checked_bias(bias, rows.stop - rows.start, columns.stop - columns.start)

    def scores(self, q: Tensor, k: Tensor, rows: slice, columns: slice) -> Tensor:
        """The softmax's argument for a tile [B, H, R, C] of q [B, H, R, K] and k [B, Hkv, C, K]; -inf where masked."""
        x = heads_times(q, k.mT) * self.scale
        bias, allowed = self.added(rows, columns, q.device), self.allowed(rows, columns, q.device)
        if bias is not None:
            x = x + bias.to(x.dtype)
        return x if allowed is None else x.masked_fill(~allowed, -torch.inf)

    def learns(self, device: torch.device) -> bool:
        """Whether the bias asks for a gradient."""
        if self.bias is None or not torch.is_grad_enabled():
            return False
        if isinstance(self.bias, Tensor):
            return self.bias.requires_grad
        first = torch.zeros(1, dtype=torch.long, device=device)
        return self.bias(first, first).requires_grad


def part(x: Tensor, rows: slice, columns: slice) -> Tensor:
    """The tile of a tensor that is broadcastable over its last two axes."""
    rows = rows if x.shape[-2] > 1 else slice(None)
    return x[..., rows, columns if x.shape[-1] > 1 else slice(None)]


def heads_times(x: Tensor, y: Tensor) -> Tensor:
    """x @ y for each head: x [B, H, R, I] and y [B, Hkv, I, J], whose heads are shared by consecutive heads of x."""
    B, H, R, _ = x.shape
    return (x.reshape(B, y.shape[1], -1, x.shape[-1]) @ y).view(B, H, R, y.shape[-1])


def accumulator(x: Tensor) -> torch.dtype:
    """The dtype of sums over x: float64 for float64, float32 for everything shorter."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def blocks(span: slice, size: int) -> Iterator[slice]:
    for start in range(span.start, span.stop, size):
        yield slice(start, min(start + size, span.stop))


def nothing(q: Tensor, k: Tensor, v: Tensor) -> Result:
    """What attention over no keys is, or that of no queries: zeros that depend on the inputs, with zero gradients."""
    link = sum(x[..., :0].sum() for x in (q, k, v))
    B, T, H, _ = q.shape
    return v.new_zeros(B, T, H, v.shape[-1]) + link, q.new_full((B, T, H), -torch.inf, dtype=accumulator(q))


def joined(results: list[Result], axis: int) -> Result:
    outputs, sums = [o for o, _ in results], [lse for _, lse in results if lse is not None]
    return torch.cat(outputs, axis), torch.cat(sums, axis) if len(sums) == len(outputs) else None


def uncompiled(function: Function) -> Function:
    """`function`, left out by torch.compile: it would unroll the loops inside, and do so again for every length."""
    if torch.compiler.is_compiling():
        return torch.compiler.disable(function)  # type: ignore[no-any-return, no-untyped-call]
    return function


def checked_bias(bias: Tensor, num_queries: int, num_keys: int) -> Tensor:
    rule = "a `bias` function returns a floating-point tensor broadcastable to [H, queries, keys]"
    shape = tuple(bias.shape)
    sizes = zip(reversed(shape), (num_keys, num_queries), strict=False)
    if len(shape) > 3 or any(size not in (1, expected) for size, expected in sizes) or not bias.is_floating_point():
        raise ValueError(f"{rule}: got {bias.dtype} {list(shape)} for {num_queries} queries and {num_keys} keys")
    return bias

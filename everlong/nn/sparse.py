"""Softmax attention to a part of the past: which keys a query sees, and no more work than these need.

    near      the keys less than `window` away, or those of one's own block of `stride` tokens
    far       the keys whose distance is a multiple of `stride`, or the last `summary` tokens of each block
    global    the first tokens of a text are seen by all others, and see all others themselves

Tokens are counted from the beginning of their sequence: that count is called a place here, for the position that an
encoding is told may be another.

Forms     mask        all queries at once against the keys that any of them sees, under a mask
          tiles       near, summaries and global keys: tiles of neighbouring queries, each against what it reaches
          classes     multiples: tokens whose places leave the same remainder are a sequence of their own

Work      of T queries: T w for a window w;  T (l + c T / l) for blocks of l with c summaries;  T (l + T / l) for a
          window l and multiples of l;  T g for g global tokens; each up to a factor of 2 or so
Memory    O(T) and a mask of the scores of all tiles, or of one tile where these are more than LIMIT
Source    Child et al. 2019, arXiv 1904.10509; Beltagy et al. 2020, arXiv 2004.05150
"""

import bisect
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from everlong.ops import softmax_attention
from everlong.ops.online_softmax import merge
from everlong.ops.scoring import Result, joined, uncompiled

FEW = 64  # queries that are one tile, whatever the pattern
LIMIT = 1 << 24  # scores beyond which tiles are computed once more in the backward pass

# What an encoding adds to the scores of queries [*rows, T] and keys [*rows, S]: [*rows, H, T, S]
Bias = Callable[[Tensor, Tensor], Tensor]


class Queries(NamedTuple):
    """Those of one call. Places and positions have one row where all sequences share them."""

    vectors: Float[Tensor, "N T H K"]
    places: Int[Tensor, "rows T"]
    positions: Int[Tensor, "rows T"]

    def part(self, start: int, stop: int | None) -> "Queries":
        """Some neighbours."""
        return Queries(*(x[:, start:stop] for x in self))

    def split(self, sizes: list[int]) -> list["Queries"]:
        """Neighbours together, so many at a time."""
        return [Queries(*parts) for parts in zip(*(x.split_with_sizes(sizes, 1) for x in self), strict=True)]


class Keys(NamedTuple):
    """Those that there still are, in their order, with their values."""

    keys: Float[Tensor, "N S G K"]
    values: Float[Tensor, "N S G V"]
    places: Int[Tensor, "rows S"]  # -1: there is nothing
    positions: Int[Tensor, "rows S"]

    def part(self, start: int, stop: int | None) -> "Keys":
        """Some neighbours."""
        return Keys(*(x[:, start:stop] for x in self))

    def pick(self, index: Int[Tensor, " R"]) -> "Keys":
        """Some of them."""
        return Keys(*(x.index_select(1, index) for x in self))

    def split(self, sizes: list[int]) -> list["Keys"]:
        """Neighbours together, so many at a time."""
        return [Keys(*parts) for parts in zip(*(x.split_with_sizes(sizes, 1) for x in self), strict=True)]


class _Tile(NamedTuple):
    """Queries, and the keys that they are read against, from several places."""

    queries: Queries
    parts: list[Keys]

    @property
    def shape(self) -> tuple[int, int]:
        return self.queries.places.shape[1], sum(part.places.shape[1] for part in self.parts)


@dataclass(frozen=True)
class Pattern:
    """Which keys a query sees."""

    causal: bool
    near: Literal["window", "block"] | None = None
    far: Literal["multiples", "summaries"] | None = None
    window: int = 1
    stride: int = 1
    summary: int = 0
    global_tokens: int = 0
    reading: bool = True
    """Whether global tokens read here; otherwise, as queries, they see nothing."""

    def visible(self, queries: Int[Tensor, "rows T"], keys: Int[Tensor, "rows_or_1 S"]) -> Bool[Tensor, "some T S"]:
        """Which of these places sees which; nobody sees a key at -1."""
        query, key = queries[..., :, None], keys[..., None, :]
        seen = key < self.global_tokens
        if self.near == "window":
            seen = seen | ((query - key).abs() < self.window)
        elif self.near == "block":
            seen = seen | (query // self.stride == key // self.stride)
        if self.far == "multiples":
            seen = seen | ((query - key) % self.stride == 0)
        elif self.far == "summaries":
            seen = seen | self._summarises(key)
        own = query < self.global_tokens
        seen = seen | own if self.reading else seen & ~own
        return seen & (key >= 0) & (key <= query) if self.causal else seen & (key >= 0)

    def kept(self, keys: Int[Tensor, "rows S"], length: Int[Tensor, "rows 1"]) -> Bool[Tensor, "rows S"]:
        """Which of these places a token may still see that comes after `length` others."""
        kept = keys < self.global_tokens
        if self.near == "window":
            kept = kept | (keys > length - self.window)
        elif self.near == "block":
            kept = kept | (keys // self.stride == length // self.stride)
        if self.far == "multiples":
            kept = torch.ones_like(kept)
        elif self.far == "summaries":
            kept = kept | self._summarises(keys)
        return kept & (keys >= 0)

    def count(self, queries: Int[Tensor, " T"], length: int) -> Int[Tensor, " T"]:
        """How many keys these places see in a text of so many tokens."""
        end = (queries + 1).clamp_max(length) if self.causal else torch.full_like(queries, length)
        low, high = self._reach(queries)
        low, high = low.clamp_min(0).minimum(end), high.minimum(end)
        seen = high - low + self._far_before(low, queries) + self._far_before(end, queries)
        seen = seen - self._far_before(high, queries)
        first = torch.arange(min(self.global_tokens, length))
        others = replace(self, global_tokens=0).visible(queries[None], first[None])[0]
        seen = seen + (~others & (first < end[:, None])).sum(1)
        return torch.where(queries < self.global_tokens, end if self.reading else 0, seen)

    def attend(
        self,
        q: Queries,
        k: Keys,
        *,
        scale: float | None = None,
        bias: Bias | None = None,
        alike: bool = True,
        form: str = "auto",
    ) -> Float[Tensor, "N T H V"]:
        """Each query's average of the values that it sees.

        Args:
            q: the last tokens, without gaps between their places.
            k: all keys that these see, theirs included, in their order.
            alike: the places of all sequences are the same.
        """
        if q.vectors.dtype != k.keys.dtype or q.vectors.dtype != k.values.dtype:
            k = k._replace(keys=k.keys.to(q.vectors.dtype), values=k.values.to(q.vectors.dtype))
        reader = _Reader(self, scale, bias, form)
        tiled = alike and form in {"auto", "chunk"} and q.vectors.shape[1] > FEW
        return uncompiled(reader.tiled)(q, k) if tiled else uncompiled(reader.at_once)(q, k)[0]

    def _summarises(self, places: Tensor) -> Tensor:
        return places % self.stride >= self.stride - self.summary

    def _reach(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """The first place that is near, and the one after the last, with no regard to causality."""
        if self.near == "window":
            return places - self.window + 1, places + self.window
        if self.near == "block":
            start = places // self.stride * self.stride
            return start, start + self.stride
        return torch.zeros_like(places), torch.zeros_like(places)

    def _far_before(self, stop: Tensor, queries: Tensor) -> Tensor:
        """How many of the places before `stop` are far ones of these queries, whether near as well or not."""
        if self.far == "multiples":
            return (stop + self.stride - 1 - queries % self.stride) // self.stride
        if self.far == "summaries":
            rest = (stop % self.stride - self.stride + self.summary).clamp_min(0)
            return stop // self.stride * self.summary + rest
        return torch.zeros_like(stop)


@dataclass(frozen=True)
class _Reader:
    """Reads keys in one of the forms."""

    pattern: Pattern
    scale: float | None
    bias: Bias | None
    form: str

    def at_once(self, q: Queries, k: Keys) -> Result:
        """All queries against the keys that any of them sees."""
        seen = self.pattern.visible(q.places, k.places)
        some = seen.flatten(0, 1).any(0)
        if not bool(some.all()):
            index = some.nonzero()[:, 0]
            seen, k = seen.index_select(2, index), k.pick(index)
        return self.read(q, k, seen)

    def together(self, tiles: list["_Tile"], with_lse: bool) -> Result:
        """Tiles of one shape as a batch."""
        batch = len(tiles[0].queries.vectors)
        parts = [Keys(*(torch.cat(leaves, 1) for leaves in zip(*tile.parts, strict=True))) for tile in tiles]
        q = Queries(*(torch.cat(leaves) for leaves in zip(*(tile.queries for tile in tiles), strict=True)))
        k = Keys(*(torch.cat(leaves) for leaves in zip(*parts, strict=True)))
        o, lse = self.read(q, k, self.pattern.visible(q.places, k.places), with_lse=with_lse)

        def neighbours(x: Tensor) -> Tensor:
            return x if len(tiles) == 1 else torch.cat(x.split_with_sizes([batch] * len(tiles)), 1)

        return neighbours(o), None if lse is None else neighbours(lse)

    def read(self, q: Queries, k: Keys, seen: Bool[Tensor, "rows T S"], *, with_lse: bool = False) -> Result:
        """These queries against these keys."""

        def of_all(x: Tensor) -> Tensor:
            """A row for each sequence where several tiles have one for all of theirs."""
            return x if len(x) == 1 else x.repeat_interleave(len(q.vectors) // len(x), 0)

        mask = None if bool(seen.all()) else of_all(seen)[:, None]
        bias = None if self.bias is None else of_all(self.bias(q.positions, k.positions))
        return self.call(q.vectors, k.keys, k.values, with_lse, causal=False, mask=mask, bias=bias)

    def call(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        with_lse: bool,
        *,
        causal: bool,
        window: int | None = None,
        mask: Tensor | None = None,
        bias: Tensor | Bias | None = None,
    ) -> Result:
        run: Callable[..., Any] = partial(
            softmax_attention, causal=causal, window=window, mask=mask, bias=bias, scale=self.scale, form=self.form
        )
        return run(q, k, v, return_lse=True) if with_lse else (run(q, k, v), None)

    def tiled(self, q: Queries, k: Keys) -> Float[Tensor, "N T H V"]:
        """Queries of the same places in every row."""
        rule = self.pattern
        # The first tokens read by a rule of their own.
        count = min(max(rule.global_tokens - int(q.places[0, 0]), 0), q.vectors.shape[1])
        first = [self.at_once(q.part(0, count), k)[0]] if count else []
        if count == q.vectors.shape[1]:
            return first[0]
        q = q.part(count, None)
        in_classes = rule.far == "multiples"
        in_tiles = rule.near is not None or rule.far == "summaries" or rule.global_tokens > 0
        length = k.keys.shape[1]
        # Two results that are merged need their sums as well, which costs about three times as much.
        merging = 3 * (2 * rule.window + rule.global_tokens + length // rule.stride)
        if in_tiles == in_classes and (not in_tiles or length <= merging):
            o = self.at_once(q, k)[0]
        elif not in_classes:
            o, _ = self.tiles(q, k, with_lse=False)
        elif not in_tiles:
            o, _ = self.classes(q, k, with_lse=False)
        else:
            o, lse = replace(self, pattern=replace(rule, far=None)).tiles(q, k, with_lse=True)
            more, more_lse = self.classes(q, k, with_lse=True)
            assert lse is not None
            assert more_lse is not None
            o, _ = merge(o, lse, more, more_lse)
        return torch.cat([*first, o], 1) if first else o

    def tiles(self, q: Queries, k: Keys, *, with_lse: bool) -> Result:
        """Neighbouring queries against what is near, and what is far or global on either side of that."""
        rule, total, places = self.pattern, k.keys.shape[1], k.places[0]
        apart = places < rule.global_tokens
        if rule.far == "summaries":
            apart = apart | rule._summarises(places)
        index = apart.nonzero()[:, 0]
        if rule.near == "window" and self.bias is None and not len(index):
            return self.call(q.vectors, k.keys, k.values, with_lse, causal=rule.causal, window=rule.window)
        others, columns = k.pick(index), index.tolist()
        start = int(q.places[0, 0])
        stop = start + q.vectors.shape[1]
        edges = self._edges(start, stop, len(columns))
        # From a place to where its key stands: from the first place that is near to a query on, none is missing.
        spans = [tuple(min(max(place - stop + total, 0), total) for place in ends) for ends in self._near(edges, stop)]
        near = k.pick(torch.cat([torch.arange(*span, device=index.device) for span in spans]))
        queries = q.split([high - low for low, high in itertools.pairwise(edges)])
        tiles = []
        for query, keys, (first, last) in zip(
            queries, near.split([last - first for first, last in spans]), spans, strict=True
        ):
            before, after = bisect.bisect_left(columns, first), bisect.bisect_left(columns, last)
            sides = [others.part(0, before), keys, *([] if rule.causal else [others.part(after, None)])]
            tiles.append(_Tile(query, [side for side in sides if side.places.shape[1]] or [keys]))
        once_more = sum(math.prod(tile.shape) for tile in tiles) > LIMIT and torch.is_grad_enabled()
        results = []
        for shape, alike in itertools.groupby(tiles, lambda tile: tile.shape):
            group = list(alike)
            count = max(1, LIMIT // max(1, math.prod(shape)))  # of tiles that are together
            for few in (group[start : start + count] for start in range(0, len(group), count)):
                if once_more:
                    result = checkpoint(self.together, few, with_lse, use_reentrant=False, preserve_rng_state=False)
                else:
                    result = self.together(few, with_lse)
                results.append(result)
        return joined(results, 1)

    def _edges(self, start: int, stop: int, others: int) -> list[int]:
        """The places at which a tile begins, and the end."""
        rule, wide = self.pattern, max(FEW, others // 4)  # that many more are copied for each tile
        if rule.near == "block":  # a tile is a block or several whole ones
            step = rule.stride * max(1, wide // rule.stride)
            return [start, *range((start // step + 1) * step, stop, step), stop]
        step = max(min(rule.window // 2, 4 * FEW), wide)
        return [*range(start, stop, step), stop]

    def _near(self, edges: list[int], stop: int) -> list[tuple[int, int]]:
        """Of each tile the first place that is near, and the one after the last."""
        rule, ends = self.pattern, edges[1:]
        if rule.near is None:
            return [(end, end) if rule.causal else (0, 0) for end in ends]
        first, _ = rule._reach(torch.tensor(edges[:-1]))
        _, last = rule._reach(torch.tensor(ends) - 1)
        last = last.minimum(torch.tensor(ends) if rule.causal else torch.tensor(stop))
        return list(zip(first.tolist(), last.tolist(), strict=True))

    def classes(self, q: Queries, k: Keys, *, with_lse: bool) -> Result:
        """Tokens of one remainder together, beyond what is near or global; all are aligned at the last token."""
        rule, stride, (N, T) = self.pattern, self.pattern.stride, q.vectors.shape[:2]
        # So many of the nearest of a class are near already: of a block the token itself.
        skipped = {"window": -(-rule.window // stride), "block": 1}.get(rule.near or "", 0)
        queries, keys, values = (_fold(x, stride) for x in (q.vectors, k.keys, k.values))
        places = _fold(k.places[:1] + 1, stride) - 1
        shared = places >= rule.global_tokens
        count = keys.shape[1]
        if rule.causal:
            count = max(0, count - skipped)
            keys, values, shared = keys[:, :count], values[:, :count], shared[:, :count]
        mask = shared[:, None]
        if not rule.causal and skipped:
            member = torch.arange(count, device=keys.device)
            reader = member[count - queries.shape[1] :, None]
            mask = mask & ((reader - member).abs() >= skipped)
        whole = None if bool(mask.all()) else mask.repeat(N, 1, 1)[:, None]
        ahead = skipped if rule.causal else 0
        bias = None if self.bias is None else self._bias_of_classes(q, k, N, count, ahead)
        o, lse = self.call(queries, keys, values, with_lse, causal=rule.causal, mask=whole, bias=bias)
        return _unfold(o, stride, T), None if lse is None else _unfold(lse, stride, T)

    def _bias_of_classes(self, q: Queries, k: Keys, batch: int, count: int, ahead: int) -> Tensor | Bias:
        bias, stride = self.bias, self.pattern.stride
        assert bias is not None
        if bool((k.positions.diff(dim=1) == 1).all()):  # distances are all that a bias knows
            return lambda queries, keys: bias((queries + ahead) * stride, keys * stride)
        added = bias(_fold(q.positions, stride), _fold(k.positions, stride)[:, :count])
        return added.repeat(batch * stride // len(added), 1, 1, 1)


def _fold(x: Tensor, stride: int) -> Tensor:
    """`[N, T, ...]` as `[N stride, ceil(T / stride), ...]`, with zeros before the first token."""
    missing = -x.shape[1] % stride
    x = functional.pad(x, (*(0, 0) * (x.dim() - 2), missing, 0)) if missing else x
    return x.reshape(x.shape[0], -1, stride, *x.shape[2:]).transpose(1, 2).flatten(0, 1)


def _unfold(x: Tensor, stride: int, length: int) -> Tensor:
    """The inverse of `_fold`."""
    x = x.view(-1, stride, *x.shape[1:]).transpose(1, 2).flatten(1, 2)
    return x[:, x.shape[1] - length :]

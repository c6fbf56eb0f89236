"""Softmax attention under a position encoding, by the cheapest way that its hooks leave open.

    nothing on the scores       the operator as it is
    a bias of each distance     the operator with the bias as a function, which it calls for parts; where positions
                                have gaps, as below
    scores, values              blocks of queries: what the encoding adds is a tensor [N, H, block, S], and where
                                gradients are asked for it is computed again in the backward pass
    late rotation               queries that share a length of text turn themselves and the keys that they read

Memory    O(T + S) without scores and values; with them O(H S) for each query of a block of at most LIMIT scores, and
          O(T S) where all scores are no more than that
"""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from everlong.nn.positions.base import READING, PositionEncoding, Projection
from everlong.nn.positions.rotary import Rope
from everlong.ops import softmax_attention
from everlong.ops.online_softmax import finite, nonzero
from everlong.ops.scoring import accumulator, heads_times, nothing, uncompiled

LIMIT = 1 << 24  # scores that are held at a time


def attend(
    position: PositionEncoding,
    q: Float[Tensor, "N T H K"],
    k: Float[Tensor, "N S G K"],
    v: Float[Tensor, "N S G V"],
    *,
    queries: Int[Tensor, "rows T"],
    keys: Int[Tensor, "rows S"] | None,
    counted: bool,
    project: tuple[Projection, Projection],
    causal: bool = True,
    window: int | None = None,
    real: Bool[Tensor, "N S"] | None = None,
    cu_seqlens: Int[Tensor, " N_plus_1"] | None = None,
    form: str = "auto",
) -> Float[Tensor, "N T H V"]:
    """Each query's average of the values; queries are the last of the keys, rotated already where that is the hook.

    Args:
        queries, keys: their positions; keys are not asked for where nothing in `READING` is among the hooks.
        counted: positions of neighbours differ by one, within each sequence.
        project: how vectors as wide as the layer's input become queries and keys.
        real: which keys are there at all; None: all.
    """
    late = position.hooks & READING
    if late <= {"score bias"} and (counted or not late):
        return softmax_attention(
            q,
            k.to(q.dtype),
            v.to(q.dtype),
            causal=causal,
            window=window,
            scale=position.scale,
            bias=position.score_bias if late else None,
            mask=None if real is None else real[:, None, None],
            cu_seqlens=cu_seqlens,
            form=form,
        )
    assert keys is not None
    parts = _Parts(position, project, causal, window, counted, form)
    k, v = k.to(q.dtype), v.to(q.dtype)
    if cu_seqlens is None:
        return uncompiled(parts.whole)(q, k, v, queries, keys, real)
    return uncompiled(parts.packed)(q, k, v, queries, keys, cu_seqlens)


def consecutive(keys: Int[Tensor, "N S"], real: Bool[Tensor, "N S"] | None) -> bool:
    """Whether the positions of real keys follow each other without gaps."""
    follows = keys.diff(dim=1) == 1
    return bool((follows if real is None else follows | ~real[:, :-1]).all())


class _Parts:
    """Attention of parts of the queries to parts of the keys, under one rule."""

    def __init__(
        self,
        position: PositionEncoding,
        project: tuple[Projection, Projection],
        causal: bool,
        window: int | None,
        counted: bool,
        form: str,
    ) -> None:
        self.position, self.project, self.form = position, project, form
        self.causal, self.window, self.counted = causal, window, counted

    def packed(
        self, q: Tensor, k: Tensor, v: Tensor, queries: Tensor, keys: Tensor, cu_seqlens: Tensor
    ) -> Float[Tensor, "1 T H V"]:
        """Each sequence of a packed row for itself."""
        spans = [slice(start, stop) for start, stop in itertools.pairwise(cu_seqlens.tolist())]
        outputs = [
            self.whole(q[:, span], k[:, span], v[:, span], queries[:, span], keys[:, span], None) for span in spans
        ]
        return torch.cat(outputs, dim=1) if outputs else v.new_zeros(*q.shape[:3], v.shape[-1])

    def whole(
        self, q: Tensor, k: Tensor, v: Tensor, queries: Tensor, keys: Tensor, real: Tensor | None
    ) -> Float[Tensor, "N T H V"]:
        """All queries of the call, in parts."""
        if "late rotation" in self.position.hooks:
            return self.late(q, k, v, queries, keys, real)
        T, S = q.shape[1], k.shape[1]
        if self.counted:  # one row of distances for all sequences
            queries, keys = (torch.arange(*span, device=q.device)[None] for span in ((S - T, S), (0, S)))
        rows = max(1, LIMIT // max(1, q.shape[0] * q.shape[2] * S))
        if not (q.numel() and k.numel()):
            return nothing(q, k, v)[0]
        if rows >= T:
            return self._read(q, k, v, queries, keys, real, S - T)
        outputs = []
        for start in range(0, T, rows):
            stop = min(start + rows, T)
            first, last = self._reach(start + S - T, stop + S - T, S)
            inputs = q[:, start:stop], k[:, first:last], v[:, first:last], queries[:, start:stop], keys[:, first:last]
            seen = None if real is None else real[:, first:last]
            place = start + S - T - first
            outputs.append(_again(self._read, True, *inputs, seen, place))
        return torch.cat(outputs, dim=1)

    def _reach(self, start: int, stop: int, num_keys: int) -> tuple[int, int]:
        """The keys that queries at these places may see."""
        first = 0 if self.window is None else max(0, start - self.window + 1)
        last = stop if self.causal else num_keys if self.window is None else min(num_keys, stop + self.window - 1)
        return first, last

    def _visible(self, q: Tensor, k: Tensor, real: Tensor | None, place: int) -> Bool[Tensor, "rows T S"] | None:
        """Which query sees which key, where query i stands `place` + i keys behind key 0; None: all see all."""
        own = place + torch.arange(q.shape[1], device=q.device)[:, None]
        key = torch.arange(k.shape[1], device=q.device)
        seen = key <= own if self.causal else torch.ones_like(key <= own)
        if self.window is not None:
            seen = seen & ((own - key).abs() < self.window)
        seen = seen[None] if real is None else seen & real[:, None]
        return None if bool(seen.all()) else seen

    def _read(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        queries: Tensor,
        keys: Tensor,
        real: Tensor | None,
        place: int,
    ) -> Float[Tensor, "N T H V"]:
        """Attention with what the encoding adds to scores and values."""
        position, hooks = self.position, self.position.hooks
        visible = self._visible(q, k, real, place)
        distance = queries[:, :, None] - keys[:, None]
        if visible is not None:  # where nothing is seen there may be no position either
            distance = distance.masked_fill(~visible, 0)
        added: Tensor | float = 0.0
        if "score bias" in hooks:
            added = position.score_bias(queries, keys)
        if "score" in hooks:
            added = added + position.score(q, k, distance, self.project)
        assert isinstance(added, Tensor)
        q = position.content(q)
        if "value" in hooks:
            return self._weigh(q, k, v, added, visible, distance)
        mask = None if visible is None else visible[:, None]
        return softmax_attention(q, k, v, causal=False, scale=position.scale, bias=added, mask=mask, form=self.form)

    def _weigh(
        self, q: Tensor, k: Tensor, v: Tensor, added: Tensor, visible: Tensor | None, distance: Tensor
    ) -> Float[Tensor, "N T H V"]:
        """Attention whose weights are needed themselves."""
        scale = q.shape[-1] ** -0.5 if self.position.scale is None else self.position.scale
        dtype = v.dtype
        with torch.autocast(q.device.type, enabled=False):
            q, k, v = (x.transpose(1, 2).to(accumulator(x)) for x in (q, k, v))
            scores = heads_times(q, k.mT) * scale + added.to(q.dtype)
            if visible is not None:
                scores = scores.masked_fill(~visible[:, None], -torch.inf)
            weights = torch.exp(scores - finite(scores.detach().amax(-1, keepdim=True)))
            weights = weights / nonzero(weights.sum(-1, keepdim=True))
            o = heads_times(weights, v) + self.position.value(weights, distance)
        return o.transpose(1, 2).to(dtype)

    def late(
        self, q: Tensor, k: Tensor, v: Tensor, queries: Tensor, keys: Tensor, real: Tensor | None
    ) -> Float[Tensor, "N T H V"]:
        """Queries turn themselves and the keys that they read; those of one length of text together."""
        position, (T, S) = self.position, (q.shape[1], k.shape[1])
        assert isinstance(position, Rope)
        if not (q.numel() and k.numel()):
            return nothing(q, k, v)[0]
        ends = queries
        if not self.causal:  # the text ends where its last key does
            ends = keys if real is None else keys.masked_fill(~real, 0)
            ends = ends.amax(-1, keepdim=True).expand(-1, T)
        lengths = position.text_length(ends)
        if bool((lengths != lengths[0]).any()):
            rows = []
            for n in range(len(q)):
                of, to = (y[n : n + 1] if len(y) > 1 else y for y in (queries, keys))
                one = slice(n, n + 1)
                rows.append(self.late(q[one], k[one], v[one], of, to, None if real is None else real[one]))
            return torch.cat(rows)
        outputs, stop = [], 0
        alike = torch.unique_consecutive(lengths[0], return_counts=True)
        for length, count in zip(*(y.tolist() for y in alike), strict=True):
            start, stop = stop, stop + count
            first, last = self._reach(start + S - T, stop + S - T, S)
            inputs = q[:, start:stop], k[:, first:last], v[:, first:last], queries[:, start:stop], keys[:, first:last]
            seen = None if real is None else real[:, first:last]
            outputs.append(_again(self._turned, count < T, *inputs, seen, length))
        return torch.cat(outputs, dim=1)

    def _turned(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        queries: Tensor,
        keys: Tensor,
        real: Tensor | None,
        length: int,
    ) -> Float[Tensor, "N T H V"]:
        """Attention of queries whose text has one length."""
        position = self.position
        assert isinstance(position, Rope)
        return softmax_attention(
            position.rotate(q, queries, length).to(v.dtype),
            position.rotate(k, keys, length).to(v.dtype),
            v,
            causal=self.causal,
            window=self.window,
            mask=None if real is None else real[:, None, None],
            form=self.form,
        )


def _again(part: Callable[..., Tensor], once_more: bool, *inputs: Any) -> Tensor:
    """One of several parts, computed once more in the backward pass in the place of keeping what it needs."""
    if not (once_more and torch.is_grad_enabled()):
        return part(*inputs)
    result: Tensor = checkpoint(part, *inputs, use_reentrant=False, preserve_rng_state=False)
    return result

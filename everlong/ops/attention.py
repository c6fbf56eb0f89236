"""Softmax attention, and the ways to compute it.

    o_i = sum_j softmax_j( scale q_i . k_j + bias_ij ) v_j          over the keys j that query i may attend to
    lse_i = log sum_j exp( scale q_i . k_j + bias_ij )

Shapes    q [B, T, H, K];  k [B, S, Hkv, K];  v [B, S, Hkv, V];  o [B, T, H, V];  lse [B, T, H]
Cost      2 H (K + V) FLOPs for each pair of a query and a key that it sees, forward; 2.5 times that backward
Source    Vaswani et al. 2017, arXiv 1706.03762; Beltagy et al. 2020, arXiv 2004.05150 (sliding windows in bands)

Forms     parallel    all scores at once: O(T S) memory, the plainest
          chunk       tiles with the online softmax (ops/online_softmax.py): O(T + S) memory
          recurrent   one key after another, O(T) memory without gradients
          auto        kernels of our own on a CPU (ops/native/softmax_attention.py); of the torch backend, products of
                      blocks in bfloat16 (ops/product_attention.py), otherwise torch's own fused kernels; always on
                      parts small enough that no mask of T by S is ever held
"""

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Literal, overload

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from everlong.config import divisible
from everlong.ops import dispatch
from everlong.ops.fused_attention import fused_attention
from everlong.ops.online_softmax import finite, nonzero, one_pass_attention, safe_log, tiled_attention
from everlong.ops.scoring import (
    UNBOUNDED,
    Band,
    BiasFunction,
    Result,
    Scoring,
    accumulator,
    heads_times,
    joined,
    nothing,
    uncompiled,
)
from everlong.ops.tree import Tree

Compute = Callable[[Tensor, Tensor, Tensor, Scoring], Result]


@overload
def softmax_attention(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B S Hkv K"],
    v: Float[Tensor, "B S Hkv V"],
    *,
    causal: bool = ...,
    window: int | None = ...,
    scale: float | None = ...,
    bias: Float[Tensor, "..."] | BiasFunction | None = ...,
    mask: Bool[Tensor, "..."] | None = ...,
    key_lengths: Int[Tensor, " B"] | None = ...,
    cu_seqlens: Int[Tensor, " N_plus_1"] | None = ...,
    parents: Int[Tensor, " T"] | None = ...,
    return_lse: Literal[False] = ...,
    form: str = ...,
    backend: str = ...,
) -> Float[Tensor, "B T H V"]: ...


@overload
def softmax_attention(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B S Hkv K"],
    v: Float[Tensor, "B S Hkv V"],
    *,
    causal: bool = ...,
    window: int | None = ...,
    scale: float | None = ...,
    bias: Float[Tensor, "..."] | BiasFunction | None = ...,
    mask: Bool[Tensor, "..."] | None = ...,
    key_lengths: Int[Tensor, " B"] | None = ...,
    cu_seqlens: Int[Tensor, " N_plus_1"] | None = ...,
    parents: Int[Tensor, " T"] | None = ...,
    return_lse: Literal[True],
    form: str = ...,
    backend: str = ...,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B T H"]]: ...


def softmax_attention(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B S Hkv K"],
    v: Float[Tensor, "B S Hkv V"],
    *,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    bias: Float[Tensor, "..."] | BiasFunction | None = None,
    mask: Bool[Tensor, "..."] | None = None,
    key_lengths: Int[Tensor, " B"] | None = None,
    cu_seqlens: Int[Tensor, " N_plus_1"] | None = None,
    parents: Int[Tensor, " T"] | None = None,
    return_lse: bool = False,
    form: str = "auto",
    backend: str = "auto",
) -> Float[Tensor, "B T H V"] | tuple[Float[Tensor, "B T H V"], Float[Tensor, "B T H"]]:
    """Each query's average of the values, weighted by the softmax of its scores.

    Queries are aligned with the end of the keys: query i sits at position p = S - T + i, key j at position j. A query
    that sees no key gives o = 0 and lse = -inf, with zero gradients. Consecutive heads of q share a head of k and v.

    Args:
        causal: a query sees the keys at j <= p only.
        window: causal, the keys at p - window < j <= p (`window` of them); otherwise those at |p - j| < window.
        scale: of the scores; None is K ** -0.5.
        bias: added to the scores: a tensor broadcastable to [B, H, T, S], or a function of the positions of queries [T]
            and keys [S] that returns a tensor broadcastable to [H, T, S]; it may be called for parts, many times.
        mask: broadcastable to [B, H, T, S], True = may attend; it adds to what `causal` and `window` forbid.
        key_lengths: only the first `key_lengths[b]` keys of row b are real, whatever stands behind them. The last query
            then sits at row b's last real key (new tokens read a cache); in a row with fewer keys than queries the
            first query sits at key 0, so that a batch padded on the right (T = S) means what it looks like.
        cu_seqlens: [N + 1], 0 first and T last: N sequences in the one row, each of which attends to itself only, and
            whose positions start again; `mask` and a `bias` tensor are those of the whole row.
        parents: the queries are the nodes of a tree, whose keys are the last T (of the real ones): each sees the keys
            before these, its ancestors and itself, the parent of each being one before it, or -1. Positions, and with
            them `window` and a `bias` function, count along the paths: the position of a node is S - T plus the number
            of its ancestors. All rows share the tree; which keys to keep says `ops.commit(ops.KeyRecords(...), path)`.
        return_lse: also return the log-sum-exp of each row's scores, [B, T, H], float32 (float64 for float64 inputs).
        form: "parallel", "chunk", "recurrent" or "auto"; they agree.

    Raises:
        ValueError: shapes or dtypes do not fit, `parents` are no tree, or an unknown form or backend.
    """
    dispatch.check_form(form)
    _check_shapes(q, k, v)
    _check_options(q, k, window, bias, mask)
    if key_lengths is not None or cu_seqlens is not None:
        uncompiled(_check_lengths)(q, k, key_lengths, cu_seqlens)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if parents is not None:
        tree = uncompiled(_check_tree)(q, k, parents, causal, key_lengths, cu_seqlens)
        over_tree = uncompiled(dispatch.choose("softmax_attention_tree", backend, q, form))
        o, lse = over_tree(
            q,
            k,
            v,
            tree=tree,
            window=window,
            scale=scale,
            bias=bias,
            mask=mask,
            key_lengths=key_lengths,
            return_lse=return_lse,
            form=form,
        )
        return (o, lse) if return_lse else o
    compute = dispatch.choose("softmax_attention", backend, q, form=form)
    o, lse = compute(
        q,
        k,
        v,
        causal=causal,
        window=window,
        scale=scale,
        bias=bias,
        mask=mask,
        key_lengths=key_lengths,
        cu_seqlens=cu_seqlens,
        return_lse=return_lse,
        form=form,
    )
    return (o, lse) if return_lse else o


def softmax_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    window: int | None,
    scale: float,
    bias: Tensor | BiasFunction | None,
    mask: Tensor | None,
    key_lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    return_lse: bool,
    form: str,
) -> Result:
    """The definition, one query after another in float64, whatever the form. [o, lse]"""
    (B, T, H, _), (S, Hkv) = q.shape, k.shape[1:3]
    shape = (B, H, T, S)
    mask = torch.ones(shape, dtype=torch.bool, device=q.device) if mask is None else mask.expand(shape)
    bias = bias.double().expand(shape) if isinstance(bias, Tensor) else bias

    def place(b: int, i: int) -> tuple[int, int, int]:
        """The first key of query i's sequence, the end of its keys, and the query's position in it."""
        if cu_seqlens is not None:
            bounds = cu_seqlens.tolist()
            start, stop = next((s, e) for s, e in itertools.pairwise(bounds) if s <= i < e)
            return start, stop, i - start
        if key_lengths is not None:
            real = int(key_lengths[b])
            return 0, real, i + min(S - T, max(real - T, 0))
        return 0, S, i + S - T

    def sees(position: int, key: int) -> bool:
        if causal and key > position:
            return False
        return window is None or abs(position - key) < window

    def row(b: int, i: int, h: int) -> tuple[Tensor, Tensor]:
        start, stop, position = place(b, i)
        keys = [j for j in range(start, stop) if sees(position, j - start) and mask[b, h, i, j]]
        index, head = torch.tensor(keys, dtype=torch.long, device=q.device), h // (H // Hkv)
        x = scale * (k[b, index, head].double() @ q[b, i, h].double())
        if isinstance(bias, Tensor):
            x = x + bias[b, h, i, index]
        elif bias is not None and keys:
            x = x + bias(index.new_tensor([position]), index - start).double().expand(H, 1, len(keys))[h, 0]
        lse = torch.logsumexp(x, 0) if bool((x > -torch.inf).any()) else x.new_tensor(-torch.inf)
        weights = torch.exp(x - lse) if lse > -torch.inf else torch.zeros_like(x) + x[:0].sum()
        return weights @ v[b, index, head].double(), lse

    rows = [row(b, i, h) for b in range(B) for i in range(T) for h in range(H)]
    if not rows:
        return nothing(q, k, v)
    o, lse = (torch.stack(column) for column in zip(*rows, strict=True))
    return o.view(B, T, H, -1).to(v.dtype), lse.view(B, T, H).to(accumulator(v))


def softmax_attention_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    window: int | None,
    scale: float,
    bias: Tensor | BiasFunction | None,
    mask: Tensor | None,
    key_lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    return_lse: bool,
    form: str,
) -> Result:
    """Attention out of torch's own operators. [o, lse]; lse may be None where it was not asked for."""
    dtype = v.dtype
    q, k, v = in_one_dtype(q, k, v)
    reach = UNBOUNDED if window is None else min(window - 1, UNBOUNDED)
    scoring = Scoring(
        scale,
        Band(k.shape[1] - q.shape[1], left=reach, right=0 if causal else reach),
        None if mask is None else _four_axes(mask),
        _four_axes(bias) if isinstance(bias, Tensor) else bias,
    )
    compute = _FORMS[form] if form != "auto" else partial(fused_attention, with_lse=return_lse)
    with torch.autocast(q.device.type, enabled=False):
        if cu_seqlens is not None:
            o, lse = uncompiled(_packed)(q, k, v, scoring, cu_seqlens, compute)
        elif key_lengths is not None:
            o, lse = uncompiled(_row_by_row)(q, k, v, scoring, key_lengths, compute)
        else:
            o, lse = _dense(q, k, v, scoring, compute)
    return o.to(dtype), lse


def _parallel(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Result:
    """All scores at once."""
    rows, columns = slice(0, q.shape[1]), slice(0, k.shape[1])
    q, k, v = (x.transpose(1, 2).to(accumulator(x)) for x in (q, k, v))
    x = scoring.scores(q, k, rows, columns)
    maximum = finite(x.detach().amax(-1))
    weights = torch.exp(x - maximum[..., None])
    normaliser = weights.sum(-1)
    o = heads_times(weights, v) / nonzero(normaliser)[..., None]
    return o.transpose(1, 2), (maximum + safe_log(normaliser)).transpose(1, 2)


def _recurrent(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Result:
    return uncompiled(_key_by_key)(q, k, v, scoring)


def _key_by_key(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Result:
    """One key after another, each seen by all queries at once."""
    rows, columns = slice(0, q.shape[1]), [slice(j, j + 1) for j in range(k.shape[1])]
    shared = q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2).to(accumulator(x)) for x in (q, k, v))
    scores = (scoring.scores(q, k[:, :, key], rows, key)[..., 0] for key in columns)
    values = (v[:, :, key].repeat_interleave(shared, 1) for key in columns)
    o, lse = one_pass_attention(scores, values)
    return o.transpose(1, 2), lse.transpose(1, 2)


_FORMS: dict[str, Compute] = {"parallel": _parallel, "chunk": tiled_attention, "recurrent": _recurrent}


def _dense(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring, compute: Compute) -> Result:
    """Every row of the batch under the same rule."""
    return compute(q, k, v, scoring) if q.numel() and k.numel() else nothing(q, k, v)


def _row_by_row(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring, key_lengths: Tensor, compute: Compute) -> Result:
    """The first `lengths[b]` keys of each row; all at once where they are as many."""
    T, S, lengths = q.shape[1], k.shape[1], key_lengths.tolist()

    def first(length: int) -> Scoring:
        part = scoring.cut(slice(0, T), slice(0, length))
        return replace(part, band=replace(part.band, offset=min(S - T, max(length - T, 0))))

    if len(set(lengths)) == 1:
        return _dense(q, k[:, : lengths[0]], v[:, : lengths[0]], first(lengths[0]), compute)
    results = []
    for b, (length, q_row, k_row, v_row) in enumerate(zip(lengths, q.unbind(), k.unbind(), v.unbind(), strict=True)):
        results.append(_dense(q_row[None], k_row[None, :length], v_row[None, :length], first(length).row(b), compute))
    return joined(results, 0)


def _packed(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring, cu_seqlens: Tensor, compute: Compute) -> Result:
    """Each sequence for itself; those of one length together, as a batch."""
    spans = [slice(start, stop) for start, stop in itertools.pairwise(cu_seqlens.tolist())]
    lengths = [span.stop - span.start for span in spans]
    pieces = [x.split_with_sizes(lengths, 1) for x in (q, k, v)]
    results: dict[int, Result] = {}
    for length in set(lengths):
        members = [n for n, found in enumerate(lengths) if found == length]
        queries, keys, values = (torch.cat([piece[n] for n in members]) for piece in pieces)
        rule = _together([scoring.cut(spans[n], spans[n]) for n in members])
        o, lse = _dense(queries, keys, values, rule, compute)
        sums = [None] * len(members) if lse is None else [row[None] for row in lse.unbind()]
        results |= {n: (o_row[None], lse_row) for n, o_row, lse_row in zip(members, o.unbind(), sums, strict=True)}
    return joined([results[n] for n in range(len(spans))], 1)


def _together(parts: list[Scoring]) -> Scoring:
    """The rules of sequences of one length as that of a batch; positions count from each one's own start."""
    first, masks = parts[0], [part.mask for part in parts if part.mask is not None]
    tensors = [part.bias for part in parts if isinstance(part.bias, Tensor)]
    return replace(
        first,
        mask=torch.cat(masks) if masks else None,
        bias=torch.cat(tensors) if tensors else first.bias,
        origin=0,
    )


def in_one_dtype(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All three in the dtype that torch's own attention would take: autocast's, and without it the widest."""
    device, dtype = q.device.type, torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    if dtype != torch.float64 and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def _four_axes(x: Tensor) -> Tensor:
    return x[(None,) * (4 - x.dim())]


def _check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    if not q.dim() == k.dim() == v.dim() == 4:
        raise ValueError(f"`q`, `k` and `v` are [batch, time, heads, channels]: {_shapes(q, k, v)}")
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0]:
        rule = "`k` and `v` must agree in batch, time and heads, and `q` with them in the batch"
        raise ValueError(f"{rule}: {_shapes(q, k, v)}")
    if q.shape[3] != k.shape[3] or q.shape[3] == 0:
        raise ValueError(f"`q` and `k` must have the same number of channels, at least 1: {_shapes(q, k, v)}")
    divisible("heads of q", q.shape[2], "heads of k and v", k.shape[2])


def _shapes(q: Tensor, k: Tensor, v: Tensor) -> str:
    return f"got q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"


def _check_options(
    q: Tensor, k: Tensor, window: int | None, bias: Tensor | BiasFunction | None, mask: Tensor | None
) -> None:
    if window is not None and window < 1:
        raise ValueError(f"`window` is the number of keys that a query sees, itself included, at least 1: got {window}")
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(
            f"`mask` is boolean, True = may attend: got {mask.dtype}. Use `mask.bool()`, or `bias` to add to scores"
        )
    if isinstance(bias, Tensor) and not bias.is_floating_point():
        raise ValueError(
            f"`bias` is added to the scores, a floating-point tensor: got {bias.dtype}. For True and False use `mask`"
        )
    shape = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    for name, x in (("mask", mask), ("bias", bias)):
        if isinstance(x, Tensor) and not _fits(x, shape):
            raise ValueError(f"`{name}` must be broadcastable to [B, H, T, S] = {list(shape)}: got {list(x.shape)}")


def _fits(x: Tensor, shape: tuple[int, ...]) -> bool:
    pairs = zip(reversed(x.shape), reversed(shape), strict=False)
    return x.dim() <= len(shape) and all(size in (1, whole) for size, whole in pairs)


def _check_tree(
    q: Tensor, k: Tensor, parents: Tensor, causal: bool, key_lengths: Tensor | None, cu_seqlens: Tensor | None
) -> Tree:
    tree, least = Tree.of(parents, q, cu_seqlens), k.shape[1]
    if not causal:
        raise ValueError("`parents` give an order of tokens: got causal=False; drop one of the two")
    if key_lengths is not None:
        least = min(key_lengths.tolist(), default=least)
    if least < q.shape[1]:
        raise ValueError(f"the keys of the tree's {q.shape[1]} nodes are the last ones: got {least} keys in a row")
    return tree


def _check_lengths(q: Tensor, k: Tensor, key_lengths: Tensor | None, cu_seqlens: Tensor | None) -> None:
    if key_lengths is not None:
        if cu_seqlens is not None:
            raise ValueError(
                "`key_lengths` and `cu_seqlens` exclude each other: a packed row has no keys beyond its sequences"
            )
        if key_lengths.shape != q.shape[:1] or key_lengths.is_floating_point():
            raise ValueError(
                f"`key_lengths` holds an integer a row, {q.shape[0]}: got {key_lengths.dtype} {list(key_lengths.shape)}"
            )
        lengths = key_lengths.tolist()
        if lengths and not 0 <= min(lengths) <= max(lengths) <= k.shape[1]:
            raise ValueError(f"`key_lengths` must lie between 0 and the number of keys, {k.shape[1]}: got {lengths}")
    if cu_seqlens is not None:
        if q.shape[0] != 1 or q.shape[1] != k.shape[1]:
            raise ValueError(
                f"`cu_seqlens` packs sequences in one row, B = 1 and T = S: got q {list(q.shape)}, k {list(k.shape)}"
            )
        bounds = cu_seqlens.tolist() if cu_seqlens.dim() == 1 and not cu_seqlens.is_floating_point() else []
        if bounds != sorted(bounds) or bounds[:1] != [0] or bounds[-1:] != [q.shape[1]]:
            raise ValueError(
                f"`cu_seqlens` must be integers that rise from 0 to T = {q.shape[1]}: got {cu_seqlens.tolist()}"
            )

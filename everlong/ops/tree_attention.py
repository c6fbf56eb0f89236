"""Softmax attention over a tree of tokens: queries that see the keys before the tree, their ancestors and themselves.

    position of a node = the number of keys before the tree + the number of its ancestors

Shapes    q [B, T, H, K];  k [B, S, Hkv, K];  v [B, S, Hkv, V];  o [B, T, H, V];  lse [B, T, H]
Source    Miao et al. 2023, arXiv 2305.09781, section 4 (tree attention)
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from everlong.ops.attention import softmax_attention_reference, softmax_attention_torch
from everlong.ops.scoring import BiasFunction, Result, checked_bias, joined, nothing
from everlong.ops.tree import Tree


def softmax_attention_tree_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    tree: Tree,
    window: int | None,
    scale: float,
    bias: Tensor | BiasFunction | None,
    mask: Tensor | None,
    key_lengths: Tensor | None,
    return_lse: bool,
    form: str,
) -> Result:
    """The definition: each node's query behind the keys of its own path, and of nothing else."""
    (B, T, H, _), S = q.shape, k.shape[1]
    shape = (B, H, T, S)
    compute = partial(
        softmax_attention_reference,
        causal=True,
        window=window,
        scale=scale,
        key_lengths=None,
        cu_seqlens=None,
        return_lse=return_lse,
        form=form,
    )

    def row(b: int, t: int) -> Result:
        prefix = (S if key_lengths is None else int(key_lengths[b])) - T
        path = [node for node in tree.ancestors[t].flip(0).tolist() if node >= 0]
        keys = torch.tensor([*range(prefix), *(prefix + node for node in path)], device=q.device)
        cut = [None if not isinstance(x, Tensor) else x.expand(shape)[b, None, :, t, None, keys] for x in (bias, mask)]
        along = cut[0] if bias is None or isinstance(bias, Tensor) else bias
        return compute(q[b, t][None, None], k[b, None, keys], v[b, None, keys], bias=along, mask=cut[1])

    if B == 0 or T == 0:
        return nothing(q, k, v)
    return joined([joined([row(b, t) for t in range(T)], 1) for b in range(B)], 0)


def attend_under_mask(
    compute: Callable[..., Result],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    tree: Tree,
    window: int | None,
    scale: float,
    bias: Tensor | BiasFunction | None,
    mask: Tensor | None,
    key_lengths: Tensor | None,
    return_lse: bool,
    form: str,
) -> Result:
    """`compute`, a backend's attention, under the tree's mask. Only the keys that a window reaches are looked at."""
    T, S = q.shape[1], k.shape[1]
    if T == 0:
        return nothing(q, k, v)
    reached = slice(0 if window is None or key_lengths is not None else max(S - T - window + 1, 0), S)
    ends = torch.tensor([S], device=q.device) if key_lengths is None else key_lengths
    prefix = ends[:, None] - T
    queries = prefix + tree.depth  # [B or 1, T]: positions
    index = torch.arange(reached.start, S, device=q.device)
    node = (index - prefix).clamp_max(T - 1)  # [B or 1, S]: negative before the tree
    keys = torch.where(node < 0, index, queries.gather(1, node.clamp_min(0)))
    visible = torch.where(node < 0, True, tree.visible[:, node.clamp_min(0)]).transpose(0, 1)  # [B or 1, T, S]
    if window is not None:
        visible = visible & (queries[:, :, None] - keys[:, None] < window)
    if bias is not None:
        bias = _columns(bias, reached) if isinstance(bias, Tensor) else _added(bias, queries, keys)
    return compute(
        q,
        k[:, reached],
        v[:, reached],
        causal=False,
        window=None,
        scale=scale,
        bias=bias,
        mask=visible[:, None] if mask is None else visible[:, None] & _columns(mask, reached),
        key_lengths=key_lengths,
        cu_seqlens=None,
        return_lse=return_lse,
        form=form,
    )


softmax_attention_tree_torch = partial(attend_under_mask, softmax_attention_torch)


def _added(bias: BiasFunction, queries: Tensor, keys: Tensor) -> Tensor:
    """What a bias function adds at the positions `queries [b, T]` and `keys [b, S]`: `[b, H or 1, T or 1, S or 1]`."""
    rows = [checked_bias(bias(*both), *map(len, both)) for both in zip(queries, keys, strict=True)]
    return torch.stack([x[(None,) * (3 - x.dim())] for x in rows])


def _columns(x: Tensor, keys: slice) -> Tensor:
    return x[..., keys] if x.dim() and x.shape[-1] > 1 else x

"""Softmax attention over a tree of tokens behind a cache of keys, by the kernel of kernels/tree_softmax.cpp."""

import torch
from torch import Tensor

from everlong.ops.dispatch import NATIVE_DTYPES
from everlong.ops.native.call import call
from everlong.ops.native.register import register
from everlong.ops.scoring import UNBOUNDED, BiasFunction, Result, nothing
from everlong.ops.tree import Tree
from everlong.ops.tree_attention import softmax_attention_tree_torch


def softmax_attention_tree_native(
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
    """The prefix in blocks that all nodes share, then each node's ancestors; sums are float32.

    Torch's operators compute with a bias or a mask, and where a gradient may be asked for: verifying drafted tokens
    never does.
    """
    differentiated = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    plain = bias is None and mask is None and all(x.dtype in NATIVE_DTYPES for x in (q, k, v))
    if not plain or differentiated:
        return softmax_attention_tree_torch(
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
    if q.shape[1] == 0:
        return nothing(q, k, v)
    reach = UNBOUNDED if window is None else min(window, UNBOUNDED)
    o, lse = _attention(q, k, v, tree.parents, key_lengths, reach, float(scale))
    return o, lse


def _compute(
    q: Tensor, k: Tensor, v: Tensor, parents: Tensor, key_lengths: Tensor | None, window: int, scale: float
) -> tuple[Tensor, Tensor]:
    o, lse = _shapes(q, k, v, parents, key_lengths, window, scale)
    lengths = None if key_lengths is None else key_lengths.to(torch.int64)
    sizes = q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3], v.shape[3]
    call("tree_softmax", _rows(q), _rows(k), _rows(v), parents.contiguous(), lengths, o, lse, *sizes, window, scale)
    return o, lse


def _shapes(
    q: Tensor, k: Tensor, v: Tensor, parents: Tensor, key_lengths: Tensor | None, window: int, scale: float
) -> tuple[Tensor, Tensor]:
    return v.new_empty((*q.shape[:3], v.shape[3])), q.new_empty(q.shape[:3], dtype=torch.float32)


def _rows(x: Tensor) -> Tensor:
    """With neighbouring channels side by side in memory, as the kernel reads them."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


_attention = register(
    "tree_softmax(Tensor q, Tensor k, Tensor v, Tensor parents, Tensor? key_lengths, int window, float scale) "
    "-> (Tensor, Tensor)",
    _compute,
    _shapes,
)

"""The operators with a matrix state over trees of tokens, by the kernel of kernels/tree_memory.cpp.

Where a gradient may be asked for, torch's operators compute instead: verifying drafted tokens never does.
"""

import torch
from torch import Tensor

from everlong.ops.chunks import starting_state
from everlong.ops.dispatch import NATIVE_DTYPES
from everlong.ops.native.call import call
from everlong.ops.native.register import register
from everlong.ops.tree import MemoryRecords, State, Tree
from everlong.ops.tree_memory import delta_rule_tree_torch, dplr_tree_torch, linear_attention_tree_torch


def linear_attention_tree_native(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    tree: Tree,
    log_decay: Tensor | None,
    bonus: Tensor | None,
    normalize: bool,
    scale: float,
    initial_state: State | None,
    form: str,
) -> tuple[Tensor, MemoryRecords]:
    """Linear attention over a tree."""
    memory, total = initial_state if isinstance(initial_state, tuple) else (initial_state, None)
    if not _serves(q, k, v, log_decay, bonus, memory, total):
        return linear_attention_tree_torch(
            q,
            k,
            v,
            tree=tree,
            log_decay=log_decay,
            bonus=bonus,
            normalize=normalize,
            scale=scale,
            initial_state=initial_state,
            form=form,
        )
    if log_decay is not None and log_decay.dim() == 1:
        log_decay = log_decay.expand(v.shape[:3])
    memory = starting_state(q, v, memory, None)
    if not normalize:
        o, _ = _memory(q, k, v, log_decay, bonus, None, None, None, memory, None, tree.parents, scale)
        return o, MemoryRecords(tree.parents, ((k, v),), log_decay, memory)
    total = memory.new_zeros(memory.shape[:3]) if total is None else total.to(memory.dtype)
    o, _ = _memory(q, k, v, log_decay, bonus, None, None, None, memory, total, tree.parents, scale)
    values = torch.cat([v, v.new_ones(()).expand(*v.shape[:3], 1)], -1)
    return o, MemoryRecords(tree.parents, ((k, values),), log_decay, (memory, total))


def delta_rule_tree_native(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    tree: Tree,
    log_decay: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    form: str,
) -> tuple[Tensor, MemoryRecords]:
    """The delta rule over a tree."""
    if not _serves(q, k, v, beta, log_decay, initial_state):
        options = {"log_decay": log_decay, "initial_state": initial_state}
        return delta_rule_tree_torch(q, k, v, beta, tree=tree, scale=scale, form=form, **options)
    state = starting_state(q, v, initial_state, None)
    o, u = _memory(q, k, v, log_decay, None, beta, None, None, state, None, tree.parents, scale)
    return o, MemoryRecords(tree.parents, ((k, u),), log_decay, state)


def dplr_tree_native(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    tree: Tree,
    log_decay: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    form: str,
) -> tuple[Tensor, MemoryRecords]:
    """Diagonal plus low rank over a tree."""
    if not _serves(q, k, v, a, b, log_decay, initial_state):
        options = {"log_decay": log_decay, "initial_state": initial_state}
        return dplr_tree_torch(q, k, v, a, b, tree=tree, scale=scale, form=form, **options)
    state = starting_state(q, v, initial_state, None)
    o, u = _memory(q, k, v, log_decay, None, None, a, b, state, None, tree.parents, scale)
    return o, MemoryRecords(tree.parents, ((b, u), (k, v)), log_decay, state)


def _serves(*tensors: Tensor | None) -> bool:
    """Whether the kernel computes this: float32 and bfloat16, and no gradient."""
    there = [x for x in tensors if x is not None]
    differentiated = torch.is_grad_enabled() and any(x.requires_grad for x in there)
    return not differentiated and all(x.dtype in NATIVE_DTYPES for x in there)


def _compute(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    bonus: Tensor | None,
    beta: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    state: Tensor,
    total: Tensor | None,
    parents: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """o, and what is written under the keys, or nothing where that is v. The rule is that of the tensors given."""
    channels = log_decay is not None and log_decay.dim() == 4
    o, u = _shapes(q, k, v, log_decay, bonus, beta, a, b, state, total, parents, scale)
    call(
        "tree_memory",
        *(_rows(q), _rows(k), _rows(v)),
        None if log_decay is None else _rows(log_decay) if channels else log_decay,
        None if bonus is None else _rows(bonus.float()),
        beta,
        None if a is None else _rows(a),
        None if b is None else _rows(b),
        _rows(state),
        None if total is None else _rows(total),
        parents.contiguous(),
        o,
        u,
        *v.shape[:3],
        q.shape[2],
        0 if a is None else a.shape[2],
        0 if b is None else b.shape[2],
        q.shape[3],
        v.shape[3],
        channels,
        scale,
    )
    return o, u


def _shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    bonus: Tensor | None,
    beta: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    state: Tensor,
    total: Tensor | None,
    parents: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return v.new_empty(v.shape), state.new_empty(0 if beta is None and a is None else v.shape)


def _rows(x: Tensor) -> Tensor:
    """With neighbouring channels side by side in memory, as the kernel reads them."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


_memory = register(
    "tree_memory(Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor? bonus, Tensor? beta, Tensor? a, Tensor? b, "
    "Tensor state, Tensor? total, Tensor parents, float scale) -> (Tensor, Tensor)",
    _compute,
    _shapes,
)

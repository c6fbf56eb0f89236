"""Linear attention by the kernels of kernels/linear_attention.cpp and kernels/linear_attention_backward.cpp."""

from typing import Any

import torch
from torch import Tensor

from everlong.ops.chunks import Size
from everlong.ops.native.call import call
from everlong.ops.native.linear_attention_bf16 import linear_attention_bf16, serves
from everlong.ops.native.register import differentiate, register
from everlong.ops.recurrence import linear_attention_torch
from everlong.ops.spans import check_bounds
from everlong.ops.tree import State

GROUP = 128  # tokens from one saved state to the next, as in kernels/linear_attention.h


def linear_attention_native(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None,
    bonus: Tensor | None,
    normalize: bool,
    scale: float,
    causal: bool,
    initial_state: State | None,
    cu_seqlens: Tensor | None,
    form: str,
) -> tuple[Tensor, State]:
    """Linear attention in blocks of 16 tokens in the cache, or token by token where there are few.

    In bfloat16 products of such numbers serve where they can. Not causal it is two matrix products, which are torch's.
    The gradient cannot be differentiated once more.
    """
    if not causal:
        return linear_attention_torch(
            q,
            k,
            v,
            log_decay=log_decay,
            bonus=bonus,
            normalize=normalize,
            scale=scale,
            causal=causal,
            initial_state=initial_state,
            cu_seqlens=cu_seqlens,
            form=form,
        )
    state, total = initial_state if isinstance(initial_state, tuple) else (initial_state, None)
    if bonus is None and not normalize and serves(q, k, v, log_decay, cu_seqlens):
        return linear_attention_bf16(
            q, k, v, log_decay=log_decay, scale=scale, initial_state=state, cu_seqlens=cu_seqlens
        )
    inputs = (q, k, v, log_decay, bonus, state, total)
    differentiable = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    run = _forward if differentiable else _inference
    o, last, last_total, *_ = run(*inputs, cu_seqlens, scale, normalize)
    return o, (last, last_total) if normalize else last


def _compute_inference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    bonus: Tensor | None,
    state: Tensor | None,
    total: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    normalize: bool,
) -> tuple[Tensor, ...]:
    check_bounds(v.shape[1], cu_seqlens)
    results = _shapes_inference(q, k, v, log_decay, bonus, state, total, cu_seqlens, scale, normalize)
    inputs = _inputs(q, k, v, log_decay, bonus, cu_seqlens, scale, normalize)
    call("linear_attention_forward", *inputs, _float32(state), _float32(total), *results, None, None, None)
    return results


def _shapes_inference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    bonus: Tensor | None,
    state: Tensor | None,
    total: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    normalize: bool,
) -> tuple[Tensor, ...]:
    """o and the last S and z (empty where it is not needed)."""
    sequences, (_, _, heads, values), keys = _sequences(v, cu_seqlens), v.shape, q.shape[3]
    last = v.new_empty((sequences, heads, keys, values), dtype=torch.float32)
    return (
        torch.empty_like(v, memory_format=torch.contiguous_format),
        last,
        last.new_empty((sequences if normalize else 0, heads, keys)),
    )


def _compute(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    bonus: Tensor | None,
    state: Tensor | None,
    total: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    normalize: bool,
) -> tuple[Tensor, ...]:
    check_bounds(v.shape[1], cu_seqlens)
    results = _shapes(q, k, v, log_decay, bonus, state, total, cu_seqlens, scale, normalize)
    inputs = _inputs(q, k, v, log_decay, bonus, cu_seqlens, scale, normalize)
    call("linear_attention_forward", *inputs, _float32(state), _float32(total), *results)
    return results


def _shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    bonus: Tensor | None,
    state: Tensor | None,
    total: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    normalize: bool,
) -> tuple[Tensor, ...]:
    """The same, and what the backward pass needs: the denominators, and S and z before groups of tokens."""
    (batch, length, heads, values), keys, slots = v.shape, q.shape[3], _slots(v, cu_seqlens)
    o, last, last_total = _shapes_inference(q, k, v, log_decay, bonus, state, total, cu_seqlens, scale, normalize)
    denominator = last.new_empty((batch if normalize else 0, length, heads))
    starts = last.new_empty((slots, heads, keys, values))
    return o, last, last_total, denominator, starts, last.new_empty((slots if normalize else 0, heads, keys))


def _compute_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    bonus: Tensor | None,
    cu_seqlens: Tensor | None,
    o: Tensor,
    denominator: Tensor,
    starts: Tensor,
    starts_total: Tensor,
    d_o: Tensor | None,
    d_last: Tensor | None,
    d_total: Tensor | None,
    scale: float,
    normalize: bool,
) -> tuple[Tensor, ...]:
    (batch, length, heads, values), keys, shared = v.shape, q.shape[3], q.shape[2]
    sequences, slots = _sequences(v, cu_seqlens), _slots(v, cu_seqlens)

    def room(*shape: Size, like: Tensor | None = None) -> Tensor:
        return v.new_empty(
            shape, dtype=torch.bfloat16 if like is not None and like.dtype == torch.bfloat16 else torch.float32
        )

    # Heads write their own part of what they share, groups of tokens that of what all tokens share; added up below.
    d_q, d_k = (room(batch, length, heads, keys, like=x if heads == shared else None) for x in (q, k))
    d_v, d_log_decay, d_bonus = room(*v.shape, like=v), None, None
    if log_decay is not None:
        d_log_decay = v.new_zeros(slots, heads, dtype=torch.float32) if log_decay.dim() == 1 else room(*log_decay.shape)
    if bonus is not None:
        d_bonus = v.new_zeros(slots, heads, keys, dtype=torch.float32)
    d_state, d_first_total = room(sequences, heads, keys, values), room(sequences if normalize else 0, heads, keys)
    few = sequences * heads < torch.get_num_threads()
    call(
        "linear_attention_backward",
        *_inputs(q, k, v, log_decay, bonus, cu_seqlens, scale, normalize),
        *(_rows(o), denominator, starts, starts_total),
        *(torch.zeros_like(v) if d_o is None else _rows(d_o), _float32(d_last), _float32(d_total)),
        *(d_q, d_k, d_v, d_log_decay, d_bonus, d_state, d_first_total),
        room(slots, heads, values + normalize, keys) if few else None,
        log_decay is not None and log_decay.dim() == 1,
    )
    if heads != shared:
        d_q, d_k = (torch.unflatten(x, 2, (shared, -1)).sum(3) for x in (d_q, d_k))
    if log_decay is not None and d_log_decay is not None and log_decay.dim() == 1:
        d_log_decay = d_log_decay.sum(0)
    found = (d_q, d_k, d_v, d_log_decay, None if d_bonus is None else d_bonus.sum(0))
    given = (q, k, v, log_decay, bonus)
    gradients = (v.new_empty(0) if x is None or y is None else y.to(x.dtype) for x, y in zip(given, found, strict=True))
    return *gradients, d_state, d_first_total


def _shapes_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    bonus: Tensor | None,
    cu_seqlens: Tensor | None,
    o: Tensor,
    denominator: Tensor,
    starts: Tensor,
    starts_total: Tensor,
    d_o: Tensor | None,
    d_last: Tensor | None,
    d_total: Tensor | None,
    scale: float,
    normalize: bool,
) -> tuple[Tensor, ...]:
    """The gradients of q, k, v, log_decay, bonus (empty where there is none), and of the initial S and z."""
    gradients = (v.new_empty(0) if x is None else x.new_empty(x.shape) for x in (q, k, v, log_decay, bonus))
    sequences, heads, keys, values = _sequences(v, cu_seqlens), v.shape[2], q.shape[3], v.shape[3]
    states = ((sequences, heads, keys, values), (sequences if normalize else 0, heads, keys))
    return *gradients, *(v.new_empty(shape, dtype=torch.float32) for shape in states)


def _inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    bonus: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    normalize: bool,
) -> tuple[Tensor | float | None, ...]:
    """The members of `struct Inputs`."""
    (_, length, heads, values), keys = v.shape, q.shape[3]
    decay = 0
    if log_decay is not None:
        decay = 2 if log_decay.dim() == 4 else 1
        log_decay = log_decay.expand(v.shape[:3]) if log_decay.dim() == 1 else log_decay
    tensors = (x if x is None else _rows(x) for x in (q, k, v, log_decay, bonus))
    sizes = (int(_sequences(v, cu_seqlens)), length, heads, q.shape[2], keys, values)
    return *tensors, cu_seqlens, *sizes, decay, int(normalize), float(scale), torch.get_num_threads()


def _rows(x: Tensor) -> Tensor:
    """With neighbouring channels side by side in memory, in a type that the kernels read."""
    x = x if x.dtype in (torch.float32, torch.bfloat16) else x.float()
    return x if x.stride(-1) == 1 or x.dim() == 3 or x.shape[-1] <= 1 else x.contiguous()


def _float32(x: Tensor | None) -> Tensor | None:
    return None if x is None else _rows(x.float())


def _sequences(v: Tensor, cu_seqlens: Tensor | None) -> Size:
    return v.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _slots(v: Tensor, cu_seqlens: Tensor | None) -> Size:
    """How many groups of tokens there are at most."""
    return v.shape[0] * v.shape[1] // GROUP + _sequences(v, cu_seqlens)


_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor? bonus, Tensor? state, Tensor? total, "
    "Tensor? cu_seqlens, float scale, bool normalize"
)
# One that has no gradient and keeps nothing for it: half the cost of a call, which is most of that of a decoding step.
_inference = register(
    f"linear_attention_inference({_ARGUMENTS}) -> (Tensor, Tensor, Tensor)", _compute_inference, _shapes_inference
)
_forward = register(
    f"linear_attention({_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)", _compute, _shapes
)
_backward = register(
    "linear_attention_backward(Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor? bonus, Tensor? cu_seqlens, "
    "Tensor o, Tensor denominator, Tensor starts, Tensor starts_total, Tensor? d_o, Tensor? d_last, Tensor? d_total, "
    "float scale, bool normalize) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _compute_backward,
    _shapes_backward,
)


def _save(context: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, log_decay, bonus, state, total, cu_seqlens, context.scale, context.normalize = inputs
    o, _, _, denominator, starts, starts_total = output
    o = o if context.normalize else o.new_empty(0)
    context.mark_non_differentiable(denominator, starts, starts_total)
    context.save_for_backward(q, k, v, log_decay, bonus, cu_seqlens, o, denominator, starts, starts_total)
    context.types = tuple(None if x is None else x.dtype for x in (state, total))


def _gradient(context: Any, d_o: Tensor | None, d_last: Tensor | None, d_total: Tensor | None, *_: Any) -> Any:
    saved = context.saved_tensors
    *found, d_state, d_first_total = _backward(*saved, d_o, d_last, d_total, context.scale, context.normalize)
    found = [x if given is not None else None for x, given in zip(found, saved, strict=False)]
    states = (
        x if kind is None else x.to(kind) for x, kind in zip((d_state, d_first_total), context.types, strict=True)
    )
    return *found, *(None if kind is None else x for x, kind in zip(states, context.types, strict=True)), *(None,) * 3


differentiate(_forward, _gradient, _save)

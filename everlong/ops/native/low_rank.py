"""The delta rule and diagonal plus low rank by the kernels of kernels/low_rank.h.

Forward and backward are one operator each; the backward pass cannot be differentiated once more. The operators give and
take gradients of q, k, a, b for each head of v; where those share heads, torch adds them up.
"""

from typing import Any

import torch
from torch import Tensor

from everlong.ops.chunks import Size
from everlong.ops.native.call import call
from everlong.ops.native.register import differentiate, register
from everlong.ops.spans import check_bounds

GROUP = 128  # tokens between the states that are kept for the backward pass: then a group's blocks stay in the cache
Tensors = tuple[Tensor, ...]


def delta_rule_native(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    log_decay: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    form: str,
) -> tuple[Tensor, Tensor]:
    """The delta rule; the kernels have one form, whatever `form` says. States and sums are float32."""
    return _run(q, k, v, beta, None, None, log_decay, initial_state, cu_seqlens, scale)


def dplr_native(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    log_decay: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    form: str,
) -> tuple[Tensor, Tensor]:
    """Diagonal plus low rank; the kernels have one form, whatever `form` says. States and sums are float32."""
    return _run(q, k, v, None, a, b, log_decay, initial_state, cu_seqlens, scale)


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    log_decay: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    tensors = tuple(_readable(x) for x in (q, k, v, beta, a, b, log_decay, state))
    differentiable = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    o, last, *_ = (_forward if differentiable else _inference)(*tensors, cu_seqlens, scale)
    return o, last


def _readable(x: Tensor | None) -> Tensor | None:
    """In a dtype that the kernels read."""
    return x if x is None or x.dtype in (torch.float32, torch.bfloat16) else x.float()


def _compute(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    log_decay: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    results = _shapes(q, k, v, beta, a, b, log_decay, state, cu_seqlens, scale)
    _forwards(q, k, v, beta, a, b, log_decay, state, cu_seqlens, scale, *results)
    return results


def _compute_inference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    log_decay: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    results = _shapes_inference(q, k, v, beta, a, b, log_decay, state, cu_seqlens, scale)
    _forwards(q, k, v, beta, a, b, log_decay, state, cu_seqlens, scale, *results, None)
    return results


def _forwards(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    log_decay: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    o: Tensor,
    last: Tensor,
    starts: Tensor | None,
) -> None:
    check_bounds(v.shape[1], cu_seqlens)
    kernel = "dplr_forward" if beta is None else "delta_rule_forward"
    call(kernel, *_inputs(q, k, v, beta, a, b, log_decay, cu_seqlens, scale), state, o, last, starts)


def _shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    log_decay: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """o, the last states, and those before each group of tokens."""
    o, last = _shapes_inference(q, k, v, beta, a, b, log_decay, state, cu_seqlens, scale)
    length, (count, *shape) = v.shape[1], last.shape
    if cu_seqlens is None:
        return o, last, last.new_empty((count * max(-(-length // GROUP), 1), *shape))
    return o, last, last.new_zeros((length // GROUP + count, *shape))  # not all of them are used


def _shapes_inference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    log_decay: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """o and the last states."""
    shape = (_sequences(v, cu_seqlens), v.shape[2], q.shape[3], v.shape[3])
    return v.new_empty(v.shape), v.new_empty(shape, dtype=torch.float32)


def _compute_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    log_decay: Tensor | None,
    cu_seqlens: Tensor | None,
    starts: Tensor,
    d_o: Tensor | None,
    d_last: Tensor | None,
    scale: float,
) -> Tensors:
    tensors = (q, k, v, beta, a, b, log_decay)
    d_o = v.new_zeros(v.shape) if d_o is None else _rows(d_o)
    d_last = d_last if d_last is None else _rows(d_last)
    heads = v.shape[2]
    given = [x if x is None else _spread_shape(x, heads) for x in tensors]
    d_state = starts.new_empty((_sequences(v, cu_seqlens), *starts.shape[1:]))
    kernel = "dplr_backward" if beta is None else "delta_rule_backward"
    ends = torch.empty_like(starts) if d_state.shape[0] * heads < torch.get_num_threads() else None
    call(kernel, *_inputs(*tensors, cu_seqlens, scale), starts, ends, d_o, d_last, *given, d_state)
    gradients = (
        v.new_empty(0) if x is None or y is None else _gathered(y, x) for x, y in zip(tensors, given, strict=True)
    )
    return *gradients, d_state


def _shapes_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    log_decay: Tensor | None,
    cu_seqlens: Tensor | None,
    starts: Tensor,
    d_o: Tensor | None,
    d_last: Tensor | None,
    scale: float,
) -> Tensors:
    """The gradients of q .. log_decay, empty where there is none, and of the first states."""
    given = (q, k, v, beta, a, b, log_decay)
    gradients = (v.new_empty(0) if x is None else x.new_empty(x.shape) for x in given)
    return *gradients, starts.new_empty((_sequences(v, cu_seqlens), *starts.shape[1:]))


def _sequences(v: Tensor, cu_seqlens: Tensor | None) -> Size:
    return v.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _spread_shape(x: Tensor, heads: int) -> Tensor:
    """Room for the gradient of `x [B, T, h, ...]`: of all heads in float32 where heads share x, else as x."""
    if x.shape[2] == heads:
        return x.new_empty(x.shape)
    return x.new_empty((*x.shape[:2], heads, *x.shape[3:]), dtype=torch.float32)


def _gathered(gradient: Tensor, x: Tensor) -> Tensor:
    if gradient.shape == x.shape:
        return gradient
    return torch.unflatten(gradient, 2, (x.shape[2], -1)).sum(3).to(x.dtype)


def _inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    log_decay: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
) -> tuple[Any, ...]:
    """LowRankInputs of the kernels."""
    tensors = (x if x is None or x.dim() < 4 else _rows(x) for x in (q, k, v, beta, a, b, log_decay))
    return (
        *tensors,
        cu_seqlens,
        _sequences(v, cu_seqlens),
        v.shape[1],
        v.shape[2],
        q.shape[2],
        0 if a is None else a.shape[2],
        0 if b is None else b.shape[2],
        q.shape[3],
        v.shape[3],
        int(log_decay is not None and log_decay.dim() == 4),
        GROUP,
        torch.get_num_threads(),
        float(scale),
    )


def _rows(x: Tensor) -> Tensor:
    """With neighbouring channels side by side in memory, as the kernels read them."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


_TENSORS = "Tensor q, Tensor k, Tensor v, Tensor? beta, Tensor? a, Tensor? b, Tensor? log_decay"
_forward = register(
    f"low_rank({_TENSORS}, Tensor? state, Tensor? cu_seqlens, float scale) -> (Tensor, Tensor, Tensor)",
    _compute,
    _shapes,
)
_inference = register(
    f"low_rank_inference({_TENSORS}, Tensor? state, Tensor? cu_seqlens, float scale) -> (Tensor, Tensor)",
    _compute_inference,
    _shapes_inference,
)
_backward = register(
    f"low_rank_backward({_TENSORS}, Tensor? cu_seqlens, Tensor starts, Tensor? d_o, Tensor? d_last, float scale) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _compute_backward,
    _shapes_backward,
)


def _save(context: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, state, cu_seqlens, context.scale = inputs
    context.mark_non_differentiable(output[2])
    context.save_for_backward(*tensors, state, cu_seqlens, output[2])


def _gradient(context: Any, d_o: Tensor | None, d_last: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    *tensors, state, cu_seqlens, starts = context.saved_tensors
    *gradients, d_state = _backward(*tensors, cu_seqlens, starts, d_o, d_last, context.scale)
    found = (None if x is None else gradient for x, gradient in zip(tensors, gradients, strict=True))
    return *found, None if state is None else d_state.to(state.dtype), None, None


differentiate(_forward, _gradient, _save)

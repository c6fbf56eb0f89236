"""The linear scan by the kernel of kernels/linear_scan.cpp."""

from typing import Any

import torch
from torch import Tensor

from everlong.ops.native.call import call
from everlong.ops.native.register import differentiate, register
from everlong.ops.spans import check_bounds


def linear_scan_native(
    a: Tensor, b: Tensor, *, initial_state: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """h_t = a_t h_{t-1} + b_t; the states are float32, sums too."""
    complex = b.dim() == 4  # pairs of numbers: one axis for the kernel
    flat = (x.flatten(2) if complex else x for x in (a, b))
    state = initial_state.flatten(1) if complex else initial_state
    h, last = _forward(*flat, state, cu_seqlens, complex)
    return h.view(b.shape), last.view(initial_state.shape)


def _compute(a: Tensor, b: Tensor, state: Tensor, cu_seqlens: Tensor | None, complex: bool) -> tuple[Tensor, Tensor]:
    check_bounds(b.shape[1], cu_seqlens)
    a, b, state = _rows(a).to(b.dtype), _rows(b), _rows(state)
    h, last = _shapes(a, b, state, cu_seqlens, complex)
    call("linear_scan_forward", a, b, state, cu_seqlens, h, last, *_sizes(b, state), complex)
    return h, last


def _shapes(a: Tensor, b: Tensor, state: Tensor, cu_seqlens: Tensor | None, complex: bool) -> tuple[Tensor, Tensor]:
    return b.new_empty(b.shape), state.new_empty(state.shape)


def _compute_backward(
    a: Tensor,
    h: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
    d_h: Tensor | None,
    d_last: Tensor | None,
    complex: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    a, state = _rows(a), _rows(state)
    d_h = torch.zeros_like(h) if d_h is None else _rows(d_h)
    d_last = torch.zeros_like(state) if d_last is None else _rows(d_last)
    d_a, d_b, d_state = _shapes_backward(a, h, state, cu_seqlens, d_h, d_last, complex)
    inputs = (a.to(h.dtype), h, state, cu_seqlens, d_h, d_last)
    call("linear_scan_backward", *inputs, d_a, d_b, d_state, *_sizes(h, state), complex)
    return d_a.to(a.dtype), d_b, d_state


def _shapes_backward(
    a: Tensor,
    h: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
    d_h: Tensor | None,
    d_last: Tensor | None,
    complex: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return a.new_empty(a.shape), h.new_empty(h.shape), state.new_empty(state.shape)


def _rows(x: Tensor) -> Tensor:
    """With neighbouring channels side by side in memory, as the kernels read them."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def _sizes(x: Tensor, state: Tensor) -> tuple[int, int, int]:
    """Sequences, length, numbers of a step."""
    return state.shape[0], x.shape[1], x.shape[2]


_forward = register(
    "linear_scan(Tensor a, Tensor b, Tensor state, Tensor? cu_seqlens, bool complex) -> (Tensor, Tensor)",
    _compute,
    _shapes,
)
_backward = register(
    "linear_scan_backward(Tensor a, Tensor h, Tensor state, Tensor? cu_seqlens, Tensor? d_h, Tensor? d_last, "
    "bool complex) -> (Tensor, Tensor, Tensor)",
    _compute_backward,
    _shapes_backward,
)


def _save(context: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    a, _, state, cu_seqlens, context.complex = inputs
    context.save_for_backward(a, output[0], state, cu_seqlens)


def _gradient(context: Any, d_h: Tensor | None, d_last: Tensor | None) -> tuple[Tensor | None, ...]:
    a, h, state, cu_seqlens = context.saved_tensors
    return *_backward(a, h, state, cu_seqlens, d_h, d_last, context.complex), None, None


differentiate(_forward, _gradient, _save)

"""The short causal convolution by the kernel of kernels/causal_conv1d.cpp."""

from typing import Any

import torch
from torch import Tensor

from everlong.ops.native.call import call
from everlong.ops.native.register import differentiate, register
from everlong.ops.spans import check_bounds


def causal_conv1d_native(
    x: Tensor, weight: Tensor, *, bias: Tensor | None, activation: str | None, state: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Each channel's weighted sum of its last W inputs and SiLU in one pass; sums are float32."""
    y, last = _forward(x, weight, bias, state, cu_seqlens, activation == "silu")
    return y, last


def _compute(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, cu_seqlens: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    check_bounds(x.shape[1], cu_seqlens)
    y, last = _shapes(x, weight, bias, state, cu_seqlens, silu)
    sizes = _sizes(x, weight, state)
    call("causal_conv1d_forward", _rows(x), weight, bias, _rows(state), cu_seqlens, y, last, *sizes, silu)
    return y, last


def _shapes(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, cu_seqlens: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), state.new_empty(state.shape)


def _compute_backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    cu_seqlens: Tensor | None,
    d_y: Tensor | None,
    d_last: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gradients = _shapes_backward(x, weight, bias, state, cu_seqlens, d_y, d_last, silu)
    d_y = torch.zeros_like(gradients[0]) if d_y is None else _rows(d_y)
    d_last = torch.zeros_like(gradients[3]) if d_last is None else _rows(d_last)
    by_sequence = state.new_empty(state.shape[0], weight.shape[1] + 1, weight.shape[0])
    inputs = (_rows(x), weight, bias, _rows(state), cu_seqlens, d_y, d_last)
    call("causal_conv1d_backward", *inputs, *gradients, by_sequence, *_sizes(x, weight, state), silu)
    return gradients


def _shapes_backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    cu_seqlens: Tensor | None,
    d_y: Tensor | None,
    d_last: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # Where there is no bias, its gradient is empty.
    d_bias = x.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), d_bias, state.new_empty(state.shape)


def _rows(x: Tensor) -> Tensor:
    """With neighbouring channels side by side in memory, as the kernels read them."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def _sizes(x: Tensor, weight: Tensor, state: Tensor) -> tuple[int, int, int, int]:
    """Sequences, length, channels, taps."""
    return state.shape[0], x.shape[1], x.shape[2], weight.shape[1]


_forward = register(
    "causal_conv1d(Tensor x, Tensor weight, Tensor? bias, Tensor state, Tensor? cu_seqlens, bool silu) "
    "-> (Tensor, Tensor)",
    _compute,
    _shapes,
)
_backward = register(
    "causal_conv1d_backward(Tensor x, Tensor weight, Tensor? bias, Tensor state, Tensor? cu_seqlens, Tensor? d_y, "
    "Tensor? d_last, bool silu) -> (Tensor, Tensor, Tensor, Tensor)",
    _compute_backward,
    _shapes_backward,
)


def _save(context: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, context.silu = inputs
    context.save_for_backward(*tensors)


def _gradient(context: Any, d_y: Tensor | None, d_last: Tensor | None) -> tuple[Tensor | None, ...]:
    tensors = context.saved_tensors
    d_x, d_weight, d_bias, d_state = _backward(*tensors, d_y, d_last, context.silu)
    return d_x, d_weight, None if tensors[2] is None else d_bias, d_state, None, None


differentiate(_forward, _gradient, _save)

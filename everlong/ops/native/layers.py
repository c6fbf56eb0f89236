"""The layers around the operators by the kernels of kernels/layers.cpp; float32 and bfloat16, any mixture of them.

Each is one pass or two over its tensors, where torch's expression takes several. `everlong/nn/fused.py` chooses.
"""

from typing import Any

import torch
from torch import Tensor

from everlong.ops.native.call import call
from everlong.ops.native.register import differentiate, register

GROUPS = 64  # of rows, whose gradients of a shared weight are summed one after the other


def rms_norm_native(x: Tensor, weight: Tensor | None, eps: float, dtype: torch.dtype) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, in `dtype`; weight [D], or [H, D] for x [..., H, D]."""
    y: Tensor = _norm(x, weight, eps, dtype)[0]
    return y


def _rows(x: Tensor) -> Tensor:
    """`[R, D]`, the numbers of a row side by side."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 or flat.shape[1] <= 1 else flat.contiguous()


def _weights(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.reshape(-1, weight.shape[-1]).float().contiguous()


def _compute_norm(x: Tensor, weight: Tensor | None, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    rows, weights = _rows(x), _weights(weight)
    y, inverse = _shapes_norm(x, weight, eps, dtype)
    heads = 1 if weights is None else len(weights)
    call("rms_norm_forward", rows, weights, y.view(rows.shape), inverse, *rows.shape, heads, eps)
    return y, inverse


def _shapes_norm(x: Tensor, weight: Tensor | None, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(rows, dtype=torch.float32)


def _compute_norm_backward(
    x: Tensor, weight: Tensor | None, inverse: Tensor, d_y: Tensor, learns: bool
) -> tuple[Tensor, Tensor]:
    rows, weights, slope = _rows(x), _weights(weight), _rows(d_y)
    d_x = x.new_empty(x.shape)
    heads = 1 if weights is None else len(weights)
    d_weight = inverse.new_empty(GROUPS, heads, x.shape[-1]) if learns else None
    sizes = (*rows.shape, heads, GROUPS)
    call("rms_norm_backward", rows, weights, inverse, slope, d_x.view(rows.shape), d_weight, *sizes)
    if weight is None or d_weight is None:
        return d_x, d_x.new_empty(0)
    return d_x, d_weight.sum(0).view(weight.shape).to(weight.dtype)


def _shapes_norm_backward(
    x: Tensor, weight: Tensor | None, inverse: Tensor, d_y: Tensor, learns: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(0) if weight is None or not learns else weight.new_empty(weight.shape)


_norm = register(
    "rms_norm(Tensor x, Tensor? weight, float eps, ScalarType dtype) -> (Tensor, Tensor)", _compute_norm, _shapes_norm
)
_norm_backward = register(
    "rms_norm_backward(Tensor x, Tensor? weight, Tensor inverse, Tensor d_y, bool learns) -> (Tensor, Tensor)",
    _compute_norm_backward,
    _shapes_norm_backward,
)


def _save_norm(context: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, _ = inputs
    context.save_for_backward(x, weight, output[1])
    context.mark_non_differentiable(output[1])


def _gradient_norm(context: Any, d_y: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    x, weight, inverse = context.saved_tensors
    if d_y is None:
        return None, None, None, None
    learns = weight is not None and context.needs_input_grad[1]
    d_x, d_weight = _norm_backward(x, weight, inverse, d_y, learns)
    return d_x, d_weight if learns else None, None, None


differentiate(_norm, _gradient_norm, _save_norm)


def swiglu_native(gate: Tensor, x: Tensor) -> Tensor:
    """silu(gate) * x, in the dtype of `x`."""
    y: Tensor = _swiglu(gate, x)
    return y


def _compute_swiglu(gate: Tensor, x: Tensor) -> Tensor:
    gates, rows = _rows(gate), _rows(x)
    y = _shapes_swiglu(gate, x)
    call("swiglu_forward", gates, rows, y.view(rows.shape), *rows.shape)
    return y


def _shapes_swiglu(gate: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _compute_swiglu_backward(gate: Tensor, x: Tensor, d_y: Tensor) -> tuple[Tensor, Tensor]:
    rows = _rows(x)
    d_gate, d_x = _shapes_swiglu_backward(gate, x, d_y)
    results = (d_gate.view(rows.shape), d_x.view(rows.shape))
    call("swiglu_backward", _rows(gate), rows, _rows(d_y), *results, *rows.shape)
    return d_gate, d_x


def _shapes_swiglu_backward(gate: Tensor, x: Tensor, d_y: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), x.new_empty(x.shape)


_swiglu = register("swiglu(Tensor gate, Tensor x) -> Tensor", _compute_swiglu, _shapes_swiglu)
_swiglu_backward = register(
    "swiglu_backward(Tensor gate, Tensor x, Tensor d_y) -> (Tensor, Tensor)",
    _compute_swiglu_backward,
    _shapes_swiglu_backward,
)


def _save_inputs(context: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    context.save_for_backward(*inputs)


def _gradient_swiglu(context: Any, d_y: Tensor | None) -> tuple[Tensor | None, ...]:
    return (None, None) if d_y is None else _swiglu_backward(*context.saved_tensors, d_y)


differentiate(_swiglu, _gradient_swiglu, _save_inputs)


def turn_native(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The pairs of channels i and i + K / 2 of `x [B, T, H, K]`, turned by angles `[B or 1, T, 1, K / 2]`."""
    y: Tensor = _turn(x, cos, sin, 1.0)
    return y


def _compute_turn(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    x = x if x.stride(3) == 1 else x.contiguous()
    y = _shapes_turn(x, cos, sin, sign)
    batch, length, heads, size = x.shape
    cos, sin = (angle[:, :, 0].contiguous().expand(batch, -1, -1) for angle in (cos, sin))
    call("turn", x, cos, sin.to(cos.dtype), y, batch, length, heads, size // 2, sign)
    return y


def _shapes_turn(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    return x.new_empty(x.shape)


_turn = register("turn(Tensor x, Tensor cos, Tensor sin, float sign) -> Tensor", _compute_turn, _shapes_turn)


def _save_turn(context: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cos, sin, context.sign = inputs
    context.save_for_backward(cos, sin)


def _gradient_turn(context: Any, d_y: Tensor | None) -> tuple[Tensor | None, ...]:
    return None if d_y is None else _turn(d_y, *context.saved_tensors, -context.sign), None, None, None


differentiate(_turn, _gradient_turn, _save_turn)


def cross_entropy_native(logits: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """The cross entropy of each row in nats, float32; `logits` `[R, C]` become its gradient, in place.

    A target below 0 is ignored: loss and gradient are 0.

    Raises:
        IndexError: a target is no class.
    """
    if len(targets) and int(targets.max()) >= logits.shape[1]:
        raise IndexError(f"a target must be below the {logits.shape[1]} classes: got {int(targets.max())}")
    loss = torch.empty(len(targets), dtype=torch.float32)
    offsets = None if bias is None else bias.float().contiguous()
    call("cross_entropy", logits, offsets, targets.long().contiguous(), loss, *logits.shape)
    return loss

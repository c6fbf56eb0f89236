"""The selective scan by the kernel of kernels/selective_scan.cpp."""

from typing import Any

import torch
from torch import Tensor

from everlong.ops.native.call import call
from everlong.ops.native.register import differentiate, register
from everlong.ops.spans import check_bounds

STEPS = 16  # of a piece
LANES = 16  # at most, in a block of channels
GROUPS = 8  # of channels, at most: B's and C's gradients are summed within each, then over all
SMALLEST = 64  # channels of a group


def selective_scan_native(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    initial_state: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Mamba's scan; states and sums are float32, and no result of size T x D x N is held."""
    inputs = (u, dt, A, B, C, D, z, dt_bias, initial_state)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    y, last, _ = _forward(*inputs, cu_seqlens, dt_softplus, keep)
    return y, last


def _compute(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    state: Tensor,
    cu_seqlens: Tensor | None,
    softplus: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    check_bounds(u.shape[1], cu_seqlens)
    y, last, before = _shapes(u, dt, A, B, C, D, z, dt_bias, state, cu_seqlens, softplus, keep)
    z = None if z is None else _rows(z)
    inputs = (_rows(u), _rows(dt), A, B, C, D, z, dt_bias, state, cu_seqlens)
    call(
        "selective_scan_forward",
        *inputs,
        y,
        last,
        before if keep else None,
        *_sizes(u, A, state),
        _kept(A.shape[1]),
        softplus,
    )
    return y, last, before


def _shapes(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    state: Tensor,
    cu_seqlens: Tensor | None,
    softplus: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    # What is kept is the kernel's own: the states before each piece, blocks of channels one by one.
    (rows, length, channels), states = u.shape, A.shape[1]
    kept = _kept(states)
    pieces = rows * -(-length // kept) if cu_seqlens is None else length // kept + state.shape[0]
    before = state.new_empty((pieces if keep else 0) * -(-channels // LANES) * LANES * states)
    return u.new_empty(u.shape), state.new_empty(state.shape), before


def _compute_backward(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    before: Tensor,
    cu_seqlens: Tensor | None,
    d_y: Tensor | None,
    d_last: Tensor | None,
    softplus: bool,
    sequences: int,
) -> tuple[Tensor, ...]:
    (rows, length, channels), states = u.shape, A.shape[1]
    gradients = _shapes_backward(u, dt, A, B, C, D, z, dt_bias, before, cu_seqlens, d_y, d_last, softplus, sequences)
    d_u, d_dt, d_A, d_B, d_C, d_D, d_z, d_dt_bias, d_state = gradients
    group = max(SMALLEST, -(-channels // (GROUPS * LANES)) * LANES)
    by_group = before.new_empty(-(-channels // group), rows * length, 2 * states)
    by_sequence = before.new_empty(sequences * -(-channels // LANES) * LANES * (states + 2))
    call(
        "selective_scan_backward",
        *(_rows(u), _rows(dt), A, B, C, D, None if z is None else _rows(z), dt_bias, before, cu_seqlens),
        torch.zeros_like(d_u) if d_y is None else _rows(d_y),
        torch.zeros_like(d_state) if d_last is None else d_last,
        *(d_u, d_dt, d_A, d_B, d_C, d_D, d_z, d_dt_bias, d_state, by_group, by_sequence),
        *(sequences, length, channels, states, _kept(states), softplus, group),
    )
    return gradients


def _shapes_backward(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    before: Tensor,
    cu_seqlens: Tensor | None,
    d_y: Tensor | None,
    d_last: Tensor | None,
    softplus: bool,
    sequences: int | torch.SymInt,
) -> tuple[Tensor, ...]:
    # Where there is no D, z or dt_bias, their gradients are empty.
    made = (x.new_empty(x.shape) if x is not None else u.new_empty(0) for x in (u, dt, A, B, C, D, z, dt_bias))
    return *made, before.new_empty(sequences, *A.shape)


def _rows(x: Tensor) -> Tensor:
    """With neighbouring channels side by side in memory, as the kernels read them."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def _kept(states: Any) -> Any:
    """Tokens between two states that are kept for the backward pass: all together are no larger than u."""
    return max(STEPS, -(-states // STEPS) * STEPS)


def _sizes(u: Tensor, A: Tensor, state: Tensor) -> tuple[int, int, int, int]:
    """Sequences, length, channels, states of a channel."""
    return state.shape[0], u.shape[1], u.shape[2], A.shape[1]


_forward = register(
    "selective_scan(Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, "
    "Tensor state, Tensor? cu_seqlens, bool softplus, bool keep) -> (Tensor, Tensor, Tensor)",
    _compute,
    _shapes,
)
_backward = register(
    "selective_scan_backward(Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, "
    "Tensor before, Tensor? cu_seqlens, Tensor? d_y, Tensor? d_last, bool softplus, SymInt sequences) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _compute_backward,
    _shapes_backward,
)


def _save(context: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, state, cu_seqlens, context.softplus, keep = inputs
    assert keep, "a backward pass needs the states that the forward pass keeps"
    context.mark_non_differentiable(output[2])
    context.sequences = state.shape[0]
    context.save_for_backward(*tensors, output[2], cu_seqlens)


def _gradient(context: Any, d_y: Tensor | None, d_last: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    tensors = context.saved_tensors
    found = _backward(*tensors, d_y, d_last, context.softplus, context.sequences)
    present = (None if x is None else d for x, d in zip(tensors[:8], found[:8], strict=True))
    return *present, found[8], None, None, None


differentiate(_forward, _gradient, _save)

"""Softmax attention by the kernels of kernels/softmax_attention.cpp."""

from typing import Any

import torch
from torch import Tensor

from everlong.ops.attention import in_one_dtype, softmax_attention_torch
from everlong.ops.dispatch import NATIVE_DTYPES
from everlong.ops.native.call import call
from everlong.ops.native.register import differentiate, register
from everlong.ops.scoring import UNBOUNDED, BiasFunction
from everlong.ops.spans import check_bounds


def softmax_attention_native(
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
) -> tuple[Tensor, Tensor | None]:
    """Attention in tiles that stay in the cache, forward and backward. [o, lse]

    A bias goes to torch's operators, and so do float64 and float16, which k or v may bring. It cannot be differentiated
    twice.
    """
    dtype = v.dtype
    q_, k_, v_ = in_one_dtype(q, k, v)
    if bias is not None or q_.dtype not in NATIVE_DTYPES:
        options = {"key_lengths": key_lengths, "cu_seqlens": cu_seqlens, "return_lse": return_lse, "form": form}
        rule = {"causal": causal, "window": window, "scale": scale, "bias": bias, "mask": mask}
        return softmax_attention_torch(q, k, v, **rule, **options)  # type: ignore[arg-type]
    if mask is not None:
        mask = mask.expand(q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    left = UNBOUNDED if window is None else min(window - 1, UNBOUNDED)
    o, lse = _forward(q_, k_, v_, mask, key_lengths, cu_seqlens, scale, left, 0 if causal else left)
    return o.to(dtype), lse


def _compute(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    key_lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    left: int,
    right: int,
) -> tuple[Tensor, Tensor]:
    check_bounds(q.shape[1], cu_seqlens)
    o, lse = _shapes(q, k, v, mask, key_lengths, cu_seqlens, scale, left, right)
    words = _words(q, k, v, mask, key_lengths, cu_seqlens, scale, left, right)
    call("softmax_attention_forward", *words, o, lse)
    return o, lse


def _shapes(q: Tensor, k: Tensor, v: Tensor, *rule: Any) -> tuple[Tensor, Tensor]:
    return v.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)


def _compute_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    key_lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    left: int,
    right: int,
    o: Tensor,
    lse: Tensor,
    d_o: Tensor | None,
    d_lse: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    d_o = torch.zeros_like(o) if d_o is None else d_o
    d_q, *sums = q.new_empty(q.shape), *(x.new_zeros(x.shape, dtype=torch.float32) for x in (k, v))
    words = _words(q, k, v, mask, key_lengths, cu_seqlens, scale, left, right)
    call("softmax_attention_backward", *words, o, lse, d_o, d_lse, d_q, *sums)
    return d_q, sums[0].to(k.dtype), sums[1].to(v.dtype)


def _shapes_backward(q: Tensor, k: Tensor, v: Tensor, *rule: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _words(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    key_lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    left: int,
    right: int,
) -> tuple[Tensor | float | None, ...]:
    """What every kernel begins with: `struct Attention` of kernels/attention.h."""
    lengths = None if key_lengths is None else key_lengths.to(torch.int64)
    sequences = q.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    sizes = sequences, q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3], v.shape[3]
    return q, k, v, mask, lengths, cu_seqlens, *sizes, left, right, float(scale)


_RULE = "Tensor? mask, Tensor? key_lengths, Tensor? cu_seqlens, float scale, int left, int right"
_forward = register(f"softmax_attention(Tensor q, Tensor k, Tensor v, {_RULE}) -> (Tensor, Tensor)", _compute, _shapes)
_backward = register(
    f"softmax_attention_backward(Tensor q, Tensor k, Tensor v, {_RULE}, Tensor o, Tensor lse, Tensor? d_o, "
    "Tensor? d_lse) -> (Tensor, Tensor, Tensor)",
    _compute_backward,
    _shapes_backward,
)


def _save(context: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, context.scale, context.left, context.right = inputs
    context.save_for_backward(*tensors, *output)


def _gradient(context: Any, d_o: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, o, lse = context.saved_tensors
    rule = context.scale, context.left, context.right
    return *_backward(*tensors, *rule, o, lse, d_o, d_lse), None, None, None, None, None, None


differentiate(_forward, _gradient, _save)

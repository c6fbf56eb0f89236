"""Linear attention by the kernels of kernels/linear_attention_bf16*.cpp: bfloat16, a decay of heads or none."""

from typing import Any

import torch
from torch import Tensor

from everlong.ops.chunks import Size
from everlong.ops.dispatch import multiplies_bfloat16
from everlong.ops.native.call import call
from everlong.ops.native.register import differentiate, register
from everlong.ops.spans import check_bounds

_GROUP = 256  # tokens from one saved state to the next
_BLOCK = 32  # channels are filled up to a multiple of this
_FEW = 16  # tokens of a sequence, for which the general kernels are as fast


def serves(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, cu_seqlens: Tensor | None) -> bool:
    """Whether these kernels are the fastest for such tensors, without bonus or normaliser.

    They are not where sequences are short, for they fill them up to 32 tokens, nor where the processor multiplies no
    bfloat16 numbers itself.
    """
    if not q.dtype == k.dtype == v.dtype == torch.bfloat16 or (log_decay is not None and log_decay.dim() == 4):
        return False
    sequences = 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return v.shape[1] > _FEW * sequences and multiplies_bfloat16("cpu")


def linear_attention_bf16(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Outputs and last states. It cannot be differentiated twice."""
    inputs = (q, k, v, log_decay, initial_state)
    differentiated = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    o, state, _ = _forward(*inputs, cu_seqlens, scale, differentiated)
    return o, state


def _compute(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    check_bounds(v.shape[1], cu_seqlens)
    q, k, v = (_rows(x) for x in (q, k, v))
    state = None if state is None else _rows(state.float())
    o, last, saved = _shapes(q, k, v, log_decay, state, cu_seqlens, scale, save)
    few = _few(v, cu_seqlens)
    states = saved if save else _states(q, v, cu_seqlens) if few else None
    given = (q, k, v, _of_tokens(log_decay, v), state, cu_seqlens)
    call("linear_attention_bf16_forward", *given, o, last, states, *_sizes(q, v, cu_seqlens), few, scale)
    return o, last, saved


def _shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    last = v.new_empty((_count(v, cu_seqlens), v.shape[2], q.shape[3], v.shape[3]), dtype=torch.float32)
    saved = _states(q, v, cu_seqlens) if save else v.new_empty((0,), dtype=torch.float32)
    return v.new_empty(v.shape), last, saved


def _compute_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    cu_seqlens: Tensor | None,
    saved: Tensor,
    d_o: Tensor | None,
    d_last: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    q, k, v = (_rows(x) for x in (q, k, v))
    d_o = torch.zeros_like(v) if d_o is None else _rows(d_o)
    d_last = None if d_last is None else _rows(d_last)
    heads, shared, (count, keys) = v.shape[2], q.shape[2], (_count(v, cu_seqlens), q.shape[3])
    of_head = log_decay is not None and log_decay.dim() == 1
    d_q, d_k = (q.new_empty((*v.shape[:3], keys)) for _ in range(2))
    d_v = v.new_empty(v.shape)
    d_state = v.new_empty((count, heads, keys, v.shape[3]), dtype=torch.float32)
    shape = (0,) if log_decay is None else (_slots(v, cu_seqlens), heads) if of_head else log_decay.shape
    d_log_decay = v.new_zeros(shape, dtype=torch.float32)
    few = _few(v, cu_seqlens)
    call(
        "linear_attention_bf16_backward",
        *(q, k, v, _of_tokens(log_decay, v), cu_seqlens, saved, d_o, d_last),
        *(d_q, d_k, d_v, None if log_decay is None else d_log_decay, d_state),
        saved.new_empty((*saved.shape[:2], *saved.shape[:1:-1])) if few else None,
        *_sizes(q, v, cu_seqlens),
        few,
        of_head,
        scale,
    )
    if shared < heads:
        d_q, d_k = (torch.unflatten(x, 2, (shared, -1)).sum(3) for x in (d_q, d_k))
    if of_head:
        d_log_decay = d_log_decay.sum(0)
    return d_q, d_k, d_v, d_log_decay if log_decay is None else d_log_decay.to(log_decay.dtype), d_state


def _shapes_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    cu_seqlens: Tensor | None,
    saved: Tensor,
    d_o: Tensor | None,
    d_last: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    state = (_count(v, cu_seqlens), v.shape[2], q.shape[3], v.shape[3])
    return (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        v.new_empty((0,), dtype=torch.float32) if log_decay is None else log_decay.new_empty(log_decay.shape),
        v.new_empty(state, dtype=torch.float32),
    )


def _rows(x: Tensor) -> Tensor:
    """With neighbouring channels side by side in memory, as the kernels read them."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def _of_tokens(log_decay: Tensor | None, v: Tensor) -> Tensor | None:
    return log_decay if log_decay is None or log_decay.dim() == 3 else log_decay.expand(v.shape[:3])


def _count(v: Tensor, cu_seqlens: Tensor | None) -> Size:
    return v.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _slots(v: Tensor, cu_seqlens: Tensor | None) -> Size:
    """Places for the states before groups: as many as there are groups, or a few more where sequences are packed."""
    batch, length = v.shape[:2]
    return batch * -(-length // _GROUP) if cu_seqlens is None else length // _GROUP + cu_seqlens.shape[0]


def _states(q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Room for the states before groups, `[groups, H, K, V]`, whole blocks of channels."""
    wide = (-(-size // _BLOCK) * _BLOCK for size in (q.shape[3], v.shape[3]))
    return v.new_empty((_slots(v, cu_seqlens), v.shape[2], *wide), dtype=torch.float32)


def _few(v: Tensor, cu_seqlens: Tensor | None) -> bool:
    """Whether there are fewer heads of sequences than threads: then groups of tokens are computed side by side."""
    return _count(v, cu_seqlens) * v.shape[2] < torch.get_num_threads() and v.shape[1] > 2 * _GROUP


def _sizes(q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> tuple[int, ...]:
    """Sequences, length, heads, channels of keys and values, heads of v for one of q, places for states."""
    heads = v.shape[2]
    sizes = _count(v, cu_seqlens), v.shape[1], heads, q.shape[3], v.shape[3], heads // q.shape[2]
    return *(int(size) for size in sizes), int(_slots(v, cu_seqlens))


_forward = register(
    "linear_attention_bf16(Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor? state, Tensor? cu_seqlens, "
    "float scale, bool save) -> (Tensor, Tensor, Tensor)",
    _compute,
    _shapes,
)
_backward = register(
    "linear_attention_bf16_backward(Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor? cu_seqlens, "
    "Tensor saved, Tensor? d_o, Tensor? d_last, float scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _compute_backward,
    _shapes_backward,
)


def _save(context: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, log_decay, state, cu_seqlens, context.scale, _ = inputs
    context.state = None if state is None else state.dtype
    context.mark_non_differentiable(output[2])
    context.save_for_backward(q, k, v, log_decay, cu_seqlens, output[2])


def _gradient(context: Any, d_o: Tensor | None, d_last: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    q, k, v, log_decay, cu_seqlens, saved = context.saved_tensors
    d_q, d_k, d_v, d_log_decay, d_state = _backward(q, k, v, log_decay, cu_seqlens, saved, d_o, d_last, context.scale)
    return (
        d_q,
        d_k,
        d_v,
        None if log_decay is None else d_log_decay,
        None if context.state is None else d_state.to(context.state),
        None,
        None,
        None,
    )


differentiate(_forward, _gradient, _save)

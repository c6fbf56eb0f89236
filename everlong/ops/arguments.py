"""What the operators with a matrix state accept, checked before anything is computed."""

from collections.abc import Sequence

import torch
from torch import Tensor

from everlong.ops.dispatch import check_form

Shape = Sequence[int]


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None,
    decays: Sequence[Shape],
    states: Sequence[tuple[str, Tensor | None, Shape]],
    others: Sequence[tuple[str, Tensor | None, Shape]],
    cu_seqlens: Tensor | None,
    form: str,
) -> None:
    """Checks shapes; `decays` lists those that `log_decay` may have, `states` lacks the number of sequences in front.

    Raises:
        ValueError: in one line, with the rule, what arrived and what would be right.
    """
    check_form(form)
    if q.dim() != 4 or q.shape != k.shape:
        raise ValueError(f"`q` and `k` must have the same shape [B, T, H, K]: got {[*q.shape]} and {[*k.shape]}")
    if v.dim() != 4 or v.shape[:2] != q.shape[:2]:
        raise ValueError(f"`v` must be [B, T, H, V] with the B and T of `q`: got v {[*v.shape]}, q {[*q.shape]}")
    if q.shape[2] == 0 or v.shape[2] % q.shape[2]:
        raise ValueError(
            f"the heads of `v` must be a multiple of those of `q` and `k`: got {v.shape[2]} and {q.shape[2]}"
        )
    if log_decay is not None and not any(log_decay.shape == torch.Size(shape) for shape in decays):
        allowed = " or ".join(str([*shape]) for shape in decays)
        raise ValueError(f"`log_decay` must be {allowed} here: got {[*log_decay.shape]}")
    if cu_seqlens is not None and (cu_seqlens.dim() != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64)):
        raise ValueError(f"`cu_seqlens` must be integers [N + 1]: got {cu_seqlens.dtype} {[*cu_seqlens.shape]}")
    if cu_seqlens is not None and v.shape[0] != 1:
        raise ValueError(f"with `cu_seqlens` the sequences are packed in one row: got {v.shape[0]} rows; flatten them")
    count = v.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    for name, tensor, shape in (*((name, x, (count, *shape)) for name, x, shape in states), *others):
        if tensor is not None and tensor.shape != torch.Size(shape):
            raise ValueError(f"`{name}` must be {[*shape]} here: got {[*tensor.shape]}")

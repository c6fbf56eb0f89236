"""Growing tensors for softmax layers: joined in constant time a token, and still values that can be branched."""

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor
from torch.nn import functional


class _Buffer:
    """Memory with room to grow, of which views have been handed out up to `used`."""

    def __init__(self, storage: Tensor, used: int) -> None:
        self.storage, self.used = storage, used


def append(past: Shaped[Tensor, "B S *rest"], new: Shaped[Tensor, "B T *rest"]) -> Shaped[Tensor, "B S_plus_T *rest"]:
    """`past` and `new` joined along time. The result never changes later, whatever is appended to it or to `past`.

    Without gradients the result is a view of a buffer twice its size, and the next `append` writes behind it. Only the
    first to continue from a value may do that: a second continuation, or a value that was cut or joined with others,
    is copied to a buffer of its own.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return torch.cat([past, new], dim=1)
    length = past.shape[1] + new.shape[1]
    buffer: _Buffer | None = getattr(past, "everlong_buffer", None)
    if buffer is None or buffer.used != past.shape[1] or buffer.storage.shape[1] < length:
        buffer = _Buffer(past.new_empty(past.shape[0], max(64, 2 * length), *past.shape[2:]), past.shape[1])
        buffer.storage[:, : past.shape[1]] = past
    buffer.storage[:, past.shape[1] : length] = new
    buffer.used = length
    joined = buffer.storage[:, :length]
    joined.everlong_buffer = buffer  # type: ignore[attr-defined]
    return joined


def append_ragged(
    pairs: list[tuple[Tensor, Tensor]], kept: Int[Tensor, " N"], lengths: Int[Tensor, " N"]
) -> tuple[list[Shaped[Tensor, "N R *rest"]], Bool[Tensor, "N R"]]:
    """Past `[N, S, ...]` and new `[N, T, ...]` of each pair joined, where rows bring unequal numbers; what is real.

    The last `kept` entries of a row of the past are real, and the last `lengths` of a row of what is new: so they are
    in the result, which is as long as the longest row.
    """
    device, (old, fresh) = kept.device, (half.shape[1] for half in pairs[0])
    real = torch.cat(
        [
            torch.arange(old, device=device) >= old - kept[:, None],
            torch.arange(fresh, device=device) >= fresh - lengths[:, None],
        ],
        dim=1,
    )
    longest = int((kept + lengths).max()) if len(lengths) else 0
    order = real.int().argsort(dim=1, stable=True)  # the gap between the two moves to the front
    order = order[:, old + fresh - longest :]

    def joined(before: Tensor, after: Tensor) -> Tensor:
        index = order.view(*order.shape, *(1,) * (after.dim() - 2)).expand(-1, -1, *after.shape[2:])
        return torch.cat([before.to(after.dtype), after], dim=1).gather(1, index)

    return [joined(*pair) for pair in pairs], real.gather(1, order)


def retain(leaves: list[Tensor], keep: Bool[Tensor, "N S"]) -> list[Shaped[Tensor, "N R *rest"]]:
    """What is to be kept of `[N, S, ...]`, at the end of each row and as long as the longest; zeros before it."""
    if bool(keep.all()):
        return leaves
    count = keep.sum(1)
    longest = int(count.max()) if len(count) else 0
    order = keep.int().argsort(dim=1, stable=True)[:, keep.shape[1] - longest :]
    real = torch.arange(longest, device=keep.device) >= longest - count[:, None]
    ragged = not bool(real.all())

    def kept(leaf: Tensor) -> Tensor:
        after = (1,) * (leaf.dim() - 2)
        rows = leaf.gather(1, order.view(*order.shape, *after).expand(-1, -1, *leaf.shape[2:]))
        return rows * real.view(*real.shape, *after).to(rows.dtype) if ragged else rows

    return [kept(leaf) for leaf in leaves]


def stacked(leaves: list[Shaped[Tensor, "_ _ *rest"]]) -> list[Shaped[Tensor, "_ _ *rest"]]:
    """Caches of unequal lengths made as long as the longest, with zeros before what is there."""
    longest = max((leaf.shape[1] for leaf in leaves), default=0)
    return [functional.pad(leaf, (*(0, 0) * (leaf.dim() - 2), longest - leaf.shape[1], 0)) for leaf in leaves]

"""Growing tensors for softmax layers: joined in constant time a token, and still values that can be branched."""

import torch
from jaxtyping import Shaped
from torch import Tensor


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

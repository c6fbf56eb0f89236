"""Elementwise functions of a training step that autograd would take many passes over memory for, each in a few.

On a CPU a step of a small model spends as long between its products as in them, and that time goes by how often a
tensor is read and written. So each function here has a kernel, and where that does not serve, a backward pass of its
own, which works in place. `torch.compile` joins passes by itself: under it each function is its plain expression. They
cannot be differentiated twice.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from everlong.ops.dispatch import kernels_serve


def rms_norm(
    x: Float[Tensor, "*B D"],
    weight: Float[Tensor, " D"] | Float[Tensor, "H D"] | None,
    eps: float,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "*B D"]:
    """x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich 2019, arXiv 1910.07467), computed in float32 at least.

    A `weight` of heads is for x `[..., H, D]`. `dtype` is that of the result; None: that of `x`.
    """
    dtype = x.dtype if dtype is None else dtype
    if kernels_serve(x) and dtype in (torch.float32, torch.bfloat16):
        from everlong.ops.native.layers import rms_norm_native

        return rms_norm_native(x, weight, eps, dtype)
    if weight is not None and weight.dim() > 1:
        return rms_norm(x, None, eps, dtype) * weight.to(dtype)
    if torch.compiler.is_compiling():
        y = F.rms_norm(x, x.shape[-1:], eps=eps)
        return (y if weight is None else y * weight).to(dtype)
    result: Tensor = _RMSNorm.apply(x, weight, eps, dtype)  # type: ignore[no-untyped-call]
    return result


def swiglu(gate: Float[Tensor, "*B D"], x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
    """silu(gate) * x: a gate that opens smoothly (Shazeer 2020, arXiv 2002.05202)."""
    if gate.dtype == x.dtype and kernels_serve(gate, x):
        from everlong.ops.native.layers import swiglu_native

        return swiglu_native(gate, x)
    return F.silu(gate) * x


def cross_entropy_(
    logits: Float[Tensor, "R C"], targets: Int[Tensor, " R"], bias: Float[Tensor, " C"] | None = None
) -> Float[Tensor, " R"]:
    """The cross entropy of each row of `logits + bias` in nats; the logits become its gradient, softmax - onehot.

    A target below 0 is ignored: its loss and gradient are 0.
    """
    if kernels_serve(logits):
        from everlong.ops.native.layers import cross_entropy_native

        return cross_entropy_native(logits, bias, targets)
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if bias is not None:
        exact = exact + bias
    ignored, label = (targets < 0)[:, None], targets.clamp_min(0)[:, None]
    slope = exact.log_softmax(1)
    loss = -slope.gather(1, label).masked_fill(ignored, 0.0)[:, 0]
    slope.exp_().scatter_add_(1, label, torch.full_like(label, -1.0, dtype=slope.dtype))
    logits.copy_(slope.masked_fill_(ignored, 0.0))
    return loss


def turn(
    x: Float[Tensor, "B T H K"], cos: Float[Tensor, "rows T 1 half"], sin: Float[Tensor, "rows T 1 half"]
) -> Float[Tensor, "B T H K"]:
    """The pairs of channels i and i + K / 2, each turned by its angle."""
    if torch.compiler.is_compiling():
        left, right = x.chunk(2, dim=-1)
        return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)
    if kernels_serve(x, cos):
        from everlong.ops.native.layers import turn_native

        return turn_native(x, cos, sin)
    result: Tensor = _Turn.apply(x, cos, sin)  # type: ignore[no-untyped-call]
    return result


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float, dtype: torch.dtype) -> Tensor:
        exact = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=exact)
        inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        y = torch.mul(x, inverse)
        y = y if weight is None else y.mul_(weight)
        return y.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        """With r the inverse and u = x * dy: dw = r^T u;  dx = r * (w * dy) - x * r^3 (u w) / D."""
        x, weight, inverse = ctx.saved_tensors
        size, exact = x.shape[-1], inverse.dtype
        rows, inverse = x.reshape(-1, size).to(exact), inverse.view(-1, 1)
        slope = d_y.reshape(-1, size).to(exact)
        product = slope * rows
        gains = product.new_ones(size) if weight is None else weight.to(exact)
        pull = torch.mv(product, gains)[:, None] * inverse.pow(3).div_(-size)
        d_weight = None if weight is None else torch.mv(product.T, inverse[:, 0]).to(weight.dtype)
        d_x = torch.mul(slope, inverse, out=product).mul_(gains).addcmul_(rows, pull)
        return d_x.view(x.shape).to(x.dtype), d_weight, None, None


class _Turn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(d_y, cos, -sin), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    (left, right), (y_left, y_right) = x.chunk(2, dim=-1), y.chunk(2, dim=-1)
    torch.mul(left, cos, out=y_left).addcmul_(right, sin, value=-1)
    torch.mul(right, cos, out=y_right).addcmul_(left, sin)
    return y

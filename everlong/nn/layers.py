"""The layers that mixers and models share: norms, feed-forward, short convolution, the loss over a vocabulary."""

import math
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from everlong.nn.fused import cross_entropy_, rms_norm, swiglu
from everlong.ops import causal_conv1d
from everlong.ops.dispatch import kernels_serve


class InputNorm(nn.RMSNorm):
    """RMS normalisation of what only matrix products read: under autocast the result has their dtype."""

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        return rms_norm(x, self.weight, self.eps or 0.0, _product_dtype(x))


class HeadNorm(nn.Module):
    """RMS normalisation of each head's channels, so that every head speaks equally loud (Zhang and Sennrich 2019)."""

    def __init__(self, num_heads: int, size: int, *, affine: bool = True, eps: float = 1e-5) -> None:
        super().__init__()
        self.size, self.eps = size, eps
        self.weight = nn.Parameter(torch.ones(num_heads, size)) if affine else None

    def forward(self, x: Float[Tensor, "B T H V"]) -> Float[Tensor, "B T H V"]:
        weight = self.weight if self.weight is None or len(self.weight) > 1 else self.weight[0]
        return rms_norm(x, weight, self.eps)

    def reference(self, x: Float[Tensor, "H V"]) -> Float[Tensor, "H V"]:
        """The equation, of one token."""
        y: Tensor = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return y if self.weight is None else y * self.weight


class SwiGLU(nn.Module):
    """The gated feed-forward: W_down [silu(W_gate x) * W_up x] (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, width: int, hidden: int, *, bias: bool = False) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=bias)
        self.up = nn.Linear(width, hidden, bias=bias)
        self.down = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        y: Tensor = self.down(swiglu(self.gate(x), self.up(x)))
        return y


class ShortConvolution(nn.Module):
    """A causal convolution of each channel over its last few inputs, which lets a recurrence see its neighbours."""

    def __init__(
        self, width: int, kernel: int = 4, *, bias: bool = False, activation: Literal["silu"] | None = "silu"
    ) -> None:
        super().__init__()
        self.activation = activation
        bound = kernel**-0.5
        self.weight = nn.Parameter(torch.empty(width, kernel).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        state: Float[Tensor, "N W D"] | None = None,
        cu_seqlens: Int[Tensor, " N_plus_1"] | None = None,
    ) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "N W D"]]:
        """The filtered sequence and the last W - 1 inputs, oldest first."""
        y, state = causal_conv1d(
            x, self.weight, bias=self.bias, activation=self.activation, state=state, cu_seqlens=cu_seqlens
        )
        return y, state

    def reference(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        """The weighted sums of one sequence from its beginning, one token after another."""
        taps, outputs = self.weight.shape[1], []
        for t in range(len(x)):
            terms = [self.weight[:, taps - 1 - back] * x[t - back] for back in range(min(taps, t + 1))]
            outputs.append(torch.stack(terms).sum(0) + (0.0 if self.bias is None else self.bias))
        y = torch.stack(outputs)
        return y if self.activation is None else F.silu(y)


class Unfiltered(nn.Module):
    """What stands where a short convolution may: its inputs as they are."""

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        state: Float[Tensor, "N W D"],
        cu_seqlens: Int[Tensor, " N_plus_1"] | None = None,
    ) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "N W D"]]:
        return x, state

    def reference(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        return x


class LowRank(nn.Sequential):
    """A projection through a few channels: W_up W_down x (+ b)."""

    def __init__(self, inputs: int, rank: int, outputs: int, *, bias: bool = False) -> None:
        super().__init__(nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs, bias=bias))


def unit_heads(x: Float[Tensor, "B T H K"]) -> Float[Tensor, "B T H K"]:
    """Heads of length one; a head of zeros stays zero."""
    if kernels_serve(x):
        size = x.shape[-1]
        return rms_norm(x, torch.full((size,), size**-0.5), 1e-6 / size)
    return x * torch.rsqrt(exact(x).square().sum(-1, keepdim=True) + 1e-6).to(x.dtype)


def exact(x: Float[Tensor, "*B"]) -> Float[Tensor, "*B"]:
    """`x` in float32 at least: gates and decays lose too much in bfloat16."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _product_dtype(x: Tensor) -> torch.dtype:
    """What products with `x` are computed in: autocast's dtype where it is on."""
    device = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return x.dtype
    return torch.get_autocast_dtype(device)


def initial_steps(num_heads: int) -> Float[Tensor, " H"]:
    """Biases whose softplus is spread evenly in the logarithm from 0.001 to 0.1 (Gu and Dao 2023, section 3.6)."""
    steps = torch.empty(num_heads).uniform_(math.log(1e-3), math.log(1e-1)).exp()
    return steps + torch.log(-torch.expm1(-steps))


def linear_cross_entropy(
    x: Float[Tensor, "N D"],
    weight: Float[Tensor, "C D"],
    targets: Int[Tensor, " N"],
    *,
    bias: Float[Tensor, " C"] | None = None,
    reduction: Literal["mean", "none"] = "mean",
) -> Float[Tensor, "..."]:
    """Cross entropy in nats of the logits `x W^T + bias`, without ever holding all of them.

    Rows go through the vocabulary in pieces of about 16 MB of logits, and the gradient of a piece is formed while its
    logits are still in cache: the backward pass only scales what is there. A target below 0 is ignored.
    """
    if reduction == "mean" and torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        total: Tensor = _LinearCrossEntropy.apply(x, weight, bias, targets)  # type: ignore[no-untyped-call]
        return total / (targets >= 0).sum().clamp_min(1)
    rows, losses = _rows(weight), []
    for start in range(0, len(x), rows):
        logits = F.linear(x[start : start + rows], weight, bias)
        wanted = targets[start : start + rows].clamp_min(-1)
        losses.append(F.cross_entropy(exact(logits), wanted, ignore_index=-1, reduction="none"))
    each = torch.cat(losses) if losses else x.new_zeros(0)
    return each if reduction == "none" else each.sum() / (targets >= 0).sum().clamp_min(1)


def _rows(weight: Tensor) -> int:
    return max(64, (1 << 22) // len(weight))


class _LinearCrossEntropy(torch.autograd.Function):
    """The sum of the rows' cross entropies; gradients are made in the forward pass, piece by piece."""

    @staticmethod
    def forward(ctx, x, weight, bias, targets):  # type: ignore[no-untyped-def]
        # Under autocast the products run in its type; the softmax and the sums stay in float32.
        kind = _product_dtype(x)
        with torch.autocast(x.device.type, enabled=False):
            rows, w = x.to(kind), weight.to(kind)
            exact = torch.promote_types(x.dtype, torch.float32)
            grad_x = torch.empty_like(rows)
            grad_weight = torch.zeros_like(weight, dtype=exact)
            grad_bias = None if bias is None else torch.zeros_like(bias, dtype=exact)
            total = torch.zeros((), dtype=exact, device=x.device)
            step = _rows(weight)
            for start in range(0, len(rows), step):
                piece, wanted = rows[start : start + step], targets[start : start + step]
                slope = F.linear(piece, w)
                total += cross_entropy_(slope, wanted, bias).sum()
                if grad_bias is not None:
                    grad_bias += slope.sum(0, dtype=exact)
                grad_x[start : start + step] = slope @ w
                grad_weight += slope.T @ piece
        ctx.save_for_backward(grad_x.to(x.dtype), grad_weight.to(weight.dtype), grad_bias)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        grad_x, grad_weight, grad_bias = ctx.saved_tensors
        return grad_x * grad, grad_weight * grad, None if grad_bias is None else grad_bias * grad, None

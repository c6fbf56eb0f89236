"""The simple and the gated recurrent network over all steps of a call, and backpropagation through time by hand.

    tanh, relu    h_t = f(x_t + W h_{t-1} + b)
    gru           h_t = z_t * h_{t-1} + (1 - z_t) * n_t        n_t = tanh(x^n_t + r_t * (W_n h_{t-1} + b_n))
                  r_t, z_t = sigmoid(x_t + W h_{t-1} + b)

With d_t the gradient of h_t and everything that a step multiplies it with in one tensor P_t, a step backwards is

    D_t = P_t * d_t        d_{t-1} = dy_{t-1} + D_t W (+ z_t * d_t)
    dW = sum_t D_t^T h_{t-1}        db = sum_t D_t

so that P and the two sums are single operations over all steps (Werbos 1990, "Backpropagation Through Time"). Torch's
own kernels take several times as many operations a step, and add to dW at each.

Rows stand in rounds: the first tokens of all sequences, longest sequence first, then the second tokens of those that
have one, and so on (`everlong.ops.chunks`). Of M tokens, G gates and S channels there are `x [M, G S]` and `h [M, S]`;
states are `[N, S]`. It cannot be differentiated twice.
"""

import itertools
from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

Kind = Literal["tanh", "relu", "gru"]


def unrolled(
    kind: Kind,
    x: Float[Tensor, "M GS"],
    state: Float[Tensor, "N S"],
    weight: Float[Tensor, "GS S"],
    bias: Float[Tensor, " GS"],
    rounds: Sequence[slice],
) -> tuple[Float[Tensor, "M S"], Float[Tensor, "N S"]]:
    """All hidden states and each sequence's last one, from `state` before and the inputs' part `x` of the sums.

    `bias` is that of the hidden part; the rows of `weight` are those of the gates r, z, n where there are three.
    """
    sizes = [step.stop - step.start for step in rounds]
    h, last = _Unrolled.apply(kind, x, state, weight, bias, sizes)  # type: ignore[no-untyped-call]
    return h, last


class _Unrolled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, kind: Kind, x: Tensor, state: Tensor, weight: Tensor, bias: Tensor, sizes: list[int]
    ) -> tuple[Tensor, Tensor]:
        h = x.new_empty(len(x), state.shape[1])
        gates = _gated(x, state, weight, bias, h, sizes) if kind == "gru" else None
        if kind != "gru":
            _simple(kind, x + bias, state, weight, h, sizes)
        last, steps = state.clone(), torch.split(h, sizes)
        for t, rows in _endings(sizes):
            last[rows] = steps[t][rows]
        ctx.kind, ctx.sizes = kind, sizes
        ctx.save_for_backward(h, state, weight, *(gates or ()))
        return h, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_h: Tensor, d_last: Tensor) -> tuple[Tensor | None, ...]:
        sizes: list[int] = ctx.sizes
        h, state, weight, *gates = ctx.saved_tensors
        steps = (state, *torch.split(h, sizes)[:-1])
        before = torch.cat([left[:size] for left, size in zip(steps, sizes, strict=True)])
        keep = None
        if ctx.kind == "gru":
            r, keep, from_hidden = gates[0].chunk(3, -1)
            new = (1 - keep) * (1 - gates[1].square())  # of the sum in n
            slope = torch.stack([new * from_hidden * r * (1 - r), (before - gates[1]) * keep * (1 - keep), new * r], 1)
        else:
            slope = (1 - h.square() if ctx.kind == "tanh" else (h > 0).to(h.dtype))[:, None]
        total, d_state = d_h.clone(), d_last.clone()
        d_steps = torch.split(total, sizes)
        for t, rows in _endings(sizes):
            d_steps[t][rows] += d_last[rows]
        d_state[: sizes[0]] = 0.0
        d_sums = _backwards(slope, weight, keep, total, d_state, sizes)
        d_x = d_sums if ctx.kind != "gru" else torch.cat([d_sums[:, : -h.shape[1]], total * new], 1)
        return None, d_x, d_state, d_sums.mT @ before, d_sums.sum(0), None


def _simple(kind: Kind, x: Tensor, state: Tensor, weight: Tensor, h: Tensor, sizes: list[int]) -> None:
    """Writes the states of the simple network into `h`."""
    for x_t, h_t in zip(torch.split(x, sizes), torch.split(h, sizes), strict=True):
        torch.addmm(x_t, state[: len(x_t)], weight.mT, out=h_t)
        state = h_t.tanh_() if kind == "tanh" else h_t.relu_()


def _gated(
    x: Tensor, state: Tensor, weight: Tensor, bias: Tensor, h: Tensor, sizes: list[int]
) -> tuple[Tensor, Tensor]:
    """Writes the states of the gated network into `h`; r, z and the hidden part of n side by side, and n."""
    size = h.shape[1]
    sums, new = torch.empty_like(x), torch.empty_like(h)
    parts = (x[:, : 2 * size], x[:, 2 * size :], sums, sums[:, : 2 * size], *torch.split(sums, size, 1), new, h)
    steps = zip(*(torch.split(part, sizes) for part in parts), strict=True)
    for x_gates, x_new, sums_t, both, r, z, from_hidden, new_t, h_t in steps:
        state = state[: len(h_t)]
        torch.addmm(bias, state, weight.mT, out=sums_t)
        both.add_(x_gates).sigmoid_()
        torch.addcmul(x_new, r, from_hidden, out=new_t).tanh_()
        state = torch.lerp(new_t, state, z, out=h_t)
    return sums, new


def _backwards(
    slope: Tensor, weight: Tensor, keep: Tensor | None, total: Tensor, d_state: Tensor, sizes: list[int]
) -> Tensor:
    """The gradients of the sums, `[M, G S]`, from `slope [M, G, S]` (P above) and `total`, which holds what each state
    receives from elsewhere and receives what it gets through time; what is before the first step goes to `d_state`."""
    d_sums = torch.empty_like(slope)
    flat = d_sums.flatten(1)
    kept = [None] * len(sizes) if keep is None else torch.split(keep, sizes)
    totals = torch.split(total, sizes)
    targets = [d_state, *totals[:-1]]
    parts = (slope, d_sums, flat)
    steps = list(zip(*(torch.split(part, sizes) for part in parts), kept, totals, targets, strict=True))
    for slope_t, d_t, flat_t, keep_t, total_t, target in reversed(steps):
        torch.mul(slope_t, total_t[:, None], out=d_t)
        target = target[: len(total_t)]
        target.addmm_(flat_t, weight)
        if keep_t is not None:
            target.addcmul_(total_t, keep_t)
    return flat


def _endings(sizes: list[int]) -> list[tuple[int, slice]]:
    """The steps in which sequences end, and which of the step's rows these are."""
    ends = zip(itertools.count(), sizes, [*sizes[1:], 0], strict=False)
    return [(t, slice(after, size)) for t, size, after in ends if after < size]

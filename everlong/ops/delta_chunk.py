"""The delta rule and its generalisation in chunks: forward and backward as one opaque operator each, linear in time.

Both write what they first read. In a chunk the reads of its tokens are one triangular system, which the state S at the
chunk's start enters on the right (the WY form):

    read = A_ab u + A_ak v + reach_a S          o = scale * [ A_qb u + A_qk v + reach_q S ]
                                                S' = total S + store_b^T u + store_k^T v

    A_xy: products of receivers x (q; a) with sources y (b; k) under the decays between them, see decays.py
    diagonal plus low rank: a, b as given, u = read
    delta rule: a = b = k with no source k of its own, u = beta (v - read)

The backward pass holds the inputs and the states at the chunks' starts, and computes the rest again. It cannot be
differentiated once more; the recurrent form can.
"""

from typing import Any

import torch
from torch import Tensor

from everlong.ops.chunks import Layout, capacity_of, confine, plan, product_dtype, state_dtype, without_autocast
from everlong.ops.decays import Products, Weights, inverse, multiply, multiply_backward
from everlong.ops.stepwise import delta_steps, dplr_steps


class LowRank:
    """One call, cut into chunks; M counts chunks times heads of v, s = 1 or 2 are the sources of a token."""

    def __init__(
        self,
        layout: Layout,
        receivers: tuple[Tensor, Tensor],
        sources: tuple[Tensor, ...],
        v: Tensor,
        beta: Tensor | None,
        log_decay: Tensor | None,
        scale: float,
    ) -> None:
        self.layout, self.scale, self.heads, self.exact = layout, scale, v.shape[2], state_dtype(v.dtype)
        by_channel = log_decay is not None and log_decay.dim() == 4
        self.dtype = self.exact if by_channel else product_dtype(v.dtype)
        self.receivers = self.stack(receivers)  # [M, C, 2, K]
        self.sources = self.stack(sources) if beta is None else self.receivers[:, :, 1:]  # [M, C, s, K]
        self.v = self.chunks(v, self.dtype)  # [M, C, V]
        self.beta = None if beta is None else self.chunks(beta, self.exact)[:, :, None]  # [M, C, 1]
        self.decay: Tensor | Weights | None = None
        if log_decay is not None:
            self.decay = self.chunks(log_decay, self.exact)
            self.decay = self.decay if by_channel else Weights.of(self.decay)
        self.products = multiply(self.receivers, self.sources, self.decay, late=beta is None)
        self.reach, self.store = self.products.reach.flatten(1, 2), self.products.store.flatten(1, 2)
        self.inverse = inverse(self.system())  # [M, C, C]

    def chunks(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """`[B, T, H, ...]` -> `[M, C, ...]`"""
        return self.layout.chunks(x, self.heads, dtype)

    def stack(self, tensors: tuple[Tensor, ...]) -> Tensor:
        """`[B, T, H, K]` each -> `[M, C, n, K]`"""
        size, width = self.layout.size, tensors[0].shape[3]
        stacked = tensors[0].new_empty(self.layout.count, self.heads, size, len(tensors), width, dtype=self.dtype)
        for i, tensor in enumerate(tensors):
            self.layout.split(tensor, stacked[:, :, :, i])
        return stacked.flatten(0, 1)

    def system(self) -> Tensor:
        """What multiplies u in u; never of low precision, because the inverse would multiply its rounding errors."""
        lower = self.products.matrix[:, :, 1, :, 0]
        if self.dtype != self.exact:
            lower = torch.bmm(self.receivers[:, :, 1].to(self.exact), self.sources[:, :, 0].to(self.exact).mT)
            if isinstance(self.decay, Weights):
                lower *= self.decay.between
            lower.tril_(-1)
        return lower if self.beta is None else lower * -self.beta

    def solution(self) -> tuple[Tensor, Tensor, float]:
        """X [M, C, C], y [M, C, V] and z such that u = X (y + z reach_a S)."""
        if self.beta is None:
            return self.inverse.to(self.dtype), torch.bmm(self.products.matrix[:, :, 1, :, 1], self.v), 1.0
        return (self.inverse * self.beta.mT).to(self.dtype), self.v, -1.0

    def values(self) -> Tensor:
        """What each source writes, `[M, C, s, V]`; the first place is for u."""
        return self.v[:, :, None].expand(-1, -1, self.sources.shape[2], -1).contiguous()

    def rounds(self) -> list[slice]:
        """The rounds of chunks, as slices of M."""
        return [slice(chunks.start * self.heads, chunks.stop * self.heads) for chunks in self.layout.rounds]

    def advance(self, state: Tensor, update: Tensor, values: Tensor, chunks: slice) -> None:
        """state = total * state + update^T values, in place; `[n, K, V]`, `[n, i, K]`, `[n, i, V]`."""
        if self.products.total is not None:
            state *= self.products.total[chunks]
        if self.dtype == self.exact:
            state.baddbmm_(update.mT, values)
        else:
            state += torch.bmm(update.mT, values)

    def forward(self, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The chunks of o, the states before each, and the last state; `state [N, H, K, V]` is changed."""
        starts = state.new_empty(self.layout.capacity * self.heads, *state.shape[2:], dtype=self.dtype)
        starts[len(self.v) :].zero_()
        values, flat = self.values(), state.flatten(0, 1)
        (solve, base, sign), reach_a = self.solution(), self.products.reach[:, :, 1]
        for chunks in self.rounds():
            current = flat[: chunks.stop - chunks.start]
            starts[chunks] = current
            right = torch.baddbmm(base[chunks], reach_a[chunks], starts[chunks], alpha=sign)
            values[chunks, :, 0] = torch.bmm(solve[chunks], right)
            self.advance(current, self.store[chunks], values[chunks].flatten(1, 2), chunks)
        o = torch.bmm(self.products.reach[:, :, 0], starts[: len(self.v)])
        o.baddbmm_(self.products.matrix[:, :, 0].flatten(2), values.flatten(1, 2), beta=self.scale, alpha=self.scale)
        return o, torch.unflatten(starts, 0, (-1, self.heads)), flat.view_as(state)

    def backward(
        self, starts: Tensor, d_o: Tensor, d_state: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor]:
        """The gradients of the chunks of receivers, sources, v, beta and log_decay, and of the first state."""
        starts, values = starts.flatten(0, 1)[: len(self.v)], self.values()
        solve, base, sign = self.solution()
        right = torch.baddbmm(base, self.products.reach[:, :, 1], starts, alpha=sign)
        values[:, :, 0] = torch.bmm(solve, right)
        d_reads, d_values, d_u, ends, d_state = self.carry_back(d_o, d_state)
        flat_reads, flat_values = d_reads.flatten(1, 2), values.flatten(1, 2)
        gradient = Products(
            torch.bmm(flat_reads, flat_values.mT).view_as(self.products.matrix),
            torch.bmm(flat_reads, starts.mT).view_as(self.receivers),
            torch.bmm(flat_values, ends.mT).view_as(self.sources),
            self.total_gradient(starts, ends),
        )
        d_receivers, d_sources, d_log_decay = multiply_backward(
            self.receivers, self.sources, self.decay, self.products, gradient, late=self.beta is None
        )
        if self.beta is None:
            d_v = torch.bmm(self.products.matrix[:, :, 1, :, 1].mT, d_reads[:, :, 1]) + d_values[:, :, 1]
            return d_receivers, d_sources, d_v, None, d_log_decay, d_state
        error = right.baddbmm_(self.products.matrix[:, :, 1, :, 0], values[:, :, 0], alpha=-1)  # v - read
        return d_receivers, d_sources, d_reads[:, :, 1].neg(), (d_u * error).sum(2), d_log_decay, d_state

    def carry_back(self, d_o: Tensor, d_state: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The chunks in reverse: the gradients of reads by q and a, values, u, states after chunks, and the first."""
        d_reads = self.v.new_empty(*self.v.shape[:2], 2, self.v.shape[2])
        self.layout.split(d_o, torch.unflatten(d_reads, 0, (-1, self.heads))[:, :, :, 0])
        d_reads[:, :, 0] *= self.scale
        d_values = torch.bmm(self.products.matrix[:, :, 0].flatten(2).mT, d_reads[:, :, 0])  # [M, C s, V]
        flat, ends = d_state.flatten(0, 1), self.v.new_empty(len(self.v), *d_state.shape[2:])
        d_u, back = torch.empty_like(self.v), self.inverse.to(self.dtype).mT
        factor = None if self.beta is None else self.beta.neg().to(self.dtype)
        for chunks in reversed(self.rounds()):
            current = flat[: chunks.stop - chunks.start]
            ends[chunks] = current
            d_values[chunks].baddbmm_(self.store[chunks], ends[chunks])
            of_first = torch.unflatten(d_values[chunks], 1, self.sources.shape[1:3])[:, :, 0]
            d_u[chunks] = torch.bmm(back[chunks], of_first)
            d_reads[chunks, :, 1] = d_u[chunks] if factor is None else d_u[chunks] * factor[chunks]
            self.advance(current, self.reach[chunks], d_reads[chunks].flatten(1, 2), chunks)
        d_values = torch.unflatten(d_values, 1, self.sources.shape[1:3])
        return d_reads, d_values, d_u, ends, flat.view_as(d_state)

    def total_gradient(self, starts: Tensor, ends: Tensor) -> Tensor | None:
        """The gradient of the logarithm of each chunk's decay."""
        total = self.products.total
        if total is None:
            return None
        return total * (starts * ends).sum((1, 2) if isinstance(self.decay, Weights) else 2, keepdim=True)


def _cut(
    layout: Layout,
    scale: float,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    log_decay: Tensor | None,
) -> LowRank:
    if beta is not None:
        return LowRank(layout, (q, k), (), v, beta, log_decay, scale)
    assert a is not None
    assert b is not None
    return LowRank(layout, (q, a), (b, k), v, None, log_decay, scale)


@torch.library.custom_op("everlong::low_rank_chunk", mutates_args=())
def low_rank_chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    log_decay: Tensor | None,
    initial_state: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The delta rule, with `beta`, or diagonal plus low rank, with `a` and `b`, in chunks of `size`, a power of two.

    Shapes as `delta_rule` and `dplr`.

    Returns:
        o, the last state, and the states before each chunk for the backward pass.
    """
    layout = plan(v.shape[0], v.shape[1], cu_seqlens, size)

    def chunked(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        core = _cut(layout, scale, *inputs)
        o, starts, state = core.forward(layout.sort(initial_state))
        return layout.join(o, v.dtype), layout.unsort(state), starts

    def stepwise(q: Tensor, k: Tensor, v: Tensor, beta: Any, a: Any, b: Any, log_decay: Any) -> tuple[Tensor, Tensor]:
        if beta is None:
            return dplr_steps(q, k, v, a, b, log_decay, initial_state, cu_seqlens, scale)
        return delta_steps(q, k, v, beta, log_decay, initial_state, cu_seqlens, scale)

    with without_autocast(v):
        inputs = (q, k, v, beta, a, b, log_decay)
        o, state, starts = chunked(*inputs)
        o, state = confine(o, state, inputs, cu_seqlens, lambda *inputs: chunked(*inputs)[0], stepwise)
        return o, state, starts


@low_rank_chunk.register_fake
def _(q, k, v, beta, a, b, log_decay, initial_state, cu_seqlens, scale, size):  # type: ignore[no-untyped-def]
    packed = None if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shape = (capacity_of(v.shape[0], v.shape[1], packed, size), v.shape[2], q.shape[3], v.shape[3])
    dtype = state_dtype(v.dtype) if log_decay is not None and log_decay.dim() == 4 else product_dtype(v.dtype)
    o = torch.empty_like(v, memory_format=torch.contiguous_format)
    state = torch.empty_like(initial_state, memory_format=torch.contiguous_format)
    return o, state, v.new_empty(shape, dtype=dtype)


@torch.library.custom_op("everlong::low_rank_chunk_backward", mutates_args=())
def low_rank_chunk_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    log_decay: Tensor | None,
    cu_seqlens: Tensor | None,
    starts: Tensor,
    d_o: Tensor,
    d_state: Tensor,
    scale: float,
    size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v, beta, a, b, log_decay (empty where there is none) and the initial state."""
    with without_autocast(v):
        layout, inputs = plan(v.shape[0], v.shape[1], cu_seqlens, size), (q, k, v, beta, a, b, log_decay)
        core = _cut(layout, scale, *inputs)
        d_receivers, d_sources, d_v, d_beta, d_log_decay, d_state = core.backward(starts, d_o, layout.sort(d_state))
        (d_q, second), (first, *others) = d_receivers.unbind(2), d_sources.unbind(2)
        d_k, d_a, d_b = (others[0], second, first) if beta is None else (second + first, None, None)
        chunks = (d_q, d_k, d_v, d_beta, d_a, d_b, d_log_decay)
        return *layout.gradients(chunks, inputs), layout.unsort(d_state)  # type: ignore[return-value]


@low_rank_chunk_backward.register_fake
def _(q, k, v, beta, a, b, log_decay, cu_seqlens, starts, d_o, d_state, scale, size):  # type: ignore[no-untyped-def]
    like = (torch.empty(0) if x is None else x for x in (q, k, v, beta, a, b, log_decay, d_state))
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in like)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _, cu_seqlens, ctx.scale, ctx.size = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(*tensors, cu_seqlens, output[2])
    ctx.state = output[1].shape, output[1].dtype


def _backward(ctx: Any, d_o: Tensor | None, d_state: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    *tensors, cu_seqlens, starts = ctx.saved_tensors
    d_o = torch.zeros_like(tensors[2]) if d_o is None else d_o
    d_state = d_o.new_zeros(ctx.state[0], dtype=ctx.state[1]) if d_state is None else d_state
    *gradients, d_state = low_rank_chunk_backward(*tensors, cu_seqlens, starts, d_o, d_state, ctx.scale, ctx.size)
    found = (None if x is None else gradient for x, gradient in zip(tensors, gradients, strict=True))
    return *found, d_state, None, None, None


low_rank_chunk.register_autograd(_backward, setup_context=_setup)

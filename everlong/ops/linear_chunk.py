"""Linear attention in chunks: forward and backward as one opaque operator each, linear in time and memory.

    O_c = scale * [ (Q_c K_c^T * between_c) V_c + reach_c Q_c S_c ]          S_{c+1} = total_c S_c + K_c^T (store_c V_c)

for chunks c, whose first states S_c come from one short scan; `between`, `reach`, `store` and `total` are the decays of
decays.py. The backward pass holds the inputs and the S_c, and computes the rest again. It cannot be differentiated once
more; the recurrent form can.
"""

from typing import Any

import torch
from torch import Tensor

from everlong.ops.chunks import Layout, capacity_of, confine, plan, product_dtype, scan, state_dtype, without_autocast
from everlong.ops.decays import Products, Weights, multiply, multiply_backward
from everlong.ops.stepwise import linear_steps


class SharedDecay:
    """No decay, or one for each head: it is applied to the values.

    So heads that share queries and keys share everything made from these, with their values side by side ("wide").
    Below, M counts chunks times heads of q and k, and G the heads of v for each of them.
    """

    def __init__(self, layout: Layout, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, scale: float) -> None:
        self.layout, self.scale, self.dtype = layout, scale, product_dtype(v.dtype)
        self.heads, self.groups = q.shape[2], v.shape[2] // q.shape[2]
        self.q, self.k = (layout.chunks(x, self.heads, self.dtype) for x in (q, k))  # [M, C, K]
        self.v = layout.chunks(v, v.shape[2], self.dtype)  # [M G, C, V]
        self.weights = None
        if log_decay is not None:
            self.weights = Weights.of(layout.chunks(log_decay, v.shape[2], state_dtype(v.dtype)))
            self.between, self.reach, self.store = self.weights.cast(self.dtype)

    def wide(self, x: Tensor) -> Tensor:
        """`[M G, n, V]` -> `[M, n, G V]`"""
        return torch.unflatten(x, 0, (-1, self.groups)).transpose(1, 2).flatten(2)

    def narrow(self, x: Tensor) -> Tensor:
        """`[M, n, G V]` -> `[M G, n, V]`"""
        return torch.unflatten(x, 2, (self.groups, -1)).transpose(1, 2).flatten(0, 1)

    def reached(self, x: Tensor) -> Tensor:
        """`x [M G, C, V]` under the decay from the chunk's start."""
        return x if self.weights is None else x * self.reach[..., None]

    def stored(self, x: Tensor) -> Tensor:
        """`x [M G, C, V]` under the decay to the chunk's end."""
        return x if self.weights is None else x * self.store[..., None]

    def matrix(self) -> Tensor:
        """Each receiver's weights for the sources, `[M G, C, C]`."""
        products = torch.bmm(self.q, self.k.mT).tril_()
        if self.weights is None:
            return products if self.groups == 1 else products.repeat_interleave(self.groups, 0)
        return (products[:, None] * torch.unflatten(self.between, 0, (-1, self.groups))).flatten(0, 1)

    def carry(self, state: Tensor, update: Tensor, rounds: tuple[slice, ...]) -> tuple[Tensor, Tensor]:
        """Scans `update [M, K, G V]`: the states before each chunk, and the last one as `[N, H, K, V]`."""
        state = torch.unflatten(state, 1, (self.heads, self.groups)).transpose(2, 3).contiguous()  # [N, h, K, G, V]
        update = update.view(-1, *state.shape[1:]).to(state.dtype)
        total = self.weights and self.weights.total.view(-1, self.heads, 1, self.groups, 1)
        starts = scan(state, update, total, rounds, self.dtype, self.layout.capacity)
        return starts, state.transpose(2, 3).flatten(1, 2)

    def flat(self, states: Tensor) -> Tensor:
        """`[capacity, h, K, G, V]` -> `[M, K, G V]`"""
        return states[: self.layout.count].flatten(3).flatten(0, 1)

    def forward(self, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The chunks of o, the states before each, and the last state `[N, H, K, V]`."""
        update = torch.bmm(self.k.mT, self.wide(self.stored(self.v)))
        starts, state = self.carry(state, update, self.layout.rounds)
        o = self.reached(self.narrow(torch.bmm(self.q, self.flat(starts))))
        return o.baddbmm_(self.matrix(), self.v, beta=self.scale, alpha=self.scale), starts, state

    def backward(
        self, starts: Tensor, d_o: Tensor, d_state: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
        """The gradients of the chunks of q, k, v and log_decay, and of the first state."""
        d_o = self.layout.chunks(d_o, self.heads * self.groups, self.dtype).mul_(self.scale)
        d_reached, stored = self.reached(d_o), self.stored(self.v)
        d_ends, d_state = self.carry(d_state, torch.bmm(self.q.mT, self.wide(d_reached)), self.layout.rounds[::-1])
        starts, ends = self.flat(starts), self.flat(d_ends)
        matrix, d_matrix = self.matrix(), torch.bmm(d_o, self.v.mT)
        d_stored = self.stored(self.narrow(torch.bmm(self.k, ends)))
        d_reaching = torch.bmm(self.wide(d_reached), starts.mT)
        d_log_decay = None
        if self.weights is not None:
            if self.groups == 1:
                d_reach = (self.q * d_reaching).sum(2)
            else:
                d_reach = (self.narrow(torch.bmm(self.q, starts)) * d_reached).sum(2)
            d_store = (self.v * d_stored).sum(2)
            d_total = self.weights.total * self.narrow(starts * ends).sum((1, 2))
            d_log_decay = self.weights.gradient(d_matrix * matrix, d_reach, d_store, d_total)
            d_matrix *= self.between
        d_v = d_stored.baddbmm_(matrix.mT, d_o)
        d_products = torch.unflatten(d_matrix, 0, (-1, self.groups)).sum(1) if self.groups > 1 else d_matrix
        d_products.tril_()
        d_q = d_reaching.baddbmm_(d_products, self.k)
        d_k = torch.bmm(self.wide(stored), ends.mT).baddbmm_(d_products.mT, self.q)
        return d_q, d_k, d_v, d_log_decay, d_state


class ChannelDecay:
    """A decay for each channel of each head's keys. M counts chunks times heads of v."""

    def __init__(self, layout: Layout, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, scale: float) -> None:
        self.layout, self.scale = layout, scale
        self.heads, self.dtype = v.shape[2], state_dtype(v.dtype)
        self.q, self.k = (layout.chunks(x, self.heads, self.dtype)[:, :, None] for x in (q, k))  # [M, C, 1, K]
        self.v = layout.chunks(v, self.heads, self.dtype)  # [M, C, V]
        self.log_decay = layout.chunks(log_decay, self.heads, self.dtype)  # [M, C, K]
        self.products = multiply(self.q, self.k, self.log_decay, late=False)
        self.matrix = self.products.matrix.flatten(3).flatten(1, 2)
        self.reach, self.store = self.products.reach.squeeze(2), self.products.store.squeeze(2)

    def carry(self, state: Tensor, update: Tensor, rounds: tuple[slice, ...]) -> Tensor:
        """Scans `update [M, K, V]`: the states before each chunk."""
        assert self.products.total is not None
        total, update = (torch.unflatten(x, 0, (-1, self.heads)) for x in (self.products.total, update))
        return scan(state, update, total, rounds, self.dtype, self.layout.capacity)

    def forward(self, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The chunks of o, the states before each, and the last state."""
        starts = self.carry(state, torch.bmm(self.store.mT, self.v), self.layout.rounds)
        reached = torch.bmm(self.reach, starts[: self.layout.count].flatten(0, 1))
        return reached.baddbmm_(self.matrix, self.v, beta=self.scale, alpha=self.scale), starts, state

    def backward(
        self, starts: Tensor, d_o: Tensor, d_state: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
        """The gradients of the chunks of q, k, v and log_decay, and of the first state."""
        assert self.products.total is not None
        d_o = self.layout.chunks(d_o, self.heads, self.dtype).mul_(self.scale)
        ends = self.carry(d_state, torch.bmm(self.reach.mT, d_o), self.layout.rounds[::-1])
        starts, ends = (x[: self.layout.count].flatten(0, 1) for x in (starts, ends))
        gradient = Products(
            torch.bmm(d_o, self.v.mT)[:, :, None, :, None],
            torch.bmm(d_o, starts.mT)[:, :, None],
            torch.bmm(self.v, ends.mT)[:, :, None],
            self.products.total * (starts * ends).sum(2, keepdim=True),
        )
        d_v = torch.bmm(self.store, ends).baddbmm_(self.matrix.mT, d_o)
        d_q, d_k, d_log_decay = multiply_backward(self.q, self.k, self.log_decay, self.products, gradient, late=False)
        return d_q.squeeze(2), d_k.squeeze(2), d_v, d_log_decay, d_state


def _cut(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, cu_seqlens: Tensor | None, scale: float, size: int
) -> SharedDecay | ChannelDecay:
    layout = plan(v.shape[0], v.shape[1], cu_seqlens, size)
    if log_decay is not None and log_decay.dim() == 4:
        return ChannelDecay(layout, q, k, v, log_decay, scale)
    return SharedDecay(layout, q, k, v, log_decay, scale)


@torch.library.custom_op("everlong::linear_attention_chunk", mutates_args=())
def linear_attention_chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Linear attention in chunks of `size` tokens, a power of two; shapes as `linear_attention`.

    Returns:
        o, the last state, and the states before each chunk for the backward pass.
    """

    def chunked(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        core = _cut(q, k, v, log_decay, cu_seqlens, scale, size)
        o, starts, state = core.forward(core.layout.sort(initial_state))
        return core.layout.join(o, v.dtype), core.layout.unsort(state), starts

    with without_autocast(v):
        o, state, starts = chunked(q, k, v, log_decay)
        o, state = confine(
            o,
            state,
            (q, k, v, log_decay),
            cu_seqlens,
            lambda *inputs: chunked(*inputs)[0],
            lambda q, k, v, log_decay: linear_steps(q, k, v, log_decay, initial_state, cu_seqlens, scale),
        )
        return o, state, starts


@linear_attention_chunk.register_fake
def _(q, k, v, log_decay, initial_state, cu_seqlens, scale, size):  # type: ignore[no-untyped-def]
    packed = None if cu_seqlens is None else cu_seqlens.shape[0] - 1
    capacity = capacity_of(v.shape[0], v.shape[1], packed, size)
    if log_decay is not None and log_decay.dim() == 4:
        starts = v.new_empty(capacity, v.shape[2], q.shape[3], v.shape[3], dtype=state_dtype(v.dtype))
    else:
        shape = (capacity, q.shape[2], q.shape[3], v.shape[2] // q.shape[2], v.shape[3])
        starts = v.new_empty(shape, dtype=product_dtype(v.dtype))
    o, state = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (v, initial_state))
    return o, state, starts


@torch.library.custom_op("everlong::linear_attention_chunk_backward", mutates_args=())
def linear_attention_chunk_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    cu_seqlens: Tensor | None,
    starts: Tensor,
    d_o: Tensor,
    d_state: Tensor,
    scale: float,
    size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v, log_decay (empty where there is none) and the initial state."""
    with without_autocast(v):
        core = _cut(q, k, v, log_decay, cu_seqlens, scale, size)
        *chunks, d_state = core.backward(starts, d_o, core.layout.sort(d_state))
        d_q, d_k, d_v, d_log_decay = core.layout.gradients(chunks, (q, k, v, log_decay))
        return d_q, d_k, d_v, d_log_decay, core.layout.unsort(d_state)


@linear_attention_chunk_backward.register_fake
def _(q, k, v, log_decay, cu_seqlens, starts, d_o, d_state, scale, size):  # type: ignore[no-untyped-def]
    like = (q, k, v, torch.empty(0) if log_decay is None else log_decay, d_state)
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in like)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, log_decay, _, cu_seqlens, ctx.scale, ctx.size = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(q, k, v, log_decay, cu_seqlens, output[2])
    ctx.state = output[1].shape, output[1].dtype


def _backward(ctx: Any, d_o: Tensor | None, d_state: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    q, k, v, log_decay, cu_seqlens, starts = ctx.saved_tensors
    d_o = torch.zeros_like(v) if d_o is None else d_o
    d_state = v.new_zeros(ctx.state[0], dtype=ctx.state[1]) if d_state is None else d_state
    d_q, d_k, d_v, d_log_decay, d_state = linear_attention_chunk_backward(
        q, k, v, log_decay, cu_seqlens, starts, d_o, d_state, ctx.scale, ctx.size
    )
    return d_q, d_k, d_v, None if log_decay is None else d_log_decay, d_state, None, None, None


linear_attention_chunk.register_autograd(_backward, setup_context=_setup)

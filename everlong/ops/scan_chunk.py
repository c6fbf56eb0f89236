"""The linear scan and the selective scan in chunks of time: forward and backward as one opaque operator each.

Both backward passes are the same recurrence run from the end,

    d_t = g_t + conj(a_{t+1}) d_{t+1}            da_t = d_t conj(h_{t-1})            db_t = d_t

with g the gradient of the states. Nothing is divided and no logarithm is taken, so any gate is legal: 0, negative,
above 1. Neither operator can be differentiated twice; the reference can.
"""

import math
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from everlong.ops.chunks import without_autocast
from everlong.ops.spans import Span, spans

STEP = 1 << 14  # channels that one step of the linear scan should touch: fewer, and calling costs more than computing
PIECE = 1 << 19  # states that the selective scan holds at once: a few buffers of this size stay in the last cache

fresh = partial(torch.empty_like, memory_format=torch.contiguous_format)  # strided inputs have plain outputs


def linear_scan_torch(
    a: Tensor, b: Tensor, *, initial_state: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """h_t = a_t h_{t-1} + b_t in float32, or in float64 for float64 inputs."""
    a, x = a.to(initial_state.dtype), b.to(initial_state.dtype)
    h, last = linear_scan_chunk(a, x, initial_state, cu_seqlens, b.dim() == 4)
    return h.to(b.dtype), last


@torch.library.custom_op("everlong::linear_scan_chunk", mutates_args=())
def linear_scan_chunk(
    a: Tensor, b: Tensor, initial_state: Tensor, cu_seqlens: Tensor | None, pairs: bool
) -> tuple[Tensor, Tensor]:
    """The states `[B, T, D]` and the last ones `[N, D]`; with `pairs`, all have a last axis of 2 and are complex."""
    h, last = fresh(b), fresh(initial_state)
    a, b, state, out, end = (_channels(x, pairs) for x in (a, b, initial_state, h, last))
    for span in spans(b.shape[1], cu_seqlens):
        carry = state[span.sequences]
        if span.start < span.stop:
            first = out[:, span.start]
            torch.addcmul(b[:, span.start], a[:, span.start], carry, out=first)
            rest = slice(span.start + 1, span.stop)
            carry = _scan(first, a[:, rest], b[:, rest], out[:, rest], backwards=False)
        end[span.sequences] = carry
    return h, last


@linear_scan_chunk.register_fake
def _(a, b, initial_state, cu_seqlens, pairs):  # type: ignore[no-untyped-def]
    return fresh(b), fresh(initial_state)


@torch.library.custom_op("everlong::linear_scan_chunk_backward", mutates_args=())
def linear_scan_chunk_backward(
    a: Tensor, h: Tensor, initial_state: Tensor, cu_seqlens: Tensor | None, d_h: Tensor, d_last: Tensor, pairs: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of a, b and the initial state."""
    gradients = [fresh(x) for x in (h, h, initial_state)]
    d_a, d_b, d_state = (_channels(x, pairs) for x in gradients)
    a, h, state, d_h, d_last = (_channels(x, pairs) for x in (a, h, initial_state, d_h, d_last))
    if pairs:
        a, h, state = (x.conj().resolve_conj() for x in (a, h, state))
    for span in spans(h.shape[1], cu_seqlens):
        carry = d_last[span.sequences]
        if span.start < span.stop:
            before, after = slice(span.start, span.stop - 1), slice(span.start + 1, span.stop)
            last = torch.add(d_h[:, span.stop - 1], carry, out=d_b[:, span.stop - 1])
            first = _scan(last, a[:, after], d_h[:, before], d_b[:, before], backwards=True)
            torch.mul(d_b[:, after], h[:, before], out=d_a[:, after])
            torch.mul(first, state[span.sequences], out=d_a[:, span.start])
            carry = first * a[:, span.start]
        d_state[span.sequences] = carry
    return gradients[0], gradients[1], gradients[2]


@linear_scan_chunk_backward.register_fake
def _(a, h, initial_state, cu_seqlens, d_h, d_last, pairs):  # type: ignore[no-untyped-def]
    return fresh(h), fresh(h), fresh(initial_state)


def _setup_linear(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    a, _, initial_state, cu_seqlens, ctx.pairs = inputs
    ctx.save_for_backward(a, output[0], initial_state, cu_seqlens)


def _backward_linear(ctx: Any, d_h: Tensor, d_last: Tensor) -> tuple[Tensor | None, ...]:
    return *linear_scan_chunk_backward(*ctx.saved_tensors, d_h, d_last, ctx.pairs), None, None


linear_scan_chunk.register_autograd(_backward_linear, setup_context=_setup_linear)


def _channels(x: Tensor, pairs: bool) -> Tensor:
    """`x`, with pairs of real numbers read as complex ones."""
    return torch.view_as_complex(x.contiguous()) if pairs else x


def _scan(carry: Tensor, a: Tensor, b: Tensor, out: Tensor, *, backwards: bool) -> Tensor:
    """out_t = a_t out_{t-1} + b_t along axis 1, from `carry [B, D]`; backwards, from the last step to the first.

    Few channels are cut into pieces of time that step together: once from zero, which gives what each piece adds, and,
    when the pieces' own states are known, once more for the outputs.

    Returns:
        The last state computed, `[B, D]`.
    """
    steps = out.shape[1]
    count = min(STEP // max(carry.numel(), 1), math.isqrt(steps))
    if count > 1:
        size = steps // count
        whole = slice(steps - count * size, steps) if backwards else slice(0, count * size)
        shape = (out.shape[0], count, size, out.shape[2])
        a_pieces, b_pieces, out_pieces = (x[:, whole].view(shape) for x in (a, b, out))
        starts = _piece_starts(carry, a_pieces, b_pieces, backwards)
        ends = _steps(starts, a_pieces, b_pieces, out_pieces.unbind(2), backwards)
        carry = ends[:, 0 if backwards else -1]
        rest = slice(0, whole.start) if backwards else slice(whole.stop, steps)
        a, b, out = a[:, rest], b[:, rest], out[:, rest]
    return _steps(carry, a, b, out.unbind(1), backwards)


def _steps(carry: Tensor, a: Tensor, b: Tensor, outs: Iterable[Tensor], backwards: bool) -> Tensor:
    """One step after another along the axis before the last."""
    steps = list(zip(a.unbind(-2), b.unbind(-2), outs, strict=True))
    for a_t, b_t, out_t in reversed(steps) if backwards else steps:
        carry = torch.addcmul(b_t, a_t, carry, out=out_t)
    return carry


def _piece_starts(carry: Tensor, a: Tensor, b: Tensor, backwards: bool) -> Tensor:
    """The states `[B, pieces, D]` before each piece of `a, b [B, pieces, size, D]`."""
    state = torch.zeros_like(b[:, :, 0])
    added = _steps(state, a, b, [state] * a.shape[2], backwards).unbind(1)
    kept = a.prod(2).unbind(1)
    starts = fresh(state)
    order = range(len(added))
    for piece in reversed(order) if backwards else order:
        starts[:, piece] = carry
        # A product of gates may overflow where no state does: nothing times that is still nothing.
        carry = torch.where(carry == 0, added[piece], torch.addcmul(added[piece], kept[piece], carry))
    return starts


def selective_scan_torch(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    initial_state: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Mamba's scan in float32, or in float64 for float64 inputs."""
    dtype = initial_state.dtype
    x, dt, A, B, C = (tensor.to(dtype) for tensor in (u, dt, A, B, C))
    if dt_bias is not None:
        dt = dt + dt_bias.to(dtype)
    if dt_softplus:
        dt = softplus(dt)
    size = max(8, min(256, PIECE // max(x.shape[0] * A.numel(), 1)))
    y, state, _ = selective_scan_chunk(x, dt, A, B, C, initial_state, cu_seqlens, size)
    if D is not None:
        y = torch.addcmul(y, x, D.to(dtype))
    if z is not None:
        y = y * silu(z.to(dtype))
    return y.to(u.dtype), state


class _Piece:
    """Some steps of the selective scan: inputs and states with time first and channels last, `[size, B, N, D]`."""

    def __init__(self, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, size: int, buffers: int) -> None:
        self.inputs, self.size = (u, dt, B, C), size
        self.A = A.mT.contiguous()  # [N, D]
        self.exponents = self.A * math.log2(math.e)  # of 2: `exp2` is several times as fast as `exp`
        self.buffers = u.new_empty(buffers, size, u.shape[0], *self.A.shape)

    def read(self, time: slice, start: Tensor) -> None:
        """Computes the decays and the states of the steps `time`, from the state `start [B, N, D]`."""
        self.u, self.dt, self.B, self.C = (x[:, time].transpose(0, 1) for x in self.inputs)
        self.decay, self.states, *self.rest = self.buffers[:, : time.stop - time.start]
        torch.mul(self.dt[:, :, None], self.exponents, out=self.decay).exp2_()
        torch.mul((self.u * self.dt)[:, :, None], self.B[..., None], out=self.states)
        for decay, state in zip(self.decay.unbind(), self.states.unbind(), strict=True):
            start = state.addcmul_(decay, start)

    def cut(self, span: Span) -> list[slice]:
        """The steps of one span, in pieces."""
        return [slice(t, min(t + self.size, span.stop)) for t in range(span.start, span.stop, self.size)]


@torch.library.custom_op("everlong::selective_scan_chunk", mutates_args=())
def selective_scan_chunk(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor,
    cu_seqlens: Tensor | None,
    size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """h = exp(dt A) h + dt B u, y = C . h; shapes as `selective_scan`, all in one dtype.

    Returns:
        y, the last states, and those before each piece of `size` steps for the backward pass.
    """
    piece, last = _Piece(u, dt, A, B, C, max(1, min(size, u.shape[1])), buffers=2), fresh(initial_state)
    y = fresh(u)
    starts = u.new_empty(_capacity(u, cu_seqlens, size), u.shape[0], *piece.A.shape)
    count = 0
    with without_autocast(u):
        for span in spans(u.shape[1], cu_seqlens):
            state = initial_state[span.sequences].mT
            for time in piece.cut(span):
                starts[count] = state
                piece.read(time, starts[count])
                y[:, time] = (piece.C[:, :, None] @ piece.states)[:, :, 0].transpose(0, 1)
                state, count = piece.states[-1], count + 1
            last[span.sequences] = state.mT
    return y, last, starts


@selective_scan_chunk.register_fake
def _(u, dt, A, B, C, initial_state, cu_seqlens, size):  # type: ignore[no-untyped-def]
    starts = u.new_empty(_capacity(u, cu_seqlens, size), u.shape[0], A.shape[1], A.shape[0])
    y = fresh(u)
    return y, fresh(initial_state), starts


def _capacity(u: Tensor, cu_seqlens: Tensor | None, size: int) -> int:
    """An upper bound of the number of pieces, from shapes alone."""
    return -(-u.shape[1] // size) if cu_seqlens is None else u.shape[1] // size + cu_seqlens.shape[0] - 1


@torch.library.custom_op("everlong::selective_scan_chunk_backward", mutates_args=())
def selective_scan_chunk_backward(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    cu_seqlens: Tensor | None,
    starts: Tensor,
    d_y: Tensor,
    d_last: Tensor,
    size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of u, dt, A, B, C and the initial state; the states are computed again, piece by piece."""
    piece = _Piece(u, dt, A, B, C, max(1, min(size, u.shape[1])), buffers=4)
    d_u, d_dt, d_B, d_C = (fresh(x) for x in (u, dt, B, C))
    d_A, d_initial = torch.zeros_like(piece.A), fresh(d_last)
    everything = spans(u.shape[1], cu_seqlens)
    count = sum(len(piece.cut(span)) for span in everything)
    with without_autocast(u):
        for span in reversed(everything):
            d_state = d_last[span.sequences].mT.contiguous()
            for time in reversed(piece.cut(span)):
                count -= 1
                piece.read(time, starts[count])
                gradients = _piece_backward(piece, starts[count], d_y[:, time].transpose(0, 1), d_state, d_A)
                for whole, part in zip((d_u, d_dt, d_B, d_C), gradients, strict=True):
                    whole[:, time] = part.transpose(0, 1)
            d_initial[span.sequences] = d_state.mT
    return d_u, d_dt, d_A.mT.contiguous(), d_B, d_C, d_initial


def _piece_backward(
    piece: _Piece, start: Tensor, d_y: Tensor, d_state: Tensor, d_A: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of a piece's u, dt, B and C. `d_state [B, N, D]`, of the last state, becomes that of the first;
    what A receives is added to `d_A [N, D]`."""
    d_states, scratch = piece.rest
    d_C = torch.mul(piece.states, d_y[:, :, None], out=scratch).sum(3)
    torch.mul(d_y[:, :, None], piece.C[..., None], out=d_states)
    before = d_state
    for decay, d_h, kept in zip(*(reversed(x.unbind()) for x in (piece.decay, d_states, scratch)), strict=True):
        d_h += before
        before = torch.mul(d_h, decay, out=kept)
    d_state.copy_(before)
    d_B = torch.mul(d_states, (piece.u * piece.dt)[:, :, None], out=piece.decay).sum(3)
    d_input = (piece.B[:, :, None] @ d_states)[:, :, 0]  # of dt u
    scratch[0] *= start
    scratch[1:] *= piece.states[:-1]
    d_exponent = scratch  # of dt A
    d_dt = torch.mul(d_exponent, piece.A, out=d_states).sum(2)
    d_A += torch.mul(d_exponent, piece.dt[:, :, None], out=d_states).sum((0, 1))
    return d_input * piece.dt, d_dt.addcmul_(d_input, piece.u), d_B, d_C


@selective_scan_chunk_backward.register_fake
def _(u, dt, A, B, C, cu_seqlens, starts, d_y, d_last, size):  # type: ignore[no-untyped-def]
    return tuple(fresh(x) for x in (u, dt, A, B, C, d_last))


def _setup_selective(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _, cu_seqlens, ctx.size = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(*tensors, cu_seqlens, output[2])


def _backward_selective(ctx: Any, d_y: Tensor, d_last: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *selective_scan_chunk_backward(*ctx.saved_tensors, d_y, d_last, ctx.size), None, None


selective_scan_chunk.register_autograd(_backward_selective, setup_context=_setup_selective)

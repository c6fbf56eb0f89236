"""Causal convolutions of each channel with itself: a few taps by shifted products, long kernels by FFT.

    y_t = act( bias + sum_i w_i x_{t-W+1+i} )

Short ones go through the sequences in blocks that stay in cache. Their backward pass holds the inputs only and computes
the sum again for the activation's slope. Both are opaque operators that cannot be differentiated twice.
"""

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import silu

from everlong.ops.chunks import state_dtype
from everlong.ops.spans import Span, spans
from everlong.ops.tree import ConvolutionRecords, Tree

BLOCK = 1 << 18  # numbers in a block: the few tensors of this size that are in use stay in the last cache
SPECTRUM = 1 << 19  # numbers transformed at once, so that a few such tensors stay in cache

fresh = partial(torch.empty_like, memory_format=torch.contiguous_format)  # strided inputs have plain outputs


def causal_conv1d_torch(
    x: Tensor, weight: Tensor, *, bias: Tensor | None, activation: str | None, state: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The short convolution in float32, or in float64 for float64 inputs."""
    weight, bias = weight.to(state.dtype), None if bias is None else bias.to(state.dtype)
    y, after = short_convolution(x, weight, bias, state, cu_seqlens, activation == "silu")
    return y, after


def causal_conv1d_tree_torch(
    x: Tensor, weight: Tensor, *, tree: Tree, bias: Tensor | None, activation: str | None, state: Tensor
) -> tuple[Tensor, ConvolutionRecords]:
    """The short convolution over a tree: for each tap, the inputs of the nodes' ancestors at that distance."""
    reach, depth = weight.shape[1] - 1, tree.depth
    seen, taps = torch.cat([state, x.to(state.dtype)], 1), weight.to(state.dtype)
    y = torch.zeros_like(x, dtype=state.dtype) if bias is None else bias.to(state.dtype).expand(x.shape)
    for back in range(reach + 1):
        source = reach - (back - depth)  # in the state, counted from its end
        if back < tree.ancestors.shape[1]:
            ancestor = tree.ancestors[:, back]
            source = torch.where(ancestor >= 0, reach + ancestor, source)
        y = torch.addcmul(y, seen.index_select(1, source), taps[:, reach - back])
    y = y if activation is None else silu(y)
    return y.to(x.dtype), ConvolutionRecords(tree.parents, x, state)


def blocks(x: Tensor, span: Span) -> Iterator[tuple[slice, list[slice]]]:
    """A span of `x [B, T, D]` cut into blocks: some rows, and the times that they go through in order."""
    channels, length = max(x.shape[2], 1), max(span.stop - span.start, 1)
    rows = max(1, BLOCK // (length * channels))
    steps = max(1, BLOCK // (rows * channels))
    times = [slice(t, min(t + steps, span.stop)) for t in range(span.start, span.stop, steps)]
    for row in range(0, x.shape[0], rows):
        yield slice(row, row + rows), times


def sequences_of(rows: slice, span: Span) -> slice:
    """The states of those rows: a packed row has one for each span."""
    return rows if span.sequences == slice(None) else span.sequences


def filtered(window: Tensor, taps: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """`window [B, t + W - 1, D]` through `taps [W, D]` into `out [B, t, D]`."""
    steps = out.shape[1]
    if bias is None:
        torch.mul(window[:, :steps], taps[0], out=out)
    else:
        torch.addcmul(bias, window[:, :steps], taps[0], out=out)
    for i in range(1, len(taps)):
        out.addcmul_(window[:, i : i + steps], taps[i])
    return out


@contextlib.contextmanager
def exact(target: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """`target` itself, or a tensor in `dtype` that is rounded into it at the end."""
    out = target if target.dtype == dtype else torch.empty_like(target, dtype=dtype)
    yield out
    if out is not target:
        target.copy_(out)


@torch.library.custom_op("everlong::short_convolution", mutates_args=())
def short_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, cu_seqlens: Tensor | None, activated: bool
) -> tuple[Tensor, Tensor]:
    """Shapes as `causal_conv1d`; `activated` applies SiLU. The new state is the last W - 1 inputs."""
    y = fresh(x)
    after, taps = fresh(state), weight.mT.contiguous()
    for span in spans(x.shape[1], cu_seqlens):
        for rows, times in blocks(x, span):
            history = state[sequences_of(rows, span)]
            for time in times:
                window = torch.cat([history, x[rows, time]], 1)
                with exact(y[rows, time], state.dtype) as out:
                    filtered(window, taps, bias, out)
                    if activated:
                        silu(out, inplace=True)
                history = window[:, window.shape[1] - state.shape[1] :]
            after[sequences_of(rows, span)] = history
    return y, after


@short_convolution.register_fake
def _(x, weight, bias, state, cu_seqlens, activated):  # type: ignore[no-untyped-def]
    return fresh(x), fresh(state)


@torch.library.custom_op("everlong::short_convolution_backward", mutates_args=())
def short_convolution_backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    cu_seqlens: Tensor | None,
    d_y: Tensor,
    d_after: Tensor,
    activated: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, weight, bias (zeros where there is none) and the initial state."""
    d_x, d_state = fresh(x), fresh(state)
    taps = weight.mT.contiguous()
    d_taps, d_bias = torch.zeros_like(taps), torch.zeros_like(taps[0])
    for span in spans(x.shape[1], cu_seqlens):
        for rows, times in blocks(x, span):
            sequences = sequences_of(rows, span)
            # What a later block gives to the inputs before it; behind the last one, what the final state receives.
            d_history = d_after[sequences]
            for time in reversed(times):
                window = _window(x[rows], state[sequences], span.start, time)
                frame = _slopes(window, taps, bias, d_y[rows, time], activated)
                _add_weights(window, frame, d_taps, None if bias is None else d_bias)
                with exact(d_x[rows, time], state.dtype) as out:
                    d_history = _inputs(frame, taps, d_history, out)
            d_state[sequences] = d_history
    return d_x, d_taps.mT.contiguous(), d_bias, d_state


def _window(x: Tensor, state: Tensor, start: int, time: slice) -> Tensor:
    """The inputs that the outputs of `time` see, `[B, W - 1 + t, D]`: before `start`, those in the state."""
    first = max(start, time.start - state.shape[1])
    return torch.cat([state[:, time.start - start :], x[:, first : time.stop]], 1)


def _slopes(window: Tensor, taps: Tensor, bias: Tensor | None, d_y: Tensor, activated: bool) -> Tensor:
    """The gradient of the sums before the activation, between W - 1 zeros on either side: `[B, t + 2 (W - 1), D]`."""
    reach = len(taps) - 1
    frame = window.new_empty(window.shape[0], window.shape[1] + reach, window.shape[2])
    slope = frame[:, reach : window.shape[1]]
    frame[:, :reach] = frame[:, window.shape[1] :] = 0.0
    if activated:
        sums = filtered(window, taps, bias, torch.empty_like(slope))
        torch.ops.aten.silu_backward.grad_input(d_y.to(slope.dtype), sums, grad_input=slope)
    else:
        slope.copy_(d_y)
    return frame


def _add_weights(window: Tensor, frame: Tensor, d_taps: Tensor, d_bias: Tensor | None) -> None:
    """Adds what the taps and the bias receive."""
    slope = frame[:, len(d_taps) - 1 : window.shape[1]]
    product = torch.empty_like(slope)
    for i, d_tap in enumerate(d_taps):
        d_tap += torch.mul(slope, window[:, i : i + slope.shape[1]], out=product).sum((0, 1))
    if d_bias is not None:
        d_bias += slope.sum((0, 1))


def _inputs(frame: Tensor, taps: Tensor, d_after: Tensor, out: Tensor) -> Tensor:
    """Writes what the inputs receive into `out [B, t, D]` and returns it for the W - 1 inputs before them.

    `d_after` is what the last W - 1 of all these receive from elsewhere.
    """
    reach, steps = len(taps) - 1, out.shape[1]
    mirrored, shared = taps.flip(0), min(reach, steps)
    filtered(frame[:, reach:], mirrored, None, out)
    out[:, steps - shared :] += d_after[:, reach - shared :]
    before = filtered(frame[:, : 2 * reach], mirrored, None, torch.empty_like(d_after))
    before[:, steps:] += d_after[:, : reach - shared]
    return before


@short_convolution_backward.register_fake
def _(x, weight, bias, state, cu_seqlens, d_y, d_after, activated):  # type: ignore[no-untyped-def]
    d_x = fresh(x)
    return d_x, fresh(weight), fresh(weight[:, 0]), fresh(state)


def _setup_short(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.activated = inputs
    ctx.save_for_backward(*tensors)


def _backward_short(ctx: Any, d_y: Tensor, d_after: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    d_x, d_weight, d_bias, d_state = short_convolution_backward(*saved, d_y, d_after, ctx.activated)
    return d_x, d_weight, None if saved[2] is None else d_bias, d_state, None, None


short_convolution.register_autograd(_backward_short, setup_context=_setup_short)


class Part(NamedTuple):
    """What one transform of a long convolution covers."""

    time: slice
    channels: slice
    size: int  # of the transform, in steps of time


def parts(u: Tensor, kernel: Tensor, cu_seqlens: Tensor | None) -> Iterator[Part]:
    """Each sequence (a batch counts as one), some channels at a time: spectra of long sequences take much memory."""
    for span in spans(u.shape[1], cu_seqlens):
        length = span.stop - span.start
        if length:
            size = fft_size(length + min(length, kernel.shape[1]) - 1)
            step = max(1, SPECTRUM // (size * max(u.shape[0], 1)))
            for channel in range(0, u.shape[2], step):
                yield Part(span.time, slice(channel, channel + step), size)


def fft_size(needed: int) -> int:
    """The smallest of 2^n, 3 2^n, 5 2^n, 9 2^n, 15 2^n that is large enough."""
    return min(odd << max(0, (-(-needed // odd) - 1).bit_length()) for odd in (1, 3, 5, 9, 15))


def spectrum(x: Tensor, size: int) -> Tensor:
    """The transform of `x [..., T, D]` along time, cut or zero-padded to `size`."""
    found: Tensor = torch.fft.rfft(x.to(state_dtype(x.dtype)), size, dim=-2)
    return found


@torch.library.custom_op("everlong::fft_convolution", mutates_args=())
def fft_convolution(u: Tensor, kernel: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """y_t = sum_{s <= t} kernel_s u_{t-s} for `u [B, T, D]`, `kernel [D, L]`, each packed sequence for itself."""
    y = fresh(u)
    for time, channels, size in parts(u, kernel, cu_seqlens):
        here, length = (slice(None), time, channels), time.stop - time.start
        taps = kernel[channels, :length].mT
        y[here] = torch.fft.irfft(spectrum(u[here], size) * spectrum(taps, size), size, dim=-2)[:, :length]
    return y


@fft_convolution.register_fake
def _(u, kernel, cu_seqlens):  # type: ignore[no-untyped-def]
    return fresh(u)


@torch.library.custom_op("everlong::fft_convolution_backward", mutates_args=())
def fft_convolution_backward(
    u: Tensor, kernel: Tensor, cu_seqlens: Tensor | None, d_y: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of u and kernel: each is d_y correlated with the other one."""
    d_u = fresh(u)
    d_kernel = kernel.new_zeros(kernel.shape, dtype=state_dtype(kernel.dtype))
    for time, channels, size in parts(u, kernel, cu_seqlens):
        here, length = (slice(None), time, channels), time.stop - time.start
        taps = kernel[channels, :length].mT
        slope = spectrum(d_y[here], size)
        d_u[here] = torch.fft.irfft(slope * spectrum(taps, size).conj(), size, dim=-2)[:, :length]
        products = (slope * spectrum(u[here], size).conj()).sum(0)
        d_kernel[channels, :length] += torch.fft.irfft(products, size, dim=-2)[: len(taps)].mT
    return d_u, d_kernel.to(kernel.dtype)


@fft_convolution_backward.register_fake
def _(u, kernel, cu_seqlens, d_y):  # type: ignore[no-untyped-def]
    return tuple(fresh(x) for x in (u, kernel))


def _setup_fft(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward_fft(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
    return *fft_convolution_backward(*ctx.saved_tensors, d_y), None


fft_convolution.register_autograd(_backward_fft, setup_context=_setup_fft)

"""Recurrences whose state is a vector for each channel, convolutions along time, and the maximum of a sliding window.

    linear_scan       h_t = a_t h_{t-1} + b_t
    selective_scan    h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t          y_t = (C_t . h_t + D u_t) * silu(z_t)
    causal_conv1d     y_t = act( bias + sum_i w_i x_{t-W+1+i} )
    long_convolution  y_t = sum_{s <= t} k_s u_{t-s}

Shapes    x, u, dt, a, b, y [B, T, D];  A [D, N];  B, C [B, T, N];  w [D, W];  k [D, T]
States    [B, D];  [B, D, N];  the last inputs [B, W - 1, D];  float32, or float64 for float64 inputs
Cost      FLOPs a token, forward: 2 D;  6 D N;  2 D W;  O(D log T)
Source    Martin and Cundy 2018, arXiv 1709.04057 (scans); Gu and Dao 2023, arXiv 2312.00752, section 3 (selective
          scan); van Herk 1992, Gil and Werman 1993 (window maximum)

Under `cu_seqlens` [N + 1], 0 first and T last, one row (B = 1) holds N sequences that do not see each other, and states
are [N, ...]. The references below are the definitions; the fast forms are in scan_chunk.py and convolution.py.
"""

from typing import overload

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.nn.functional import pad, silu, softplus

from everlong.config import unknown
from everlong.ops import dispatch
from everlong.ops.chunks import state_dtype
from everlong.ops.convolution import causal_conv1d_torch, causal_conv1d_tree_torch, fft_convolution
from everlong.ops.scan_chunk import linear_scan_torch, selective_scan_torch
from everlong.ops.scoring import uncompiled
from everlong.ops.spans import spans
from everlong.ops.tree import ConvolutionRecords, Tree

__all__ = [
    "causal_conv1d",
    "causal_conv1d_reference",
    "causal_conv1d_torch",
    "causal_conv1d_tree_reference",
    "causal_conv1d_tree_torch",
    "linear_scan",
    "linear_scan_reference",
    "linear_scan_torch",
    "long_convolution",
    "selective_scan",
    "selective_scan_reference",
    "selective_scan_torch",
    "sliding_window_max",
]


def linear_scan(
    a: Float[Tensor, "B T *D"],
    b: Float[Tensor, "B T *D"],
    *,
    initial_state: Float[Tensor, "N *D"] | None = None,
    cu_seqlens: Int[Tensor, " N_plus_1"] | None = None,
    backend: str = "auto",
) -> tuple[Float[Tensor, "B T *D"], Float[Tensor, "N *D"]]:
    """h_t = a_t h_{t-1} + b_t for each channel, from the initial state or 0.

    Args:
        a: the gates, any numbers: 0, negative, above 1. With a last axis of 2, `[B, T, D, 2]`, these and all others are
            complex, as pairs of real and imaginary part.
        b: what enters.
        initial_state: `[N, D]`, or `[N, D, 2]`.
        cu_seqlens: where the sequences in one row begin and end.

    Returns:
        All states, in the dtype of b, and the last ones, `[N, D]`, in float32 (float64 for float64).

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    if a.shape != b.shape or a.dim() not in (3, 4) or (a.dim() == 4 and a.shape[3] != 2):
        raise ValueError(
            f"`a` and `b` are both [B, T, D], or [B, T, D, 2] if complex: got {list(a.shape)} and {list(b.shape)}"
        )
    state = _state(initial_state, b, b.shape[2:], cu_seqlens)
    compute = dispatch.choose("linear_scan", backend, b)
    h, last = compute(a, b, initial_state=state, cu_seqlens=cu_seqlens)
    return h, last


def selective_scan(
    u: Float[Tensor, "B T D"],
    dt: Float[Tensor, "B T D"],
    A: Float[Tensor, "D N"],
    B: Float[Tensor, "B T N"],
    C: Float[Tensor, "B T N"],
    *,
    D: Float[Tensor, " D"] | None = None,
    z: Float[Tensor, "B T D"] | None = None,
    dt_bias: Float[Tensor, " D"] | None = None,
    dt_softplus: bool = False,
    initial_state: Float[Tensor, "S D N"] | None = None,
    cu_seqlens: Int[Tensor, " S_plus_1"] | None = None,
    backend: str = "auto",
) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "S D N"]]:
    """Mamba's scan: N states for each channel, whose decay, input and output depend on the token.

    Args:
        u: the input.
        dt: step sizes, after `dt + dt_bias` and, with `dt_softplus`, a softplus.
        A: usually negative; the decay of a step is exp(dt A) (zero-order hold), its input dt B u (Euler).
        D: passes the input on, `y = C . h + D u`.
        z: gates the output, `y silu(z)`.
        initial_state: `[B, D, N]`, 0 if None.
        cu_seqlens: where the sequences in one row begin and end.

    Returns:
        y in the dtype of u, and the last states in float32 (float64 for float64).

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    shapes = f"got u {list(u.shape)}, dt {list(dt.shape)}, A {list(A.shape)}, B {list(B.shape)}, C {list(C.shape)}"
    if u.dim() != 3 or dt.shape != u.shape or (z is not None and z.shape != u.shape):
        raise ValueError(f"`u`, `dt` and `z` are all [B, T, D]: {shapes}, z {None if z is None else list(z.shape)}")
    if A.dim() != 2 or A.shape[0] != u.shape[2] or B.shape != (*u.shape[:2], A.shape[1]) or C.shape != B.shape:
        raise ValueError(f"`A` is [D, N], `B` and `C` are [B, T, N]: {shapes}")
    for name, vector in (("D", D), ("dt_bias", dt_bias)):
        if vector is not None and vector.shape != u.shape[2:]:
            raise ValueError(f"`{name}` has a number for each channel, [{u.shape[2]}]: got {list(vector.shape)}")
    state = _state(initial_state, u, A.shape, cu_seqlens)
    compute = dispatch.choose("selective_scan", backend, u)
    y, last = compute(
        u,
        dt,
        A,
        B,
        C,
        D=D,
        z=z,
        dt_bias=dt_bias,
        dt_softplus=dt_softplus,
        initial_state=state,
        cu_seqlens=cu_seqlens,
    )
    return y, last


@overload
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = ...,
    activation: str | None = ...,
    state: Tensor | None = ...,
    cu_seqlens: Tensor | None = ...,
    parents: None = ...,
    backend: str = ...,
) -> tuple[Tensor, Tensor]: ...


@overload
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = ...,
    activation: str | None = ...,
    state: Tensor | None = ...,
    cu_seqlens: Tensor | None = ...,
    parents: Tensor,
    backend: str = ...,
) -> tuple[Tensor, ConvolutionRecords]: ...


def causal_conv1d(
    x: Float[Tensor, "B T D"],
    weight: Float[Tensor, "D W"],
    *,
    bias: Float[Tensor, " D"] | None = None,
    activation: str | None = None,
    state: Float[Tensor, "N W_minus_1 D"] | None = None,
    cu_seqlens: Int[Tensor, " N_plus_1"] | None = None,
    parents: Int[Tensor, " T"] | None = None,
    backend: str = "auto",
) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "N W_minus_1 D"] | ConvolutionRecords]:
    """Each channel's weighted sum of its last W inputs.

    Args:
        weight: the last tap, `weight[:, W - 1]`, is that of the current input.
        activation: None or "silu".
        state: the W - 1 inputs before the first, oldest first; 0 if None.
        cu_seqlens: where the sequences in one row begin and end.
        parents: the inputs are the nodes of a tree, see `ops.commit`: each sees its last W - 1 ancestors, and before
            the first of these the end of `state`. The parent of each, before it, or -1; all rows share the tree.

    Returns:
        y in the dtype of x, and the last W - 1 inputs in float32 (float64 for float64), which are partly those of the
        given state where a sequence has fewer; with `parents` the tree's records instead.

    Raises:
        ValueError: shapes or dtypes do not fit, an unknown activation, or `parents` that are no tree.
    """
    if x.dim() != 3 or weight.dim() != 2 or weight.shape[0] != x.shape[2] or weight.shape[1] == 0:
        raise ValueError(
            f"`x` is [B, T, D] and `weight` [D, W], W at least 1: got {list(x.shape)} and {list(weight.shape)}"
        )
    if bias is not None and bias.shape != x.shape[2:]:
        raise ValueError(f"`bias` has a number for each channel, [{x.shape[2]}]: got {list(bias.shape)}")
    if activation not in (None, "silu"):
        raise unknown("activation", str(activation), ("silu", "None"))
    state = _state(state, x, (weight.shape[1] - 1, x.shape[2]), cu_seqlens, name="state")
    if parents is not None:
        over_tree = uncompiled(dispatch.choose("causal_conv1d_tree", backend, x))
        tree = uncompiled(Tree.of)(parents, x, cu_seqlens)
        recorded: tuple[Tensor, ConvolutionRecords] = over_tree(
            x, weight, tree=tree, bias=bias, activation=activation, state=state
        )
        return recorded
    compute = dispatch.choose("causal_conv1d", backend, x)
    y, last = compute(x, weight, bias=bias, activation=activation, state=state, cu_seqlens=cu_seqlens)
    return y, last


def long_convolution(
    u: Float[Tensor, "B T D"], kernel: Float[Tensor, "D L"], *, cu_seqlens: Int[Tensor, " N_plus_1"] | None = None
) -> Float[Tensor, "B T D"]:
    """y_t = sum_{s <= t} kernel_s u_{t-s} by FFT, zero-padded so that nothing wraps round.

    The kernel may be shorter than the sequence (then it ends) or longer (then the rest has no effect). Causal up to the
    rounding of the transform: relative to the largest output, about 1e-7 in float32 and 1e-16 in float64.

    Raises:
        ValueError: shapes do not fit.
    """
    if u.dim() != 3 or kernel.dim() != 2 or kernel.shape[0] != u.shape[2] or kernel.shape[1] == 0:
        raise ValueError(
            f"`u` is [B, T, D] and `kernel` [D, L], L at least 1: got {list(u.shape)} and {list(kernel.shape)}"
        )
    _sequences(u, cu_seqlens)
    y: Tensor = fft_convolution(u, kernel, cu_seqlens)
    return y


def sliding_window_max(x: Shaped[Tensor, "..."], window: int, *, dim: int = -1) -> Shaped[Tensor, "..."]:
    """The maximum of every `window` neighbours along `dim`; n numbers give n - window + 1. NaN wins.

    In O(n) whatever the window: running maxima from the left and from the right of blocks as long as the window; each
    window is the end of one block and the beginning of the next.

    Raises:
        ValueError: the window is longer than the axis, or not positive.
    """
    length = x.shape[dim]
    if not 1 <= window <= length:
        raise ValueError(f"`window` lies between 1 and the {length} numbers along axis {dim}: got {window}")
    x = x.movedim(dim, -1)
    # What is padded stands behind all windows: its value is never seen.
    blocks = pad(x, (0, -length % window))
    blocks = blocks.view(*blocks.shape[:-1], -(-length // window), window)
    from_left = blocks.cummax(-1).values.flatten(-2)
    from_right = blocks.flip(-1).cummax(-1).values.flip(-1).flatten(-2)
    y = torch.maximum(from_right[..., : length - window + 1], from_left[..., window - 1 : length])
    return y.movedim(-1, dim)


def linear_scan_reference(
    a: Tensor, b: Tensor, *, initial_state: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One step after another in float64."""
    dtype, pairs = b.dtype, b.dim() == 4
    a, b, state = (torch.view_as_complex(x.double()) if pairs else x.double() for x in (a, b, initial_state))
    h, last = [b[:, :0]], []
    for span in spans(b.shape[1], cu_seqlens):
        current = state[span.sequences]
        for t in range(span.start, span.stop):
            current = a[:, t] * current + b[:, t]
            h.append(current[:, None])
        last.append(current)
    found, final = (torch.view_as_real(x) if pairs else x for x in (torch.cat(h, 1), torch.cat(last)))
    return found.to(dtype), final.to(initial_state.dtype)


def selective_scan_reference(
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
    """One step after another in float64."""
    dtype = u.dtype
    u, dt, A, B, C, state = (x.double() for x in (u, dt, A, B, C, initial_state))
    dt = dt if dt_bias is None else dt + dt_bias.double()
    dt = softplus(dt) if dt_softplus else dt
    y, last = [u[:, :0]], []
    for span in spans(u.shape[1], cu_seqlens):
        h = state[span.sequences]
        for t in range(span.start, span.stop):
            decay = torch.exp(torch.einsum("bd,dn->bdn", dt[:, t], A))
            h = decay * h + torch.einsum("bd,bn,bd->bdn", dt[:, t], B[:, t], u[:, t])
            y.append(torch.einsum("bn,bdn->bd", C[:, t], h)[:, None])
        last.append(h)
    out = torch.cat(y, 1)
    out = out if D is None else out + D.double() * u
    out = out if z is None else out * silu(z.double())
    return out.to(dtype), torch.cat(last).to(initial_state.dtype)


def causal_conv1d_reference(
    x: Tensor, weight: Tensor, *, bias: Tensor | None, activation: str | None, state: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One step after another in float64."""
    dtype, kind = x.dtype, state.dtype
    x, weight, state = x.double(), weight.double(), state.double()
    y, last = [x[:, :0]], []
    for span in spans(x.shape[1], cu_seqlens):
        window = state[span.sequences]
        for t in range(span.start, span.stop):
            window = torch.cat([window, x[:, t, None]], 1)
            y.append(torch.einsum("bwd,dw->bd", window, weight)[:, None])
            window = window[:, 1:]
        last.append(window)
    out = torch.cat(y, 1)
    out = out if bias is None else out + bias.double()
    out = out if activation is None else silu(out)
    return out.to(dtype), torch.cat(last).to(kind)


def causal_conv1d_tree_reference(
    x: Tensor, weight: Tensor, *, tree: Tree, bias: Tensor | None, activation: str | None, state: Tensor
) -> tuple[Tensor, ConvolutionRecords]:
    """One node after another in float64."""
    windows, y = {-1: state.double()}, [x.double()[:, :0]]
    for node, parent in enumerate(tree.parents.tolist()):
        window = torch.cat([windows[parent], x.double()[:, node, None]], 1)
        y.append(torch.einsum("bwd,dw->bd", window, weight.double())[:, None])
        windows[node] = window[:, 1:]
    out = torch.cat(y, 1)
    out = out if bias is None else out + bias.double()
    out = out if activation is None else silu(out)
    return out.to(x.dtype), ConvolutionRecords(tree.parents, x, state)


def _sequences(x: Tensor, cu_seqlens: Tensor | None) -> int:
    """How many sequences there are, after a look at what can be known without reading `cu_seqlens`."""
    if cu_seqlens is None:
        return x.shape[0]
    if x.shape[0] != 1:
        raise ValueError(f"`cu_seqlens` packs sequences in one row, B = 1: got a batch of {x.shape[0]}")
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2 or cu_seqlens.is_floating_point():
        raise ValueError(
            f"`cu_seqlens` holds N + 1 integers for N sequences: got {cu_seqlens.dtype} {list(cu_seqlens.shape)}"
        )
    return len(cu_seqlens) - 1


def _state(
    state: Tensor | None, x: Tensor, shape: tuple[int, ...], cu_seqlens: Tensor | None, name: str = "initial_state"
) -> Tensor:
    """The state that was given, or zeros, in the dtype of states."""
    shape, dtype = (_sequences(x, cu_seqlens), *shape), state_dtype(x.dtype)
    if state is None:
        return x.new_zeros(shape, dtype=dtype)
    if state.shape != shape:
        raise ValueError(f"`{name}` must be {list(shape)} here: got {list(state.shape)}")
    return state.to(dtype)

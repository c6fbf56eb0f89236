"""The delta rule, and its generalisation to a diagonal plus a low-rank matrix: memories that correct what they hold.

    delta rule    S' = e^{g_t} S_{t-1}     S_t = S' + beta_t k_t (v_t - S'^T k_t)^T            o_t = scale * S_t^T q_t
    general       S_t = diag(e^{g_t}) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T                o_t = scale * S_t^T q_t

Sources   Schlag et al. 2021, arXiv 2102.11174; Yang et al. 2024, arXiv 2406.06484 (in chunks: the WY form) and
          arXiv 2412.06464 (with a decay); Kimi Team 2025, arXiv 2510.26692 (a decay for each channel);
          Peng et al. 2025, arXiv 2503.14456 (RWKV-7: a = -kappa, b = kappa * rate)
Cost      FLOPs a token and head: 6 K V step by step, 6 K V + 4 C (K + V) in chunks of C tokens;
          general: 8 K V and 8 K V + 8 C (K + V)
"""

from collections.abc import Callable
from typing import overload

import torch
from jaxtyping import Float, Int
from torch import Tensor

from everlong.ops import arguments
from everlong.ops.chunks import form_size, starting_state, state_dtype
from everlong.ops.delta_chunk import low_rank_chunk
from everlong.ops.dispatch import choose
from everlong.ops.scoring import uncompiled
from everlong.ops.spans import spans
from everlong.ops.stepwise import delta_steps, dplr_steps
from everlong.ops.tree import MemoryRecords, Tree

CHUNK = 32  # tokens; 64 is 10 to 20 % slower on the CPU with K = V = 64


@overload
def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    log_decay: Tensor | None = ...,
    scale: float | None = ...,
    initial_state: Tensor | None = ...,
    cu_seqlens: Tensor | None = ...,
    parents: None = ...,
    form: str = ...,
    backend: str = ...,
) -> tuple[Tensor, Tensor]: ...


@overload
def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    log_decay: Tensor | None = ...,
    scale: float | None = ...,
    initial_state: Tensor | None = ...,
    cu_seqlens: Tensor | None = ...,
    parents: Tensor,
    form: str = ...,
    backend: str = ...,
) -> tuple[Tensor, MemoryRecords]: ...


def delta_rule(
    q: Float[Tensor, "B T h K"],
    k: Float[Tensor, "B T h K"],
    v: Float[Tensor, "B T H V"],
    beta: Float[Tensor, "B T H"],
    *,
    log_decay: Float[Tensor, "B T H"] | Float[Tensor, "B T H K"] | None = None,
    scale: float | None = None,
    initial_state: Float[Tensor, "N H K V"] | None = None,
    cu_seqlens: Int[Tensor, " N_plus_1"] | None = None,
    parents: Int[Tensor, " T"] | None = None,
    form: str = "auto",
    backend: str = "auto",
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "N H K V"] | MemoryRecords]:
    """The delta rule, gated or not, and the state after the last token.

    Args:
        q, k: queries and keys; their h heads are shared by H / h heads of `v` each. The caller normalises k: the memory
            is stable while beta * |k|^2 is at most 2.
        beta: how much of the error is corrected, 0 to 1 (to 2 where eigenvalues may be negative).
        log_decay: g, natural logarithms, of a token or of its key channels; -inf forgets all before.
        scale: of the queries; None is K ** -0.5.
        initial_state: S before the first token.
        cu_seqlens: the bounds of N sequences that are packed in one row (B = 1).
        parents: the tokens are the nodes of a tree, see `ops.commit`: each sees its ancestors, itself and the initial
            state. The parent of each, before it, or -1; all rows share the tree.
        form: "parallel" (T x T weights), "chunk", "recurrent", or "auto".
        backend: "reference", "torch", "native", or "auto".

    Returns:
        o in the dtype of `v`, and the state, float32 (float64 for float64 inputs); with `parents` the
        tree's records instead.

    Raises:
        ValueError: shapes that do not fit, or `parents` that are no tree.
    """
    batch, length, heads, size = *v.shape[:3], q.shape[3]
    arguments.check(
        q,
        k,
        v,
        log_decay=log_decay,
        decays=((batch, length, heads), (batch, length, heads, size)),
        states=(("initial_state", initial_state, (heads, size, v.shape[3])),),
        others=(("beta", beta, (batch, length, heads)),),
        cu_seqlens=cu_seqlens,
        form=form,
    )
    scale = size**-0.5 if scale is None else scale
    if parents is not None:
        over_tree = uncompiled(choose("delta_rule_tree", backend, v, form))
        recorded: tuple[Tensor, MemoryRecords] = over_tree(
            q,
            k,
            v,
            beta,
            tree=uncompiled(Tree.of)(parents, v, cu_seqlens),
            log_decay=log_decay,
            scale=scale,
            initial_state=initial_state,
            form=form,
        )
        return recorded
    run = choose("delta_rule", backend, v, form=form)
    result: tuple[Tensor, Tensor] = run(
        q,
        k,
        v,
        beta,
        log_decay=log_decay,
        scale=scale,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
        form=form,
    )
    return result


@overload
def dplr(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    log_decay: Tensor | None = ...,
    scale: float | None = ...,
    initial_state: Tensor | None = ...,
    cu_seqlens: Tensor | None = ...,
    parents: None = ...,
    form: str = ...,
    backend: str = ...,
) -> tuple[Tensor, Tensor]: ...


@overload
def dplr(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    log_decay: Tensor | None = ...,
    scale: float | None = ...,
    initial_state: Tensor | None = ...,
    cu_seqlens: Tensor | None = ...,
    parents: Tensor,
    form: str = ...,
    backend: str = ...,
) -> tuple[Tensor, MemoryRecords]: ...


def dplr(
    q: Float[Tensor, "B T h K"],
    k: Float[Tensor, "B T h K"],
    v: Float[Tensor, "B T H V"],
    a: Float[Tensor, "B T h_a K"],
    b: Float[Tensor, "B T h_b K"],
    *,
    log_decay: Float[Tensor, "B T H K"] | None = None,
    scale: float | None = None,
    initial_state: Float[Tensor, "N H K V"] | None = None,
    cu_seqlens: Int[Tensor, " N_plus_1"] | None = None,
    parents: Int[Tensor, " T"] | None = None,
    form: str = "auto",
    backend: str = "auto",
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "N H K V"] | MemoryRecords]:
    """A memory under a diagonal plus a rank-one matrix, and the state after the last token.

    Args:
        q, k, a, b: queries, keys, and the two vectors of the low-rank part: what a reads of S_{t-1}, before the decay,
            is written under b. Their h heads are shared by H / h heads of `v` each; a and b may also have all H.
        log_decay: g, natural logarithms, of each key channel; -inf forgets all before.
        scale, initial_state, cu_seqlens, parents, form, backend: as in `delta_rule`.

    Returns:
        o in the dtype of `v`, and the state, float32 (float64 for float64 inputs); with `parents` the
        tree's records instead.

    Raises:
        ValueError: shapes that do not fit, or `parents` that are no tree.
    """
    heads, size = v.shape[2], q.shape[3]
    full = torch.Size((*v.shape[:3], size))
    arguments.check(
        q,
        k,
        v,
        log_decay=log_decay,
        decays=(full,),
        states=(("initial_state", initial_state, (heads, size, v.shape[3])),),
        others=tuple((name, x, full if x.shape == full else q.shape) for name, x in (("a", a), ("b", b))),
        cu_seqlens=cu_seqlens,
        form=form,
    )
    scale = size**-0.5 if scale is None else scale
    if parents is not None:
        over_tree = uncompiled(choose("dplr_tree", backend, v, form))
        recorded: tuple[Tensor, MemoryRecords] = over_tree(
            q,
            k,
            v,
            a,
            b,
            tree=uncompiled(Tree.of)(parents, v, cu_seqlens),
            log_decay=log_decay,
            scale=scale,
            initial_state=initial_state,
            form=form,
        )
        return recorded
    run = choose("dplr", backend, v, form=form)
    result: tuple[Tensor, Tensor] = run(
        q,
        k,
        v,
        a,
        b,
        log_decay=log_decay,
        scale=scale,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
        form=form,
    )
    return result


def delta_rule_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    log_decay: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    form: str,
) -> tuple[Tensor, Tensor]:
    """The equation, token by token, in float64; `form` makes no difference."""

    def step(state: Tensor, decay: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
        state = decay[..., None] * state
        error = v - torch.einsum("nhkv,nhk->nhv", state, k)
        return state + torch.einsum("nh,nhk,nhv->nhkv", beta, k, error)

    k = k.repeat_interleave(v.shape[2] // k.shape[2], 2)
    return _reference(step, q, (k, v, beta), v, log_decay, scale, initial_state, cu_seqlens)


def dplr_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    log_decay: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    form: str,
) -> tuple[Tensor, Tensor]:
    """The equation, token by token, in float64; `form` makes no difference."""

    def step(state: Tensor, decay: Tensor, k: Tensor, a: Tensor, b: Tensor, v: Tensor) -> Tensor:
        low_rank = torch.einsum("nhk,nhl,nhlv->nhkv", b, a, state)
        return decay[..., None] * state + low_rank + torch.einsum("nhk,nhv->nhkv", k, v)

    k, a, b = (x.repeat_interleave(v.shape[2] // x.shape[2], 2) for x in (k, a, b))
    return _reference(step, q, (k, a, b, v), v, log_decay, scale, initial_state, cu_seqlens)


def _reference(
    step: Callable[..., Tensor],
    q: Tensor,
    inputs: tuple[Tensor, ...],
    v: Tensor,
    log_decay: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """S_t = step(S_{t-1}, e^{g_t}, inputs_t) over each sequence, read with q_t."""
    dtype = v.dtype
    q = q.double().repeat_interleave(v.shape[2] // q.shape[2], 2)
    decay = torch.ones_like(q)
    if log_decay is not None:
        decay = decay * (log_decay[..., None] if log_decay.dim() < 4 else log_decay).double().exp()
    tokens = (decay, *(x.double() for x in inputs))
    count = v.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    states = q.new_zeros(count, *q.shape[2:], v.shape[3]) if initial_state is None else initial_state.double()
    outputs, last = [v.double()[:, :0]], []
    for span in spans(v.shape[1], cu_seqlens):
        state = states[span.sequences]
        for t in range(span.start, span.stop):
            state = step(state, *(x[:, t] for x in tokens))
            outputs.append(scale * torch.einsum("nhk,nhkv->nhv", q[:, t], state)[:, None])
        last.append(state)
    return torch.cat(outputs, 1).to(dtype), torch.cat(last).to(state_dtype(dtype))


def delta_rule_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    log_decay: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    form: str,
) -> tuple[Tensor, Tensor]:
    """The delta rule by matrix products."""
    state = starting_state(q, v, initial_state, cu_seqlens)
    size = form_size(form, v, cu_seqlens, CHUNK)
    if size == 0:
        return delta_steps(q, k, v, beta, log_decay, state, cu_seqlens, scale)
    o, state, _ = low_rank_chunk(q, k, v, beta, None, None, log_decay, state, cu_seqlens, scale, size)
    return o, state


def dplr_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    log_decay: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    form: str,
) -> tuple[Tensor, Tensor]:
    """The diagonal plus low-rank recurrence by matrix products."""
    state = starting_state(q, v, initial_state, cu_seqlens)
    size = form_size(form, v, cu_seqlens, CHUNK)
    if size == 0:
        return dplr_steps(q, k, v, a, b, log_decay, state, cu_seqlens, scale)
    o, state, _ = low_rank_chunk(q, k, v, None, a, b, log_decay, state, cu_seqlens, scale, size)
    return o, state

"""Linear attention: a memory that fades and to which every token adds one pair of key and value.

    S_t = e^{g_t} S_{t-1} + k_t v_t^T            o_t = scale * S_t^T q_t

Sources   Katharopoulos et al. 2020, "Transformers are RNNs", arXiv 2006.16236 (no decay, normaliser);
          Sun et al. 2023, arXiv 2307.08621 (a constant decay for each head); Dao & Gu 2024, arXiv 2405.21060 (one for
          each token and head); Yang et al. 2023, arXiv 2312.06635 (one for each channel, chunk form);
          Peng et al. 2024, arXiv 2404.05892 (bonus)
Cost      FLOPs a token and head: 4 K V step by step; in chunks of C tokens 4 K V + 2 C (K + V)
"""

from typing import overload

import torch
from jaxtyping import Float, Int
from torch import Tensor

from everlong.ops import arguments
from everlong.ops.chunks import form_size, starting_state, state_dtype, without_autocast
from everlong.ops.dispatch import choose
from everlong.ops.linear_chunk import linear_attention_chunk
from everlong.ops.scoring import uncompiled
from everlong.ops.spans import spans
from everlong.ops.stepwise import linear_steps, read, spread
from everlong.ops.tree import MemoryRecords, State, Tree

# Tokens of a chunk where channels share a decay, and half as many where they do not: the fastest on the CPU for
# K = V = 64. With 32 the shared decay is as fast in float32, but keeps twice as many states and is slower in bfloat16.
CHUNK = 64


@overload
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None = ...,
    bonus: Tensor | None = ...,
    normalize: bool = ...,
    scale: float | None = ...,
    causal: bool = ...,
    initial_state: State | None = ...,
    cu_seqlens: Tensor | None = ...,
    parents: None = ...,
    form: str = ...,
    backend: str = ...,
) -> tuple[Tensor, State]: ...


@overload
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None = ...,
    bonus: Tensor | None = ...,
    normalize: bool = ...,
    scale: float | None = ...,
    causal: bool = ...,
    initial_state: State | None = ...,
    cu_seqlens: Tensor | None = ...,
    parents: Tensor,
    form: str = ...,
    backend: str = ...,
) -> tuple[Tensor, MemoryRecords]: ...


def linear_attention(
    q: Float[Tensor, "B T h K"],
    k: Float[Tensor, "B T h K"],
    v: Float[Tensor, "B T H V"],
    *,
    log_decay: Float[Tensor, " H"] | Float[Tensor, "B T H"] | Float[Tensor, "B T H K"] | None = None,
    bonus: Float[Tensor, "H K"] | None = None,
    normalize: bool = False,
    scale: float | None = None,
    causal: bool = True,
    initial_state: Float[Tensor, "N H K V"] | tuple[Float[Tensor, "N H K V"], Float[Tensor, "N H K"]] | None = None,
    cu_seqlens: Int[Tensor, " N_plus_1"] | None = None,
    parents: Int[Tensor, " T"] | None = None,
    form: str = "auto",
    backend: str = "auto",
) -> tuple[
    Float[Tensor, "B T H V"],
    Float[Tensor, "N H K V"] | tuple[Float[Tensor, "N H K V"], Float[Tensor, "N H K"]] | MemoryRecords,
]:
    """Linear attention and the state after the last token.

    Args:
        q, k: queries and keys, after any feature map; their h heads are shared by H / h heads of `v` each.
        log_decay: g, natural logarithms, of a head, of a token, or of a token's key channels; -inf forgets all before.
        bonus: RWKV's u: o_t = scale * q_t^T (S_{t-1} + diag(u) k_t v_t^T), the token's own decay not yet applied.
        normalize: divide by scale * q_t^T z_t, z_t = e^{g_t} z_{t-1} + k_t; where that is 0, so is the output.
        scale: of the queries; None is K ** -0.5.
        causal: False lets every token read the sum over its whole sequence; without decay and bonus only.
        initial_state: S before the first token; with `normalize` the pair (S, z).
        cu_seqlens: the bounds of N sequences that are packed in one row (B = 1).
        parents: the tokens are the nodes of a tree, see `ops.commit`: each sees its ancestors, itself and the initial
            state. The parent of each, before it, or -1; all rows share the tree.
        form: "parallel" (T x T weights), "chunk", "recurrent", or "auto".
        backend: "reference", "torch", "native", or "auto".

    Returns:
        o in the dtype of `v`, and the state, float32 (float64 for float64 inputs); with `normalize` the pair (S, z);
        with `parents` the tree's records instead.

    Raises:
        ValueError: shapes that do not fit, `parents` that are no tree, or a combination that does not exist.
    """
    memory, total = initial_state if isinstance(initial_state, tuple) else (initial_state, None)
    batch, length, heads, size = *v.shape[:3], q.shape[3]
    arguments.check(
        q,
        k,
        v,
        log_decay=log_decay,
        decays=((heads,), (batch, length, heads), (batch, length, heads, size)),
        states=(("initial_state", memory, (heads, size, v.shape[3])), ("initial_state[1]", total, (heads, size))),
        others=(("bonus", bonus, (heads, size)),),
        cu_seqlens=cu_seqlens,
        form=form,
    )
    if initial_state is not None and normalize != isinstance(initial_state, tuple):
        raise ValueError(f"the state is a pair (S, z) with `normalize` and S alone without: got normalize={normalize}")
    if not causal and (log_decay is not None or bonus is not None):
        raise ValueError(
            "`log_decay` and `bonus` need an order of tokens: got causal=False; drop them or use causal=True"
        )
    scale = size**-0.5 if scale is None else scale
    if parents is not None:
        if not causal:
            raise ValueError("`parents` give an order of tokens: got causal=False; drop one of the two")
        over_tree = uncompiled(choose("linear_attention_tree", backend, v, form))
        recorded: tuple[Tensor, MemoryRecords] = over_tree(
            q,
            k,
            v,
            tree=uncompiled(Tree.of)(parents, v, cu_seqlens),
            log_decay=log_decay,
            bonus=bonus,
            normalize=normalize,
            scale=scale,
            initial_state=initial_state,
            form=form,
        )
        return recorded
    run = choose("linear_attention", backend, v, form=form)
    result: tuple[Tensor, State] = run(
        q,
        k,
        v,
        log_decay=log_decay,
        bonus=bonus,
        normalize=normalize,
        scale=scale,
        causal=causal,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
        form=form,
    )
    return result


def linear_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None,
    bonus: Tensor | None,
    normalize: bool,
    scale: float,
    causal: bool,
    initial_state: State | None,
    cu_seqlens: Tensor | None,
    form: str,
) -> tuple[Tensor, State]:
    """The equations, token by token, in float64; `form` makes no difference."""
    dtype, heads = v.dtype, v.shape[2]
    q, k = (x.double().repeat_interleave(heads // x.shape[2], 2) for x in (q, k))
    v = v.double()
    decay = torch.ones_like(k)
    if log_decay is not None:
        decay = decay * (log_decay[..., None] if log_decay.dim() < 4 else log_decay).double().exp()
    bonus = None if bonus is None else bonus.double()
    memory, total = initial_state if isinstance(initial_state, tuple) else (initial_state, None)
    count = v.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    memory = v.new_zeros(count, *k.shape[2:], v.shape[3]) if memory is None else memory.double()
    total = v.new_zeros(count, *k.shape[2:]) if total is None else total.double()
    parts = []
    for span in spans(v.shape[1], cu_seqlens):
        states = memory[span.sequences], total[span.sequences]
        tokens = q[:, span.time], k[:, span.time], v[:, span.time], decay[:, span.time]
        parts.append(_sequence(*tokens, *states, bonus, scale, normalize, causal))
    memory, total = (torch.cat([part[i] for part in parts]).to(state_dtype(dtype)) for i in (1, 2))
    return torch.cat([part[0] for part in parts], 1).to(dtype), (memory, total) if normalize else memory


def _sequence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    memory: Tensor,
    total: Tensor,
    bonus: Tensor | None,
    scale: float,
    normalize: bool,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """One sequence, or several side by side."""
    if not causal:
        memory, total = memory + torch.einsum("nthk,nthv->nhkv", k, v), total + k.sum(1)
    outputs = [v[:, :0]]
    for t in range(v.shape[1]):
        read, read_total = memory, total
        if causal:
            pair = k[:, t, :, :, None] * v[:, t, :, None, :]
            if bonus is not None:
                read, read_total = memory + bonus[:, :, None] * pair, total + bonus * k[:, t]
            memory, total = decay[:, t, :, :, None] * memory + pair, decay[:, t] * total + k[:, t]
            if bonus is None:
                read, read_total = memory, total
        o = scale * torch.einsum("nhk,nhkv->nhv", q[:, t], read)
        if normalize:
            by = scale * torch.einsum("nhk,nhk->nh", q[:, t], read_total)[..., None]
            o = torch.where(by == 0, 0.0, o / torch.where(by == 0, 1.0, by))
        outputs.append(o[:, None])
    return torch.cat(outputs, 1), memory, total


def linear_attention_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None,
    bonus: Tensor | None,
    normalize: bool,
    scale: float,
    causal: bool,
    initial_state: State | None,
    cu_seqlens: Tensor | None,
    form: str,
) -> tuple[Tensor, State]:
    """Linear attention by matrix products."""
    if normalize:
        return _normalized(q, k, v, log_decay, bonus, scale, causal, initial_state, cu_seqlens, form)
    assert not isinstance(initial_state, tuple)
    state = starting_state(q, v, initial_state, cu_seqlens)
    if not causal:
        return _bidirectional(q, k, v, state, scale, cu_seqlens)
    if bonus is not None:
        return _with_bonus(q, k, v, log_decay, bonus, scale, state, cu_seqlens, form)
    return _causal(q, k, v, log_decay, scale, state, cu_seqlens, form)


def _causal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    scale: float,
    state: Tensor,
    cu_seqlens: Tensor | None,
    form: str,
) -> tuple[Tensor, Tensor]:
    if log_decay is not None and log_decay.dim() == 1:
        log_decay = log_decay.expand(*v.shape[:3])
    largest = CHUNK // 2 if log_decay is not None and log_decay.dim() == 4 else CHUNK
    size = form_size(form, v, cu_seqlens, largest)
    if size == 0:
        return linear_steps(q, k, v, log_decay, state, cu_seqlens, scale)
    o, state, _ = linear_attention_chunk(q, k, v, log_decay, state, cu_seqlens, scale, size)
    return o, state


def _normalized(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    bonus: Tensor | None,
    scale: float,
    causal: bool,
    initial_state: State | None,
    cu_seqlens: Tensor | None,
    form: str,
) -> tuple[Tensor, State]:
    """z is the memory of one more value, which is always 1."""
    both = None
    if isinstance(initial_state, tuple):
        both = torch.cat([initial_state[0], initial_state[1][..., None]], -1)
    ones = v.new_ones(*v.shape[:3], 1)
    o, state = linear_attention_torch(
        q,
        k,
        torch.cat([v, ones], -1),
        log_decay=log_decay,
        bonus=bonus,
        normalize=False,
        scale=scale,
        causal=causal,
        initial_state=both,
        cu_seqlens=cu_seqlens,
        form=form,
    )
    assert isinstance(state, Tensor)
    by = o[..., -1:]
    o = torch.where(by == 0, 0.0, o[..., :-1] / torch.where(by == 0, 1.0, by))
    return o, (state[..., :-1].contiguous(), state[..., -1].contiguous())


def _bidirectional(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, scale: float, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    if cu_seqlens is not None:  # one causal pass for the last states, and one that writes nothing to read them
        _, state = _causal(q, k, v, None, scale, state, cu_seqlens, "chunk")
        o, _ = _causal(q, torch.zeros_like(k), v, None, scale, state, cu_seqlens, "chunk")
        return o, state
    with without_autocast(v):
        wide = torch.unflatten(v, 2, (q.shape[2], -1)).to(state.dtype)
        state = state + torch.einsum("bthk,bthgv->bhgkv", k.to(state.dtype), wide).flatten(1, 2)
        o = torch.einsum("bthk,bhgkv->bthgv", q.to(state.dtype) * scale, torch.unflatten(state, 1, (q.shape[2], -1)))
    return o.flatten(2, 3).to(v.dtype), state


def _with_bonus(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    bonus: Tensor,
    scale: float,
    state: Tensor,
    cu_seqlens: Tensor | None,
    form: str,
) -> tuple[Tensor, Tensor]:
    """What a token reads of the past is what its query reads after the token before: queries move one to the left."""
    if v.shape[1] == 0:
        return v, state
    shifted = torch.cat([q[:, 1:], torch.zeros_like(q[:, :1])], 1)
    past, last = _causal(shifted, k, v, log_decay, scale, state, cu_seqlens, form)
    past = torch.cat([torch.zeros_like(past[:, :1]), past[:, :-1]], 1)
    with without_autocast(v):
        q, k, wide = (x.to(state.dtype) for x in (q, k, v))
        q, k = spread(q, v.shape[2]), spread(k, v.shape[2])
        if cu_seqlens is None:
            first = read(state, q[:, 0]) * scale
            past = torch.cat([first[:, None].to(past.dtype), past[:, 1:]], 1)
        else:
            token = torch.arange(v.shape[1], device=v.device)
            sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), token, right=True)
            starts = cu_seqlens[:-1].clamp_max(v.shape[1] - 1)
            first = (read(state, q[0].index_select(0, starts)) * scale).index_select(0, sequence)
            past = torch.where((token == cu_seqlens[sequence])[None, :, None, None], first[None].to(past.dtype), past)
        own = scale * (q * bonus.to(state.dtype) * k).sum(-1, keepdim=True) * wide
    return past + own.to(v.dtype), last

"""The operators with a matrix state over a tree of tokens, see tree.py for what they return.

    linear      o = scale * [ A_qk v + reach_q S_0 ]
    delta rule  o = scale * [ A_qk u + reach_q S_0 ]             (I + diag(beta) A_kk) u = diag(beta) (v - reach_k S_0)
    low rank    o = scale * [ A_qb u + A_qk v + reach_q S_0 ]    (I - A_ab) u = A_ak v + reach_a S_0

    A_xy [T, T]: products of receivers x with sources y under the decays between them, 0 unless y is an ancestor of x

A node's row of A has entries at its ancestors only, which come first: the systems are strictly lower triangular. Every
weight is the exponential of a sum of log-decays along a path in which nothing is subtracted, so that decays to zero and
weak ones behind strong ones are exact. Tensors of nodes are `[B, H, T, ...]` here, states `[B, H, K, V]`.

Cost      FLOPs a tree and head: 2 T^2 (K + V) + 2 T K V; the delta rule 2 T^2 K + T^2 V + 2 T K V more. With a decay of
          channels 2 T L K instead of 2 T^2 K, L the longest path, and so many numbers are exponentiated.
Memory    T^2 or T L K numbers a head for a gradient; states of all nodes, T K V, by form="recurrent" alone
Source    SPEC 4.10 and 10.5; Yang et al. 2024, arXiv 2406.06484 (the system, on a chain)
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from everlong.ops.chunks import starting_state, state_dtype, without_autocast
from everlong.ops.stepwise import read, spread, write
from everlong.ops.tree import MemoryRecords, State, Tree, with_total

Products = Callable[..., tuple[Tensor, Tensor]]  # (tree, state, *tokens) -> o, u
Step = Callable[..., tuple[Tensor, Tensor, Tensor]]  # (state, *tokens of one node) -> o, u, the state after it


def linear_attention_tree_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    tree: Tree,
    log_decay: Tensor | None,
    bonus: Tensor | None,
    normalize: bool,
    scale: float,
    initial_state: State | None,
    form: str,
) -> tuple[Tensor, MemoryRecords]:
    """Linear attention over a tree."""
    dtype = v.dtype
    v = torch.cat([v, v.new_ones(*v.shape[:3], 1)], -1) if normalize else v
    memory = starting_state(q, v, None if initial_state is None else with_total(initial_state), None)
    if log_decay is not None and log_decay.dim() == 1:
        log_decay = log_decay.expand(*v.shape[:3])
    with without_autocast(v):
        tokens = q.to(memory.dtype) * scale, k, v, log_decay
        if bonus is None:
            o, _ = _over_tree(tree, memory, tokens, _linear, _linear_step, form)
        else:
            u = bonus.to(memory.dtype)[:, None]
            products, step = functools.partial(_with_bonus, u), functools.partial(_bonus_step, u[:, 0])
            o, _ = _over_tree(tree, memory, tokens, products, step, form)
        if normalize:
            by = o[..., -1:]
            o = torch.where(by == 0, 0.0, o[..., :-1] / torch.where(by == 0, 1.0, by))
    state = (memory[..., :-1], memory[..., -1]) if normalize else memory
    return o.to(dtype), MemoryRecords(tree.parents, ((k, v),), log_decay, state)


def delta_rule_tree_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    tree: Tree,
    log_decay: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    form: str,
) -> tuple[Tensor, MemoryRecords]:
    """The delta rule over a tree: u are the corrections."""
    state = starting_state(q, v, initial_state, None)
    with without_autocast(v):
        tokens = q.to(state.dtype) * scale, k, v, log_decay, beta
        o, u = _over_tree(tree, state, tokens, _delta, _delta_step, form)
    return o.to(v.dtype), MemoryRecords(tree.parents, ((k, u),), log_decay, state)


def dplr_tree_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    tree: Tree,
    log_decay: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    form: str,
) -> tuple[Tensor, MemoryRecords]:
    """Diagonal plus low rank over a tree: u is what a reads."""
    state = starting_state(q, v, initial_state, None)
    with without_autocast(v):
        tokens = q.to(state.dtype) * scale, k, v, log_decay, a, b
        o, u = _over_tree(tree, state, tokens, _low_rank, _low_rank_step, form)
    return o.to(v.dtype), MemoryRecords(tree.parents, ((b, u), (k, v)), log_decay, state)


def _reference(compute: Callable[..., tuple[Tensor, MemoryRecords]]) -> Callable[..., tuple[Tensor, MemoryRecords]]:
    """The equations, node by node, in float64; `form` makes no difference."""

    def reference(*tokens: Tensor, form: str, **options: Any) -> tuple[Tensor, MemoryRecords]:
        dtype = tokens[2].dtype
        exact = {name: _cast(x, torch.float64) for name, x in options.items()}
        o, records = compute(*(x.double() for x in tokens), form="recurrent", **exact)
        return o.to(dtype), records._replace(state=_cast(records.state, state_dtype(dtype)))

    return reference


def _cast(x: Any, dtype: torch.dtype) -> Any:
    """Tensors, and pairs of them, in another dtype; whatever else there is as it is."""
    if isinstance(x, tuple):
        return tuple(_cast(one, dtype) for one in x)
    return x.to(dtype) if isinstance(x, Tensor) else x


linear_attention_tree_reference = _reference(linear_attention_tree_torch)
delta_rule_tree_reference = _reference(delta_rule_tree_torch)
dplr_tree_reference = _reference(dplr_tree_torch)


def _over_tree(
    tree: Tree, state: Tensor, tokens: Sequence[Tensor | None], products: Products, step: Step, form: str
) -> tuple[Tensor, Tensor]:
    """o and u `[B, T, H, V]` in the dtype of the state, from tokens `[B, T, h, ...]`, the third of which is v.

    Infinities and NaN stay with the descendants of the nodes that they come from: 0 * inf would carry them further.
    Where there are some, these nodes are computed one by one, and the others without them, to the bit as before.
    """
    v = tokens[2]
    assert v is not None
    if v.shape[1] == 0:
        return v.to(state.dtype), v.to(state.dtype)
    inputs = [None if x is None else spread(x.to(state.dtype), v.shape[2]).transpose(1, 2) for x in tokens]
    if form == "recurrent":
        o, u = _node_by_node(tree, state, inputs, step)
        return o.transpose(1, 2), u.transpose(1, 2)
    o, u = products(tree, state, *inputs)
    if not all(bool(x.detach().sum().isfinite()) for x in (o, u)):
        exact = _node_by_node(tree, state, inputs, step)
        bad = torch.cat([~x.isfinite() for x in exact], 3).any(3).any(1)  # [B, T]
        clean = ~(tree.visible & bad[:, None]).any(2)[:, None, :, None]  # [B, 1, T, 1]
        good = [None if x is None else x.where(clean if x.dim() == 4 else clean[..., 0], 0.0) for x in inputs]
        kept = products(tree, state, *good)
        o, u = (torch.where(clean & x.isfinite(), x, y) for x, y in zip(kept, exact, strict=True))
    return o.transpose(1, 2), u.transpose(1, 2)


def _node_by_node(tree: Tree, state: Tensor, inputs: Sequence[Tensor | None], step: Step) -> tuple[Tensor, Tensor]:
    """Holds the state of every node; from tokens `[B, H, T, ...]`."""
    states, outputs, written = {-1: state}, [], []
    for node, parent in enumerate(tree.parents.tolist()):
        o, u, states[node] = step(states[parent], *(None if x is None else x[:, :, node] for x in inputs))
        outputs.append(o)
        written.append(u)
    return torch.stack(outputs, 2), torch.stack(written, 2)


def _linear(
    tree: Tree, state: Tensor, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None
) -> tuple[Tensor, Tensor]:
    matrix, reach = multiply(tree, q[None], k[None], log_decay, late=False)
    return matrix[0, 0] @ v + reach[0] @ state, v


def _linear_step(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    state = write(_decayed(state, log_decay), k, v)
    return read(state, q), v, state


def _with_bonus(
    bonus: Tensor, tree: Tree, state: Tensor, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None
) -> tuple[Tensor, Tensor]:
    """A node's own pair is read under `bonus [H, 1, K]`, all others before the node's decay."""
    matrix, reach = multiply(tree, q[None], k[None], log_decay, late=True)
    own = (q * bonus * k).sum(-1, keepdim=True)
    return matrix[0, 0].tril(-1) @ v + own * v + reach[0] @ state, v


def _bonus_step(
    bonus: Tensor, state: Tensor, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return read(write(state, bonus * k, v), q), v, write(_decayed(state, log_decay), k, v)


def _delta(
    tree: Tree, state: Tensor, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor
) -> tuple[Tensor, Tensor]:
    matrix, (reach_q, reach_k) = multiply(tree, torch.stack([q, k]), k[None], log_decay, late=False)
    of_queries, of_keys = matrix[:, 0]
    beta = beta[..., None]
    u = _solve(beta * of_keys, beta * (v - reach_k @ state))
    return of_queries @ u + reach_q @ state, u


def _delta_step(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    state = _decayed(state, log_decay)
    u = beta[..., None] * (v - read(state, k))
    state = write(state, k, u)
    return read(state, q), u, state


def _low_rank(
    tree: Tree, state: Tensor, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, a: Tensor, b: Tensor
) -> tuple[Tensor, Tensor]:
    sources = torch.stack([b, k])
    ((of_b, of_k),), (reach,) = multiply(tree, a[None], sources, log_decay, late=True)
    u = _solve(-of_b, of_k.tril(-1) @ v + reach @ state)
    ((of_b, of_k),), (reach,) = multiply(tree, q[None], sources, log_decay, late=False)
    return of_b @ u + of_k @ v + reach @ state, u


def _low_rank_step(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, a: Tensor, b: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    u = read(state, a)
    state = write(write(_decayed(state, log_decay), b, u), k, v)
    return read(state, q), u, state


def _decayed(state: Tensor, log_decay: Tensor | None) -> Tensor:
    """One node's decay, `[B, H]` or `[B, H, K]`."""
    if log_decay is None:
        return state
    decay = log_decay.exp()
    return state * (decay[..., None] if decay.dim() == 3 else decay[..., None, None])


def _solve(lower: Tensor, right: Tensor) -> Tensor:
    """(I + lower)^-1 right, of what lies strictly below the diagonal."""
    solution: Tensor = torch.linalg.solve_triangular(lower, right, upper=False, unitriangular=True)
    return solution


def multiply(
    tree: Tree, receivers: Tensor, sources: Tensor, log_decay: Tensor | None, *, late: bool
) -> tuple[Tensor, Tensor]:
    """Receivers `[r, B, H, T, K]` times sources `[s, B, H, T, K]` under the decays between them.

    Late receivers read before the decay of their own node; what they find on the diagonal has no meaning.

    Returns:
        `[r, s, B, H, T, T]`, 0 unless the source is an ancestor or the node itself, and the receivers under the decay
        since the incoming state.
    """
    if log_decay is None:
        return (receivers[:, None] @ sources[None].mT).where(tree.visible, 0.0), receivers
    by_kind = _multiply_tokens if log_decay.dim() == 3 else _multiply_channels
    return by_kind(tree, receivers, sources, log_decay, late)


def _multiply_channels(
    tree: Tree, receivers: Tensor, sources: Tensor, log_decay: Tensor, late: bool
) -> tuple[Tensor, Tensor]:
    """At growing distance: every node with itself, with its parent, and so on."""
    sources, log_decay = pad(sources, (0, 0, 0, 1)), pad(log_decay, (0, 0, 0, 1))
    exponent, products = torch.zeros_like(log_decay[:, :, 1:]), []
    for distance, places in enumerate(tree.places.unbind(1)):
        faded = sources.index_select(-2, places) * exponent.exp()
        products.append((receivers[:, None] * faded).sum(-1))
        if distance or not late:
            exponent = exponent + log_decay.index_select(-2, places)
    return tree.dense(torch.stack(products, -1)), receivers * exponent.exp()


def _multiply_tokens(
    tree: Tree, receivers: Tensor, sources: Tensor, log_decay: Tensor, late: bool
) -> tuple[Tensor, Tensor]:
    """With decays that all channels share, in one product."""
    along = pad(log_decay, (0, 1))[:, :, tree.places]  # [B, H, T, L]
    along = torch.cat([torch.zeros_like(along[..., :1]), along[..., 1:]], -1) if late else along
    sums = pad(along.cumsum(-1), (1, 0))
    between = tree.dense(sums[..., :-1].exp())
    return (receivers[:, None] @ sources[None].mT) * between, receivers * sums[..., -1:].exp()

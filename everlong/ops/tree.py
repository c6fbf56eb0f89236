"""Trees of tokens: every node sees the incoming state, its ancestors and itself; afterwards one path is kept.

    S_t = e^{g_t} S_parent(t) + k_t u_t^T        S after a path = e^{G_0} S_0 + sum_j e^{G_j} k_j u_j^T

over the path's nodes j, G_j the sum of log-decays behind j on the path. An operator over a tree (its `parents`) returns
records instead of a state: keys, what was written under them, and decays, none of them larger than the inputs; `commit`
makes a state of them by one weighted sum. Forgetting the records is going back.

Shapes    parents [T], -1 the incoming state (the root), others smaller than the node's own number; a path [P]
Source    SPEC 10.5: Dao AI Lab 2026 (one state and the records of the last steps); SpecInfer, Miao et al. 2023,
          arXiv 2305.09781 (trees of draft tokens)
"""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from everlong.ops.chunks import without_autocast
from everlong.ops.dispatch import kernels_serve
from everlong.ops.stepwise import spread

Path = Int[Tensor, " P"] | Sequence[int]
Paths = Path | Sequence[Path]
State = Tensor | tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Tree:
    """Who descends from whom: L is the number of nodes on the longest path."""

    parents: Int[Tensor, " T"]

    @classmethod
    def of(cls, parents: Tensor, x: Tensor, cu_seqlens: Tensor | None = None) -> "Tree":
        """The tree of the tokens of `x [B, T, ...]`.

        Raises:
            ValueError: `parents` is no tree of T nodes in which parents come first, or sequences are packed as well.
        """
        length = x.shape[1]
        if cu_seqlens is not None:
            raise ValueError("`parents` and `cu_seqlens` exclude each other: the rows of a batch share one tree")
        if parents.shape != (length,) or parents.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"`parents` holds an integer a token, [{length}]: got {parents.dtype} {[*parents.shape]}")
        for node, parent in enumerate(parents.tolist()):
            if not -1 <= parent < node:
                raise ValueError(
                    f"`parents` come before their children, and -1 is the root: got parents[{node}] = {parent}"
                )
        return cls(parents.to(x.device, torch.long))

    @functools.cached_property
    def ancestors(self) -> Int[Tensor, "T L"]:
        """A node, its parent, and so on; -1 beyond the first node of the path."""
        above = torch.cat([self.parents, self.parents.new_tensor([-1])])
        columns = [torch.arange(len(self.parents), device=above.device)]
        while bool(((following := above[columns[-1]]) >= 0).any()):
            columns.append(following)
        return torch.stack(columns, 1)

    @property
    def depth(self) -> Int[Tensor, " T"]:
        """How many ancestors a node has: its position behind the incoming state."""
        return (self.ancestors >= 0).sum(1) - 1

    @property
    def places(self) -> Int[Tensor, "T L"]:
        """`ancestors`, for tensors with one more node: T, which stands for what is beyond a path's first one."""
        return self.ancestors.where(self.ancestors >= 0, len(self.parents))

    @property
    def visible(self) -> Tensor:
        """Which node (row) sees which (column): boolean [T, T]."""
        return self.dense(torch.ones_like(self.ancestors, dtype=torch.bool))

    def dense(self, x: Tensor) -> Tensor:
        """What belongs to ancestors, `[..., T, L]`, at their places in `[..., T, T]`; 0 for all other nodes."""
        length = len(self.parents)
        return x.new_zeros(*x.shape[:-1], length + 1).scatter(-1, self.places.expand(x.shape), x)[..., :length]


@runtime_checkable
class Records(Protocol):
    """What an operator leaves behind for each node of a tree."""

    def commit(self, path: Path) -> Any:
        """What `commit` returns, if all rows of the batch take one path."""

    def rows(self) -> Sequence["Records"]:
        """The records of each row of the batch."""


def commit(records: Records, path: Paths) -> Any:
    """The state after a chosen path of a tree, as if its tokens had come one after another.

    Args:
        records: what the operator returned under `parents`; for softmax attention `KeyRecords`.
        path: the nodes from the first one, whose parent is -1, to the chosen one; empty is the incoming state. A
            sequence of paths, of any lengths, has one for each row of the batch.

    Returns:
        What the operator returns without `parents`; for `KeyRecords` the indices of the keys to keep.

    Raises:
        ValueError: the path is no chain of the tree, or there is not one for each row.
    """
    if not any(isinstance(node, Sequence) or (isinstance(node, Tensor) and node.dim() > 0) for node in path):
        return records.commit(path)  # type: ignore[arg-type]
    rows = records.rows()
    if len(rows) != len(path):
        raise ValueError(f"one `path` for all rows, or one for each of the {len(rows)}: got {len(path)} paths")
    if isinstance(records, MemoryRecords) and records.fit_kernels():
        return records.commit_chains([_chain(records.parents, own) for own in path])  # type: ignore[arg-type]
    states = [row.commit(own) for row, own in zip(rows, path, strict=True)]
    if isinstance(states[0], Tensor):
        return torch.cat(states)
    return tuple(torch.cat(parts) for parts in zip(*states, strict=True))


class MemoryRecords(NamedTuple):
    """What the nodes wrote into a matrix state.

    With a state that is a pair (S, z) the values have one more channel, always 1: z is what that has summed up.
    """

    parents: Int[Tensor, " T"]
    sources: tuple[tuple[Float[Tensor, "B T h K"], Float[Tensor, "B T H V"]], ...]  # keys, and values under them
    log_decay: Float[Tensor, "B T H"] | Float[Tensor, "B T H K"] | None
    state: State  # the incoming one

    def commit(self, path: Path) -> State:
        """The matrix state after the path."""
        nodes = _chain(self.parents, path)
        if len(nodes) == 0:
            return self.state
        if self.fit_kernels():
            return self.commit_chains([nodes])
        memory = with_total(self.state)
        heads, dtype = memory.shape[1], torch.promote_types(memory.dtype, self.sources[0][1].dtype)
        later = None
        with without_autocast(memory):
            if self.log_decay is not None:
                decay = self.log_decay[:, nodes].to(dtype)
                decay = decay if decay.dim() == 4 else decay[..., None]  # [B, P, H, K or 1]
                after = torch.cat([decay[:, 1:], torch.zeros_like(decay[:, :1])], 1)
                later = after.flip(1).cumsum(1).flip(1).exp()
                memory = memory * decay.sum(1).exp()[..., None]
            for keys, values in self.sources:
                k = spread(keys[:, nodes].to(dtype), heads)
                k = k if later is None else k * later
                memory = memory + torch.einsum("bphk,bphv->bhkv", k, values[:, nodes].to(dtype))
        return like_state(memory, self.state)

    def fit_kernels(self) -> bool:
        """Whether there is a kernel for `commit`: there is none for gradients."""
        state = self.state if isinstance(self.state, tuple) else (self.state,)
        decay = () if self.log_decay is None else (self.log_decay,)
        tensors = [x for pair in self.sources for x in pair] + [*decay, *state]
        if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
            return False
        return state[0].dtype == torch.float32 and kernels_serve(*tensors)

    def commit_chains(self, chains: Sequence[Sequence[int]]) -> State:
        """By the kernel: the state after one chain of nodes for all rows, or after one for each."""
        from everlong.ops.native.tree_commit import commit_native

        return commit_native(self, chains)

    def rows(self) -> "list[MemoryRecords]":
        """Views of the rows of the batch."""
        cuts = [slice(b, b + 1) for b in range(len(self.sources[0][0]))]
        return [
            MemoryRecords(
                self.parents,
                tuple((keys[cut], values[cut]) for keys, values in self.sources),
                None if self.log_decay is None else self.log_decay[cut],
                (self.state[0][cut], self.state[1][cut]) if isinstance(self.state, tuple) else self.state[cut],
            )
            for cut in cuts
        ]


class ConvolutionRecords(NamedTuple):
    """The inputs of a short convolution."""

    parents: Int[Tensor, " T"]
    x: Float[Tensor, "B T D"]
    state: Float[Tensor, "B W_minus_1 D"]  # the incoming one

    def commit(self, path: Path) -> Tensor:
        """The last W - 1 inputs on the path."""
        nodes, reach = _chain(self.parents, path), self.state.shape[1]
        if len(nodes) == 0:
            return self.state
        seen = torch.cat([self.state, self.x[:, nodes].to(self.state.dtype)], 1)
        return seen[:, seen.shape[1] - reach :]

    def rows(self) -> "list[ConvolutionRecords]":
        """Views of the rows of the batch."""
        pairs = zip(torch.split(self.x, 1), torch.split(self.state, 1), strict=True)
        return [ConvolutionRecords(self.parents, *pair) for pair in pairs]


class KeyRecords(NamedTuple):
    """The keys of softmax attention, which stay in the caller's cache: `prefix` of them, then those of the nodes.

    Where the rows of a batch have prefixes of different lengths, 0 gives the indices behind each row's own prefix.
    """

    parents: Int[Tensor, " T"]
    prefix: int

    def commit(self, path: Path) -> Int[Tensor, " kept"]:
        """The indices of the keys to keep, in order: all of the prefix, and the path's."""
        nodes = torch.tensor(_chain(self.parents, path), dtype=torch.long, device=self.parents.device)
        return torch.cat([torch.arange(self.prefix, device=nodes.device), self.prefix + nodes])

    def rows(self) -> "list[KeyRecords]":
        """Nothing that could be joined again: rows keep different numbers of keys."""
        raise ValueError("`KeyRecords` take one path at a time: with a path for each row, commit them one by one")


def with_total(state: State) -> Tensor:
    """A pair (S, z) as one memory, z the column of one more value."""
    return torch.cat([state[0], state[1][..., None]], -1) if isinstance(state, tuple) else state


def like_state(memory: Tensor, state: State) -> State:
    """A memory in the shape and dtype of `state`: the inverse of `with_total`."""
    if isinstance(state, tuple):
        memory = memory.to(state[0].dtype)
        return memory[..., :-1].contiguous(), memory[..., -1].contiguous()
    return memory.to(state.dtype)


def _chain(parents: Tensor, path: Path) -> list[int]:
    """The nodes of a path that begins at the root and follows the tree."""
    nodes = path.tolist() if isinstance(path, Tensor) else [*path]
    if isinstance(path, Tensor) and (path.dim() != 1 or (nodes and path.dtype not in (torch.int32, torch.int64))):
        raise ValueError(f"`path` holds the numbers of nodes, [P]: got {path.dtype} {[*path.shape]}")
    known = parents.tolist()
    for before, node in itertools.pairwise([-1, *nodes]):
        if not 0 <= node < len(known):
            raise ValueError(f"`path` holds nodes of the tree, 0 to {len(known) - 1}: got {nodes}")
        if known[node] != before:
            raise ValueError(
                f"`path` leads from the root (-1) through the parent of each node: got {nodes}, where {before} comes "
                f"before {node}, whose parent is {known[node]}"
            )
    return nodes

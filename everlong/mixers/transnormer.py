"""TransNormer: attention within blocks in the first half of the layers, linear attention under a norm in the second.

    DiagAttention    o_i = sum_j p_ij v_j                 over the j <= i of i's own block of w tokens
                     T1: p_ij = relu(q_i^T k_j / sqrt(K)), and y_i = W_o RMSNorm(o_i)
                     T2: p_i  = softmax_j(q_i^T k_j / sqrt(K)), and y_i = W_o o_i
    NormAttention    S_t = S_{t-1} + phi(k_t) v_t^T       o_t = S_t^T phi(q_t)       y_t = W_o RMSNorm(o_t)
                     phi(x) = 1 + elu(x)

Linear attention divides by the sum of its weights, through which the gradient of a score is unbounded; a norm bounds
it. And its weights spread over the whole text, where the early layers of a softmax look nearby; blocks confine them.
docs/findings/transnormer.md measures both.

Shapes    x [B, T, D] -> y [B, T, D];  q, k, v [B, T, H, K];  the norm is that of all heads' channels together
State     Norm: S [B, H, K, K], and Diag: the block's keys and values so far, 2 (w - 1) H K zeros at first; and a count:
          4 H K^2 + 8 or 8 (w - 1) D + 8 bytes a sequence, whatever its length
Cost      FLOPs a token: 8 D^2 for the projections + 4 H K^2 for the memory of Norm, or 4 D for each of the up to w keys
          of Diag
Source    Qin et al. 2022, "The Devil in Linear Transformer", arXiv 2210.10340
Deviates  with an odd number of layers the middle one is Norm; there is no gate beside the norm, as in the paper and
          unlike its code; T1's weights have the scale of a softmax's, which the norm cancels
"""

import dataclasses
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from everlong.config import config
from everlong.mixers.base import Context, Cost, HeadOptions, Mixer, Traits, unpadded
from everlong.nn import feature_maps, positions
from everlong.nn.layers import InputNorm
from everlong.ops import linear_attention, softmax_attention

EPS = 1e-5  # of the norm


class State(NamedTuple):
    """What TransNormer keeps of a sequence: a memory in its Norm layers, a block in its Diag layers."""

    memory: Float[Tensor, "N H K V"]  # of no heads in Diag
    keys: Float[Tensor, "N S H K"]  # of the block that is not yet full, zeros behind them; no slots in Norm
    values: Float[Tensor, "N S H K"]
    length: Int[Tensor, " N"]


@config
class Options(HeadOptions):
    """Options of TransNormer."""

    kind: Literal["auto", "diag", "norm"] = "auto"
    """Of attention; auto: diag in the first half of a model's layers, norm in the second."""
    variant: Literal["T1", "T2"] = "T2"
    """Of the weights within a block: relu with a norm (T1) or softmax (T2)."""
    block_size: int = 64
    """Tokens of a block, counted from the start of the text."""
    position: positions.Position = "none"
    causal: bool = True
    bias: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_size < 1:
            raise ValueError(f"`block_size` must be at least 1: got {self.block_size}")

    @property
    def norms(self) -> bool:
        """Whether what a layer reads is normed."""
        return self.kind != "diag" or self.variant == "T1"


class TransNormer(Mixer):
    """TransNormer under the contract. The layer's own place decides what `kind = auto` is."""

    Config = Options
    traits = Traits(
        forms=frozenset({"parallel", "chunk", "recurrent"}),
        causal=True,
        bidirectional=True,
        growth="constant",
        positions=frozenset({"rotation"}),
    )

    def __init__(self, config: Options, *, layer: int = 0, depth: int = 1) -> None:
        if config.kind == "auto":
            config = dataclasses.replace(config, kind="diag" if layer < depth // 2 else "norm")
        super().__init__(config, layer=layer, depth=depth)
        self.q, self.k, self.v, self.o = (nn.Linear(config.width, config.width, bias=config.bias) for _ in range(4))
        self.norm = InputNorm(config.width, eps=EPS) if config.norms else nn.Identity()
        self.feature_map = feature_maps.Elu(config.head_size)
        self.position = positions.attach(
            config.position,
            num_heads=config.heads,
            size=config.head_size,
            offered=self.traits.positions,
            mixer="transnormer",
        )

    def init_state(self, batch: int) -> State:
        c, diag = self.config, self.config.kind == "diag"
        block = self.new_state(batch, c.block_size - 1 if diag else 0, c.heads, c.head_size)
        memory = self.new_state(batch, 0 if diag else c.heads, c.head_size, c.head_size)
        return State(memory, block, block, self.new_state(batch, dtype=torch.long))

    @unpadded
    def forward(
        self, x: Float[Tensor, "B T D"], state: State | None = None, context: Context = Context()
    ) -> tuple[Float[Tensor, "B T D"], State]:
        c = self.config
        fresh = state is None or not c.causal
        state = self.init_state(context.sequences(x)) if state is None or fresh else state
        where = context.count_from(state.length, x)
        q, k, v = (project(x).unflatten(-1, (c.heads, -1)) for project in (self.q, self.k, self.v))
        if c.kind == "norm":
            q, k = self.feature_map(q), self.feature_map(k)
        q, k = (self.position.rotate(y, where).to(v.dtype) for y in (q, k))
        if c.kind == "norm":
            o, state = self._norm(q, k, v, state, context)
        else:
            o, state = self._diag(q, k, v, state, context, fresh=fresh)
        return self.o(self.norm(o.flatten(-2))), state._replace(length=state.length + context.lengths(x))

    def _norm(
        self, q: Tensor, k: Tensor, v: Tensor, state: State, context: Context
    ) -> tuple[Float[Tensor, "B T H K"], State]:
        o, memory = linear_attention(
            q,
            k,
            v,
            scale=1.0,
            causal=self.config.causal,
            initial_state=state.memory if self.config.causal else None,
            cu_seqlens=context.cu_seqlens,
            form=context.form,
        )
        assert isinstance(memory, Tensor)  # a pair comes with `normalize` only
        return o, state._replace(memory=memory)

    def _diag(
        self, q: Tensor, k: Tensor, v: Tensor, state: State, context: Context, *, fresh: bool
    ) -> tuple[Float[Tensor, "B T H K"], State]:
        place, packed = state.length % self.config.block_size, context.cu_seqlens is not None
        if not packed and not fresh and q.shape[1] == 1:
            return self._diag_step(q, k, v, state, place, context.form)
        if not packed and (fresh or not bool(place.any())):
            return self._diag_aligned(q, k, v, state, context.form)
        rows = [y.flatten(0, 1) for y in (q, k, v)]
        o, state = self._diag_ragged(*rows, state=state, place=place, lengths=context.lengths(q), form=context.form)
        return o.view_as(v), state

    def _diag_step(
        self, q: Tensor, k: Tensor, v: Tensor, state: State, place: Tensor, form: str
    ) -> tuple[Float[Tensor, "B 1 H K"], State]:
        """One token for each sequence, in the block that is there."""
        seen = int(place.max()) + 1 if len(place) else 1
        slot = torch.arange(self.config.block_size, device=q.device)
        new = (slot == place[:, None])[..., None, None]
        keys, values = (
            torch.where(new[:, :seen], y, F.pad(old, (0, 0, 0, 0, 0, 1))[:, :seen].to(y.dtype))
            for y, old in ((k, state.keys), (v, state.values))
        )
        o = self._attend(q, keys, values, mask=slot[:seen] <= place[:, None], form=form)
        full = (place + 1 == self.config.block_size)[:, None, None, None]
        keys, values = (
            torch.where(full, 0.0, torch.where(new[:, :-1], y.to(old.dtype), old))
            for y, old in ((k, state.keys), (v, state.values))
        )
        return o, state._replace(keys=keys, values=values)

    def _diag_aligned(
        self, q: Tensor, k: Tensor, v: Tensor, state: State, form: str
    ) -> tuple[Float[Tensor, "B T H K"], State]:
        """Sequences that begin with a block: full blocks side by side in the batch, then what is left."""
        size, batch = self.config.block_size, q.shape[0]
        whole = q.shape[1] // size * size
        parts = []
        if whole:
            blocks = (y[:, :whole].reshape(-1, size, *y.shape[2:]) for y in (q, k, v))
            parts.append(self._attend(*blocks, form=form).reshape(batch, whole, *v.shape[2:]))
        if whole < q.shape[1] or not whole:
            parts.append(self._attend(q[:, whole:], k[:, whole:], v[:, whole:], form=form))
        left = whole + size - 1 - q.shape[1]  # free slots; -1 cannot be: a full block is no remainder
        keys, values = (F.pad(y[:, whole:].to(state.keys.dtype), (0, 0, 0, 0, 0, left)) for y in (k, v))
        return torch.cat(parts, 1), state._replace(keys=keys, values=values)

    def _diag_ragged(
        self,
        q: Float[Tensor, "tokens H K"],
        k: Float[Tensor, "tokens H K"],
        v: Float[Tensor, "tokens H K"],
        *,
        state: State,
        place: Int[Tensor, " N"],
        lengths: Int[Tensor, " N"],
        form: str,
    ) -> tuple[Float[Tensor, "tokens H K"], State]:
        """Sequences of any lengths, one after another, which begin at any place of a block.

        Each gets its own blocks, the last of which is not full and may be empty: what is in that one is the next state.
        """
        size, filled = self.config.block_size, place + lengths
        count = filled // size + 1
        first = count.cumsum(0) - count
        total = int(count.sum())
        # The slot of a token: its sequence's first, and one more for each token before it in the sequence.
        start = first * size + place - (lengths.cumsum(0) - lengths)
        slot = start.repeat_interleave(lengths) + torch.arange(len(q), device=q.device)
        held = (first * size)[:, None] + torch.arange(size - 1, device=q.device)

        def blocks(x: Tensor, past: Tensor | None) -> Tensor:
            empty = x.new_zeros(total * size, *x.shape[1:])
            if past is not None:
                empty = empty.index_copy(0, held.flatten(), past.flatten(0, 1).to(x.dtype))
            return torch.unflatten(empty.index_copy(0, slot, x), 0, (total, size))

        rows, keys, values = blocks(q, None), blocks(k, state.keys), blocks(v, state.values)
        mask = None
        if not self.config.causal:
            real = (filled % size).new_full((total,), size).index_copy(0, first + count - 1, filled % size)
            mask = torch.arange(size, device=q.device) < real[:, None]
        o = self._attend(rows, keys, values, mask=mask, form=form).flatten(0, 1).index_select(0, slot)
        last = first + count - 1
        keys, values = (y[last, : size - 1].to(state.keys.dtype) for y in (keys, values))
        return o, state._replace(keys=keys, values=values)

    def _attend(
        self,
        q: Float[Tensor, "M Q H K"],
        k: Float[Tensor, "M S H K"],
        v: Float[Tensor, "M S H K"],
        *,
        mask: Tensor | None = None,
        form: str,
    ) -> Float[Tensor, "M Q H K"]:
        """Attention of each block to itself. With a mask `[M, S]` of keys the order of tokens is not asked for."""
        causal = self.config.causal and mask is None
        if self.config.variant == "T2":
            visible = None if mask is None else mask[:, None, None]
            return softmax_attention(q, k, v, causal=causal, mask=visible, form=form)
        q, k, v = (y.transpose(1, 2) for y in (q * self.config.head_size**-0.5, k, v))
        weights = (q @ k.mT).relu()
        if causal:
            weights = weights.tril()
        elif mask is not None:
            weights = weights * mask[:, None, None]
        return (weights @ v).transpose(1, 2).to(v.dtype)

    @classmethod
    def cost(cls, config: Options, length: int) -> Cost:
        d, k, w = config.width, config.head_size, config.block_size
        if config.kind != "diag":
            work, state = 4 * d * k, 4 * d * k
        elif config.causal:
            work, state = 4 * d * (length % w + 1), 8 * d * (w - 1)
        else:
            pairs = length // w * w * w + (length % w) ** 2
            work, state = 4 * d * pairs // max(1, length), 8 * d * (w - 1)
        return Cost(
            flops_per_token=8 * d * d + work,
            state_bytes=state + 8,
            parameters=4 * d * d + (4 * d if config.bias else 0) + (d if config.norms else 0),
        )

    def reference(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        c, where = self.config, torch.arange(len(x))[None]
        q, k, v = (project(x).unflatten(-1, (c.heads, -1)) for project in (self.q, self.k, self.v))
        if c.kind == "norm":
            q, k = F.elu(q) + 1, F.elu(k) + 1
        q, k = (self.position.rotate(y[None], where)[0] for y in (q, k))
        outputs = []
        for i in range(len(x)):
            start = 0 if c.kind == "norm" else i // c.block_size * c.block_size
            stop = len(x) if c.kind == "norm" else min(len(x), start + c.block_size)
            seen = slice(start, i + 1 if c.causal else stop)
            weights = (k[seen] * q[i]).sum(-1)  # [S, H]
            if c.kind == "diag":
                weights = weights * c.head_size**-0.5
                weights = weights.relu() if c.variant == "T1" else weights.softmax(0)
            o = (weights[..., None] * v[seen]).sum(0).flatten()
            if c.norms:
                o = o / (o.square().mean() + EPS).sqrt() * self.norm.weight
            outputs.append(o)
        y: Tensor = self.o(torch.stack(outputs))
        return y

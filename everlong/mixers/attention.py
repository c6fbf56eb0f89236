"""Softmax attention: every token reads all that it may see, weighted by how well keys match its query.

    o_t = sum_s softmax_s(q_t^T k_s / sqrt(K) + bias(t, s)) v_s                              (section 3.2.1)

Shapes    x [B, T, D] -> y [B, T, D];  q [B, T, H, K];  k, v [B, S, G, K] with G <= H heads shared by groups of queries
State     keys and values of all tokens so far, or of the last `window - 1`: 8 G K bytes a token, and a count
Cost      FLOPs a token: 4 D K (H + G) for the projections + 4 H K S for the S tokens that it sees
Source    Vaswani et al. 2017, "Attention Is All You Need", arXiv 1706.03762; grouped heads: Ainslie et al. 2023,
          arXiv 2305.13245; normalised queries and keys: Henry et al. 2020, arXiv 2010.04245
Deviates  positions act on queries, keys or scores, not on the embedding; norms of q and k have one weight for all heads
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from everlong.config import config, divisible
from everlong.mixers.base import Context, Cost, HeadOptions, Mixer, Traits, unpadded
from everlong.nn import positions
from everlong.nn.cache import append
from everlong.nn.layers import HeadNorm
from everlong.ops import softmax_attention


class State(NamedTuple):
    """What attention keeps of a sequence; where rows differ in length, what is real stands at the end."""

    keys: Float[Tensor, "N S G K"]
    values: Float[Tensor, "N S G K"]
    length: Int[Tensor, " N"]  # tokens seen, those that a window has dropped included


@config
class Options(HeadOptions):
    """Options of softmax attention."""

    num_kv_heads: int | None = None
    """Heads of keys and values, shared by groups of query heads; None: as many as query heads."""
    window: int | None = None
    """A token sees this many tokens, itself included; None: all."""
    qk_norm: bool = False
    """RMS-normalise queries and keys, which keeps scores bounded."""
    position: str = "rope"
    causal: bool = True
    bias: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        divisible("num_heads", self.heads, "num_kv_heads", self.kv_heads)
        if self.window is not None and self.window < 1:
            raise ValueError(f"`window` must be at least 1 (the token itself): got {self.window}")

    @property
    def kv_heads(self) -> int:
        return self.heads if self.num_kv_heads is None else self.num_kv_heads


class Attention(Mixer):
    """Softmax attention under the contract."""

    Config = Options
    traits = Traits(
        forms=frozenset({"parallel", "chunk", "recurrent"}),
        causal=True,
        bidirectional=True,
        growth="linear",
        positions=frozenset({"rotation", "score bias"}),
    )

    def __init__(self, config: Options, *, layer: int = 0, depth: int = 1) -> None:
        super().__init__(config, layer=layer, depth=depth)
        keys = config.kv_heads * config.head_size
        self.q = nn.Linear(config.width, config.width, bias=config.bias)
        self.k = nn.Linear(config.width, keys, bias=config.bias)
        self.v = nn.Linear(config.width, keys, bias=config.bias)
        self.o = nn.Linear(config.width, config.width, bias=config.bias)
        self.q_norm = HeadNorm(1, config.head_size) if config.qk_norm else nn.Identity()
        self.k_norm = HeadNorm(1, config.head_size) if config.qk_norm else nn.Identity()
        self.position = positions.attach(
            config.position,
            num_heads=config.heads,
            size=config.head_size,
            offered=self.traits.positions,
            mixer="attention",
        )

    def init_state(self, batch: int) -> State:
        c = self.config
        empty = self.new_state(batch, 0, c.kv_heads, c.head_size)
        return State(empty, empty, self.new_state(batch, dtype=torch.long))

    @unpadded
    def forward(
        self, x: Float[Tensor, "B T D"], state: State | None = None, context: Context = Context()
    ) -> tuple[Float[Tensor, "B T D"], State]:
        past = state if state is not None and self.config.causal else None
        where = context.count_from(None if past is None else past.length, x)
        q, k, v = (project(x).unflatten(-1, (-1, self.config.head_size)) for project in (self.q, self.k, self.v))
        q = self.position.rotate(self.q_norm(q), where).to(v.dtype)
        k = self.position.rotate(self.k_norm(k), where).to(v.dtype)
        if past is None:
            o = self._attend(q, k, v, context=context)
            if context.cu_seqlens is not None:
                k, v = unpack(k, context.cu_seqlens), unpack(v, context.cu_seqlens)
            state = State(self._recent(k), self._recent(v), context.lengths(x))
        elif context.cu_seqlens is None:
            o, state = self._continue(q, k, v, past, context)
        else:
            cu_seqlens = context.cu_seqlens
            padded = [unpack(t, cu_seqlens) for t in (q, k, v)]
            o, state = self._continue_ragged(*padded, past=past, lengths=cu_seqlens.diff(), context=context)
            o = o[unpack(torch.ones_like(x[..., 0], dtype=torch.bool), cu_seqlens)][None]
        return self.o(o.flatten(-2)), state

    def _continue(
        self, q: Tensor, k: Tensor, v: Tensor, past: State, context: Context
    ) -> tuple[Float[Tensor, "N T H K"], State]:
        """Queries after a cache; every row brings the same number of tokens."""
        keys, values = append(past.keys, k), append(past.values, v)
        mask = None
        if bool((past.length < past.keys.shape[1]).any()):  # some rows are shorter: what stands before them is not real
            column = torch.arange(keys.shape[1], device=q.device)
            mask = (column >= past.keys.shape[1] - past.length[:, None])[:, None, None]
        o = self._attend(q, keys, values, mask=mask, context=context)
        return o, State(self._recent(keys), self._recent(values), past.length + q.shape[1])

    def _continue_ragged(
        self, q: Tensor, k: Tensor, v: Tensor, *, past: State, lengths: Tensor, context: Context
    ) -> tuple[Float[Tensor, "N T H K"], State]:
        """Queries after a cache where rows bring unequal numbers of tokens, each at the end of its row."""
        kept = past.length.clamp_max(past.keys.shape[1])
        column = torch.arange(past.keys.shape[1], device=q.device)
        fresh = torch.arange(q.shape[1], device=q.device)
        real = torch.cat([column >= len(column) - kept[:, None], fresh >= len(fresh) - lengths[:, None]], dim=1)
        order = real.int().argsort(dim=1, stable=True)  # the gap between old and new moves to the front
        index = order[..., None, None].expand(-1, -1, *k.shape[2:])
        keys = torch.cat([past.keys.to(k.dtype), k], dim=1).gather(1, index)
        values = torch.cat([past.values.to(v.dtype), v], dim=1).gather(1, index)
        mask = real.gather(1, order)[:, None, None]
        o = self._attend(q, keys, values, mask=mask, context=context)
        longest = int((kept + lengths).max()) if len(lengths) else 0
        keys, values = keys[:, keys.shape[1] - longest :], values[:, values.shape[1] - longest :]
        return o, State(self._recent(keys), self._recent(values), past.length + lengths)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, context: Context
    ) -> Float[Tensor, "N T H K"]:
        cached = k.shape[1] != q.shape[1] or mask is not None
        return softmax_attention(
            q,
            k.to(q.dtype),
            v.to(q.dtype),
            causal=self.config.causal,
            window=self.config.window,
            bias=self.position.score_bias if "score bias" in self.position.hooks else None,
            mask=mask,
            cu_seqlens=None if cached else context.cu_seqlens,
            form=context.form,
        )

    def _recent(self, cache: Float[Tensor, "N S G K"]) -> Float[Tensor, "N R G K"]:
        """What later tokens may still see."""
        window = self.config.window
        return cache if window is None or cache.shape[1] < window else cache[:, cache.shape[1] - window + 1 :]

    @classmethod
    def cost(cls, config: Options, length: int) -> Cost:
        window = length + 1 if config.window is None else min(length + 1, config.window)
        if config.causal:
            scores = 4 * config.width * window
        else:  # the pairs at a distance below the window, one direction counted twice
            pairs = length + 2 * sum(length - distance for distance in range(1, min(window, length)))
            scores = 4 * config.width * pairs // max(1, length)
        kept = length if config.window is None else min(length, config.window - 1)
        keys = config.kv_heads * config.head_size
        weights = 2 * config.width * (config.width + keys)
        biases = 2 * (config.width + keys) if config.bias else 0
        norms = 2 * config.head_size if config.qk_norm else 0
        return Cost(
            flops_per_token=2 * weights + scores,
            state_bytes=8 * keys * kept + 8,
            parameters=weights + biases + norms,
        )

    def reference(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        c, where = self.config, torch.arange(len(x))
        q, k, v = (project(x).unflatten(-1, (-1, c.head_size)) for project in (self.q, self.k, self.v))
        q = self.position.rotate(self.q_norm(q[None]), where[None])[0]
        k = self.position.rotate(self.k_norm(k[None]), where[None])[0]
        k, v = (y.repeat_interleave(c.heads // c.kv_heads, dim=1) for y in (k, v))
        bias = self.position.score_bias(where, where)
        outputs = []
        for t in range(len(x)):
            first = 0 if c.window is None else max(0, t + 1 - c.window)
            last = t + 1 if c.causal else len(x) if c.window is None else t + c.window
            scores = (k[first:last] * q[t]).sum(-1) * c.head_size**-0.5 + bias[:, t, first:last].T
            weights = torch.exp(scores - scores.amax(0))
            outputs.append((weights[..., None] * v[first:last]).sum(0) / weights.sum(0)[:, None])
        y: Tensor = self.o(torch.stack(outputs).flatten(-2))
        return y


def unpack(x: Tensor, cu_seqlens: Int[Tensor, " N_plus_1"]) -> Tensor:
    """Packed sequences `[1, T, ...]` as rows `[N, longest, ...]`, each at the end of its row, zeros before it."""
    lengths = cu_seqlens.diff()
    longest = int(lengths.max()) if len(lengths) else 0
    column = torch.arange(longest, device=x.device) - (longest - lengths[:, None])
    rows = (
        x[0][(cu_seqlens[:-1, None] + column).clamp(0, max(0, x.shape[1] - 1))]
        if x.shape[1]
        else x[0].new_zeros(len(lengths), 0, *x.shape[2:])
    )
    return rows * (column >= 0).view(*column.shape, *(1,) * (x.dim() - 2)).to(x.dtype)

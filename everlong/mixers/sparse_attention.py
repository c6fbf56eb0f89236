"""Sparse attention: softmax over a part of the past, chosen by where a token stands and not by what it says.

    o_t = sum_{s in A_t} softmax_s(q_t^T k_s / sqrt(K) + bias(t, s)) v_s

    pattern     near                            far
    window      t - w < s <= t                                                  Beltagy et al., section 3.1
    strided     t - l < s <= t                  (t - s) mod l = 0               Child et al., section 4.3
    fixed       floor(s / l) = floor(t / l)     s mod l >= l - c                Child et al., section 4.3
    atrous                                      (t - s) mod l = 0               Su 2019
    sparse      t - l <= s <= t                 (t - s) mod l = 0               Su 2019

A_t is the union of near and far, or one head reads one of them, or one layer does; g global tokens at the beginning see
all and are seen by all. Without causality t - s may be negative: |t - s| < w, |t - s| < l, |t - s| <= l.

Shapes    x [B, T, D] -> y [B, T, D];  q [B, T, H, K];  k, v [B, S, G, K] with G <= H heads shared by groups of queries
State     keys, values and places of what a later token may still see, 8 G K + 8 bytes each: the last w - 1 tokens; all
          (strided, atrous, sparse); or c of l and those of the last block (fixed). And the first g, and a count
Cost      FLOPs a token: 4 D K (H + G) for the projections + 4 H K |A_t|; of whole texts see nn/sparse.py
Source    Child et al. 2019, "Generating Long Sequences with Sparse Transformers", arXiv 1904.10509; Beltagy et al.
          2020, "Longformer", arXiv 2004.05150 (global tokens, with projections of their own); Su 2019,
          kexue.fm/archives/6853
Deviates  Longformer's window of w tokens, half of them on either side, is `window` = w / 2 + 1 here, and has no gaps;
          Child's near part of `strided` has the token at t - l as well, which is far here
"""

import dataclasses
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from everlong.config import config, divisible
from everlong.mixers.base import Context, Cost, HeadOptions, Mixer, Traits, unpadded
from everlong.nn import positions
from everlong.nn.cache import append, retain, stacked
from everlong.nn.ragged import Groups
from everlong.nn.sparse import FEW, Keys, Pattern, Queries


class Cache(NamedTuple):
    """Keys that may still be seen; where rows differ in number, what is real stands at the end."""

    keys: Float[Tensor, "N S G K"]
    values: Float[Tensor, "N S G K"]
    numbers: Int[Tensor, "N S"]  # of the tokens, counted from 1; 0 where there is none
    positions: Int[Tensor, "N P"]  # P is 0 where nobody asks for them


class State(NamedTuple):
    """What sparse attention keeps of a sequence."""

    caches: tuple[Cache, ...]  # of each part of the heads, then that of the global tokens' own projections
    length: Int[Tensor, " N"]


@config
class Options(HeadOptions):
    """Options of sparse attention."""

    num_kv_heads: int | None = None
    """Heads of keys and values, shared by groups of query heads; None: as many as query heads."""
    pattern: Literal["window", "strided", "fixed", "atrous", "sparse"] = "fixed"
    """Which tokens are seen, by the table above."""
    compose: Literal["union", "heads", "layers", "near", "far"] = "union"
    """Where near and far are: in every head, each in half the heads, each in every other layer; or only one of them."""
    window: int = 64
    """Of the pattern of that name: a token sees this many tokens, itself included, in each direction."""
    stride: int = 64
    """l of the other patterns, in tokens."""
    summary: int = 8
    """c of the pattern `fixed`: so many tokens at the end of each block are seen by all that follow."""
    global_tokens: int = 0
    """g, the first tokens of a text, which see all and are seen by all."""
    global_projections: Literal["shared", "own"] = "shared"
    """Whether what global tokens read goes through queries, keys and values of their own."""
    position: positions.Position = "rope"
    """Encoding of positions: a name, or a mapping with its options."""
    causal: bool = True
    bias: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        divisible("num_heads", self.heads, "num_kv_heads", self.kv_heads)
        if self.window < 1 or self.stride < 1 or self.global_tokens < 0:
            raise ValueError(
                "`window` and `stride` must be at least 1 and `global_tokens` at least 0: got "
                f"window={self.window}, stride={self.stride}, global_tokens={self.global_tokens}"
            )
        if self.pattern == "fixed" and not 1 <= self.summary < self.stride:
            raise ValueError(
                f"`summary` must be at least 1 and below `stride`: got summary={self.summary}, stride={self.stride}"
            )
        if self.pattern in {"window", "atrous"} and self.compose != "union":
            raise ValueError(
                f"the pattern `{self.pattern}` has no two parts to compose: got compose={self.compose}. Those that "
                "have: strided, fixed, sparse"
            )
        if self.compose == "heads" and self.kv_heads < 2:
            raise ValueError(f"`compose` = heads needs two heads of keys and values: got {self.kv_heads}")
        if self.global_projections == "own" and not self.global_tokens:
            raise ValueError("projections of their own need `global_tokens` of at least 1: got 0")
        with torch.device("meta"):
            self.encoding()

    @property
    def kv_heads(self) -> int:
        return self.heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def own(self) -> bool:
        return self.global_projections == "own"

    def encoding(self) -> positions.PositionEncoding:
        """The encoding of positions, with first weights."""
        return positions.attach(
            self.position,
            num_heads=self.heads,
            size=self.head_size,
            offered=SparseAttention.traits.positions,
            mixer="sparse_attention",
            causal=self.causal,
        )

    def parts(self) -> list[tuple[Pattern, slice]]:
        """What is seen, and by which heads of keys and values."""
        whole = Pattern(
            causal=self.causal,
            near={"fixed": "block", "atrous": None}.get(self.pattern, "window"),
            far={"fixed": "summaries", "window": None}.get(self.pattern, "multiples"),
            window={"window": self.window, "sparse": self.stride + 1}.get(self.pattern, self.stride),
            stride=self.stride,
            summary=self.summary,
            global_tokens=self.global_tokens,
            reading=not self.own,
        )
        near, far = dataclasses.replace(whole, far=None), dataclasses.replace(whole, near=None)
        if self.compose == "heads":
            half = -(-self.kv_heads // 2)
            return [(near, slice(0, half)), (far, slice(half, self.kv_heads))]
        chosen = {"union": whole, "far": far}.get(self.compose, near)
        return [(chosen, slice(0, self.kv_heads))]

    def reading(self) -> Pattern:
        """What global tokens see."""
        return Pattern(causal=self.causal, global_tokens=self.global_tokens)


class SparseAttention(Mixer):
    """Sparse attention under the contract. With `compose` = layers the layer's place decides between near and far."""

    Config = Options
    traits = Traits(
        forms=frozenset({"parallel", "chunk", "recurrent"}),
        causal=True,
        bidirectional=True,
        growth="linear",
        positions=frozenset({"rotation", "score bias"}),
    )

    def __init__(self, config: Options, *, layer: int = 0, depth: int = 1) -> None:
        if config.compose == "layers":
            config = dataclasses.replace(config, compose="far" if layer % 2 else "near")
        super().__init__(config, layer=layer, depth=depth)
        width, keys = config.width, config.kv_heads * config.head_size
        self.q = nn.Linear(width, width, bias=config.bias)
        self.k = nn.Linear(width, keys, bias=config.bias)
        self.v = nn.Linear(width, keys, bias=config.bias)
        self.o = nn.Linear(width, width, bias=config.bias)
        if config.own:
            self.global_q = nn.Linear(width, width, bias=config.bias)
            self.global_k = nn.Linear(width, keys, bias=config.bias)
            self.global_v = nn.Linear(width, keys, bias=config.bias)
        self.position = config.encoding()
        self.parts = config.parts()

    @property
    def _biased(self) -> bool:
        return "score bias" in self.position.hooks

    def init_state(self, batch: int) -> State:
        heads = [part.stop - part.start for _, part in self.parts]
        caches = [self._empty(batch, n) for n in [*heads, *([self.config.kv_heads] if self.config.own else [])]]
        return State(tuple(caches), self.new_state(batch, dtype=torch.long))

    def _empty(self, batch: int, heads: int) -> Cache:
        keys, numbers = (
            self.new_state(batch, 0, heads, self.config.head_size),
            self.new_state(batch, 0, dtype=torch.long),
        )
        return Cache(keys, keys, numbers, numbers)

    @unpadded
    def forward(
        self, x: Float[Tensor, "B T D"], state: State | None = None, context: Context = Context()
    ) -> tuple[Float[Tensor, "B T D"], State]:
        past = state if state is not None and self.config.causal else None
        start = self.new_state(context.sequences(x), dtype=torch.long) if past is None else past.length
        where = context.count_from(None if past is None else start, x)
        alike = context.cu_seqlens is None and bool((start == start[:1]).all())
        few = (
            context.cu_seqlens is None
            and x.shape[1] <= FEW
            and not (self.config.own and bool((start < self.config.global_tokens).any()))
        )
        if len(start) and (alike or few):
            o, state = self._mix(x, where, start, past, context.form, alike=alike)
        else:
            o, state = self._in_groups(x, where, start, past, context)
        return self.o(o.flatten(-2)), state

    def _in_groups(
        self, x: Tensor, where: Tensor, start: Tensor, past: State | None, context: Context
    ) -> tuple[Float[Tensor, "B T H K"], State]:
        """Sequences with the same number of tokens, in the past and in this call, together."""
        B, T = x.shape[:2]
        if not len(start):
            return x.new_zeros(B, T, self.config.heads, self.config.head_size), self.init_state(0)
        groups = Groups(context.lengths(x).tolist(), alike=start.tolist())
        row = where.expand(B, -1).reshape(1, -1)
        outputs, states = [], []
        for tokens, places, members in zip(
            groups.batches(x.reshape(1, B * T, -1)), groups.batches(row), groups.members, strict=True
        ):
            before = None if past is None else _rows(past, members)
            o, after = self._mix(tokens, places, start[members], before, context.form, alike=True)
            outputs.append(o)
            states.append(after)
        o = groups.row(outputs).view(B, T, *outputs[0].shape[2:])
        caches = tuple(
            Cache(*(groups.rows(stacked(list(leaves))) for leaves in zip(*of, strict=True)))
            for of in zip(*(state.caches for state in states), strict=True)
        )
        return o, State(caches, groups.rows([state.length for state in states]))

    def _mix(
        self, x: Tensor, where: Tensor, start: Tensor, past: State | None, form: str, *, alike: bool
    ) -> tuple[Float[Tensor, "N T H K"], State]:
        """Sequences that bring as many tokens each; `alike`: after as many others."""
        c, groups = self.config, self.config.heads // self.config.kv_heads
        q, k, v = self._heads(x, where, self.q, self.k, self.v)
        places = (start[:1] if alike else start)[:, None] + torch.arange(x.shape[1], device=x.device)
        end = start + x.shape[1]
        outputs, caches = [], []
        for (pattern, part), cache in zip(self.parts, past.caches if past else (None,) * 2, strict=False):
            grown = self._append(cache, k[:, :, part], v[:, :, part], places, where)
            heads = slice(part.start * groups, part.stop * groups)
            outputs.append(self._attend(pattern, q[:, :, heads], grown, places, where, heads, form, alike=alike))
            caches.append(self._retain(grown, pattern, end))
        o = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2)
        if c.own:
            last = past.caches[-1] if past else self._empty(len(x), c.kv_heads)
            o, last = self._read_globally(x, where, places, end, o, last, form)
            caches.append(last)
        return o, State(tuple(caches), end)

    def _read_globally(
        self, x: Tensor, where: Tensor, places: Tensor, end: Tensor, o: Tensor, cache: Cache, form: str
    ) -> tuple[Float[Tensor, "N T H K"], Cache]:
        """Puts what global tokens read by their own projections in the place of what they have read."""
        c = self.config
        count = int((places[:1] < c.global_tokens).sum())
        if not count:
            return o, cache
        seen = count if c.causal else x.shape[1]
        q, k, v = self._heads(x, where, self.global_q, self.global_k, self.global_v, reading=count, seen=seen)
        grown = self._append(cache, k, v, places[:, :seen], where[:, :seen])
        heads = slice(0, c.heads)
        first = self._attend(c.reading(), q, grown, places[:, :count], where[:, :count], heads, form, alike=True)
        over = end >= c.global_tokens  # then nobody will read it any more
        grown = self._retain(grown, c.reading(), end) if not bool(over.any()) else self._empty(len(x), c.kv_heads)
        return torch.cat([first.to(o.dtype), o[:, count:]], 1), grown

    def _heads(
        self,
        x: Tensor,
        where: Tensor,
        q: nn.Module,
        k: nn.Module,
        v: nn.Module,
        *,
        reading: int | None = None,
        seen: int | None = None,
    ) -> tuple[Float[Tensor, "N R H K"], Float[Tensor, "N S G K"], Float[Tensor, "N S G K"]]:
        """Queries of the first `reading` tokens, keys and values of the first `seen`, rotated."""
        size = self.config.head_size
        queries = q(x[:, :reading]).unflatten(-1, (-1, size))
        keys, values = (project(x[:, :seen]).unflatten(-1, (-1, size)) for project in (k, v))
        if "rotation" in self.position.hooks:
            queries = self.position.rotate(queries, where[:, :reading]).to(values.dtype)
            keys = self.position.rotate(keys, where[:, :seen]).to(values.dtype)
        return queries, keys, values

    def _append(self, cache: Cache | None, k: Tensor, v: Tensor, places: Tensor, where: Tensor) -> Cache:
        """The keys of the past and those of this call."""
        numbers = (places + 1).expand(len(k), -1)
        where = where.expand(len(k), -1) if self._biased else where.new_zeros(len(k), 0)
        new = Cache(k, v, numbers, where)
        return new if cache is None else Cache(*(append(*pair) for pair in zip(cache, new, strict=True)))

    def _attend(
        self,
        pattern: Pattern,
        q: Tensor,
        grown: Cache,
        places: Tensor,
        where: Tensor,
        heads: slice,
        form: str,
        *,
        alike: bool,
    ) -> Float[Tensor, "N T H K"]:
        def bias(queries: Tensor, keys: Tensor) -> Tensor:
            added = self.position.score_bias(queries, keys)
            return added[..., heads, :, :] if added.shape[-3] > 1 else added

        numbers = grown.numbers[:1] if alike else grown.numbers
        reading, read = (where.expand(len(q), -1), grown.positions) if self._biased else (places, numbers)
        if bool((read == read[:1]).all()) and bool((reading == reading[:1]).all()):
            reading, read = reading[:1], read[:1]
        return pattern.attend(
            Queries(q, places, reading),
            Keys(grown.keys, grown.values, numbers - 1, read),
            scale=self.position.scale,
            bias=bias if self._biased else None,
            alike=alike,
            form=form,
        )

    def _retain(self, grown: Cache, pattern: Pattern, end: Tensor) -> Cache:
        """What later tokens may still see."""
        if not self.config.causal:
            return self._empty(*grown.keys.shape[0:3:2])
        leaves = [grown.keys, grown.values, grown.numbers, *([grown.positions] if self._biased else [])]
        left = retain(leaves, pattern.kept(grown.numbers - 1, end[:, None]))
        return Cache(*left, *([] if self._biased else [grown.positions]))

    @classmethod
    def cost(cls, config: Options, length: int) -> Cost:
        c, size = config, config.head_size
        with torch.device("meta"):
            encoding = c.encoding()
        keys, groups = c.kv_heads * size, c.heads // c.kv_heads
        weights, own = 2 * c.width * (c.width + keys), c.width * (c.width + 2 * keys) if c.own else 0
        biases = 2 * (c.width + keys) + (c.width + 2 * keys if c.own else 0) if c.bias else 0
        entry = 16 if "score bias" in encoding.hooks else 8  # a number, and a position where that is asked for
        tokens = torch.arange(length, length + 1) if c.causal else torch.arange(length)
        reading = int((tokens < c.global_tokens).sum()) if c.own else 0
        flops, state = 2 * weights * len(tokens), 8
        total = length + 1 if c.causal else length
        for pattern, part in c.parts():
            heads = part.stop - part.start
            flops += 4 * heads * groups * size * int(pattern.count(tokens, total).sum())
            if c.causal:
                kept = pattern.kept(torch.arange(length)[None], torch.tensor([[length]]))
                state += (8 * heads * size + entry) * int(kept.sum())
        if reading:
            seen = 1 if c.causal else length
            flops += 2 * (c.width**2 * reading + 2 * c.width * keys * seen) + 4 * c.width * reading * total
            state += (8 * keys + entry) * length if c.causal else 0
        return Cost(
            flops_per_token=flops // max(1, len(tokens)),
            state_bytes=state,
            parameters=weights + own + biases + sum(p.numel() for p in encoding.parameters()),
        )

    def reference(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        c, where = self.config, torch.arange(len(x))
        q, k, v = (y[0] for y in self._heads(x[None], where[None], self.q, self.k, self.v))
        outputs = []
        for t in range(len(x)):
            query, keys, values = q[t], k, v
            if c.own and t < c.global_tokens:
                of = self._heads(x[None], where[None], self.global_q, self.global_k, self.global_v)
                query, keys, values = of[0][0, t], of[1][0], of[2][0]
            heads = [self._reference_head(h, t, query[h], keys, values) for h in range(c.heads)]
            outputs.append(self.o(torch.cat(heads)))
        return torch.stack(outputs)

    def _reference_head(self, head: int, t: int, query: Tensor, keys: Tensor, values: Tensor) -> Float[Tensor, " K"]:
        """What one head reads for token t: zero where it sees nothing."""
        c, shared = self.config, head // (self.config.heads // self.config.kv_heads)
        only = c.compose
        if only == "heads":
            only = "near" if shared < -(-c.kv_heads // 2) else "far"
        seen = torch.tensor([s for s in range(len(keys)) if _sees(c, only, t, s)], dtype=torch.long)
        if not len(seen):
            return torch.zeros_like(query)
        scale = c.head_size**-0.5 if self.position.scale is None else self.position.scale
        added = self.position.score_bias(torch.tensor([t]), seen)
        added = added[head if len(added) > 1 else 0, 0]
        scores = (keys[seen, shared] * query).sum(-1) * scale + added
        weights = torch.exp(scores - scores.max())
        return (weights[:, None] * values[seen, shared]).sum(0) / weights.sum()


def _sees(c: Options, only: str, t: int, s: int) -> bool:
    """The table at the top of this file, for one pair."""
    if c.causal and s > t:
        return False
    near = {
        "window": abs(t - s) < c.window,
        "strided": abs(t - s) < c.stride,
        "fixed": t // c.stride == s // c.stride,
        "sparse": abs(t - s) <= c.stride,
    }.get(c.pattern, False)
    far = {
        "strided": (t - s) % c.stride == 0,
        "fixed": s % c.stride >= c.stride - c.summary,
        "atrous": (t - s) % c.stride == 0,
        "sparse": (t - s) % c.stride == 0,
    }.get(c.pattern, False)
    return t < c.global_tokens or s < c.global_tokens or (near and only != "far") or (far and only != "near")


def _rows(state: State, members: list[int]) -> State:
    """The state of some sequences that are as long, without what is not real."""

    def cut(cache: Cache) -> Cache:
        numbers = cache.numbers[members]
        real = int((numbers[0] > 0).sum())
        return Cache(*(leaf[members][:, leaf.shape[1] - min(real, leaf.shape[1]) :] for leaf in cache))

    return State(tuple(cut(cache) for cache in state.caches), state.length[members])

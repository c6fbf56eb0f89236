"""Softmax attention: every token reads all that it may see, weighted by how well keys match its query.

    o_t = sum_s softmax_s(q_t^T k_s / sqrt(K) + bias(t, s)) v_s                              (section 3.2.1)

Shapes    x [B, T, D] -> y [B, T, D];  q [B, T, H, K];  k, v [B, S, G, K] with G <= H heads shared by groups of queries
State     keys and values of all tokens so far, or of the last `window - 1`: 8 G K bytes a token, and a count; 8 more
          bytes a token for its position where an encoding needs that when keys are read
Cost      FLOPs a token: 4 D K (H + G) for the projections + 4 H K S for the S tokens that it sees, and what an encoding
          of positions multiplies (its `flops`)
Source    Vaswani et al. 2017, "Attention Is All You Need", arXiv 1706.03762; grouped heads: Ainslie et al. 2023,
          arXiv 2305.13245; normalised queries and keys: Henry et al. 2020, arXiv 2010.04245
Deviates  positions act on queries, keys, scores or values (nn/positions), those of the embedding are the model's; norms
          of q and k have one weight for all heads
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from everlong.config import config, divisible
from everlong.mixers.base import Context, Cost, HeadOptions, Mixer, Traits, unpadded
from everlong.nn import positions
from everlong.nn.cache import append, append_ragged
from everlong.nn.layers import HeadNorm


class State(NamedTuple):
    """What attention keeps of a sequence; where rows differ in length, what is real stands at the end."""

    keys: Float[Tensor, "N S G K"]
    values: Float[Tensor, "N S G K"]
    positions: Int[Tensor, "N P"]  # of the keys; P is 0 where nobody asks for them
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
    position: positions.Position = "rope"
    """Encoding of positions: a name, or a mapping with its options, {"position": "rope", "base": 500000}."""
    causal: bool = True
    bias: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        divisible("num_heads", self.heads, "num_kv_heads", self.kv_heads)
        if self.window is not None and self.window < 1:
            raise ValueError(f"`window` must be at least 1 (the token itself): got {self.window}")
        with torch.device("meta"):
            self.encoding()

    @property
    def kv_heads(self) -> int:
        return self.heads if self.num_kv_heads is None else self.num_kv_heads

    def encoding(self) -> positions.PositionEncoding:
        """The encoding of positions, with first weights."""
        return positions.attach(
            self.position,
            num_heads=self.heads,
            size=self.head_size,
            offered=Attention.traits.positions,
            mixer="attention",
            causal=self.causal,
        )


class Attention(Mixer):
    """Softmax attention under the contract."""

    Config = Options
    traits = Traits(
        forms=frozenset({"parallel", "chunk", "recurrent"}),
        causal=True,
        bidirectional=True,
        growth="linear",
        positions=frozenset({"rotation", "late rotation", "score bias", "score", "value"}),
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
        self.position = config.encoding()

    def init_state(self, batch: int) -> State:
        c = self.config
        empty = self.new_state(batch, 0, c.kv_heads, c.head_size)
        return State(empty, empty, self.new_state(batch, 0, dtype=torch.long), self.new_state(batch, dtype=torch.long))

    @unpadded
    def forward(
        self, x: Float[Tensor, "B T D"], state: State | None = None, context: Context = Context()
    ) -> tuple[Float[Tensor, "B T D"], State]:
        past = state if state is not None and self.config.causal else None
        where = context.count_from(None if past is None else past.length, x)
        q, k, v = self._queries(x), self._keys(x), self.v(x).unflatten(-1, (-1, self.config.head_size))
        q = self.position.rotate(q, where).to(v.dtype) if self._turns else q.to(v.dtype)
        k = self.position.rotate(k, where).to(v.dtype) if self._turns else k.to(v.dtype)
        if past is None:
            o = self._attend(q, k, v, where, where, context, counted=context.positions is None)
            if context.cu_seqlens is not None:
                k, v, where = (unpack(t, context.cu_seqlens) for t in (k, v, where))
            places = where.expand(len(k), -1) if self._places else where.new_zeros(len(k), 0)
            state = self._state(k, v, places, context.lengths(x))
        elif context.cu_seqlens is None:
            o, state = self._continue(q, k, v, where.expand(len(q), -1), past, context)
        else:
            cu_seqlens = context.cu_seqlens
            padded = [unpack(t, cu_seqlens) for t in (q, k, v, where)]
            o, state = self._continue_ragged(*padded, past=past, lengths=cu_seqlens.diff(), context=context)
            o = o[unpack(torch.ones_like(x[..., 0], dtype=torch.bool), cu_seqlens)][None]
        return self.o(o.flatten(-2)), state

    @property
    def _turns(self) -> bool:
        """Whether queries and keys are rotated before they meet, and kept so."""
        return "rotation" in self.position.hooks

    @property
    def _places(self) -> bool:
        """Whether the positions of keys are asked for when they are read."""
        return bool(self.position.hooks & positions.READING)

    def _queries(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T H K"]:
        q: Tensor = self.q_norm(self.q(x).unflatten(-1, (-1, self.config.head_size)))
        return q

    def _keys(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T G K"]:
        k: Tensor = self.k_norm(self.k(x).unflatten(-1, (-1, self.config.head_size)))
        return k

    def _continue(
        self, q: Tensor, k: Tensor, v: Tensor, where: Tensor, past: State, context: Context
    ) -> tuple[Float[Tensor, "N T H K"], State]:
        """Queries after a cache; every row brings the same number of tokens."""
        keys, values = append(past.keys, k), append(past.values, v)
        places = append(past.positions, where) if self._places else past.positions
        real = None
        if bool((past.length < past.keys.shape[1]).any()):  # some rows are shorter: what stands before them is not real
            column = torch.arange(keys.shape[1], device=q.device)
            real = column >= past.keys.shape[1] - past.length[:, None]
        o = self._attend(q, keys, values, where, places, context, real=real)
        return o, self._state(keys, values, places, past.length + q.shape[1])

    def _continue_ragged(
        self, q: Tensor, k: Tensor, v: Tensor, where: Tensor, *, past: State, lengths: Tensor, context: Context
    ) -> tuple[Float[Tensor, "N T H K"], State]:
        """Queries after a cache where rows bring unequal numbers of tokens, each at the end of its row."""
        kept = past.length.clamp_max(past.keys.shape[1])
        grown = [(past.keys, k), (past.values, v), *([(past.positions, where)] if self._places else [])]
        (keys, values, *rest), real = append_ragged(grown, kept, lengths)
        places = rest[0] if rest else past.positions
        o = self._attend(q, keys, values, where, places, context, real=real)
        return o, self._state(keys, values, places, past.length + lengths)

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        queries: Tensor,
        keys: Tensor,
        context: Context,
        *,
        real: Tensor | None = None,
        counted: bool | None = None,
    ) -> Float[Tensor, "N T H K"]:
        """`counted`: that positions follow each other without gaps; None: to be found out, after a cache."""
        cached = counted is None
        if counted is None:
            counted = not self._places or positions.consecutive(keys, real)
        return positions.attend(
            self.position,
            q,
            k,
            v,
            queries=queries,
            keys=keys if self._places else None,
            counted=counted,
            project=(self._queries, self._keys),
            causal=self.config.causal,
            window=self.config.window,
            real=real,
            cu_seqlens=None if cached else context.cu_seqlens,
            form=context.form,
        )

    def _state(self, keys: Tensor, values: Tensor, places: Tensor, length: Tensor) -> State:
        """The state after a call: what later tokens may still see."""
        return State(self._recent(keys), self._recent(values), self._recent(places), length)

    def _recent(self, cache: Shaped[Tensor, "N S *rest"]) -> Shaped[Tensor, "N R *rest"]:
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
        with torch.device("meta"):
            encoding = config.encoding()
        heads = config.kv_heads
        if config.causal:
            scores += encoding.flops(1, window, heads)
        else:
            if "value" in encoding.hooks:  # which needs the weights of all pairs
                scores = 4 * config.width * length
            scores += encoding.flops(length, length, heads) // max(1, length)
        kept = length if config.window is None else min(length, config.window - 1)
        keys = heads * config.head_size
        weights = 2 * config.width * (config.width + keys)
        biases = 2 * (config.width + keys) if config.bias else 0
        norms = 2 * config.head_size if config.qk_norm else 0
        places = 8 * kept if encoding.hooks & positions.READING else 0
        return Cost(
            flops_per_token=2 * weights + scores,
            state_bytes=8 * keys * kept + places + 8,
            parameters=weights + biases + norms + sum(p.numel() for p in encoding.parameters()),
        )

    def reference(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        c, position, where = self.config, self.position, torch.arange(len(x))
        q, k, v = (
            y[0]
            for y in (self._queries(x[None]), self._keys(x[None]), self.v(x[None]).unflatten(-1, (-1, c.head_size)))
        )
        if self._turns:
            q, k = (position.rotate(y[None], where[None])[0] for y in (q, k))
        groups = c.heads // c.kv_heads
        scale = c.head_size**-0.5 if position.scale is None else position.scale
        outputs = []
        for t in range(len(x)):
            first = 0 if c.window is None else max(0, t + 1 - c.window)
            last = min(len(x), t + 1 if c.causal else len(x) if c.window is None else t + c.window)
            query, keys, places = q[t], k[first:last], where[first:last]
            if isinstance(position, positions.Rope) and not self._turns:
                length = int(position.text_length(where[t] if c.causal else where[-1]))
                query = position.rotate(query[None, None], where[t : t + 1, None], length)[0, 0]
                keys = position.rotate(keys[None], places[None], length)[0]
            distance = (t - places)[None, None]
            added = position.score_bias(where[t : t + 1], places)[:, 0]
            added = (
                added + position.score(query[None, None], keys[None], distance, (self._queries, self._keys))[0, :, 0]
            )
            met = position.content(query[None, None])[0, 0]
            scores = (keys.repeat_interleave(groups, dim=1) * met).sum(-1) * scale + added.T
            weights = torch.exp(scores - scores.amax(0))
            weights = weights / weights.sum(0)
            o = (weights[..., None] * v[first:last].repeat_interleave(groups, dim=1)).sum(0)
            read = position.value(weights.T[None, :, None], distance)
            outputs.append(o + read[0, :, 0] if isinstance(read, Tensor) else o)
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

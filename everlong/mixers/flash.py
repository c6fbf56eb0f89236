"""FLASH: the gated attention unit whose attention is exact inside chunks of a text and linear between them.

    u_t, v_t, z_t as in gau.py        q, k, q', k' = gamma z + beta, four heads of z                     (section 3.2)
    o_t = sum_s a_ts v_s + M_g^T q'_t          the sum over the s <= t of t's own chunk g = 1, 2, ...
    M_g = sum_s k'_s v_s^T / ((g - 1) C)       over all s in the chunks before it; M_1 = 0
    y_t = W_o [ u_t * o_t ]                    a_ts = relu(q_t^T k_s / C + b(s - t))^2, or another of `weights`

Without causality t sees all of its chunk, and M is that of the whole text: sum_s k'_s v_s^T / n.

Shapes    x [B, T, D] -> y [B, T, D];  u, v [B, T, E] with E = 2 D;  z, q, k, q', k' [B, T, S];  M [S, E]
State     the sums over finished chunks and over the current one, its keys and values so far, zeros behind them, and a
          count: 4 (2 S E + (C - 1) (S + E)) + 8 bytes a sequence, whatever its length; 8 (C - 1) more for positions
          where a bias is added to scores
Cost      FLOPs a token: 2 D (3 E + S) for the projections + 4 S E for the sums + 2 (S + E) for each of the up to C
          tokens of its chunk that it sees
Source    Hua et al. 2022, "Transformer Quality in Linear Time", arXiv 2202.10447
Deviates  as gau.py does; n is C in weights of a chunk, as in the paper. The sum over earlier chunks is divided by the
          number of their tokens, where the paper's code has the length of the text, which a text that goes on does not
          know, and FLASH-pytorch C (`linear_divisor`). All four heads are rotated
"""

import itertools
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from everlong.config import config
from everlong.mixers.base import Context, Cost, Mixer, Traits, unpadded
from everlong.nn import positions
from everlong.nn.gated import GatedOptions, OffsetScale, PairEncoding, Weights, attend, make_norm, weigh
from everlong.nn.ragged import Groups
from everlong.ops.scoring import uncompiled


class State(NamedTuple):
    """What FLASH keeps of a sequence."""

    memory: Float[Tensor, "N S E"]  # the sum over finished chunks
    pending: Float[Tensor, "N S E"]  # over the current one, which nobody reads yet
    keys: Float[Tensor, "N slots S"]  # of the current chunk, zeros behind them
    values: Float[Tensor, "N slots E"]
    positions: Int[Tensor, "N P"]  # of the keys; P is 0 where nobody asks for them
    length: Int[Tensor, " N"]


class Tokens(NamedTuple):
    """What a layer makes of its tokens."""

    q: Float[Tensor, "M T S"]
    k: Float[Tensor, "M T S"]
    linear_q: Float[Tensor, "M T S"]
    linear_k: Float[Tensor, "M T S"]
    v: Float[Tensor, "M T E"]
    where: Int[Tensor, "M T"]

    def part(self, start: int, stop: int) -> "Tokens":
        return Tokens._make(y[:, start:stop] for y in self)

    def chunks(self, size: int) -> "Tokens":
        """Whole chunks as rows of their own."""
        return Tokens._make(y.reshape(-1, size, *y.shape[2:]) for y in self)


@config
class Options(GatedOptions):
    """Options of FLASH."""

    weights: Weights = "relu2_n2"
    """Of pairs of a chunk, with n = C: relu2_n2 as in the paper, relu2_ns, relu2_n2_bias, laplace, softmax or
    softmax_plus."""
    chunk: int = 256
    """C: tokens of a chunk, counted from the start of the text."""
    linear_divisor: Literal["visible", "chunk"] = "visible"
    """Of the sum over earlier chunks in causal layers: the number of their tokens, or C as in FLASH-pytorch."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chunk < 1:
            raise ValueError(f"`chunk` must be at least 1: got {self.chunk}")
        with torch.device("meta"):
            self.pairs()

    def pairs(self) -> PairEncoding:
        """The encodings of positions, with first weights."""
        return self.encoding("flash", Flash.traits.positions)


class Flash(Mixer):
    """FLASH under the contract."""

    Config = Options
    traits = Traits(
        forms=frozenset({"parallel", "chunk", "recurrent"}),
        causal=True,
        bidirectional=True,
        growth="constant",
        positions=frozenset({"rotation", "score bias"}),
        owns_feed_forward=True,
    )

    def __init__(self, config: Options, *, layer: int = 0, depth: int = 1) -> None:
        super().__init__(config, layer=layer, depth=depth)
        self.norm = make_norm(config.norm, config.width)
        self.gate, self.v = (nn.Linear(config.width, config.inner, bias=config.bias) for _ in range(2))
        self.z = nn.Linear(config.width, config.key_size, bias=config.bias)
        self.o = nn.Linear(config.inner, config.width, bias=config.bias)
        self.heads = OffsetScale(4, config.key_size)
        self.position = config.pairs()

    def init_state(self, batch: int) -> State:
        s, e, slots = self.config.key_size, self.config.inner, self.config.chunk - 1
        places = self.new_state(batch, slots if self.position.biased else 0, dtype=torch.long)
        return State(
            self.new_state(batch, s, e),
            self.new_state(batch, s, e),
            self.new_state(batch, slots, s),
            self.new_state(batch, slots, e),
            places,
            self.new_state(batch, dtype=torch.long),
        )

    @unpadded
    def forward(
        self, x: Float[Tensor, "B T D"], state: State | None = None, context: Context = Context()
    ) -> tuple[Float[Tensor, "B T D"], State]:
        fresh = state is None or not self.config.causal
        past = self.init_state(context.sequences(x)) if state is None or fresh else state
        where = context.count_from(None if fresh else past.length, x)
        normed = self.norm(x)
        u, v, z = (F.silu(project(normed)) for project in (self.gate, self.v, self.z))
        heads = self.position.rotate(self.heads(z), where).to(v.dtype)
        tokens = Tokens._make([*heads.unbind(-2), v, where.expand(len(v), -1)])
        if not x.numel():
            return x, past
        counted = context.positions is None if fresh else None
        if self.config.causal:
            # Which parts there are depends on numbers in the state, of which torch.compile knows nothing.
            o, state = uncompiled(self._causal)(tokens, past, context, counted)
        else:
            o, state = self._bidirectional(tokens, context), past._replace(length=context.lengths(x))
        return self.o(u * o), state

    def _causal(
        self, tokens: Tokens, state: State, context: Context, counted: bool | None
    ) -> tuple[Float[Tensor, "B T E"], State]:
        """Any sequences: at once where all stand at the same place of a chunk, otherwise those that are alike."""
        place, form = state.length % self.config.chunk, context.form
        places = place.tolist()
        if context.cu_seqlens is None and len(set(places)) == 1:
            return self._continue(tokens, state, places[0], form, counted)
        if context.cu_seqlens is None and tokens.v.shape[1] == 1:
            return self._step(tokens, state, place, form)
        groups = Groups(context.lengths(tokens.v).tolist(), places)
        batches = (groups.batches(y.reshape(1, -1, *y.shape[2:])) for y in tokens)
        outputs, states = [], []
        for group, *batch in zip(groups.members, *batches, strict=True):
            own = State._make(leaf[group] for leaf in state)
            o, own = self._continue(Tokens._make(batch), own, places[group[0]], form, counted)
            outputs.append(o)
            states.append(own)
        return groups.row(outputs).view_as(tokens.v), State._make(
            groups.rows(leaf) for leaf in zip(*states, strict=True)
        )

    def _continue(
        self, tokens: Tokens, state: State, place: int, form: str, counted: bool | None
    ) -> tuple[Float[Tensor, "M T E"], State]:
        """Sequences of one length from one place of a chunk on: what it lacks, whole chunks, what is left."""
        size, length = self.config.chunk, tokens.v.shape[1]
        first = min(length, size - place) if place else 0
        last = first + (length - first) // size * size
        outputs = []
        if first:
            o, state = self._partial(tokens.part(0, first), state, place, form, counted)
            outputs.append(o)
        if first < last:
            o, state = self._whole(tokens.part(first, last), state, form, counted)
            outputs.append(o)
        if last < length:
            o, state = self._partial(tokens.part(last, length), state, 0, form, counted)
            outputs.append(o)
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)) if outputs else tokens.v, state

    def _partial(
        self, tokens: Tokens, state: State, place: int, form: str, counted: bool | None
    ) -> tuple[Float[Tensor, "M T E"], State]:
        """Tokens of one chunk, from this place of it on."""
        kind, filled = state.memory.dtype, place + tokens.v.shape[1]
        keys, values = tokens.k, tokens.v
        where = tokens.where if self.position.biased else tokens.where[:, :0]
        if place:
            held = (y[:, :place] for y in (state.keys, state.values, state.positions))
            keys, values, where = (
                torch.cat([old.to(new.dtype), new], 1) for old, new in zip(held, (keys, values, where), strict=True)
            )
        o = self._attend(tokens, keys, values, where, form, counted)
        o = self._recall(o, tokens.linear_q, state.memory, state.length - place)
        pending = state.pending + (tokens.linear_k.mT @ tokens.v).to(kind)
        memory, length = state.memory, state.length + tokens.v.shape[1]
        if filled == self.config.chunk:
            none = [torch.zeros_like(y) for y in (pending, *state[2:5])]
            return o, State._make([memory + pending, *none, length])
        free = self.config.chunk - 1 - filled
        keys, values = (F.pad(y.to(kind), (0, 0, 0, free)) for y in (keys, values))
        where = F.pad(where, (0, free)) if self.position.biased else where
        return o, State(memory, pending, keys, values, where, length)

    def _whole(
        self, tokens: Tokens, state: State, form: str, counted: bool | None
    ) -> tuple[Float[Tensor, "M T E"], State]:
        """Whole chunks, of sequences of which nothing is pending."""
        batch, size = len(tokens.v), self.config.chunk
        rows = tokens.chunks(size)
        where = rows.where if self.position.biased else rows.where[:, :0]
        o = self._attend(rows, rows.k, rows.v, where, form, counted)
        sums = (rows.linear_k.mT @ rows.v).to(state.memory.dtype)
        sums = sums.view(batch, -1, *sums.shape[1:])
        count = sums.shape[1]
        # Sum by sum: torch's cumsum over an outer axis goes through memory a number at a time.
        *before, memory = itertools.accumulate(sums.unbind(1), initial=state.memory)
        done = state.length[:, None] + size * torch.arange(count, device=o.device)
        o = self._recall(o, rows.linear_q, torch.stack(before, 1).flatten(0, 1), done.flatten())
        return o.reshape_as(tokens.v), state._replace(memory=memory, length=state.length + count * size)

    def _step(
        self, tokens: Tokens, state: State, place: Int[Tensor, " N"], form: str
    ) -> tuple[Float[Tensor, "N 1 E"], State]:
        """One token for each sequence, wherever in its chunk it stands."""
        size, kind = self.config.chunk, state.memory.dtype
        slot = torch.arange(size, device=place.device)
        new, seen = slot == place[:, None], int(place.max()) + 1
        keys, values = (
            torch.where(new[..., None], y, F.pad(old, (0, 0, 0, 1)).to(y.dtype))
            for y, old in ((tokens.k, state.keys), (tokens.v, state.values))
        )
        real, where = slot[:seen] <= place[:, None], state.positions
        if self.position.biased:
            where = torch.where(new, tokens.where, F.pad(where, (0, 1)))
        near = torch.where(real, where[:, :seen], tokens.where) if self.position.biased else where
        o = self._attend(tokens, keys[:, :seen], values[:, :seen], near, form, False, real)
        o = self._recall(o, tokens.linear_q, state.memory, state.length - place)
        pending = state.pending + (tokens.linear_k.mT @ tokens.v).to(kind)
        full = (place + 1 == size)[:, None, None]
        memory, length = torch.where(full, state.memory + pending, state.memory), state.length + 1
        pending, keys, values = (
            y.masked_fill(full, 0.0) for y in (pending, keys[:, :-1].to(kind), values[:, :-1].to(kind))
        )
        where = where[:, : size - 1].masked_fill(full[..., 0], 0) if self.position.biased else where
        return o, State(memory, pending, keys, values, where, length)

    def _bidirectional(self, tokens: Tokens, context: Context) -> Float[Tensor, "B T E"]:
        counted, form = context.positions is None, context.form
        if context.cu_seqlens is None:
            return self._both_ways(tokens, form, counted)
        groups = Groups(context.cu_seqlens.diff().tolist())
        batches = zip(*(groups.batches(y) for y in tokens), strict=True)
        return groups.row([self._both_ways(Tokens._make(batch), form, counted) for batch in batches])

    def _both_ways(self, tokens: Tokens, form: str, counted: bool) -> Float[Tensor, "M T E"]:
        """Whole sequences of one length."""
        length = tokens.v.shape[1]
        whole = length // self.config.chunk * self.config.chunk
        outputs = []
        for part, size in ((tokens.part(0, whole), self.config.chunk), (tokens.part(whole, length), length - whole)):
            if part.v.shape[1]:
                rows = part.chunks(size)
                where = rows.where if self.position.biased else rows.where[:, :0]
                outputs.append(self._attend(rows, rows.k, rows.v, where, form, counted).reshape_as(part.v))
        if not outputs:
            return tokens.v
        memory = tokens.linear_k.mT @ (tokens.v / length)
        return torch.cat(outputs, 1) + tokens.linear_q @ memory

    def _attend(
        self,
        tokens: Tokens,
        keys: Float[Tensor, "M K S"],
        values: Float[Tensor, "M K E"],
        where: Int[Tensor, "M _"],
        form: str,
        counted: bool | None,
        real: Tensor | None = None,
    ) -> Float[Tensor, "M T E"]:
        """What tokens read in their own chunk."""
        biased = self.position.biased
        return attend(
            self.config.weights,
            tokens.q,
            keys,
            values,
            count=self.config.chunk,
            position=self.position,
            queries=tokens.where,
            keys=where if biased else None,
            counted=not biased or (positions.consecutive(where, real) if counted is None else counted),
            real=real,
            causal=self.config.causal,
            form=form,
        )

    def _recall(
        self,
        o: Float[Tensor, "M T E"],
        q: Float[Tensor, "M T S"],
        memory: Float[Tensor, "M S E"],
        done: Int[Tensor, " M"],
    ) -> Float[Tensor, "M T E"]:
        """`o` and what is read of the chunks before, in which there are so many tokens."""
        if not bool(done.any()):
            return o
        count = done if self.config.linear_divisor == "visible" else torch.full_like(done, self.config.chunk)
        share = (done > 0).to(memory.dtype) / count.clamp_min(1)
        return o + ((q * share[:, None, None]) @ memory).to(o.dtype)

    @classmethod
    def cost(cls, config: Options, length: int) -> Cost:
        d, e, s, c = config.width, config.inner, config.key_size, config.chunk
        with torch.device("meta"):
            pairs = config.pairs()
        if config.causal:
            near = 2 * (s + e) * (length % c + 1)
            far = 2 * s * e * (2 if length >= c else 1)
        else:
            far = 4 * s * e
            near = 2 * (s + e) * (length // c * c * c + (length % c) ** 2) // max(1, length)
        return Cost(
            flops_per_token=2 * d * (3 * e + s) + far + near,
            state_bytes=4 * (2 * s * e + (c - 1) * (s + e)) + (8 * (c - 1) if pairs.biased else 0) + 8,
            parameters=config.parameters(4) + sum(parameter.numel() for parameter in pairs.parameters()),
        )

    def reference(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        c, position, where, size = self.config, self.position, torch.arange(len(x)), self.config.chunk
        normed = torch.stack([self.norm(x_t) for x_t in x])
        u, v, z = (y * torch.sigmoid(y) for y in (self.gate(normed), self.v(normed), self.z(normed)))
        heads = (z * self.heads.gamma[i] + self.heads.beta[i] for i in range(4))
        q, k, linear_q, linear_k = (position.rotate(y[None, :, None], where[None])[0, :, 0] for y in heads)
        outputs = []
        for t in range(len(x)):
            start = t // size * size
            stop = t + 1 if c.causal else min(len(x), start + size)
            bias = torch.zeros(stop - start, dtype=x.dtype)
            if position.biased:
                bias = position.score_bias(where[t : t + 1], where[start:stop])[0, 0].to(x.dtype)
            weights = weigh(c.weights, k[start:stop] @ q[t], bias, count=size, size=c.key_size)
            o = weights @ v[start:stop]
            far = start if c.causal else len(x)
            for j in range(far):
                share = size if c.causal and c.linear_divisor == "chunk" else far
                o = o + (linear_q[t] @ linear_k[j]) * v[j] / share
            outputs.append(u[t] * o)
        y: Tensor = self.o(torch.stack(outputs))
        return y

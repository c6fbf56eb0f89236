"""The gated attention unit: attention of one head and a gated feed-forward as one layer, the whole branch of its block.

    x~_t = norm(x_t)        u_t, v_t = silu(W_u x~_t), silu(W_v x~_t)        z_t = silu(W_z x~_t)          (section 2)
    q_t = gamma_q z_t + beta_q        k_t = gamma_k z_t + beta_k
    y_t = W_o [ u_t * sum_s a_ts v_s ],    a_ts = relu(q_t^T k_s / n_t + b(s - t))^2                       (section 2)

Other weights a_ts are a choice of `weights`: they stand at the top of nn/gated.py. A block adds y to its stream and has
neither norm nor feed-forward: two such layers have about the weights of one of attention with its feed-forward.

Shapes    x [B, T, D] -> y [B, T, D];  u, v [B, T, E] with E = 2 D;  z, q, k [B, T, S] with S = 128
State     keys and values of all tokens so far, 4 (S + E) bytes a token, and a count; 8 more bytes a token for its
          position where a bias is added to scores
Cost      FLOPs a token: 2 D (3 E + S) for the projections + 2 (S + E) for each token that it sees
Source    Hua et al. 2022, "Transformer Quality in Linear Time", arXiv 2202.10447; Su 2022, kexue.fm/archives/8934
Deviates  n is the number of tokens that a token sees, so that a text can be continued, and not the length of the whole;
          `divisor` makes it a constant. gamma begins at 1 and not at 0, about which the gradient vanishes. The default
          relu2_ns is Su's: 1 / n^2 leaves each weight too small. The bias of positions is an option (`relative_bias`)
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import silu

from everlong.config import config
from everlong.mixers.attention import unpack
from everlong.mixers.base import Context, Cost, Mixer, Traits, unpadded
from everlong.nn import positions
from everlong.nn.cache import append, append_ragged
from everlong.nn.gated import GatedOptions, OffsetScale, PairEncoding, attend, make_norm, weigh
from everlong.nn.ragged import Groups


class State(NamedTuple):
    """What the unit keeps of a sequence; where rows differ in length, what is real stands at the end."""

    keys: Float[Tensor, "N S K"]
    values: Float[Tensor, "N S E"]
    positions: Int[Tensor, "N P"]  # of the keys; P is 0 where nobody asks for them
    length: Int[Tensor, " N"]


@config
class Options(GatedOptions):
    """Options of the gated attention unit."""

    divisor: int | None = None
    """n, such as the length of texts in training; None: the number of tokens that a token sees."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.divisor is not None and self.divisor < 1:
            raise ValueError(f"`divisor` must be at least 1: got {self.divisor}")
        with torch.device("meta"):
            self.pairs()

    def pairs(self) -> PairEncoding:
        """The encodings of positions, with first weights."""
        return self.encoding("gau", GAU.traits.positions)


class GAU(Mixer):
    """The gated attention unit under the contract."""

    Config = Options
    traits = Traits(
        forms=frozenset({"parallel", "chunk", "recurrent"}),
        causal=True,
        bidirectional=True,
        growth="linear",
        positions=frozenset({"rotation", "score bias"}),
        owns_feed_forward=True,
    )

    def __init__(self, config: Options, *, layer: int = 0, depth: int = 1) -> None:
        super().__init__(config, layer=layer, depth=depth)
        self.norm = make_norm(config.norm, config.width)
        self.gate, self.v = (nn.Linear(config.width, config.inner, bias=config.bias) for _ in range(2))
        self.z = nn.Linear(config.width, config.key_size, bias=config.bias)
        self.o = nn.Linear(config.inner, config.width, bias=config.bias)
        self.heads = OffsetScale(2, config.key_size)
        self.position = config.pairs()

    def init_state(self, batch: int) -> State:
        c = self.config
        keys, values = (self.new_state(batch, 0, size) for size in (c.key_size, c.inner))
        none = self.new_state(batch, 0, dtype=torch.long)
        return State(keys, values, none, self.new_state(batch, dtype=torch.long))

    @unpadded
    def forward(
        self, x: Float[Tensor, "B T D"], state: State | None = None, context: Context = Context()
    ) -> tuple[Float[Tensor, "B T D"], State]:
        past = state if state is not None and self.config.causal else None
        where = context.count_from(None if past is None else past.length, x)
        u, v, q, k = self._project(x, where)
        lengths = context.lengths(x)
        if past is None:
            o = self._whole(q, k, v, where, context)
            state = self._begun(k, v, where, lengths, context)
        elif context.cu_seqlens is None:
            o, state = self._continue(q, k, v, where.expand(len(q), -1), past, context)
        else:
            padded = [unpack(y, context.cu_seqlens) for y in (q, k, v, where)]
            o, state = self._continue_ragged(*padded, past=past, lengths=lengths, context=context)
            o = o[unpack(torch.ones_like(x[..., 0], dtype=torch.bool), context.cu_seqlens)][None]
        return self.o(u * o), state

    def _project(self, x: Float[Tensor, "B T D"], where: Int[Tensor, "rows T"]) -> list[Float[Tensor, "B T _"]]:
        """Gate, values, queries and keys."""
        x = self.norm(x)
        u, v, z = silu(self.gate(x)), silu(self.v(x)), silu(self.z(x))
        q, k = self.position.rotate(self.heads(z), where).to(v.dtype).unbind(-2)
        return [u, v, q, k]

    def _whole(self, q: Tensor, k: Tensor, v: Tensor, where: Tensor, context: Context) -> Float[Tensor, "B T E"]:
        """Sequences from their first token on; those of a packed row by their lengths."""
        counted = context.positions is None
        if context.cu_seqlens is None or not q.shape[1]:
            return self._attend(q, k, v, where, where, counted=counted, form=context.form)
        groups = Groups(context.cu_seqlens.diff().tolist())
        batches = zip(*(groups.batches(y) for y in (q, k, v, where)), strict=True)
        return groups.row([self._attend(*y, y[-1], counted=counted, form=context.form) for y in batches])

    def _begun(self, k: Tensor, v: Tensor, where: Tensor, lengths: Tensor, context: Context) -> State:
        """The state after the first call."""
        if not self.config.causal:
            return self.init_state(len(lengths))
        if context.cu_seqlens is not None:
            k, v, where = (unpack(y, context.cu_seqlens) for y in (k, v, where))
        places = where.expand(len(k), -1) if self.position.biased else where.new_zeros(len(k), 0)
        return State(k, v, places, lengths)

    def _continue(
        self, q: Tensor, k: Tensor, v: Tensor, where: Tensor, past: State, context: Context
    ) -> tuple[Float[Tensor, "N T E"], State]:
        """Queries after a cache; every row brings the same number of tokens."""
        keys, values = append(past.keys, k), append(past.values, v)
        places = append(past.positions, where) if self.position.biased else past.positions
        real = None
        if bool((past.length < past.keys.shape[1]).any()):
            column = torch.arange(keys.shape[1], device=q.device)
            real = column >= past.keys.shape[1] - past.length[:, None]
        o = self._attend(q, keys, values, where, places, real=real, form=context.form)
        return o, State(keys, values, places, past.length + q.shape[1])

    def _continue_ragged(
        self, q: Tensor, k: Tensor, v: Tensor, where: Tensor, *, past: State, lengths: Tensor, context: Context
    ) -> tuple[Float[Tensor, "N T E"], State]:
        """Queries after a cache where rows bring unequal numbers of tokens, each at the end of its row."""
        grown = [(past.keys, k), (past.values, v), *([(past.positions, where)] if self.position.biased else [])]
        (keys, values, *rest), real = append_ragged(grown, past.length, lengths)
        places = rest[0] if rest else past.positions
        o = self._attend(q, keys, values, where, places, real=real, form=context.form)
        return o, State(keys, values, places, past.length + lengths)

    def _attend(
        self,
        q: Float[Tensor, "N T K"],
        k: Float[Tensor, "N S K"],
        v: Float[Tensor, "N S E"],
        queries: Int[Tensor, "rows T"],
        keys: Int[Tensor, "rows _"],
        *,
        counted: bool | None = None,
        real: Tensor | None = None,
        form: str,
    ) -> Float[Tensor, "N T E"]:
        """What the queries read; `counted`: that positions follow each other, None: to be found out, after a cache."""
        if counted is None:
            counted = not self.position.biased or positions.consecutive(keys, real)
        return attend(
            self.config.weights,
            q,
            k,
            v,
            count=self.config.divisor,
            position=self.position,
            queries=queries,
            keys=keys if self.position.biased else None,
            counted=counted,
            real=real,
            causal=self.config.causal,
            form=form,
        )

    @classmethod
    def cost(cls, config: Options, length: int) -> Cost:
        d, e, s = config.width, config.inner, config.key_size
        with torch.device("meta"):
            pairs = config.pairs()
        seen = length + 1 if config.causal else length
        kept = length * (4 * (s + e) + (8 if pairs.biased else 0)) if config.causal else 0
        return Cost(
            flops_per_token=2 * d * (3 * e + s) + 2 * (s + e) * seen,
            state_bytes=kept + 8,
            parameters=config.parameters(2) + sum(parameter.numel() for parameter in pairs.parameters()),
        )

    def reference(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        c, position, where = self.config, self.position, torch.arange(len(x))
        normed = torch.stack([self.norm(x_t) for x_t in x])
        u, v, z = (y * torch.sigmoid(y) for y in (self.gate(normed), self.v(normed), self.z(normed)))
        q, k = (z * self.heads.gamma[i] + self.heads.beta[i] for i in range(2))
        q, k = (position.rotate(y[None, :, None], where[None])[0, :, 0] for y in (q, k))
        outputs = []
        for t in range(len(x)):
            seen = t + 1 if c.causal else len(x)
            bias = torch.zeros(seen, dtype=x.dtype)
            if position.biased:
                bias = position.score_bias(where[t : t + 1], where[:seen])[0, 0].to(x.dtype)
            weights = weigh(c.weights, k[:seen] @ q[t], bias, count=c.divisor or seen, size=c.key_size)
            outputs.append(u[t] * (weights @ v[:seen]))
        y: Tensor = self.o(torch.stack(outputs))
        return y

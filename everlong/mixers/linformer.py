"""Linformer: softmax attention to a fixed number of slots, into which the whole text has been projected.

    o_t = sum_i softmax_i(q_t^T kbar_i / sqrt(K)) vbar_i                                     (eq. 7)
    kbar_i = sum_s E_is k_s        vbar_i = sum_s F_is v_s

E and F act along the text, on keys and values with their biases: a row of each for every slot, a column for each place.
What projects may also be a mean, a maximum or a learned convolution over windows as wide as their stride,
`length` / `slots` tokens (section 4, "General projections").

Shapes    x [B, T, D] -> y [B, T, D];  q, k, v [B, T, H, K];  E, F [H or 1, slots, length];  kbar, vbar [B, slots, H, K]
State     none: every output knows the whole text, so that no text can be continued; 8 bytes for a count
Cost      FLOPs of a pass over T tokens: 8 T D^2 for the projections of channels + 4 slots T D for those of the text (by
          windows 0, or 4 T D for a convolution) + 4 T D slots for the attention
Source    Wang et al. 2020, "Linformer: Self-Attention with Linear Complexity", arXiv 2006.04768
Deviates  a text of n < `length` tokens takes the first n columns of E and F. A window at the end of a text has fewer
          tokens: a mean is that of those it has. A convolution is one kernel for all channels, as E is one matrix. That
          the number of slots may stay the same as texts grow is the paper's claim for a given error, and not a fact of
          every task: a text has `slots` averages, whatever is asked of it
"""

import dataclasses
import math
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from everlong.config import config
from everlong.mixers.base import Context, Cost, HeadOptions, Mixer, Traits, unpadded, with_trait
from everlong.nn.ragged import Groups
from everlong.ops import softmax_attention

OFFER = "linformer projection"  # what the first layer's is called in `context.first`


class State(NamedTuple):
    """Nothing of a sequence but its length: there is no going on."""

    length: Int[Tensor, " N"]


@config
class Options(HeadOptions):
    """Options of Linformer."""

    length: int = 512
    """Tokens of the longest text."""
    slots: int = 128
    """Rows of the projections: what a text becomes for its queries."""
    projection: Literal["learned", "mean", "max", "convolution"] = "learned"
    """Of the text: a matrix, or windows of length / slots tokens. Windows of mean and max have nothing to share."""
    sharing: Literal["none", "headwise", "key_value", "layerwise", "borrowed"] = "headwise"
    """Of the projections: none, each head has an E and an F; headwise, all heads have the same; key_value, E is F as
    well; layerwise, all layers have the first one's, of which the others become `borrowed`."""
    causal: bool = False
    """Cannot be True: a slot is made of the whole text."""
    bias: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.causal:
            raise ValueError(
                "`linformer` projects the whole text before its first output, so that every token sees those after it: "
                f"leave out `causal`, or take one of {with_trait('causal')}"
            )
        if self.length < 1 or self.slots < 1:
            raise ValueError(f"`length` and `slots` must be at least 1: got length={self.length}, slots={self.slots}")

    @property
    def stride(self) -> int:
        """Tokens of a window."""
        return -(-self.length // self.slots)

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of E and F, or of those that the layer has for itself."""
        if self.projection in ("mean", "max") or self.sharing == "borrowed":
            return []
        heads = self.heads if self.sharing == "none" else 1
        shape = (heads, self.slots, self.length) if self.projection == "learned" else (heads, self.stride)
        return [shape] * (2 if self.sharing in ("none", "headwise") else 1)


class Linformer(Mixer):
    """Linformer under the contract."""

    Config = Options
    traits = Traits(
        forms=frozenset({"parallel", "chunk"}),
        causal=False,
        bidirectional=True,
        growth="constant",
    )

    def __init__(self, config: Options, *, layer: int = 0, depth: int = 1) -> None:
        if config.sharing == "layerwise" and layer > 0:
            config = dataclasses.replace(config, sharing="borrowed")
        super().__init__(config, layer=layer, depth=depth)
        self.q, self.k, self.v, self.o = (nn.Linear(config.width, config.width, bias=config.bias) for _ in range(4))
        bound = (config.slots if config.projection == "learned" else config.stride) ** -0.5
        self.projections = nn.ParameterList(torch.empty(shape).uniform_(-bound, bound) for shape in config.shapes)

    def init_state(self, batch: int) -> State:
        return State(self.new_state(batch, dtype=torch.long))

    @unpadded
    def forward(
        self, x: Float[Tensor, "B T D"], state: State | None = None, context: Context = Context()
    ) -> tuple[Float[Tensor, "B T D"], State]:
        c, lengths = self.config, context.lengths(x)
        longest = int(lengths.max()) if len(lengths) else 0
        if longest > c.length:
            raise ValueError(
                f"a text must have at most `length` tokens, for each of which the projections have a column: got "
                f"{longest:,}, length={c.length:,}. Make the layer with a greater `length`, or cut the text"
            )
        chosen = self._chosen(context)
        q, k, v = (project(x).unflatten(-1, (c.heads, -1)) for project in (self.q, self.k, self.v))
        if context.cu_seqlens is None or not x.shape[1]:
            o = self._read(q, k, v, chosen=chosen, form=context.form)
        else:
            groups = Groups(lengths.tolist())
            batches = zip(*(groups.batches(y) for y in (q, k, v)), strict=True)
            o = groups.row([self._read(*batch, chosen=chosen, form=context.form) for batch in batches])
        return self.o(o.flatten(-2)), State(lengths)

    def _chosen(self, context: Context) -> list[Tensor]:
        """E and F, or what there is of them: the layer's own or those of the first."""
        c, own = self.config, list(self.projections)
        if c.sharing == "layerwise" and context.first is not None:
            context.first.update(zip([OFFER], own, strict=False))
        if c.sharing != "borrowed" or c.projection in ("mean", "max"):
            return own
        offered = (context.first or {}).get(OFFER)
        expected = dataclasses.replace(c, sharing="layerwise").shapes[0]
        if offered is None or tuple(offered.shape) != expected:
            found = "there is none" if offered is None else f"it has {list(offered.shape)} and not {list(expected)}"
            raise ValueError(
                f"layerwise sharing of `linformer` takes the projection of the model's first layer, but {found}: make "
                "the first layer one with the same `length`, `slots` and `projection`, or take sharing=key_value"
            )
        return [offered]

    def _read(
        self,
        q: Float[Tensor, "M T H K"],
        k: Float[Tensor, "M T H K"],
        v: Float[Tensor, "M T H K"],
        *,
        chosen: list[Tensor],
        form: str,
    ) -> Float[Tensor, "M T H K"]:
        """What the tokens of whole texts of one length read in their slots."""
        keys = self._project(k, chosen[0] if chosen else None)
        values = self._project(v, chosen[-1] if chosen else None)
        return softmax_attention(q, keys.to(q.dtype), values.to(q.dtype), causal=False, form=form)

    def _project(self, x: Float[Tensor, "M T H K"], weight: Tensor | None) -> Float[Tensor, "M slots H K"]:
        """Keys or values along the text."""
        (batch, length), stride = x.shape[:2], self.config.stride
        heads = 1 if weight is None else len(weight)
        parts = x.reshape(batch, length, heads, self.config.width // heads)
        if self.config.projection == "learned":
            assert weight is not None
            slots = torch.matmul(weight[..., :length], parts.transpose(1, 2)).transpose(1, 2)
            return slots.reshape(batch, self.config.slots, *x.shape[2:])
        count, missing = -(-length // stride), -length % stride
        empty = -torch.inf if self.config.projection == "max" else 0.0
        parts = F.pad(parts, (0, 0, 0, 0, 0, missing), value=empty)
        windows = parts.view(batch, count, stride, *parts.shape[2:]).transpose(2, 3)
        if self.config.projection == "max":
            slots = windows.amax(3)
        elif weight is not None:
            slots = torch.matmul(weight[:, None], windows)
        else:
            tokens = torch.full((count,), stride, dtype=x.dtype, device=x.device)
            tokens[-1:] -= missing
            slots = windows.sum(3) / tokens[:, None, None]
        return slots.reshape(batch, count, *x.shape[2:])

    @classmethod
    def cost(cls, config: Options, length: int) -> Cost:
        d, windows = config.width, -(-length // config.stride)
        slots = config.slots if config.projection == "learned" else windows
        along = {"learned": 4 * slots * length, "convolution": 4 * windows * config.stride}.get(config.projection, 0)
        weights = sum(math.prod(shape) for shape in config.shapes)
        return Cost(
            flops_per_token=8 * d * d + 4 * d * slots + along * d // max(1, length),
            state_bytes=8,
            parameters=4 * d * d + (4 * d if config.bias else 0) + weights,
        )

    def reference(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        c, stride, own = self.config, self.config.stride, self._chosen(Context())
        q, k, v = (project(x).unflatten(-1, (c.heads, -1)) for project in (self.q, self.k, self.v))

        def slots(y: Tensor, h: int, which: int) -> Tensor:
            rows = []
            for i in range(c.slots if c.projection == "learned" else -(-len(x) // stride)):
                window = y if c.projection == "learned" else y[i * stride : (i + 1) * stride]
                if own:
                    weight = own[which][h if c.sharing == "none" else 0]
                    row = weight[i] if c.projection == "learned" else weight
                    rows.append(torch.stack([row[s] * y_s for s, y_s in enumerate(window)]).sum(0))
                else:
                    rows.append(window.mean(0) if c.projection == "mean" else window.amax(0))
            return torch.stack(rows)

        outputs = []
        for h in range(c.heads):
            keys, values = slots(k[:, h], h, 0), slots(v[:, h], h, -1)
            outputs.append(torch.stack([torch.softmax(keys @ q_t / c.head_size**0.5, 0) @ values for q_t in q[:, h]]))
        y: Tensor = self.o(torch.cat(outputs, 1))
        return y

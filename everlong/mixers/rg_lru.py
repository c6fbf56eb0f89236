"""The real-gated linear recurrent unit in Griffin's recurrent block: each channel fades, and its gates say how fast.

    h_t = a_t * h_{t-1} + sqrt(1 - a_t^2) * (i_t * x_t)        log a_t = -8 softplus(rate) * r_t       (eq. 4, 6)
    x = conv(W_v u)        r_t = sigmoid(W_r x_t + b_r)        i_t = sigmoid(W_i x_t + b_i)            (eq. 1, 2)
    y_t = W_o [ h_t * gelu(W_gate u_t) ]

Shapes    u [B, T, D] -> y [B, T, D];  x, h, r, i [B, T, I];  W_r and W_i are H blocks on the diagonal, I / H wide
State     h [B, I], the last W - 1 inputs of the convolution and a count: 4 W I + 8 bytes, whatever the length
Cost      FLOPs a token: 6 D I + 4 I^2 / H for the matrices + 2 W I for the convolution + 2 I for the recurrence
Source    De et al. 2024, "Griffin: Mixing Gated Linear Recurrences with Local Attention", arXiv 2402.19427
Deviates  as the released RecurrentGemma does: a sequence's first token enters whole, without sqrt(1 - a^2), the gates
          have biases, and gelu is its approximation by tanh
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from everlong.config import config, divisible
from everlong.mixers.base import Context, Cost, Mixer, Traits, default_heads, unpadded
from everlong.nn.layers import ShortConvolution, exact
from everlong.ops import linear_scan

SHARPNESS = 8.0  # c in the paper


class State(NamedTuple):
    """What the unit keeps of a sequence."""

    memory: Float[Tensor, "N I"]
    v: Float[Tensor, "N W I"]  # the convolution's last inputs
    length: Int[Tensor, " N"]


@config
class Options:
    """Options of Griffin's recurrent block."""

    width: int
    hidden: int | None = None
    """Channels of the recurrence; None: as many as `width`."""
    num_heads: int | None = None
    """Blocks of the gates' matrices; None: blocks of about 64 channels."""
    kernel: int = 4
    """Taps of the short convolution."""
    bias: bool = False
    """Biases in the projections from and to the residual stream."""

    def __post_init__(self) -> None:
        divisible("hidden", self.inner, "num_heads", self.heads)
        if self.kernel < 1 or self.width < 1:
            raise ValueError(f"`width` and `kernel` must be at least 1: got width={self.width}, kernel={self.kernel}")

    @property
    def inner(self) -> int:
        return self.width if self.hidden is None else self.hidden

    @property
    def heads(self) -> int:
        return default_heads(max(self.inner, 1)) if self.num_heads is None else self.num_heads


class BlockLinear(nn.Module):
    """A linear layer whose matrix is zero beside the blocks on its diagonal: every head sees itself alone."""

    def __init__(self, num_heads: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_heads, size, size) * size**-0.5)
        self.bias = nn.Parameter(torch.zeros(num_heads * size))

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        heads = torch.unflatten(x.flatten(0, 1), -1, (len(self.weight), -1)).transpose(0, 1)
        product = torch.bmm(heads, self.weight).transpose(0, 1).reshape(x.shape)
        return exact(product) + self.bias

    def reference(self, x: Float[Tensor, " D"]) -> Float[Tensor, " D"]:
        """One head after another, of one token."""
        parts = [part @ block for part, block in zip(x.view(len(self.weight), -1), self.weight, strict=True)]
        return torch.cat(parts) + self.bias


class RGLRU(Mixer):
    """Griffin's recurrent block under the contract."""

    Config = Options
    traits = Traits(forms=frozenset({"chunk", "recurrent"}), causal=True, bidirectional=False, growth="constant")

    def __init__(self, config: Options, *, layer: int = 0, depth: int = 1) -> None:
        super().__init__(config, layer=layer, depth=depth)
        d, inner, heads = config.width, config.inner, config.heads
        self.v = nn.Linear(d, inner, bias=config.bias)
        self.gate = nn.Linear(d, inner, bias=config.bias)
        self.o = nn.Linear(inner, d, bias=config.bias)
        self.v_conv = ShortConvolution(inner, config.kernel, bias=True, activation=None)
        self.recurrence_gate, self.input_gate = (BlockLinear(heads, inner // heads) for _ in range(2))
        # With an open gate a channel keeps 0.9 to 0.999 of itself from token to token (section 2.4).
        slowest = -torch.empty(inner).uniform_(0.9, 0.999).log() / SHARPNESS
        self.rate = nn.Parameter(slowest + torch.log(-torch.expm1(-slowest)))  # its softplus is that

    def init_state(self, batch: int) -> State:
        c = self.config
        return State(
            self.new_state(batch, c.inner),
            self.new_state(batch, c.kernel - 1, c.inner),
            self.new_state(batch, dtype=torch.long),
        )

    @unpadded
    def forward(
        self, x: Float[Tensor, "B T D"], state: State | None = None, context: Context = Context()
    ) -> tuple[Float[Tensor, "B T D"], State]:
        state = self.init_state(context.sequences(x)) if state is None else state
        v, last_v = self.v_conv(self.v(x), state.v, context.cu_seqlens)
        log_a = -SHARPNESS * F.softplus(exact(self.rate)) * torch.sigmoid(self.recurrence_gate(v))
        # 1 - a^2 without cancellation; where it is 0, the root's slope is infinite and what it multiplies is 0.
        gain = (-torch.expm1(2 * log_a)).clamp_min(torch.finfo(torch.float32).tiny).sqrt()
        first = replace(context, positions=None).count_from(state.length, x) == 0
        h, memory = linear_scan(
            log_a.exp(),
            exact(v) * torch.sigmoid(self.input_gate(v)) * gain.masked_fill(first[..., None], 1.0),
            initial_state=state.memory,
            cu_seqlens=context.cu_seqlens,
            backend="reference" if context.form == "recurrent" else "auto",
        )
        y = self.o(h.to(x.dtype) * F.gelu(self.gate(x), approximate="tanh"))
        return y, State(memory, last_v, state.length + context.lengths(x))

    @classmethod
    def cost(cls, config: Options, length: int) -> Cost:
        d, inner, taps = config.width, config.inner, config.kernel
        weights = 3 * d * inner + 2 * inner * inner // config.heads
        return Cost(
            flops_per_token=2 * weights + 2 * taps * inner + 2 * inner,
            state_bytes=4 * taps * inner + 8,
            parameters=weights + inner * (taps + 4) + (2 * inner + d if config.bias else 0),
        )

    def reference(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        h, outputs = x.new_zeros(self.config.inner), []
        for t, v in enumerate(self.v_conv.reference(self.v(x))):
            r, i = (torch.sigmoid(gate.reference(v)) for gate in (self.recurrence_gate, self.input_gate))
            a = torch.sigmoid(-self.rate) ** (SHARPNESS * r)
            h = a * h + (torch.sqrt(1 - a * a) if t else 1.0) * i * v
            outputs.append(self.o(h * F.gelu(self.gate(x[t]), approximate="tanh")))
        return torch.stack(outputs)

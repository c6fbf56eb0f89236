"""DeltaNet: a memory that corrects what a key stood for by the error it makes, a step of gradient descent a token.

    S_t = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T          o_t = S_t^T q_t / sqrt(K)        (eq. 3)
    beta_t = sigmoid(w_b x_t)          q, k, v = silu(conv(W x)), q and k of length one
    y_t = W_o norm(o_t)

Shapes    x [B, T, D] -> y [B, T, D];  q, k [B, T, H, K];  v [B, T, H, V], H K = H V = D by default
State     S [B, H, K, V] and the last W - 1 inputs of three convolutions: 4 (H K V + (W - 1)(2 H K + H V)) bytes
Cost      FLOPs a token: 2 D (2 H K + 2 H V + H) for the projections + 2 W (2 H K + H V) for the convolutions + 6 H K V
          for the memory
Source    Schlag et al. 2021, "Linear Transformers Are Secretly Fast Weight Programmers", arXiv 2102.11174, as in
          Yang et al. 2024, "Parallelizing Linear Transformers with the Delta Rule", arXiv 2406.06484
Deviates  the state stands as K x V, so that products with it are transposed against the paper's
"""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from everlong.config import config
from everlong.mixers.base import Context, Cost, HeadOptions, Mixer, Traits, unpadded
from everlong.nn.layers import HeadNorm, ShortConvolution, exact, unit_heads
from everlong.ops import delta_rule


class State(NamedTuple):
    """What DeltaNet keeps of a sequence."""

    memory: Float[Tensor, "N H K V"]
    q: Float[Tensor, "N W HK"]  # the convolutions' last inputs
    k: Float[Tensor, "N W HK"]
    v: Float[Tensor, "N W HV"]


@config
class Options(HeadOptions):
    """Options of DeltaNet."""

    key_expansion: float = 1.0
    """Channels of a query or key head over width / num_heads."""
    value_expansion: float = 1.0
    """Channels of a value head over width / num_heads."""
    kernel: int = 4
    """Taps of the short convolutions of q, k and v."""
    eigenvalues: Literal["positive", "both"] = "positive"
    """"both" doubles beta, which lets the memory flip signs and track state (Grazzi et al. 2024, arXiv 2411.12537)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.key_size < 1 or self.value_size < 1 or self.kernel < 1:
            raise ValueError(
                f"a head's keys and values and `kernel` must be at least 1: got {self.key_size} keys, "
                f"{self.value_size} values, kernel={self.kernel}"
            )

    @property
    def key_size(self) -> int:
        return int(self.head_size * self.key_expansion)

    @property
    def value_size(self) -> int:
        return int(self.head_size * self.value_expansion)


class DeltaNet(Mixer):
    """DeltaNet under the contract."""

    Config = Options
    traits = Traits(
        forms=frozenset({"parallel", "chunk", "recurrent"}), causal=True, bidirectional=False, growth="constant"
    )

    def __init__(self, config: Options, *, layer: int = 0, depth: int = 1) -> None:
        super().__init__(config, layer=layer, depth=depth)
        d, keys, values = config.width, config.heads * config.key_size, config.heads * config.value_size
        self.q = nn.Linear(d, keys, bias=False)
        self.k = nn.Linear(d, keys, bias=False)
        self.v = nn.Linear(d, values, bias=False)
        self.o = nn.Linear(values, d, bias=False)
        self.beta = nn.Linear(d, config.heads, bias=False)
        self.q_conv, self.k_conv, self.v_conv = (ShortConvolution(n, config.kernel) for n in (keys, keys, values))
        self.norm = HeadNorm(1, config.value_size)

    def init_state(self, batch: int) -> State:
        c = self.config
        keys, values = c.heads * c.key_size, c.heads * c.value_size
        memory = self.new_state(batch, c.heads, c.key_size, c.value_size)
        return State(memory, *(self.new_state(batch, c.kernel - 1, n) for n in (keys, keys, values)))

    @unpadded
    def forward(
        self, x: Float[Tensor, "B T D"], state: State | None = None, context: Context = Context()
    ) -> tuple[Float[Tensor, "B T D"], State]:
        c = self.config
        state = self.init_state(context.sequences(x)) if state is None else state
        q, last_q = self.q_conv(self.q(x), state.q, context.cu_seqlens)
        k, last_k = self.k_conv(self.k(x), state.k, context.cu_seqlens)
        v, last_v = self.v_conv(self.v(x), state.v, context.cu_seqlens)
        o, memory = delta_rule(
            unit_heads(q.unflatten(-1, (c.heads, -1))),
            unit_heads(k.unflatten(-1, (c.heads, -1))),
            v.unflatten(-1, (c.heads, -1)),
            torch.sigmoid(exact(self.beta(x))) * (2.0 if c.eigenvalues == "both" else 1.0),
            initial_state=state.memory,
            cu_seqlens=context.cu_seqlens,
            form=context.form,
        )
        return self.o(self.norm(o).flatten(-2)), State(memory, last_q, last_k, last_v)

    @classmethod
    def cost(cls, config: Options, length: int) -> Cost:
        d, keys, values = config.width, config.heads * config.key_size, config.heads * config.value_size
        memory, channels = keys * config.value_size, 2 * keys + values
        weights = d * (2 * keys + 2 * values + config.heads)
        return Cost(
            flops_per_token=2 * weights + 2 * config.kernel * channels + 6 * memory,
            state_bytes=4 * (memory + (config.kernel - 1) * channels),
            parameters=weights + config.kernel * channels + config.value_size,
        )

    def reference(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        c = self.config
        q, k, v = (
            convolve(project(x)).view(len(x), c.heads, -1)
            for project, convolve in (
                (self.q, self.q_conv.reference),
                (self.k, self.k_conv.reference),
                (self.v, self.v_conv.reference),
            )
        )
        memory, outputs = x.new_zeros(c.heads, c.key_size, c.value_size), []
        for t, x_t in enumerate(x):
            q_t, k_t = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q[t], k[t]))
            beta = torch.sigmoid(self.beta(x_t)) * (2.0 if c.eigenvalues == "both" else 1.0)
            found = (memory * k_t[:, :, None]).sum(1)
            memory = memory + k_t[:, :, None] * (beta[:, None] * (v[t] - found))[:, None]
            o = (memory * q_t[:, :, None]).sum(1) * c.key_size**-0.5
            o = self.norm.reference(o)
            outputs.append(self.o(o.flatten()))
        return torch.stack(outputs)

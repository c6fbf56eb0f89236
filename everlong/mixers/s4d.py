"""S4D: a diagonal state space for each channel, the same at every step, which trains as a long convolution.

    x'(t) = A x(t) + u(t)      y(t) = 2 Re(C x(t)) + skip u(t)        A diagonal: N/2 complex numbers
    x_t = exp(dt A) x_{t-1} + (exp(dt A) - 1) / A u_t                 sampled every dt by "zoh"            (section 3)
    K_s = 2 Re sum_n C_n (exp(dt A_n) - 1) / A_n exp(dt A_n s)        the same as a convolution, y = K * u (section 3)
    out = W_o z * sigmoid(W_gate z),   z = gelu(y)

Shapes    u [B, T, D] -> out [B, T, D];  A, C [D, N/2];  dt, skip [D]
State     x [B, D, N/2, 2]: 4 D N bytes a sequence, whatever its length
Cost      FLOPs a token: 4 D^2 for the projections + 6 D N for the memory
Source    Gu, Gupta, Goel and Re 2022, "On the Parameterization and Initialization of Diagonal State Space Models",
          arXiv 2206.11893
Deviates  B is 1: only its product with C matters. The kernel is a product of two matrices, of exp(dt A s) for small s
          and for multiples of a large one, in place of all D N T exponentials
"""

import math
from typing import Literal, NamedTuple

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from everlong.config import config
from everlong.mixers.base import Context, Cost, Mixer, Traits, unpadded
from everlong.nn.hippo import normal_plus_low_rank
from everlong.nn.layers import exact
from everlong.nn.state_space import System, SystemOptions, complexes, reals, respond
from everlong.ops import linear_scan
from everlong.ops.chunks import without_autocast
from everlong.ops.scoring import uncompiled


class State(NamedTuple):
    """What S4 and S4D keep of a sequence."""

    memory: Float[Tensor, "n D P 2"]


@config
class Options(SystemOptions):
    """Options of S4D."""

    initialization: Literal["legs", "lin", "inv"] = "legs"
    """Frequencies of A: those of HiPPO-LegS's normal part, evenly spaced, or inversely (S4D-LegS, -Lin, -Inv)."""
    discretization: Literal["zoh", "bilinear"] = "zoh"


class S4D(Mixer):
    """S4D under the contract."""

    Config: type[SystemOptions] = Options
    traits = Traits(
        forms=frozenset({"parallel", "chunk", "recurrent"}),
        causal=True,
        bidirectional=False,
        growth="constant",
        fft_forms=frozenset({"parallel"}),
    )

    def __init__(self, config: Options, *, layer: int = 0, depth: int = 1) -> None:
        super().__init__(config, layer=layer, depth=depth)
        self._add_layer(config)
        frequency = initial_frequencies(config.initialization, config.pairs).to(self.skip.dtype)
        # Re A = -exp(.) stays negative: no step of training makes the state grow.
        self.log_rate = nn.Parameter(torch.full((config.width, config.pairs), math.log(0.5)))
        self.frequency = nn.Parameter(frequency.repeat(config.width, 1))  # Im A
        self.C = nn.Parameter(torch.randn(config.width, config.pairs, 2) * 0.5**0.5)

    def _add_layer(self, config: SystemOptions) -> None:
        """What stands around the state space, in S4 as well."""
        first, last = math.log(config.smallest_step), math.log(config.largest_step)
        self.log_step = nn.Parameter(torch.empty(config.width).uniform_(first, last))
        self.skip = nn.Parameter(torch.randn(config.width))
        self.gate = nn.Linear(config.width, config.width, bias=config.bias)
        self.o = nn.Linear(config.width, config.width, bias=config.bias)

    def system(self) -> System:
        """The state space, sampled every `exp(log_step)`."""
        A, C = torch.complex(-exact(self.log_rate).exp(), exact(self.frequency)), torch.view_as_complex(exact(self.C))
        z = exact(self.log_step).exp()[:, None] * A
        if self.config.discretization == "zoh":
            return Diagonal(z, torch.expm1(z) / A, C)
        return Diagonal(torch.log((1 + z / 2) / (1 - z / 2)), z / A / (1 - z / 2), C)

    def init_state(self, batch: int) -> State:
        return State(self.new_state(batch, self.config.width, self.config.pairs, 2))

    @unpadded
    def forward(
        self, x: Float[Tensor, "B T D"], state: State | None = None, context: Context = Context()
    ) -> tuple[Float[Tensor, "B T D"], State]:
        # Complex numbers gain nothing from the compiler, and loops over powers take it minutes.
        y, memory = uncompiled(self._respond)(x, state, context)
        return self._output(y), State(memory)

    def _respond(
        self, x: Float[Tensor, "B T D"], state: State | None, context: Context
    ) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "n D P 2"]]:
        """What the state space makes of x, and its last states."""
        with without_autocast(x):
            u, memory = exact(x), None
            if state is not None:  # copied: what is read as complex numbers may not lie anywhere in memory
                memory = state.memory.to(u.dtype, copy=True).flatten(2).transpose(0, 1)
            y, memory = respond(self.system(), u, memory, context.cu_seqlens, context.form)
            y = y + exact(self.skip) * u
        return y.to(x.dtype), torch.unflatten(memory.transpose(0, 1), 2, (-1, 2))

    def _output(self, y: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        z = F.gelu(y)
        out: Tensor = self.o(z) * torch.sigmoid(self.gate(z))
        return out

    @classmethod
    def cost(cls, config: SystemOptions, length: int) -> Cost:
        d, n = config.width, config.state_size
        return Cost(
            flops_per_token=4 * d * d + 6 * d * n,
            state_bytes=4 * d * n,
            parameters=2 * d * d + (2 * d if config.bias else 0) + 2 * d + 2 * d * n,
        )

    def reference(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        dt, A = self.log_step.exp()[:, None], torch.complex(-self.log_rate.exp(), self.frequency)
        C, state, outputs = torch.complex(self.C[..., 0], self.C[..., 1]), torch.zeros_like(A), []
        if self.config.discretization == "zoh":
            transition, entry = torch.exp(dt * A), (torch.exp(dt * A) - 1) / A
        else:
            transition, entry = (1 + dt * A / 2) / (1 - dt * A / 2), dt / (1 - dt * A / 2)
        for u in x:
            state = transition * state + entry * u[:, None]
            outputs.append(2 * (C * state).real.sum(1) + self.skip * u)
        return self._output(torch.stack(outputs))


class Diagonal(System):
    """x_t = exp(log_transition) x_{t-1} + entry u_t and y_t = 2 Re(C x_t), with P = N/2 complex numbers a channel."""

    steps = 4

    def __init__(
        self, log_transition: Complex[Tensor, "D P"], entry: Complex[Tensor, "D P"], C: Complex[Tensor, "D P"]
    ) -> None:
        self.log_transition, self.entry, self.row = log_transition, entry, 2 * C
        self.numbers = 2 * C.shape[1]
        self._kept: dict[int, Tensor] = {}

    def kernel(self, length: int) -> Float[Tensor, "D L"]:
        far, near = self._factors(length)
        rows = reals((self.row * self.entry)[:, None] * far, conjugate=True)
        return (rows @ reals(near).mT).flatten(1)[:, :length]

    def reads(self, length: int) -> Float[Tensor, "D L N"]:
        return reals(self.row[:, None] * self._powers(length)[:, 1:], conjugate=True)

    def writes(self, length: int) -> Float[Tensor, "D L N"]:
        return reals(self.entry[:, None] * self._powers(length)[:, :-1]).flip(1)

    def advance(self, state: Float[Tensor, "D n N"], steps: int | Int[Tensor, " n"]) -> Float[Tensor, "D n N"]:
        if not isinstance(steps, int):
            power = self._power(steps)
        elif steps in self._kept:
            power = self._kept[steps][:, -1:]
        else:
            power = self._power(torch.full((1,), steps, device=self.row.device))
        return reals(complexes(state) * power)

    def _power(self, steps: Int[Tensor, " L"]) -> Complex[Tensor, "D L P"]:
        return torch.exp(self.log_transition[:, None] * steps[:, None])

    def _factors(self, length: int) -> tuple[Complex[Tensor, "D I P"], Complex[Tensor, "D J P"]]:
        """Powers far and near, whose products are the first `length` ones and some more."""
        near = math.isqrt(max(length - 1, 0)) + 1
        steps = torch.arange(0, length, near, device=self.row.device)
        return self._power(steps), self._power(torch.arange(near, device=self.row.device))

    def _powers(self, length: int) -> Complex[Tensor, "D L_plus_1 P"]:
        """The powers from 0 to `length`."""
        if length not in self._kept:
            far, near = self._factors(length + 1)
            self._kept[length] = (far[:, :, None] * near[:, None]).flatten(1, 2)[:, : length + 1]
        return self._kept[length]

    def loop(
        self, u: Float[Tensor, "B T D"], state: Float[Tensor, "D n N"], cu_seqlens: Int[Tensor, " N_plus_1"] | None
    ) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "D n N"]]:
        added = (u[..., None] * reals(self.entry)).flatten(2)
        transition = torch.view_as_real(torch.exp(self.log_transition)).flatten(0, 1)
        states, last = linear_scan(
            transition.expand(*u.shape[:2], -1, -1),
            torch.unflatten(added, 2, (-1, 2)),
            initial_state=torch.unflatten(state.transpose(0, 1).flatten(1), 1, (-1, 2)),
            cu_seqlens=cu_seqlens,
        )
        states, last = (torch.unflatten(x.flatten(-2), -1, (u.shape[2], -1)) for x in (states, last))
        return torch.einsum("btdn,dn->btd", states, reals(self.row, conjugate=True)), last.transpose(0, 1)


def initial_frequencies(initialization: str, pairs: int) -> Float[Tensor, " P"]:
    """The imaginary parts of A at the start, of those N/2 that are not negative; all real parts are -1/2."""
    n = torch.arange(pairs, dtype=torch.float64)
    if initialization == "lin":
        return math.pi * n
    if initialization == "inv":
        return 2 * pairs / math.pi * (2 * pairs / (2 * n + 1) - 1)
    return normal_plus_low_rank(2 * pairs).eigenvalues.imag[pairs:]

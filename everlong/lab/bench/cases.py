"""The operators as they are measured: what each is given, and how it is called.

B = 1, H = 8 heads of K = V = 64 unless asked otherwise; the scans and the convolution have H V = 512 channels, the
selective scan N = 16 states for each.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from everlong import ops
from everlong.ops.dispatch import TABLE

STATES, TAPS, WINDOW = 16, 4, 512


@dataclass(frozen=True)
class Shape:
    """How much an operator is given."""

    length: int
    batch: int = 1
    heads: int = 8
    size: int = 64  # channels of a head, of keys and of values
    dtype: torch.dtype = torch.float32

    @property
    def vectors(self) -> tuple[int, ...]:
        return (self.batch, self.length, self.heads, self.size)

    @property
    def channels(self) -> tuple[int, ...]:
        return (self.batch, self.length, self.heads * self.size)

    @property
    def memory(self) -> tuple[int, ...]:
        return (self.batch, self.heads, self.size, self.size)


# Inputs of the kind that a model gives. Gates and what is learned are float32 whatever the dtype, as under autocast.
INPUTS: dict[str, Callable[[Shape], Tensor]] = {
    "q": lambda s: torch.randn(s.vectors, dtype=s.dtype),
    "k": lambda s: F.normalize(torch.randn(s.vectors, dtype=s.dtype), dim=-1),
    "v": lambda s: torch.randn(s.vectors, dtype=s.dtype),
    "beta": lambda s: torch.rand(s.vectors[:3]),
    "a": lambda s: -F.normalize(torch.randn(s.vectors, dtype=s.dtype), dim=-1),
    "b": lambda s: 0.5 * F.normalize(torch.randn(s.vectors, dtype=s.dtype), dim=-1),
    "decay of a head": lambda s: torch.log1p(-torch.exp2(-5.0 - torch.arange(s.heads))),
    "decay of a token": lambda s: F.logsigmoid(torch.randn(s.vectors[:3]) + 2),
    "decay of a channel": lambda s: F.logsigmoid(torch.randn(s.vectors) + 2),
    "x": lambda s: torch.randn(s.channels, dtype=s.dtype),
    "step": lambda s: F.softplus(torch.randn(s.channels) - 3).to(s.dtype),
    "rates": lambda s: -torch.arange(1.0, STATES + 1).repeat(s.channels[2], 1),
    "in": lambda s: torch.randn(s.batch, s.length, STATES, dtype=s.dtype),
    "out": lambda s: torch.randn(s.batch, s.length, STATES, dtype=s.dtype),
    "gates": lambda s: torch.rand(s.channels, dtype=s.dtype),
    "complex gates": lambda s: _turned(torch.rand(s.channels), torch.randn(s.channels)).to(s.dtype),
    "pairs": lambda s: torch.randn(*s.channels, 2, dtype=s.dtype),
    "taps": lambda s: torch.randn(s.channels[2], TAPS, dtype=s.dtype),
}


def _turned(radius: Tensor, angle: Tensor) -> Tensor:
    return torch.stack([radius * angle.cos(), radius * angle.sin()], -1)


def inputs(names: tuple[str, ...], shape: Shape) -> list[Tensor]:
    """Fresh ones, the same whenever they are made."""
    torch.manual_seed(0)
    return [INPUTS[name](shape) for name in names]


@dataclass(frozen=True)
class Case:
    """One way to call one operator."""

    operator: str
    names: tuple[str, ...]  # of its inputs
    call: Callable[..., Tensor]  # of the inputs and `backend`: the output without the state
    drawn: bool = True  # whether it has a line in the picture of times against length
    lengths: tuple[int, ...] = (4096, 16_384)  # at which its backends are compared
    passes: str = "forward + backward"  # what is compared: "forward" where a model is only read, as over trees

    def on(self, backend: str) -> Callable[..., Tensor]:
        """The call with a backend, as a function of the inputs."""
        return partial(self.call, backend=backend)


def branches(x: Tensor, tree: bool) -> Tensor | None:
    """Where the row is to be a tree, the parents of one in which every node has two children."""
    return (torch.arange(x.shape[1]) - 1).div(2, rounding_mode="floor") if tree else None


def linear(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None = None, *, tree: bool = False, backend: str = "auto"
) -> Tensor:
    return ops.linear_attention(q, k, v, log_decay=decay, parents=branches(q, tree), backend=backend)[0]


def delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    decay: Tensor | None = None,
    *,
    tree: bool = False,
    backend: str = "auto",
) -> Tensor:
    return ops.delta_rule(q, k, v, beta, log_decay=decay, parents=branches(q, tree), backend=backend)[0]


def dplr(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, decay: Tensor, *, tree: bool = False, backend: str = "auto"
) -> Tensor:
    return ops.dplr(q, k, v, a, b, log_decay=decay, parents=branches(q, tree), backend=backend)[0]


def softmax(
    q: Tensor, k: Tensor, v: Tensor, *, window: int | None = None, tree: bool = False, backend: str = "auto"
) -> Tensor:
    return ops.softmax_attention(q, k, v, window=window, parents=branches(q, tree), backend=backend)


def scan(gates: Tensor, x: Tensor, *, backend: str = "auto") -> Tensor:
    return ops.linear_scan(gates, x, backend=backend)[0]


def selective(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, backend: str = "auto") -> Tensor:
    return ops.selective_scan(u, dt, A, B, C, backend=backend)[0]


def convolution(x: Tensor, taps: Tensor, *, tree: bool = False, backend: str = "auto") -> Tensor:
    return ops.causal_conv1d(x, taps, activation="silu", parents=branches(x, tree), backend=backend)[0]


def _tree(operator: str, names: tuple[str, ...], call: Callable[..., Tensor]) -> Case:
    """The same over a tree, as small as those of speculation are."""
    return Case(f"{operator}_tree", names, partial(call, tree=True), drawn=False, lengths=(64,), passes="forward")


QKV = ("q", "k", "v")
LINEAR, DELTA = "linear_attention, decay of a token", "delta_rule, decay of a token"
WINDOWED, SELECTIVE = f"softmax_attention, window {WINDOW}", "selective_scan"
CASES: dict[str, Case] = {
    "softmax_attention": Case("softmax_attention", QKV, softmax),
    WINDOWED: Case("softmax_attention", QKV, partial(softmax, window=WINDOW)),
    "linear_attention": Case("linear_attention", QKV, linear, drawn=False),
    "linear_attention, decay of a head": Case("linear_attention", (*QKV, "decay of a head"), linear, drawn=False),
    LINEAR: Case("linear_attention", (*QKV, "decay of a token"), linear),
    "linear_attention, decay of a channel": Case("linear_attention", (*QKV, "decay of a channel"), linear),
    "delta_rule": Case("delta_rule", (*QKV, "beta"), delta, drawn=False),
    DELTA: Case("delta_rule", (*QKV, "beta", "decay of a token"), delta),
    "delta_rule, decay of a channel": Case("delta_rule", (*QKV, "beta", "decay of a channel"), delta, drawn=False),
    "dplr, decay of a channel": Case("dplr", (*QKV, "a", "b", "decay of a channel"), dplr),
    "linear_scan": Case("linear_scan", ("gates", "x"), scan),
    "linear_scan, complex": Case("linear_scan", ("complex gates", "pairs"), scan),
    SELECTIVE: Case("selective_scan", ("x", "step", "rates", "in", "out"), selective),
    "causal_conv1d": Case("causal_conv1d", ("x", "taps"), convolution),
    "softmax_attention, a tree": _tree("softmax_attention", QKV, softmax),
    "linear_attention, a tree, decay of a token": _tree("linear_attention", (*QKV, "decay of a token"), linear),
    "delta_rule, a tree, decay of a token": _tree("delta_rule", (*QKV, "beta", "decay of a token"), delta),
    "dplr, a tree, decay of a channel": _tree("dplr", (*QKV, "a", "b", "decay of a channel"), dplr),
    "causal_conv1d, a tree": _tree("causal_conv1d", ("x", "taps"), convolution),
}


def native() -> dict[str, Case]:
    """The cases whose operator has native kernels that can run here."""
    return {name: case for name, case in CASES.items() if has_kernels(case.operator)}


def has_kernels(operator: str) -> bool:
    """Whether an operator has native kernels, and nothing is known that keeps them from being built here."""
    return any(found.backend == "native" and found.missing(build=False) is None for found in TABLE[operator])

"""FLOATER: positions as points on the path of a learned differential equation, which never ends.

    p(0) = p_0,   dp/dtau = h(tau, p) = W_2 tanh(W_1 p + w tau + b_1) + b_2,   p_t = p(t interval)          (eq. 5)

The equation is solved by the classic method of Runge and Kutta of fourth order, in `substeps` equal steps between two
positions; the next position needs the last one only. What was solved without gradients is kept and extended, as long as
the parameters stay what they are. `method` "map" takes p_{t+1} = p_t + h(t, p_t) in the place of the equation.

Cost      FLOPs of a new position: 16 D C substeps for hidden size C, once for all sequences; sequential in the length
Source    Liu et al. 2020, "Learning to Encode Position for Transformer with Continuous Dynamical Model", arXiv
          2003.09229
Deviates  added to the embedding only, not to each layer's input, and RMS-normalised then: a path of thousands of
          positions would drown the tokens; fixed steps in the place of an adaptive solver
"""

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from everlong.config import config
from everlong.nn.positions.absolute import check_positions
from everlong.nn.positions.base import Kept, PositionEncoding, positive
from everlong.ops.scoring import uncompiled

Slope = Callable[[float, Float[Tensor, " D"]], Float[Tensor, " D"]]


@config
class RecursiveOptions:
    """Options of recursive positions."""

    hidden: int | None = None
    """Channels inside h; None: as many as the model's width, 64 at most."""
    interval: float = 0.1
    """Time between two positions."""
    substeps: int = 1
    """Steps of the solver between two positions."""
    method: Literal["ode", "map"] = "ode"
    amplitude: float = 0.02
    """Size of a channel when it is added to the embedding."""

    def __post_init__(self) -> None:
        positive(self, "hidden", "substeps")
        if not self.interval > 0:
            raise ValueError(f"`interval` must be above 0: got {self.interval}")


class Recursive(PositionEncoding):
    """Each position's vector follows from the one before by a learned flow; added to the embedding."""

    Options = RecursiveOptions
    hooks = frozenset({"embedding"})
    relative = False

    def make(self) -> None:
        size = self.size
        hidden = min(size, 64) if self.options.hidden is None else self.options.hidden
        self.start = nn.Parameter(torch.randn(size))
        self.time = nn.Parameter(0.02 * torch.randn(hidden))
        self.inner, self.outer = nn.Linear(size, hidden), nn.Linear(hidden, size)
        # Slow at first: neighbours are alike, and the path does not leave all directions but one behind.
        nn.init.normal_(self.outer.weight, std=0.02)
        nn.init.normal_(self.outer.bias, std=0.02)
        self._solved: tuple[list[Tensor], Tensor] | None = None  # parameters and the path that they give

    def slope(self, time: float, p: Float[Tensor, " D"]) -> Float[Tensor, " D"]:
        """h: where the path goes from a point."""
        y: Tensor = self.outer(torch.tanh(self.inner(p) + self.time * time))
        return y

    def path(self, length: int) -> Float[Tensor, "T D"]:
        """The vectors of the first `length` positions."""
        if torch.is_grad_enabled():
            return self._extended(self.start[None], length)
        now = [parameter.detach() for parameter in self.parameters()]
        known = self.start.detach()[None]
        if self._solved is not None and all(map(_same, self._solved[0], now)):
            known = self._solved[1]
        if len(known) < length:
            known = self._extended(known, max(length, 64, 2 * len(known)))
        self._solved = [parameter.clone() for parameter in now], known
        return known[:length]

    def _extended(self, known: Float[Tensor, "L D"], length: int) -> Float[Tensor, "T D"]:
        o, p, points = self.options, known[-1], [known]
        step = o.interval / o.substeps
        for t in range(len(known) - 1, length - 1):
            if o.method == "map":
                p = p + self.slope(float(t), p)
            else:
                for part in range(o.substeps):
                    p = runge_kutta(self.slope, t * o.interval + part * step, p, step)
            points.append(p[None])
        return torch.cat(points)[:length]

    def embed(
        self,
        x: Float[Tensor, "B T D"],
        positions: Int[Tensor, "rows T"],
        *,
        tokens: Int[Tensor, "B T"] | None = None,
        kept: Kept = (),
        cu_seqlens: Int[Tensor, " N_plus_1"] | None = None,
    ) -> tuple[Float[Tensor, "B T D"], Kept]:
        return x + uncompiled(self._vectors)(positions).to(x.dtype), ()

    def _vectors(self, positions: Int[Tensor, "rows T"]) -> Float[Tensor, "rows T D"]:
        """The points of the path at these positions."""
        length = int(positions.max()) + 1 if positions.numel() else 1
        check_positions(positions, length)
        # The path is one for all sequences: it costs little beside them, and its errors would add up in bfloat16.
        with torch.autocast(positions.device.type, enabled=False):
            points = F.rms_norm(self.path(length), (self.size,), eps=1e-5)
            read: Tensor = self.options.amplitude * F.embedding(positions, points)
        return read

    def flops(self, queries: int, keys: int, kv_heads: int) -> int:
        slopes = 4 * self.options.substeps if self.options.method == "ode" else 1
        return queries * slopes * 4 * self.inner.weight.numel()


def runge_kutta(slope: Slope, time: float, p: Float[Tensor, " D"], step: float) -> Float[Tensor, " D"]:
    """One step of the classic method of fourth order."""
    first = slope(time, p)
    second = slope(time + step / 2, p + step / 2 * first)
    third = slope(time + step / 2, p + step / 2 * second)
    fourth = slope(time + step, p + step * third)
    return p + step / 6 * (first + 2 * (second + third) + fourth)


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.device == other.device and torch.equal(one, other)

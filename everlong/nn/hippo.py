"""HiPPO: the past of a signal as N numbers, kept up to date by a linear recurrence.

    c'(t) = A c(t) + B u(t)              LegT: the last `window` samples alike; LagT: a past that fades exponentially
    c'(t) = (A c(t) + B u(t)) / t        LegS: everything since the beginning alike, whatever the length

c holds the coefficients of the past's projection on N polynomials, which are orthonormal under the measure that says
how much each moment of the past matters.

Shapes    A [N, N], B [N];  signals [..., T];  coefficients [..., N]
Cost      FLOPs a sample: 2 N^2 for LegT and LagT; 4 N^2 for LegS
Source    Gu et al. 2020, "HiPPO", arXiv 2008.07669, theorems 1 and 2, appendices B and D; Gu et al. 2021, "S4",
          arXiv 2111.00396, theorem 1 (normal plus low rank)
Deviates  A has the sign of the state equation above, so that it is stable; the paper writes -A. LegT's window is exact:
          common code halves A and B, which makes it 2. LegS is discretised by its exact solution for an
          input that is constant between samples, which needs no matrix exponential
"""

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Complex, Float
from torch import Tensor

from everlong.config import unknown

Step = tuple[Float[Tensor, "N N"], Float[Tensor, " N"]]  # c_k = step[0] c_{k-1} + step[1] u_k

MEASURES = ("legs", "legt", "lagt")
IMPLICIT = {"forward": 0.0, "bilinear": 0.5, "backward": 1.0}  # the new state's part in the slope
RULES = (*IMPLICIT, "zoh")


def legs(order: int) -> tuple[Float[Tensor, "N N"], Float[Tensor, " N"]]:
    """A and B of scaled Legendre, for c' = (A c + B u) / t: a uniform measure over [0, t]."""
    n = _numbers(order)
    root = (2 * n + 1).sqrt()
    return -torch.outer(root, root).tril(-1) - torch.diag(n + 1), root


def legt(order: int, window: float = 1.0) -> tuple[Float[Tensor, "N N"], Float[Tensor, " N"]]:
    """A and B of translated Legendre: a uniform measure over [t - window, t]."""
    n = _numbers(order)
    root = (2 * n + 1).sqrt()
    sign = torch.where((n[:, None] - n) % 2 == 0, 1.0, -1.0).double()
    return -torch.outer(root, root) * torch.where(n[:, None] >= n, 1.0, sign) / window, root / window


def lagt(
    order: int, window: float = 1.0, *, alpha: float = 0.0, beta: float = 1.0
) -> tuple[Float[Tensor, "N N"], Float[Tensor, " N"]]:
    """A and B of translated Laguerre: with s = (t - x) / window, the sample at x counts s^-alpha e^(-beta s).

    c_n = integral of u(t - s window) L_n^alpha(s) e^(-(1 + beta) s / 2) ds / norm of L_n^alpha. Others scale B by a
    constant that depends on alpha and beta.

    Raises:
        ValueError: alpha is not above -1, or beta negative.
    """
    if alpha <= -1 or beta < 0:
        raise ValueError(f"`alpha` lies above -1 and `beta` is not negative: got alpha={alpha}, beta={beta}")
    n = _numbers(order)
    matrix = -torch.ones(order, order, dtype=torch.float64).tril(-1) - torch.eye(order, dtype=torch.float64) * (
        (1 + beta) / 2
    )
    norm = torch.exp((torch.lgamma(n + alpha + 1) - torch.lgamma(n + 1)) / 2)
    at_zero = torch.exp(torch.lgamma(n + alpha + 1) - torch.lgamma(n + 1) - math.lgamma(alpha + 1))
    return matrix * norm / norm[:, None] / window, at_zero / norm / window


def discretize(A: Float[Tensor, "N N"], B: Float[Tensor, " N"], step: float, rule: str = "zoh") -> Step:
    """c_k = A' c_{k-1} + B' u_k for c' = A c + B u with samples that are `step` apart.

    Args:
        rule: "forward" and "backward" (Euler) and "bilinear" (Tustin) take the slope at the old state, at the new one
            and half at each; "zoh" (zero-order hold) is exact for an input that is constant between samples.

    Raises:
        ValueError: no such rule.
    """
    if rule not in RULES:
        raise unknown("rule", rule, RULES)
    eye = torch.eye(len(A), dtype=A.dtype, device=A.device)
    if rule == "zoh":
        # The input as one more state that never changes: no inverse of A is needed.
        block = torch.cat([torch.cat([A, B[:, None]], 1) * step, A.new_zeros(1, len(A) + 1)])
        flow = torch.linalg.matrix_exp(block)
        return flow[:-1, :-1], flow[:-1, -1]
    weight = IMPLICIT[rule]
    implicit = eye - weight * step * A
    right = torch.cat([eye + (1 - weight) * step * A, step * B[:, None]], 1)
    solved = torch.linalg.solve(implicit, right)
    return solved[:, :-1], solved[:, -1]


class Coefficients(NamedTuple):
    """What is kept of a signal."""

    values: Float[Tensor, "*B N"]
    seen: int  # samples


@dataclass(frozen=True)
class Memory:
    """Compresses signals into `order` numbers, online, and rebuilds them.

    Sample k is the signal's value during [k, k + 1): `window` is a number of samples, of LegT the length of what is
    remembered, of LagT the time scale of forgetting; LegS has none. "forward" is stable only where `order` is small
    beside `window`, or, for LegS, once more than `order` samples are seen: it is there to be compared with.
    """

    order: int
    measure: str = "legs"
    window: float = 256.0
    rule: str = "zoh"

    def __post_init__(self) -> None:
        for name, value, known in (("measure", self.measure, MEASURES), ("rule", self.rule, RULES)):
            if value not in known:
                raise unknown(name, value, known)
        if self.order < 1 or not self.window > 0:
            raise ValueError(
                f"`order` is at least 1 and `window` positive: got order={self.order}, window={self.window}"
            )

    @property
    def reach(self) -> float:
        """How many samples back the measure goes."""
        return self.window if self.measure == "legt" else float("inf")

    def compress(
        self, signal: Float[Tensor, "*B T"], past: Coefficients | None = None
    ) -> tuple[Coefficients, Float[Tensor, "*B T N"]]:
        """The coefficients at the end, and those after each sample; `past` is what an earlier part ended with."""
        if past is None:
            past = Coefficients(signal.new_zeros(*signal.shape[:-1], self.order, dtype=torch.float64), 0)
        values, trail = past.values, []
        steady = None if self.measure == "legs" else self._steady_step()
        for count, u in enumerate(signal.double().unbind(-1), past.seen):
            transition, entry = (m.to(signal.device) for m in steady or self._scaled_step(count))
            values = values @ transition.mT + u[..., None] * entry
            trail.append(values)
        kept = torch.stack(trail, -2) if trail else values[..., None, :][..., :0, :]
        return Coefficients(values, past.seen + signal.shape[-1]), kept

    def reconstruct(self, past: Coefficients, length: int) -> Float[Tensor, "*B length"]:
        """The last `length` samples as they are remembered, each at the middle of its interval.

        Raises:
            ValueError: there were not so many samples, or the window has left them behind.
        """
        longest = int(min(past.seen, self.reach))
        if not 0 <= length <= longest:
            raise ValueError(f"`length` is at most {longest}, the samples that are remembered: got {length}")
        age = torch.arange(length - 1, -1, -1, dtype=torch.float64, device=past.values.device) + 0.5
        return past.values @ self.basis(age, past.seen).mT

    def basis(self, age: Float[Tensor, " T"], count: int) -> Float[Tensor, "T N"]:
        """What each coefficient contributes to the signal `age` samples ago, when `count` were seen."""
        if self.measure == "lagt":
            return laguerre(age / self.window, self.order)
        return legendre(1 - age / (count if self.measure == "legs" else self.window), self.order)

    def _steady_step(self) -> Step:
        matrices = legt(self.order, self.window) if self.measure == "legt" else lagt(self.order, self.window)
        return discretize(*matrices, 1.0, self.rule)

    def _scaled_step(self, count: int) -> Step:
        """LegS from `count` samples to one more. The first one becomes the mean, whatever the rule."""
        A, B = legs(self.order)
        if count == 0:
            return torch.zeros_like(A), torch.eye(self.order, dtype=A.dtype)[0]
        if self.rule == "zoh":
            return stretched(self.order, count)
        eye, weight = torch.eye(self.order, dtype=A.dtype), IMPLICIT[self.rule]
        right = torch.cat([eye + (1 - weight) / count * A, B[:, None] / count], 1)
        solved = torch.linalg.solve_triangular(eye - weight / (count + 1) * A, right, upper=False)
        return solved[:, :-1], solved[:, -1]


def stretched(order: int, count: int) -> Step:
    """LegS's exact step from `count` samples to one more.

    The polynomial on [0, 1] becomes one on [0, r], r = count / (count + 1), and the new sample stands behind it; both
    parts are projected on [0, 1] by Gauss quadrature, which is exact for polynomials of these degrees. The transition
    is e^(-A ln r), by bounded numbers only.
    """
    nodes, weights = _quadrature(order)
    r = count / (count + 1)
    transition = r * (legendre(r * nodes, order).mT * weights) @ legendre(nodes, order)
    entry = (1 - r) * weights @ legendre(r + (1 - r) * nodes, order)
    return transition, entry


def legendre(s: Float[Tensor, " T"], order: int) -> Float[Tensor, "T N"]:
    """sqrt(2 n + 1) P_n(2 s - 1) for n < order: orthonormal on [0, 1]."""
    x, found = 2 * s - 1, [torch.ones_like(s), 2 * s - 1]
    for n in range(1, order - 1):
        found.append(((2 * n + 1) * x * found[n] - n * found[n - 1]) / (n + 1))
    return torch.stack(found[:order], -1) * (2 * torch.arange(order, dtype=s.dtype, device=s.device) + 1).sqrt()


def laguerre(s: Float[Tensor, " T"], order: int) -> Float[Tensor, "T N"]:
    """L_n(s) for n < order: orthonormal on [0, infinity) under the weight e^-s."""
    found = [torch.ones_like(s), 1 - s]
    for n in range(1, order - 1):
        found.append(((2 * n + 1 - s) * found[n] - n * found[n - 1]) / (n + 1))
    return torch.stack(found[:order], -1)


class NormalPlusLowRank(NamedTuple):
    """A = V (diag(eigenvalues) - P P^*) V^* and B = V B', with V unitary: eigenvalues come in conjugate pairs."""

    eigenvalues: Complex[Tensor, " N"]  # by rising imaginary part
    P: Complex[Tensor, " N"]
    B: Complex[Tensor, " N"]
    V: Complex[Tensor, "N N"]


def normal_plus_low_rank(order: int) -> NormalPlusLowRank:
    """LegS's A as a normal matrix less p p^T, p_n = sqrt(n + 1/2), in the basis in which the normal part is diagonal.

    A + p p^T = -1/2 + skew-symmetric, so that its eigenvectors are orthogonal; those of A itself are not, by factors
    that no float holds. For an even order the second half of the entries has the positive imaginary parts; the first
    half, its conjugates, adds nothing where inputs and outputs are real.
    """
    A, B = legs(order)
    p = (_numbers(order) + 0.5).sqrt()
    skew = (A + torch.outer(p, p)).tril(-1)
    frequency, V = torch.linalg.eigh(-1j * (skew - skew.mT))
    return NormalPlusLowRank(
        torch.complex(torch.full_like(frequency, -0.5), frequency), V.mH @ (p + 0j), V.mH @ (B + 0j), V
    )


def _numbers(order: int) -> Float[Tensor, " N"]:
    if order < 1:
        raise ValueError(f"`order`, the number of coefficients, is at least 1: got {order}")
    return torch.arange(order, dtype=torch.float64)


@functools.lru_cache
def _quadrature(order: int) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """Nodes and weights on [0, 1], exact for polynomials up to the degree 2 order - 1."""
    nodes, weights = np.polynomial.legendre.leggauss(order)
    return torch.from_numpy((nodes + 1) / 2), torch.from_numpy(weights / 2)

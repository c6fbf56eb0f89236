"""S4: HiPPO's memory itself as a state space, whose matrix is diagonal plus low rank, trained as a long convolution.

    x'(t) = A x(t) + B u(t)      y(t) = C x(t) + skip u(t)      A = diag(Lambda) - P P^*      (eq. 1, theorem 1)
    x_t = A' x_{t-1} + B' u_t    (1 - dt A / 2) A' = 1 + dt A / 2    (1 - dt A / 2) B' = dt B             (eq. 3)
    K^(omega) = 2 / (1 + omega) [k(c, B) - k(c, P) k(P^*, B) / (1 + k(P^*, P))]                     (appendix C.3)
    k(c, b) = sum_n c_n b_n / (g - Lambda_n)    g = 2 (1 - omega) / (dt (1 + omega))    c = C (1 - A'^L)

The kernel's transform at the L-th roots of unity is a sum over N poles (a Cauchy product), without any power of A'
but the one that cuts the kernel at L. The layer around it is that of S4D.

Shapes    u [B, T, D] -> out [B, T, D];  Lambda, P, B, C [D, N/2] complex: their conjugates are the other half
State     x [B, D, N/2, 2]: 4 D N bytes a sequence, whatever its length
Cost      FLOPs a token: 4 D^2 for the projections + 4 D N for the memory's two inner products; elementwise work, such
          as the diagonal's, is not counted
Source    Gu, Goel and Re 2021, "Efficiently Modeling Long Sequences with Structured State Spaces", arXiv 2111.00396
Deviates  the fraction is multiplied out by 1 + omega, so that nothing is infinite at omega = -1; C is the parameter,
          not c, so that a layer serves every length; every channel has a Lambda, P and B of its own
"""

import math

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from everlong.config import config
from everlong.mixers.base import Cost, Mixer
from everlong.mixers.s4d import S4D
from everlong.nn.hippo import normal_plus_low_rank
from everlong.nn.layers import exact
from everlong.nn.state_space import CHUNK, System, SystemOptions, complexes, reals
from everlong.ops.spans import spans

POLES = 1 << 17  # numbers in a tensor of poles and frequencies: the few that are in use stay in the last cache


@config
class Options(SystemOptions):
    """Options of S4."""


class S4(S4D):
    """S4 under the contract."""

    Config = Options

    def __init__(self, config: Options, *, layer: int = 0, depth: int = 1) -> None:
        Mixer.__init__(self, config, layer=layer, depth=depth)
        self._add_layer(config)
        d, half = config.width, config.pairs
        found = normal_plus_low_rank(config.state_size)
        # Re Lambda = -exp(.) stays negative, and -P P^* only takes away: no step of training makes the state grow.
        self.log_rate = nn.Parameter(torch.full((d, half), math.log(0.5)))
        self.frequency = nn.Parameter(found.eigenvalues.imag[half:].to(self.skip.dtype).repeat(d, 1))  # Im Lambda
        self.P, self.B = (
            nn.Parameter(torch.view_as_real(x[half:].resolve_conj()).to(self.skip.dtype).repeat(d, 1, 1))
            for x in (found.P, found.B)
        )
        self.C = nn.Parameter(torch.randn(d, half, 2) * 0.5**0.5)

    def system(self) -> System:
        """The state space, sampled every `exp(log_step)`."""
        Lambda = torch.complex(-exact(self.log_rate).exp(), exact(self.frequency))
        P, B, C = (torch.view_as_complex(exact(x)) for x in (self.P, self.B, self.C))
        return LowRank(exact(self.log_step).exp()[:, None], Lambda, P, B, C)

    @classmethod
    def cost(cls, config: SystemOptions, length: int) -> Cost:
        d, n = config.width, config.state_size
        return Cost(
            flops_per_token=4 * d * d + 4 * d * n,
            state_bytes=4 * d * n,
            parameters=2 * d * d + (2 * d if config.bias else 0) + 2 * d + 4 * d * n,
        )

    def reference(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        half = torch.complex(-self.log_rate.exp(), self.frequency)
        Lambda, P, B, C = (
            torch.cat([z, z.conj()], 1) for z in (half, *(torch.view_as_complex(p) for p in (self.P, self.B, self.C)))
        )
        A, eye = torch.diag_embed(Lambda) - P[:, :, None] * P[:, None].conj(), torch.eye(P.shape[1], dtype=P.dtype)
        dt = self.log_step.exp()[:, None, None]
        state, outputs = torch.zeros_like(B), []
        for u in x:
            right = ((eye + dt / 2 * A) @ state[..., None]) + dt * B[..., None] * u[:, None, None]
            state = torch.linalg.solve(eye - dt / 2 * A, right)[..., 0]
            outputs.append((C * state).sum(1).real + self.skip * u)
        return self._output(torch.stack(outputs))


class LowRank(System):
    """x' = (diag(Lambda) - P P^*) x + B u and y = C x by the bilinear rule.

    All are given by one half; the other is its conjugate. A' is diagonal plus low rank as well (appendix C.2):
    A' x = diagonal * x - column (row . x).
    """

    steps = 32

    def __init__(
        self,
        step: Float[Tensor, "D 1"],
        Lambda: Complex[Tensor, "D P"],
        P: Complex[Tensor, "D P"],
        B: Complex[Tensor, "D P"],
        C: Complex[Tensor, "D P"],
    ) -> None:
        self.step, self.P, self.B, self.C = step, P, B, C
        self.scaled = step / 2 * Lambda
        # (2 / dt - A)^-1 by Woodbury's identity. Its product with 2 / dt + A is once more diagonal plus low rank.
        resolvent = step / 2 / (1 - self.scaled)
        gain = 1 / (1 + 2 * (P.abs().square() * resolvent).real.sum(1, keepdim=True))
        self.diagonal = (1 + self.scaled) / (1 - self.scaled)
        self.column = 2 * gain * P / (1 - self.scaled)
        self.row = 2 * P.conj() * resolvent
        self.entry = 2 * resolvent * (B - gain * P * (self.row * B).real.sum(1, keepdim=True))
        self.numbers = 2 * P.shape[1]
        self._powers = {0: torch.ones_like(self.diagonal), 1: self.diagonal}
        self._kept = {1: (reals(self.column)[:, None], reals(self.row, conjugate=True)[:, None])}

    def kernel(self, length: int) -> Float[Tensor, "D L"]:
        C = self.C - self._before(length)
        angle = torch.arange(length // 2 + 1, dtype=self.step.dtype, device=self.step.device) * (math.pi / length)
        products = torch.stack([C * self.B, C * self.P, self.P.conj() * self.B, self.P.conj() * self.P], 1)
        # Some channels at a time, computed again for the gradient: there are D N T / 4 poles.
        count = max(1, POLES // (self.P.shape[1] * len(angle)))
        parts = zip(*(torch.split(x, count) for x in (self.step[..., None] / 2 * products, self.scaled)), strict=True)
        sums = torch.cat([checkpoint(cauchy, *part, angle, use_reentrant=False) for part in parts])
        # With omega = e^(-2 i angle), k is cosine times the sums and 2 / (1 + omega) is e^(i angle) / cosine: what
        # would be a division by 0 at omega = -1 cancels.
        CB, CP, PB, PP = sums.unbind(1)
        cosine = angle.cos()
        transform = torch.polar(torch.ones_like(angle), angle) * (CB - cosine * CP * PB / (1 + cosine * PP))
        kernel: Tensor = torch.fft.irfft(transform, length)
        return kernel

    def _before(self, steps: int) -> Complex[Tensor, "D P"]:
        """C A'^steps."""
        row = reals(2 * self.C, conjugate=True)[:, None]
        whole, rest = divmod(steps, CHUNK)
        for count in [CHUNK] * whole + [rest] * (rest > 0):
            row = self._applied(row, count, rows=True)
        return complexes(row[:, 0]).conj() / 2

    def _applied(self, x: Float[Tensor, "D n N"], steps: int, *, rows: bool = False) -> Float[Tensor, "D n N"]:
        """A'^steps x, from 1 to about `CHUNK` steps; with `rows`, x A'^steps.

        A'^k = diagonal^k - sum_{j < k} (A'^{k-1-j} column) (row diagonal^j): k vectors in place of a matrix.
        """
        power = self._power(steps)[:, None]
        kept = reals(complexes(x) * (power.conj() if rows else power))
        columns, weights = self._vectors(steps)
        first, second = (columns, weights) if rows else (weights, columns)
        return kept - (x @ first.mT).flip(2) @ second

    def _vectors(self, steps: int) -> tuple[Float[Tensor, "D k N"], Float[Tensor, "D k N"]]:
        """A'^j column and row diagonal^j for j < steps."""
        if steps in self._kept:
            return self._kept[steps]
        half = 1 << (steps - 1).bit_length() - 1
        columns, weights = self._vectors(half)
        more = reals(complexes(weights[:, : steps - half]) * self._power(half).conj()[:, None])
        columns = torch.cat([columns, self._applied(columns[:, : steps - half], half)], 1)
        self._kept[steps] = columns, torch.cat([weights, more], 1)
        return self._kept[steps]

    def _power(self, steps: int) -> Complex[Tensor, "D P"]:
        """diagonal^steps."""
        if steps not in self._powers:
            half = self._power(steps // 2)
            self._powers[steps] = half * half * self.diagonal if steps % 2 else half * half
        return self._powers[steps]

    def _doubled(self, x: Float[Tensor, "D 1 N"], length: int, *, rows: bool = False) -> Float[Tensor, "D L N"]:
        """x, A' x, A'^2 x, ..., each product as long as what there is already."""
        while (count := x.shape[1]) < length:
            x = torch.cat([x, self._applied(x[:, : length - count], count, rows=rows)], 1)
        return x

    def reads(self, length: int) -> Float[Tensor, "D L N"]:
        first = self._applied(reals(2 * self.C, conjugate=True)[:, None], 1, rows=True)
        return self._doubled(first, length, rows=True)

    def writes(self, length: int) -> Float[Tensor, "D L N"]:
        return self._doubled(reals(self.entry)[:, None], length).flip(1)

    def advance(self, state: Float[Tensor, "D n N"], steps: int | Int[Tensor, " n"]) -> Float[Tensor, "D n N"]:
        if isinstance(steps, int):
            return self._applied(state, steps)
        for i in range(int(steps.max()).bit_length()):
            state = torch.where((steps[:, None] >> i) % 2 == 1, self._applied(state, 1 << i), state)
        return state

    def loop(
        self, u: Float[Tensor, "B T D"], state: Float[Tensor, "D n N"], cu_seqlens: Int[Tensor, " N_plus_1"] | None
    ) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "D n N"]]:
        diagonal, column, entry = self.diagonal, reals(self.column), reals(self.entry)
        row, read = reals(self.row, conjugate=True), reals(2 * self.C, conjugate=True)
        outputs, ends = [u[:, :0]], []
        for span in spans(u.shape[1], cu_seqlens):
            x = state.transpose(0, 1)[span.sequences]
            for t in range(span.start, span.stop):
                kept = reals(diagonal * complexes(x))
                fed_back = torch.einsum("bdn,dn->bd", x, row)
                x = kept - fed_back[..., None] * column + u[:, t, :, None] * entry
                outputs.append(torch.einsum("bdn,dn->bd", x, read)[:, None])
            ends.append(x)
        return torch.cat(outputs, 1), torch.cat(ends).transpose(0, 1)


def cauchy(
    products: Complex[Tensor, "D K P"], poles: Complex[Tensor, "D P"], angle: Float[Tensor, " F"]
) -> Complex[Tensor, "D K F"]:
    """The sums of products_n / (i sin(angle) - cos(angle) poles_n) over all poles, conjugates included."""
    sine, cosine = angle.sin(), angle.cos()
    # Each pole and its conjugate make one fraction, of two real polynomials in i sin and cos.
    size = cosine * poles.abs()[..., None]
    real, imag = (size - sine) * (size + sine), -2 * sine * cosine * poles.real[..., None]
    inverse = torch.stack([real, -imag], 2) / (real * real + imag * imag)[:, :, None]
    weights = 2 * torch.cat([products.real, (products * poles.conj()[:, None]).real], 1)
    first, second = torch.complex(*(weights @ inverse.flatten(2)).chunk(2, 2)).chunk(2, 1)
    return 1j * sine * first - cosine * second

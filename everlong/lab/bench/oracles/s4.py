"""S4 against dense matrices: those of random parameters, and HiPPO's own at the start, sampled by scipy."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from everlong.lab.bench.comparison import Comparison, make
from everlong.lab.bench.oracles.s4d import dense, glu
from everlong.mixers.base import Context

ORACLE = "scipy, signal.cont2discrete of the dense matrix, as a loop"


def comparisons() -> Iterator[Comparison]:
    """Three lengths in each form; the matrix of HiPPO-LegS, by its formula, at an even and an odd length."""
    for length in (1, 7, 130):
        for form in ("recurrent", "chunk", "parallel"):
            yield _parameters(length, form)
    for length in (130, 131):
        yield _hippo(length)


def _parameters(length: int, form: str) -> Comparison:
    made = make("s4", width=6, state_size=12).double()
    halves = [
        torch.complex(-made.log_rate.exp(), made.frequency),
        *map(torch.view_as_complex, (made.P, made.B, made.C)),
    ]
    Lambda, P, B, C = (torch.cat([half, half.conj()], 1).detach() for half in halves)
    A = torch.diag_embed(Lambda) - torch.einsum("dn,dm->dnm", P, P.conj())

    def theirs(x: Tensor) -> Tensor:
        return glu(made, dense(x, A, B, C, made.log_step.exp(), "bilinear") + made.skip * x)

    x = torch.randn(2, length, 6, dtype=torch.float64)
    return Comparison(
        f"random parameters, {form}, T={length}", lambda x: made(x, None, Context(form=form))[0], theirs, x, bound=1e-9
    )


def _hippo(length: int) -> Comparison:
    """A and B of theorem 2 of HiPPO, real, in place of what the layer holds of their diagonalised form."""
    from everlong.mixers.s4 import S4, Options
    from everlong.nn.hippo import normal_plus_low_rank

    order, width = 16, 3
    n = torch.arange(order, dtype=torch.float64)
    root = (2 * n + 1).sqrt()
    A = -torch.outer(root, root).tril(-1) - torch.diag(n + 1)
    C = torch.randn(width, order, dtype=torch.float64)
    found = normal_plus_low_rank(order)
    made = S4(Options(width=width, state_size=order)).double()
    with torch.no_grad():
        # In float64 from the start: what float32 parameters are rounded to is a slightly other matrix.
        half = slice(order // 2, None)
        made.log_rate.fill_(math.log(0.5))
        made.frequency.copy_(found.eigenvalues.imag[half])
        for parameter, value in ((made.P, found.P), (made.B, found.B), (made.C, (C + 0j) @ found.V)):
            parameter.copy_(torch.view_as_real(value[..., half].resolve_conj()))

    def theirs(x: Tensor) -> Tensor:
        y = dense(x, A.repeat(width, 1, 1), root.repeat(width, 1), C, made.log_step.exp(), "bilinear")
        return glu(made, y + made.skip * x)

    x = torch.randn(2, length, width, dtype=torch.float64)
    return Comparison(
        f"HiPPO-LegS, parallel, T={length}", lambda x: made(x, None, Context(form="parallel"))[0], theirs, x, bound=1e-9
    )

"""S4D against scipy's discretisation of the whole state space, conjugates included, stepped as a dense matrix."""

import importlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from everlong.lab.bench.comparison import Comparison, make
from everlong.mixers.base import Context

ORACLE = "scipy, signal.cont2discrete of the dense matrix, as a loop"


def comparisons() -> Iterator[Comparison]:
    """Three lengths in each form, then the other starts and the other discretisation."""
    for length in (1, 7, 130):
        for form in ("recurrent", "chunk", "parallel"):
            yield _scipy(f"legs, zoh, {form}, T={length}", length, form, "legs", "zoh")
    yield _scipy("lin, bilinear", 131, "auto", "lin", "bilinear")
    yield _scipy("inv, zoh", 131, "auto", "inv", "zoh")


def _scipy(case: str, length: int, form: str, initialization: str, rule: str) -> Comparison:
    made = make("s4d", width=6, state_size=12, initialization=initialization, discretization=rule).double()
    rates = torch.complex(-made.log_rate.exp(), made.frequency).detach()
    C = torch.view_as_complex(made.C.detach())
    A = torch.diag_embed(torch.cat([rates, rates.conj()], 1))

    def theirs(x: Tensor) -> Tensor:
        y = dense(x, A, torch.ones_like(A[:, 0]), torch.cat([C, C.conj()], 1), made.log_step.exp(), rule)
        return glu(made, y + made.skip * x)

    x = torch.randn(2, length, 6, dtype=torch.float64)
    return Comparison(case, lambda x: made(x, None, Context(form=form))[0], theirs, x, bound=1e-9)


def dense(x: Tensor, A: Tensor, B: Tensor, C: Tensor, step: Tensor, rule: str) -> Tensor:
    """What channels with `A [D, N, N]`, `B, C [D, N]` make of `x [B, T, D]`, each sampled by scipy."""
    cont2discrete = importlib.import_module("scipy.signal").cont2discrete  # it has no types
    found = []
    for channel, dt in enumerate(step.tolist()):
        system = (A[channel].numpy(), B[channel, :, None].numpy(), C[channel, None].numpy(), 0.0)
        transition, entry = (torch.from_numpy(m) for m in cont2discrete(system, dt, method=rule)[:2])
        state, outputs = torch.zeros(x.shape[0], A.shape[1], 1, dtype=transition.dtype), []
        for t in range(x.shape[1]):
            state = transition @ state + entry * x[:, t, channel, None, None]
            outputs.append((C[channel] * state[..., 0]).sum(1).real)
        found.append(torch.stack(outputs, 1))
    return torch.stack(found, 2)


def glu(made: Any, y: Tensor) -> Tensor:
    """The layer's output from that of the state space."""
    z = torch.nn.functional.gelu(y)
    out: Tensor = torch.nn.functional.glu(torch.cat([made.o(z), made.gate(z)], -1))
    return out

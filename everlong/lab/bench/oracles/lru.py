"""The linear recurrent unit against its equations as one dense matrix over time, in numpy's complex numbers.

y_t = sum_{s <= t} Re( C diag(lambda^{t-s} gamma) B ) x_s + skip * x_t
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from everlong.lab.bench.comparison import Comparison, make

ORACLE = "the paper's equations, as a dense matrix in numpy"


def comparisons() -> Iterator[Comparison]:
    """In float64 at three lengths; a slow ring with few states; and one length in float32."""
    for length in (1, 7, 130):
        yield _compare(f"T={length}", length, torch.float64)
    slow = {"state_size": 5, "min_radius": 0.99, "max_radius": 0.999, "max_phase": 0.1}
    yield _compare("five slow states", 130, torch.float64, **slow)
    yield _compare("float32, T=130", 130, torch.float32)


def _compare(case: str, length: int, dtype: torch.dtype, **options: Any) -> Comparison:
    ours = make("lru", width=12, **options).to(dtype)
    # The dense matrix is linear in x: it is made once, and torch only multiplies.
    matrix = torch.from_numpy(_dense(ours, length)).to(dtype)

    def theirs(x: Tensor) -> Tensor:
        return (x.flatten(1) @ matrix.mT).view_as(x)

    bound = 1e-9 if dtype == torch.float64 else 2e-5
    return Comparison(case, lambda x: ours(x)[0], theirs, torch.randn(2, length, 12, dtype=dtype), bound)


def _dense(ours: Any, length: int) -> np.ndarray:
    """`[T D, T D]`, from the inputs of all steps to the outputs of all steps."""
    p = {name: parameter.detach().double().numpy() for name, parameter in ours.named_parameters()}
    eigenvalues = np.exp(-np.exp(p["log_rate"]) + 1j * np.exp(p["log_phase"]))
    B = np.exp(p["log_gain"])[:, None] * (p["v.weight"][0::2] + 1j * p["v.weight"][1::2])
    C = p["o.weight"][:, 0::2] - 1j * p["o.weight"][:, 1::2]
    width = len(p["skip"])
    dense = np.zeros((length, width, length, width))
    for lag in range(length):
        response = (C @ np.diag(eigenvalues**lag) @ B).real
        for t in range(lag, length):
            dense[t, :, t - lag] = response
    for t in range(length):
        dense[t, :, t] += np.diag(p["skip"])
    return dense.reshape(length * width, length * width)

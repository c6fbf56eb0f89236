"""Independent implementations by other people, for tests to compare with, and how a comparison is measured."""

from types import ModuleType

import pytest
import torch
from torch import Tensor

from everlong.lab.bench.errors import naive


def fla(path: str) -> ModuleType:
    """A file of flash-linear-attention, such as "fla/ops/gla/naive.py"; skips where fla-core is not installed."""
    try:
        return naive(path)
    except ValueError as error:
        pytest.skip(str(error))


def rms(found: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """The root mean square of the error, relative to that of what is expected or, where it is more, to `floor`."""
    found, expected = found.double(), expected.double()
    scale = max(expected.norm().item(), floor * expected.numel() ** 0.5)
    return (found - expected).norm().item() / (scale or 1.0)


def flat(results) -> list[Tensor]:
    """The tensors of nested tuples."""
    return torch.utils._pytree.tree_leaves(results)


def with_gradients(run, leaves: list[Tensor | None], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """What `run(*leaves)` gives and the gradient of every leaf, under the same random cotangents for whoever computes.

    float64 leaves are taken in `dtype`; states and log-decays never below float32.
    """
    leaves = [None if x is None else x.detach().to(dtype).requires_grad_() for x in leaves]
    results = flat(run(*leaves))
    random = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(x.shape, generator=random, dtype=torch.float64).to(x.dtype) for x in results]
    gradients = torch.autograd.grad(results, [x for x in leaves if x is not None], cotangents, allow_unused=True)
    zeros = (torch.zeros_like(x) for x in leaves if x is not None)
    found = [zero if gradient is None else gradient for zero, gradient in zip(zeros, gradients, strict=True)]
    return [x.detach() for x in (*results, *found)]

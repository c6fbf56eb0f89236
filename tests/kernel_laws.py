"""What is asked of every kernel: the reference's results within the stated bounds, gradients too, whatever the memory
layout and the number of threads."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from everlong.ops import use_backend

BOUND = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # relative RMS against a truth made in float64

Inputs = Mapping[str, Tensor | None]
Operator = Callable[..., Any]  # keyword arguments -> tensors, nested in tuples


def leaves(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [leaf for part in result for leaf in leaves(part)]


def error(ours: Tensor, truth: Tensor) -> float:
    """Relative root mean square."""
    truth = truth.detach().double()
    difference = (ours.detach().double() - truth).norm()
    return float(difference if truth.norm() == 0 else difference / truth.norm())


def outcome(operator: Operator, inputs: Inputs, backend: str, weights: list[Tensor]) -> dict[str, Tensor]:
    """Results and the gradients of all inputs with numbers, under the loss sum(weights * results).

    Empty `weights` are filled, for the next call.
    """
    used = {
        name: x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        if x is not None and x.is_floating_point()
        else x
        for name, x in inputs.items()
    }
    with use_backend(backend):
        results = leaves(operator(**used))
    if not weights:
        weights += [torch.randn(x.shape, dtype=torch.float64) for x in results]
    loss = sum((x.double() * weight).sum() for x, weight in zip(results, weights, strict=True))
    found = {f"result {i}": x for i, x in enumerate(results)}
    named = {name: x for name, x in used.items() if x is not None and x.requires_grad}
    gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    for (name, x), gradient in zip(named.items(), gradients, strict=True):
        found[f"gradient of {name}"] = torch.zeros_like(x) if gradient is None else gradient
    return found


def check(operator: Operator, inputs: Inputs, *, bound: float | None = None) -> None:
    """The kernels give what the reference gives in float64 for the same (rounded) numbers."""
    dtype = next(x.dtype for x in inputs.values() if x is not None and x.is_floating_point())
    weights: list[Tensor] = []
    exact = {n: x.double() if x is not None and x.is_floating_point() else x for n, x in inputs.items()}
    truth = outcome(operator, exact, "reference", weights)
    ours = outcome(operator, inputs, "native", weights)
    for name, expected in truth.items():
        assert ours[name].shape == expected.shape, name
        found = error(ours[name], expected)
        assert found <= (bound or BOUND[dtype]), f"{name}: relative RMS {found:.2e}"


def check_repeatable(operator: Operator, inputs: Inputs) -> None:
    """Twice the same call, and one thread or several: equal bit for bit."""
    weights: list[Tensor] = []
    outcomes = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 1, 2, 3):
            torch.set_num_threads(threads)
            outcomes.append(outcome(operator, inputs, "native", weights))
    finally:
        torch.set_num_threads(before)
    for other in outcomes[1:]:
        for name, expected in outcomes[0].items():
            assert torch.equal(other[name], expected), name


def scattered(x: Tensor) -> Tensor:
    """The same numbers, no axis but the last contiguous, as in a slice of a wider projection."""
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 3), float("nan"), dtype=x.dtype)
    part = wide[..., 1 : x.shape[-1] + 1]
    part.copy_(x)
    return part

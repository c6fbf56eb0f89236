"""Times of several things taken in turns: whatever else the machine does meets all of them alike."""

import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median

import torch
from torch import Tensor

Side = Callable[[], object]


def in_turns(
    sides: Mapping[str, Side], *, seconds: float = 3.0, least: int = 5, most: int = 51, warmup: int = 2
) -> dict[str, list[float]]:
    """Seconds of each side's calls, one call of each a turn, after turns that are not counted.

    Turns are taken until they have used up `seconds`, but `least` of them, and not more than `most`.
    """
    times: dict[str, list[float]] = {name: [] for name in sides}
    began = time.perf_counter()
    for turn in range(warmup + most):
        if turn == warmup:
            began = time.perf_counter()
        if turn >= warmup + least and time.perf_counter() - began > seconds:
            break
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            if turn >= warmup:
                times[name].append(time.perf_counter() - start)
    return times


def ratio(times: Mapping[str, Sequence[float]], above: str, below: str) -> float:
    """The median time of one side over that of another."""
    return round(median(times[above]) / median(times[below]), 4)


def forward_backward(run: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Side:
    """A call of `run(*inputs)` with the gradient of every input, under a cotangent that is there before."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    with torch.no_grad():
        cotangent = torch.randn_like(run(*leaves))
    return lambda: torch.autograd.grad(run(*leaves), leaves, cotangent)


def forward(run: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Side:
    """A call of `run(*inputs)` without gradients."""

    def call() -> None:
        with torch.no_grad():
            run(*inputs)

    return call

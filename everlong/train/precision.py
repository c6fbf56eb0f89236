"""The arithmetic of a training step.

    precision    weights   products of matrices   norms, softmax, states, loss   gradients, optimizer
    float32      float32   float32                float32                        float32
    bf16         float32   bfloat16 (autocast)    float32                        float32

bfloat16 has the range of float32, so the loss needs no scaling.
"""

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch

from everlong.ops.dispatch import multiplies_bfloat16

Precision = Literal["bf16", "float32"]
Asked = Literal["auto", "bf16", "float32"]


def resolve(asked: Asked, device: str = "cpu") -> Precision:
    """What "auto" stands for on this machine: bf16 where products in it are faster than in float32."""
    if asked != "auto":
        return asked
    return "bf16" if multiplies_bfloat16(device) else "float32"


def autocast(precision: Precision, device: str = "cpu") -> AbstractContextManager[None]:
    """The context in which forward passes run."""
    return torch.autocast(device, dtype=torch.bfloat16, enabled=precision == "bf16")


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Equal inputs give equal bits, run after run.

    Without it the embedding's gradient under `torch.compile` is a sum of atomic additions in the order of the threads.
    """
    if torch.are_deterministic_algorithms_enabled():
        yield
        return
    options: Any = torch.utils.deterministic
    filled, options.fill_uninitialized_memory = options.fill_uninitialized_memory, False  # it only serves to find bugs
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        options.fill_uninitialized_memory = filled

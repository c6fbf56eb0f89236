"""Which implementation computes an operator: the one table, and the only place that chooses from it.

An operator's public function checks its arguments, asks `choose` for an implementation and calls it. Everything that
decides (what was asked for, `use_backend`, the environment, device and dtype, what is built here) is in this file.
"""

import contextlib
import functools
import importlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from everlong.config import unknown

BACKENDS = ("reference", "torch", "native", "triton")
FORMS = ("auto", "parallel", "chunk", "recurrent")
ANY_DEVICE = frozenset({"cpu", "cuda", "mps", "xpu", "meta"})
FLOATS = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})


@dataclass(frozen=True)
class Implementation:
    """One way to compute one operator."""

    backend: str
    target: str  # "module:function", imported when it is first chosen
    devices: frozenset[str] = ANY_DEVICE
    dtypes: frozenset[torch.dtype] = FLOATS

    def serves(self, device: str, dtype: torch.dtype) -> bool:
        return device in self.devices and dtype in self.dtypes

    def load(self) -> Callable[..., Any]:
        module, _, function = self.target.partition(":")
        return getattr(importlib.import_module(module), function)  # type: ignore[no-any-return]


def _both(module: str, name: str) -> tuple[Implementation, ...]:
    """The two backends that every operator has: the first is what "auto" prefers."""
    place = f"everlong.ops.{module}"
    return (
        Implementation("torch", f"{place}:{name}_torch"),
        Implementation("reference", f"{place}:{name}_reference"),
    )


# In the order of preference of "auto". The reference is never chosen by itself: it is there to be compared with.
TABLE: dict[str, tuple[Implementation, ...]] = {
    "softmax_attention": _both("attention", "softmax_attention"),
    "linear_attention": _both("recurrence", "linear_attention"),
    "delta_rule": _both("delta", "delta_rule"),
    "dplr": _both("delta", "dplr"),
    "linear_scan": _both("scan", "linear_scan"),
    "selective_scan": _both("scan", "selective_scan"),
    "causal_conv1d": _both("scan", "causal_conv1d"),
    # The same over trees of tokens (`parents`), with `tree`, a Tree, for `cu_seqlens`.
    "softmax_attention_tree": _both("tree_attention", "softmax_attention_tree"),
    "linear_attention_tree": _both("tree_memory", "linear_attention_tree"),
    "delta_rule_tree": _both("tree_memory", "delta_rule_tree"),
    "dplr_tree": _both("tree_memory", "dplr_tree"),
    "causal_conv1d_tree": _both("scan", "causal_conv1d_tree"),
}

# A plain variable: torch.compile cannot follow a ContextVar.
_asked = "auto"


@dataclass(frozen=True)
class Choice:
    """What `choose` decided, and why, in words for a person."""

    operator: str
    backend: str
    reason: str
    implementation: Implementation

    def __str__(self) -> str:
        return f"{self.operator}: {self.backend} ({self.reason})"


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Inside this context "auto" means `name`.

    Raises:
        ValueError: no backend has that name.
    """
    global _asked
    _check_backend(name)
    before, _asked = _asked, name
    try:
        yield
    finally:
        _asked = before


def explain(operator: str, *tensors: Tensor, backend: str = "auto") -> Choice:
    """Which implementation `operator` takes for these tensors (none: float32 on the CPU), and why."""
    device, dtype = (tensors[0].device.type, tensors[0].dtype) if tensors else ("cpu", torch.float32)
    return _decide(operator, backend, device, dtype, _asked)


def choose(operator: str, backend: str, tensor: Tensor) -> Callable[..., Any]:
    """The function that computes `operator` on this tensor's device and dtype."""
    return _functions[_target(operator, backend, tensor.device.type, tensor.dtype, _asked)]


def _target(operator: str, backend: str, device: str, dtype: torch.dtype, asked: str) -> str:
    """The key of the chosen function: torch.compile runs this while it traces, and takes a name but no function."""
    found = _decide(operator, backend, device, dtype, asked).implementation
    if found.target not in _functions:
        _functions[found.target] = found.load()
    return found.target


# As `torch.compiler.assume_constant_result` marks it, which would import the compiler with everlong: 0.8 s.
_target._dynamo_marked_constant = True  # type: ignore[attr-defined]

_functions: dict[str, Callable[..., Any]] = {}


@functools.cache
def multiplies_bfloat16(device: str) -> bool:
    """Whether the processor multiplies matrices in bfloat16 by instructions of its own."""
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return any(there for name, there in torch.cpu.get_capabilities().items() if name.endswith("bf16"))


def check_form(form: str) -> None:
    """Raises ValueError for a form that does not exist."""
    if form not in FORMS:
        raise unknown("form", form, FORMS)


def _check_backend(name: str) -> None:
    if name != "auto" and name not in BACKENDS:
        raise unknown("backend", name, (*BACKENDS, "auto"))


@functools.cache
def _decide(operator: str, backend: str, device: str, dtype: torch.dtype, asked: str) -> Choice:
    if operator not in TABLE:
        raise unknown("operator", operator, TABLE)
    _check_backend(backend)
    candidates = TABLE[operator]
    name, reason = backend, "asked for by the call"
    if name == "auto":
        name, reason = asked, "asked for by use_backend"
    if name == "auto":
        name, reason = os.environ.get("EVERLONG_BACKEND", "auto"), "asked for by EVERLONG_BACKEND"
        _check_backend(name)
    if name == "auto":
        for candidate in candidates:
            if candidate.serves(device, dtype):
                return Choice(
                    operator,
                    candidate.backend,
                    f"the fastest there is for {str(dtype).removeprefix('torch.')} on {device}",
                    candidate,
                )
        raise ValueError(f"{operator} takes floating-point tensors: got {dtype} on {device}")
    for candidate in candidates:
        if candidate.backend == name:
            if not candidate.serves(device, dtype):
                raise ValueError(f"backend `{name}` of {operator} does not serve {dtype} on {device}")
            return Choice(operator, name, reason, candidate)
    there = ", ".join(candidate.backend for candidate in candidates)
    raise ValueError(f"{operator} has no backend `{name}`. There is: {there}")

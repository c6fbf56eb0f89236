"""Which implementation computes an operator: the one table, and the only place that chooses from it.

An operator's public function checks its arguments, asks `choose` for an implementation and calls it. Everything that
decides (what was asked for, `use_backend`, the environment, device and dtype, what is built here) is in this file.
"""

import contextlib
import functools
import importlib
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from everlong.config import unknown

BACKENDS = ("reference", "torch", "native", "triton")
FORMS = ("auto", "parallel", "chunk", "recurrent")
ANY_DEVICE = frozenset({"cpu", "cuda", "mps", "xpu", "meta"})
FLOATS = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})
NATIVE_DTYPES = frozenset({torch.float32, torch.bfloat16})


@dataclass(frozen=True)
class Implementation:
    """One way to compute one operator."""

    backend: str
    target: str  # "module:function", imported when it is first chosen
    devices: frozenset[str] = ANY_DEVICE
    dtypes: frozenset[torch.dtype] = FLOATS

    def serves(self, device: str, dtype: torch.dtype) -> bool:
        return device in self.devices and dtype in self.dtypes

    def missing(self, *, build: bool) -> str | None:
        """Why it cannot run on this machine; None if it can. `build` makes sure of kernels that are not built yet."""
        if self.backend != "native":
            return None
        from everlong.ops.native.build import obstacle

        found = obstacle(try_it=build)
        return None if found is None else str(found)

    def load(self) -> Callable[..., Any]:
        module, _, function = self.target.partition(":")
        return getattr(importlib.import_module(module), function)  # type: ignore[no-any-return]


def _backends(module: str, name: str, *, native: str | None = None) -> tuple[Implementation, ...]:
    """The two backends that every operator has, after the kernels of the module `native` where there are some."""
    place = f"everlong.ops.{module}"
    kernels = Implementation("native", f"everlong.ops.native.{native}:{name}_native", frozenset({"cpu"}), NATIVE_DTYPES)
    return (
        *((kernels,) if native else ()),
        Implementation("torch", f"{place}:{name}_torch"),
        Implementation("reference", f"{place}:{name}_reference"),
    )


# In the order of preference of "auto". The reference is never chosen by itself: it is there to be compared with.
TABLE: dict[str, tuple[Implementation, ...]] = {
    "softmax_attention": _backends("attention", "softmax_attention", native="softmax_attention"),
    "linear_attention": _backends("recurrence", "linear_attention", native="linear_attention"),
    "delta_rule": _backends("delta", "delta_rule", native="low_rank"),
    "dplr": _backends("delta", "dplr", native="low_rank"),
    "linear_scan": _backends("scan", "linear_scan", native="linear_scan"),
    "selective_scan": _backends("scan", "selective_scan", native="selective_scan"),
    "causal_conv1d": _backends("scan", "causal_conv1d", native="causal_conv1d"),
    # The same over trees of tokens (`parents`), with `tree`, a Tree, for `cu_seqlens`.
    "softmax_attention_tree": _backends("tree_attention", "softmax_attention_tree", native="tree_softmax"),
    "linear_attention_tree": _backends("tree_memory", "linear_attention_tree", native="tree_memory"),
    "delta_rule_tree": _backends("tree_memory", "delta_rule_tree", native="tree_memory"),
    "dplr_tree": _backends("tree_memory", "dplr_tree", native="tree_memory"),
    "causal_conv1d_tree": _backends("scan", "causal_conv1d_tree", native="tree_convolution"),
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
    warning: str | None = None  # about a faster way that is not open here

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
    """Which implementation `operator` takes for these tensors (none: float32 on the CPU), and why; builds nothing."""
    device, dtype = (tensors[0].device.type, tensors[0].dtype) if tensors else ("cpu", torch.float32)
    return _decide.__wrapped__(operator, backend, device, dtype, _asked, build=False)


def choose(operator: str, backend: str, tensor: Tensor, form: str = "auto") -> Callable[..., Any]:
    """The function that computes `operator` on this tensor's device and dtype.

    Kernels have one form, in chunks: where another is asked for, "auto" passes them over.
    """
    return _functions[
        _target(operator, backend, tensor.device.type, tensor.dtype, _asked, kernels=form in ("auto", "chunk"))
    ]


def _target(operator: str, backend: str, device: str, dtype: torch.dtype, asked: str, *, kernels: bool) -> str:
    """The key of the chosen function: torch.compile runs this while it traces, and takes a name but no function."""
    choice = _decide(operator, backend, device, dtype, asked, build=True, kernels=kernels)
    found = choice.implementation
    if found.target not in _functions:
        # All at once: what is added after the compiler has looked into `_functions`, it does not see.
        _functions.update({other.target: other.load() for others in TABLE.values() for other in others})
    if choice.warning:
        _warn(choice.warning)
    return found.target


@functools.cache
def _warn(message: str) -> None:
    """Once in a process."""
    warnings.warn(message, UserWarning, stacklevel=4)


# As `torch.compiler.assume_constant_result` marks it, which would import the compiler with everlong: 0.8 s.
_target._dynamo_marked_constant = True  # type: ignore[attr-defined]

_functions: dict[str, Callable[..., Any]] = {}


@functools.cache
def multiplies_bfloat16(device: str) -> bool:
    """Whether the processor multiplies matrices in bfloat16 by instructions of its own."""
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return any(there for name, there in torch.cpu.get_capabilities().items() if name.endswith("bf16"))


def kernels_serve(*tensors: Tensor) -> bool:
    """Whether the kernels compute the layers around the operators for these tensors.

    They do where they are the fastest: in eager mode, since torch.compile joins such passes by itself.
    """
    if torch.compiler.is_compiling() or not all(x.is_cpu and x.dtype in NATIVE_DTYPES for x in tensors):
        return False
    return _kernels_serve(_asked)


@functools.cache
def _kernels_serve(asked: str) -> bool:
    if _wish("auto", asked)[0] not in ("auto", "native"):
        return False
    from everlong.ops.native.build import obstacle

    if missing := obstacle(try_it=True):
        _warn(_slower(str(missing)))
    return missing is None


def cache_folder() -> Path:
    """Where everlong keeps what it can make again: EVERLONG_CACHE, or the user's cache folder."""
    if asked := os.environ.get("EVERLONG_CACHE"):
        return Path(asked)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "everlong"


def asked_compiler() -> str | None:
    """The C++ compiler that CXX names."""
    return os.environ.get("CXX") or None


def asked_architecture() -> str | None:
    """The processor that EVERLONG_MARCH names for the kernels, as the compiler's -march does."""
    return os.environ.get("EVERLONG_MARCH") or None


def environment(*, programs: str, compiler: str) -> dict[str, str]:
    """That of a process which builds the kernels, with a folder of `programs` first."""
    path = os.pathsep.join((programs, os.environ.get("PATH", os.defpath)))
    return {**os.environ, "PATH": path, "CXX": compiler}


def check_form(form: str) -> None:
    """Raises ValueError for a form that does not exist."""
    if form not in FORMS:
        raise unknown("form", form, FORMS)


def _check_backend(name: str) -> None:
    if name != "auto" and name not in BACKENDS:
        raise unknown("backend", name, (*BACKENDS, "auto"))


@functools.cache
def _decide(
    operator: str, backend: str, device: str, dtype: torch.dtype, asked: str, *, build: bool, kernels: bool = True
) -> Choice:
    if operator not in TABLE:
        raise unknown("operator", operator, TABLE)
    _check_backend(backend)
    candidates = TABLE[operator]
    name, reason = _wish(backend, asked)
    if name == "auto":
        warning = None
        for candidate in candidates:
            if not candidate.serves(device, dtype) or (candidate.backend == "native" and not kernels):
                continue
            if missing := candidate.missing(build=build):
                warning = _slower(missing)
                continue
            reason = f"the fastest there is for {str(dtype).removeprefix('torch.')} on {device}"
            return Choice(operator, candidate.backend, warning or reason, candidate, warning)
        raise ValueError(f"{operator} takes floating-point tensors: got {dtype} on {device}")
    for candidate in candidates:
        if candidate.backend == name:
            if not candidate.serves(device, dtype):
                raise ValueError(f"backend `{name}` of {operator} does not serve {dtype} on {device}")
            if missing := candidate.missing(build=build):
                raise ValueError(f"backend `{name}` of {operator} cannot run here: {missing}")
            return Choice(operator, name, reason, candidate)
    there = ", ".join(candidate.backend for candidate in candidates)
    raise ValueError(f"{operator} has no backend `{name}`. There is: {there}")


def _wish(backend: str, asked: str) -> tuple[str, str]:
    """The backend that is asked for, "auto" where none is, and by what."""
    if backend != "auto":
        return backend, "asked for by the call"
    if asked != "auto":
        return asked, "asked for by use_backend"
    name = os.environ.get("EVERLONG_BACKEND", "auto")
    _check_backend(name)
    return name, "asked for by EVERLONG_BACKEND"


def _slower(missing: str) -> str:
    return f"everlong works without its kernels, several times slower: {missing}"

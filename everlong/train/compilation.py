"""`torch.compile` for the training step: whether it can run here, whether it pays, and the compiled function."""

import contextlib
import shutil
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

Mode = Literal["auto", "on", "off"]
Loss = Callable[[Int[Tensor, "B T"], Int[Tensor, "B T"]], Float[Tensor, ""]]

PAYS_AFTER = 240.0  # seconds in eager mode: compiling took 12 to 40 s and made steps 1.1 to 1.2 times faster


def obstacle() -> str | None:
    """Why nothing can be compiled on this machine, and the remedy; None where it can."""
    if not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
        return "there is no C++ compiler: install g++"
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return "Python's headers are missing: install python3-dev"
    return None


def compiled(model: Any) -> Loss:
    """The model's mean loss of `(tokens, targets)`, compiled for the one shape that training uses.

    Whatever was compiled before is forgotten: torch keeps a bounded number of versions of a function, and a process
    that trains many models one after another would run out of them and go on in eager mode.
    """
    torch.compiler.reset()

    def loss(tokens: Int[Tensor, "B T"], targets: Int[Tensor, "B T"]) -> Float[Tensor, ""]:
        value: Tensor = model.loss(tokens, targets)
        return value

    return torch.compile(loss, dynamic=False)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drops what torch's compiler warns of while it works: it is about torch's own code."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"torch\b.*")
        yield


def eager(model: Any) -> Loss:
    """The model's mean loss of `(tokens, targets)`."""

    def loss(tokens: Int[Tensor, "B T"], targets: Int[Tensor, "B T"]) -> Float[Tensor, ""]:
        value: Tensor = model.loss(tokens, targets)
        return value

    return loss

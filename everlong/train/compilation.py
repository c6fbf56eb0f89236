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


def choose(
    model: Any,
    asked: Mode,
    *,
    required: bool,
    eager_seconds: Callable[[Loss], float],
    rehearse: Callable[[Loss], object],
    tell: Callable[[str | None], None],
) -> tuple[Loss, bool]:
    """The loss to train with, and whether it is compiled.

    Args:
        required: whether it is an error where it cannot be compiled; otherwise the eager one is taken, which is told.
        eager_seconds: how long the training would take in eager mode; asked for where `asked` is "auto".
        rehearse: computes a gradient, with which a function is compiled in fact.
        tell: is told what a person should know, and None when compiling begins.

    Raises:
        ValueError: it is required, and cannot be compiled.
    """
    plain, why = eager(model), obstacle()
    if asked == "off" or (asked == "auto" and why is None and eager_seconds(plain) <= PAYS_AFTER):
        return plain, False
    if why is None:
        tell(None)
        try:
            with quiet():
                fast = compiled(model)
                rehearse(fast)
        except Exception as error:  # whatever the compiler meets: eager mode is there
            why = str(error).strip().partition("\n")[0] or type(error).__name__
        else:
            return fast, True
    if required:
        raise ValueError(f"the model cannot be compiled: {why}; or train with --compile off")
    tell(f"Training without torch.compile, which makes it slower: {why}.")
    return plain, False


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

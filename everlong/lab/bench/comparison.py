"""How far each mixer is from somebody else's implementation of it: outputs and gradients on the same weights.

What a mixer is compared with stands in `oracles/NAME.py`: whose it is, as `ORACLE`, and `comparisons()`.
"""

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from everlong import mixers
from everlong.config import from_dict
from everlong.lab.bench import oracles
from everlong.lab.bench.errors import relative

BOUND = 2e-5  # of float32 against float32


@dataclass(frozen=True)
class Comparison:
    """Two functions of the same input that should give the same."""

    case: str
    ours: Callable[[Tensor], Tensor]
    theirs: Callable[[Tensor], Tensor]
    x: Tensor
    bound: float = BOUND

    def errors(self) -> dict[str, float]:
        """The largest error of the output and of the input's gradient, relative to the largest value."""
        found = []
        for run in (self.ours, self.theirs):
            x = self.x.clone().requires_grad_()
            y = run(x)
            weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
            gradient = torch.autograd.grad((y * weight).sum() + y.square().sum(), x)[0]
            found.append({"output": y.detach(), "gradient": gradient})
        ours, theirs = found
        assert all(ours[name].shape == value.shape for name, value in theirs.items())
        return {name: relative(ours[name], value) for name, value in theirs.items()}


def make(name: str, *, layer: int = 0, depth: int = 1, **options: Any) -> Any:
    """A mixer with these options, its parameters moved away from 0 and 1, where a wrong one could hide."""
    mixer = mixers.load(name)
    made = mixer(from_dict(mixer.Config, options), layer=layer, depth=depth)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return made


def convolved(mixer: Any, name: str, x: Tensor) -> Tensor:
    """The projection `name` of a mixer and its short convolution, by torch's own, for functions that begin after it."""
    weight = getattr(mixer, f"{name}_conv").weight[:, None]
    rows = functional.pad(getattr(mixer, name)(x).mT, (weight.shape[-1] - 1, 0))
    return functional.silu(functional.conv1d(rows, weight, groups=len(weight)).mT)


def unit(x: Tensor) -> Tensor:
    """Vectors of length one, with the small number under the root that layers of the delta rule have."""
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def names() -> list[str]:
    """The mixers that have an oracle."""
    return sorted(module.name for module in pkgutil.iter_modules(oracles.__path__))


def oracle(name: str) -> str:
    """Whose implementation a mixer is compared with."""
    label: str = importlib.import_module(f"everlong.lab.bench.oracles.{name}").ORACLE
    return label


def measure(name: str) -> str:
    """What the largest error of a mixer is called in a result."""
    return f"largest relative error, {name}"


def compare(name: str) -> Iterator[tuple[Comparison, dict[str, float]]]:
    """Each comparison of a mixer and its errors.

    Raises:
        ValueError: a package that holds the oracle is not installed.
    """
    module = importlib.import_module(f"everlong.lab.bench.oracles.{name}")
    torch.manual_seed(0)
    try:
        for comparison in module.comparisons():
            yield comparison, comparison.errors()
    except ModuleNotFoundError as error:
        raise ValueError(f"{error.name} is not installed: the README's `make test` installs it") from None

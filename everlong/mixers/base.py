"""The contract under which every sequence mixer trains, generates, packs, pads and is compared.

A mixer maps `x [B, T, D]` to `y [B, T, D]` and carries what it keeps of the past in a state that is a value: passed in,
returned, never stored on the module. One file makes a mixer; its name is the file's name.
"""

import functools
import importlib
import inspect
import math
import pkgutil
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from torch.nn import functional

from everlong.config import config, divisible, unknown

State = Any  # a NamedTuple of tensors, each with the sequence on axis 0
Growth = Literal["constant", "window", "linear"]


@dataclass(frozen=True)
class Traits:
    """What a mixer can do. A combination that cannot work is refused from these, never from a list of names."""

    forms: frozenset[str]  # of "parallel", "chunk", "recurrent"
    causal: bool
    bidirectional: bool
    growth: Growth  # of the state with the length: constant, up to a window, or linear
    positions: frozenset[str] = frozenset()  # the hooks of nn/positions.py that it offers
    trees: bool = False
    owns_feed_forward: bool = False  # the whole residual branch: it reads the stream, norms it, and gives what is added
    fft_forms: frozenset[str] = frozenset()  # forms that are causal up to the rounding of a transform, not bit for bit


@dataclass(frozen=True)
class Cost:
    """What one token costs in the recurrent form. Multiply-adds count 2; elementwise work counts 0."""

    flops_per_token: int
    state_bytes: int  # of one sequence, in float32
    parameters: int


@dataclass(frozen=True)
class Context:
    """What a call is about, as one value."""

    positions: Int[Tensor, "B T"] | None = None  # None: counted from the state
    padding: Bool[Tensor, "B T"] | None = None  # True = a real token
    cu_seqlens: Int[Tensor, " N_plus_1"] | None = None  # N sequences packed in one row (B = 1)
    tree: Int[Tensor, " T"] | None = None  # parents of the tree's nodes
    times: Float[Tensor, "B T"] | None = None
    form: str = "auto"
    first: dict[str, Tensor] | None = field(default=None, compare=False)  # what the first layer offers to the others

    def sequences(self, x: Float[Tensor, "B T D"]) -> int:
        """How many sequences the call holds: the rows, or those packed in the one row."""
        return x.shape[0] if self.cu_seqlens is None else len(self.cu_seqlens) - 1

    def lengths(self, x: Shaped[Tensor, "B T *rest"]) -> Int[Tensor, " N"]:
        """The number of tokens of each sequence in this call."""
        if self.cu_seqlens is not None:
            return self.cu_seqlens.diff()
        return torch.full((x.shape[0],), x.shape[1], dtype=torch.long, device=x.device)

    def count_from(self, start: Int[Tensor, " N"] | None, x: Shaped[Tensor, "B T *rest"]) -> Int[Tensor, "rows T"]:
        """The position of each token: those given, or counted from `start` (None: from 0). One row serves all alike."""
        if self.positions is not None:
            return self.positions
        row = torch.arange(x.shape[1], device=x.device)
        if self.cu_seqlens is not None:
            offset = self.cu_seqlens[:-1] if start is None else self.cu_seqlens[:-1] - start
            return (row - offset.repeat_interleave(self.cu_seqlens.diff(), output_size=x.shape[1]))[None]
        return row[None] if start is None else start[:, None] + row


def unpadded(forward: Callable[..., tuple[Tensor, State]]) -> Callable[..., tuple[Tensor, State]]:
    """Gives a mixer or a model its padding: real tokens are packed into one row, mixed, and put back among zeros.

    What it wraps only ever sees `cu_seqlens`, so that padding on either side neither enters nor ages a state.
    """

    @functools.wraps(forward)
    def wrapped(self: Any, x: Tensor, state: State | None = None, context: Context = Context()) -> tuple[Tensor, State]:
        real = context.padding
        if isinstance(self, Mixer) and context.form not in {"auto", *self.traits.forms}:
            raise unknown(f"form of `{name_of(type(self))}`", context.form, {"auto", *self.traits.forms})
        if real is None:
            return forward(self, x, state, context)
        if real.shape != x.shape[:2]:
            raise ValueError(f"`padding` must be {tuple(x.shape[:2])} as the tokens are: got {tuple(real.shape)}")
        if context.cu_seqlens is not None:
            raise ValueError("a call has either `padding` or `cu_seqlens`: packed rows hold no padding")
        packed = replace(
            context,
            padding=None,
            cu_seqlens=functional.pad(real.sum(1).cumsum(0), (1, 0)),
            positions=None if context.positions is None else context.positions[real][None],
            times=None if context.times is None else context.times[real][None],
        )
        y, state = forward(self, x[real][None], state, packed)
        return y.new_zeros(*real.shape, *y.shape[2:]).masked_scatter(expand(real, y), y), state

    return wrapped


def expand(real: Bool[Tensor, "B T"], y: Shaped[Tensor, "1 M *rest"]) -> Bool[Tensor, "B T *rest"]:
    """The mask of real tokens over the trailing axes of `y`."""
    return real.view(*real.shape, *(1,) * (y.dim() - 2)).expand(*real.shape, *y.shape[2:])


class Mixer(nn.Module, ABC):
    """What every mixer is. A subclass lives in a file of its own, beside its frozen `Config`."""

    Config: ClassVar[type]
    traits: ClassVar[Traits]

    def __init__(self, config: Any, *, layer: int = 0, depth: int = 1) -> None:
        super().__init__()
        self.config, self.layer, self.depth = config, layer, depth

    @abstractmethod
    def init_state(self, batch: int) -> State:
        """The state of `batch` sequences before their first token."""

    @abstractmethod
    def forward(
        self, x: Float[Tensor, "B T D"], state: State | None = None, context: Context = Context()
    ) -> tuple[Float[Tensor, "B T D"], State]:
        """Mixes along time; the state returned continues the sequence exactly where this call ended."""

    def commit(self, records: Any, path: Int[Tensor, " P"]) -> State:
        """The state after a chosen path of a tree (`context.tree`)."""
        raise ValueError(
            f"`{name_of(type(self))}` does not run over trees of tokens. Those that do: {with_trait('trees')}"
        )

    @classmethod
    @abstractmethod
    def cost(cls, config: Any, length: int) -> Cost:
        """Of one token in the recurrent form, `length` tokens into a sequence.

        Without causality there is no such form: a whole pass over `length` tokens is then divided by them.
        """

    def reference(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        """What `forward` gives for one sequence, as the paper's equations: one token after another, in the dtype of x.

        It takes this layer's parameters and no operator of `ops`, so that a comparison says something.
        """
        raise NotImplementedError(f"{type(self).__name__} has no reference")

    def new_state(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Zeros for a state, on this mixer's device; float64 where the weights are."""
        weight = next(self.parameters())
        if dtype == torch.float32 and weight.dtype == torch.float64:
            dtype = torch.float64
        return torch.zeros(*shape, dtype=dtype, device=weight.device)


@config
class HeadOptions:
    """What the options of all mixers with heads of equal size begin with."""

    width: int
    num_heads: int | None = None
    """None: heads of about 64 channels."""

    def __post_init__(self) -> None:
        divisible("width", self.width, "num_heads", self.heads)

    @property
    def heads(self) -> int:
        return default_heads(self.width) if self.num_heads is None else self.num_heads

    @property
    def head_size(self) -> int:
        return self.width // self.heads


def names() -> list[str]:
    """The mixers that everlong has: the files beside this one."""
    package = importlib.import_module("everlong.mixers")
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__) if module.name != "base")


def load(name: str) -> type[Mixer]:
    """The mixer of that name, or one from outside as "package.module:Class".

    Raises:
        ValueError: there is none, or what is there is no mixer.
    """
    if ":" in name:
        return _load_from_outside(name)
    if name not in names():
        raise unknown("mixer", name, names())
    module = importlib.import_module(f"everlong.mixers.{name}")
    for value in vars(module).values():
        if inspect.isclass(value) and issubclass(value, Mixer) and value.__module__ == module.__name__:
            return value
    raise ValueError(f"everlong/mixers/{name}.py holds no class derived from Mixer")


def _load_from_outside(name: str) -> type[Mixer]:
    place, _, label = name.partition(":")
    try:
        value = getattr(importlib.import_module(place), label)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"mixer `{name}` cannot be loaded: {error}") from error
    except Exception as error:  # whatever a file of somebody else meets: its line is what helps
        told = f"{type(error).__name__} {' '.join(str(error).split())}"
        where = traceback.extract_tb(error.__traceback__)[-1]
        line = "" if isinstance(error, SyntaxError) else f" at {where.filename}:{where.lineno}"
        raise ValueError(f"mixer `{name}` cannot be loaded: {told}{line}") from error
    if not (inspect.isclass(value) and issubclass(value, Mixer)):
        raise ValueError(f"`{name}` is not derived from everlong.mixers.Mixer")
    missing = [part for part in ("Config", "traits") if not hasattr(value, part)]
    if missing or inspect.isabstract(value):
        missing += sorted(value.__abstractmethods__)
        raise ValueError(f"`{name}` is no whole mixer, it lacks {', '.join(missing)}: see everlong/mixers/base.py")
    return value


@functools.cache
def default_heads(width: int, size: int = 64) -> int:
    """The number of heads that divides `width` into heads of about `size` channels, an even number if possible."""
    divisors = [n for n in range(1, width + 1) if width % n == 0]
    even = [n for n in divisors if width // n % 2 == 0] or divisors
    return min(even, key=lambda n: abs(math.log(width / n / size)))


def name_of(mixer: type[Mixer]) -> str:
    """The name by which `load` finds this class."""
    if mixer.__module__.startswith("everlong.mixers."):
        return mixer.__module__.removeprefix("everlong.mixers.")
    return f"{mixer.__module__}:{mixer.__qualname__}"


def with_trait(trait: str, value: Any = True) -> str:
    """The names of the mixers whose trait has that value (or contains it), for error messages."""

    def has(mixer: type[Mixer]) -> bool:
        found = getattr(mixer.traits, trait)
        return value in found if isinstance(found, frozenset) else found == value

    return ", ".join(name for name in names() if has(load(name))) or "none"


def sees_ahead(mixer: type[Mixer], options: Any) -> tuple[str, str] | None:
    """What of a layer shows tokens those that follow, and the way out, for error messages; None: it is causal."""
    if not mixer.traits.causal:
        return f"a layer of {name_of(mixer)}, which is bidirectional only,", f"take one of {with_trait('causal')}"
    if not getattr(options, "causal", True):
        return f"a layer of {name_of(mixer)} with causal=False", "leave it out"
    return None

"""Position encodings by name, each behind the hooks through which it acts (nn/positions/base.py).

A mixer's traits say which hooks it offers; `attach` refuses an encoding that needs another. An encoding is chosen by
its name, or by a mapping that gives it options: {"position": "rope", "scaling": "yarn", "factor": 4.0}.
"""

import dataclasses
from collections.abc import Collection
from typing import Any

from everlong.config import from_dict, unknown
from everlong.nn.positions.absolute import Hierarchical, Learned, Multiplicative, Sinusoidal, sinusoids
from everlong.nn.positions.attending import attend, consecutive
from everlong.nn.positions.base import HOOKS, READING, Kept, Position, PositionEncoding
from everlong.nn.positions.biases import T5, Alibi, RotaryBias
from everlong.nn.positions.complex_order import ComplexOrder
from everlong.nn.positions.convolutional import Convolutional
from everlong.nn.positions.disentangled import Deberta
from everlong.nn.positions.recursive import Recursive
from everlong.nn.positions.relative import Shaw, TransformerXL
from everlong.nn.positions.rotary import Rope

__all__ = [
    "HOOKS",
    "READING",
    "T5",
    "Alibi",
    "ComplexOrder",
    "Convolutional",
    "Deberta",
    "Hierarchical",
    "Kept",
    "Learned",
    "Multiplicative",
    "NoPosition",
    "Position",
    "PositionEncoding",
    "Recursive",
    "Rope",
    "RotaryBias",
    "Shaw",
    "Sinusoidal",
    "TransformerXL",
    "attach",
    "attend",
    "consecutive",
    "fitting",
    "load",
    "markdown",
    "names",
    "parse",
    "sinusoids",
]


class NoPosition(PositionEncoding):
    """No encoding: a causal mixer knows the order by what it has seen (Haviv et al. 2022, arXiv 2203.16634)."""


_ENCODINGS: dict[str, type[PositionEncoding]] = {
    "none": NoPosition,
    "learned": Learned,
    "hierarchical": Hierarchical,
    "sinusoidal": Sinusoidal,
    "recursive": Recursive,
    "multiplicative": Multiplicative,
    "complex": ComplexOrder,
    "convolutional": Convolutional,
    "rope": Rope,
    "alibi": Alibi,
    "t5": T5,
    "rotary_bias": RotaryBias,
    "shaw": Shaw,
    "transformer_xl": TransformerXL,
    "deberta": Deberta,
}


def names() -> list[str]:
    """The position encodings that there are."""
    return sorted(_ENCODINGS)


def load(name: str) -> type[PositionEncoding]:
    """The encoding of that name; ValueError where there is none."""
    if name not in _ENCODINGS:
        raise unknown("position encoding", name, _ENCODINGS)
    return _ENCODINGS[name]


def parse(position: Position) -> tuple[str, Any]:
    """The name and the options of an encoding that is asked for.

    Raises:
        ValueError: no such encoding, or no such option.
    """
    options = {"position": position} if isinstance(position, str) else dict(position)
    name = options.pop("position", None)
    if not isinstance(name, str):
        raise ValueError(f"a position encoding is a name or has one under the key `position`: got {position!r}")
    return name, from_dict(load(name).Options, options)


def fitting(offered: Collection[str]) -> list[str]:
    """The encodings that act through these hooks only, as they are by default."""
    return [name for name in names() if _ENCODINGS[name].hooks <= frozenset(offered)]


def attach(
    position: Position,
    *,
    num_heads: int,
    size: int,
    offered: frozenset[str],
    mixer: str,
    causal: bool = True,
    vocab_size: int | None = None,
) -> PositionEncoding:
    """Makes the encoding for a mixer that offers these hooks.

    Raises:
        ValueError: no such encoding or option, or it acts through a hook that the mixer does not have; those that would
            work are named.
    """
    name, options = parse(position)
    missing = _ENCODINGS[name].hooks - offered
    if not missing:
        encoding = _ENCODINGS[name](num_heads, size, options, causal=causal, vocab_size=vocab_size)
        missing = encoding.hooks - offered
        if not missing:
            return encoding
    asked = name if isinstance(position, str) or len(position) == 1 else f"{name} with these options"
    way = " That one meets the embedding: it is the model's `positions`" if "embedding" in missing else ""
    raise ValueError(
        f"`{mixer}` has no {' or '.join(sorted(missing))} for the position encoding `{asked}`. "
        f"It takes: {', '.join(fitting(offered))}.{way}"
    )


def markdown() -> str:
    """The table of docs/positions.md: every encoding, what it is, its hooks and options."""
    rows = ["| encoding | what it does | hooks | options |", "| --- | --- | --- | --- |"]
    for name, encoding in _ENCODINGS.items():
        told = " ".join((encoding.__doc__ or "").split("\n")[0].split())
        hooks = ", ".join(hook for hook in HOOKS if hook in encoding.hooks) or "-"
        options = ", ".join(f"`{field.name}`" for field in dataclasses.fields(encoding.Options)) or "-"
        rows.append(f"| `{name}` | {told} | {hooks} | {options} |")
    return "\n".join(rows) + "\n"

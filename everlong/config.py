"""Configuration: frozen dataclasses that check what they are given and survive a round trip through JSON."""

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, dataclass_transform

import pydantic
import pydantic.dataclasses

T = TypeVar("T")


@dataclass_transform(frozen_default=True, kw_only_default=True)
def config(cls: type[T]) -> type[T]:
    """Makes `cls` a frozen dataclass whose fields are checked against their types, by keyword only."""
    rules = pydantic.ConfigDict(extra="forbid", arbitrary_types_allowed=True, validate_default=True)
    return pydantic.dataclasses.dataclass(cls, frozen=True, kw_only=True, config=rules)  # type: ignore[return-value]


def to_dict(value: Any) -> dict[str, Any]:
    """The fields of a config as plain JSON values, nested configs included."""
    plain: dict[str, Any] = pydantic.TypeAdapter(type(value)).dump_python(value, mode="json")
    return plain


def from_dict(cls: type[T], values: Mapping[str, Any]) -> T:
    """Makes a config from plain values.

    Raises:
        ValueError: in one line; an unknown key is answered with its nearest neighbour, a wrong value with what arrived.
    """
    fields = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            raise unknown(f"option of {label(cls)}", key, fields)
    try:
        return cls(**values)
    except pydantic.ValidationError as error:
        raise ValueError(explain(cls, error)) from None


def label(cls: type) -> str:
    """What a config is called in messages: its file for the `Options` of a mixer, its owner for `RopeOptions`."""
    return cls.__name__.removesuffix("Options") or cls.__module__.rpartition(".")[2]


# By how pydantic's names of errors begin: the rule in words, where its own message speaks of parsing.
_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "a text",
    "tuple": "a list",
    "dict": "a mapping",
    "dataclass": "a mapping",
}


def explain(cls: type, error: pydantic.ValidationError) -> str:
    """A pydantic error in one line: the rule, what arrived."""
    parts, kinds = [], dict[tuple[str, str], list[str]]()
    for item in error.errors():
        # Where a field may be one of several types, the type that was tried stands last, and is no place.
        where = ".".join(str(place) for place in item["loc"] if str(place) != "str" and "[" not in str(place))
        message = item["msg"].removeprefix("Value error, ")
        kind = item["type"].partition("_")[0]
        if not where:
            parts.append(message)
        elif item["type"] == "missing":
            parts.append(f"`{where}` of {label(cls)} is missing")
        elif kind in _KINDS:
            kinds.setdefault((where, repr(item["input"])), []).append(_KINDS[kind])
        else:
            parts.append(f"`{where}` of {label(cls)}: {message[:1].lower()}{message[1:]}, got {item['input']!r}")
    parts += [f"`{where}` of {label(cls)} must be {' or '.join(k)}: got {got}" for (where, got), k in kinds.items()]
    return "; ".join(parts)


def nearest(name: str, options: Iterable[str]) -> str | None:
    """The option that looks most like `name`, or None where nothing comes close."""
    found = difflib.get_close_matches(name, list(options), n=1, cutoff=0.5)
    return found[0] if found else None


def unknown(kind: str, name: str, options: Iterable[str]) -> ValueError:
    """The error for a name that does not exist: it lists what does, nearest first named."""
    known = sorted(options)
    close = nearest(name, known)
    hint = f" Nearest: `{close}`." if close else ""
    return ValueError(f"unknown {kind} `{name}`.{hint} There is: {', '.join(known)}")


def divisible(name: str, value: int, by: str, divisor: int) -> None:
    """Checks that `value` is a positive multiple of `divisor`, and names the nearest values that are.

    Raises:
        ValueError: where it is not.
    """
    if divisor > 0 and value > 0 and value % divisor == 0:
        return
    if divisor <= 0 or value <= 0:
        raise ValueError(f"`{name}` and `{by}` must be positive: got {name}={value}, {by}={divisor}")
    below, above = value // divisor * divisor, (value // divisor + 1) * divisor
    choices = f"{below} or {above}" if below else f"{above}"
    raise ValueError(f"`{name}` must be a multiple of `{by}`: got {name}={value}, {by}={divisor}. Nearest: {choices}")

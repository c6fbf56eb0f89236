"""Explains a mixer (equations, options, cost) or a run (shape, parameters by part)."""

import ast
import dataclasses
import importlib
import inspect
import textwrap
from collections import defaultdict
from pathlib import Path
from typing import Any

import tyro
from torch import nn

from everlong import mixers
from everlong.cli import console
from everlong.cli.mixers import describe
from everlong.config import config, nearest, to_dict
from everlong.mixers.base import Cost, Mixer
from everlong.models.lm import LanguageModel
from everlong.models.run import load

WIDTH = 256
LENGTHS = {"1k": 1_024, "16k": 16_384, "256k": 262_144}


@config
class Arguments:
    """Explains a mixer (equations, options, cost) or a run (shape, parameters by part).

    Examples:
        everlong explain gated_deltanet
        everlong explain runs/demo
    """

    name: tyro.conf.Positional[str]
    """A mixer's name, "package.module:Class", or the folder of a run."""


def run(arguments: Arguments) -> dict[str, object]:
    """Explains what the name stands for; a mixer comes before a folder of the same name."""
    name = arguments.name
    first = name.partition(":")[0]
    if ":" in name and first in mixers.names():
        raise ValueError(
            f"options of a mixer belong to a training: got `{name}`. `everlong explain {first}` lists them"
        )
    if name in mixers.names() or ":" in name:
        return _mixer(name)
    if Path(name).exists():
        return _run(Path(name))
    close = nearest(name, mixers.names())
    hint = f" Nearest: `{close}`." if close else ""
    raise ValueError(f"`{name}` is no mixer and no folder.{hint} The mixers are: {', '.join(mixers.names())}")


def _mixer(name: str) -> dict[str, object]:
    mixer = mixers.load(name)
    header = inspect.getdoc(importlib.import_module(mixer.__module__)) or ""
    classes = [f"{base.__module__}.{base.__qualname__}" for base in mixer.__mro__ if issubclass(base, nn.Module)]
    fields = options(mixer)
    costs = {label: mixer.cost(mixer.Config(width=WIDTH), length) for label, length in LENGTHS.items()}
    print(header)
    print(f"\nClasses   {' -> '.join(place.rpartition('.')[2] for place in classes)}\n")
    console.table(
        ["option", "type", "default", ""],
        [(field["name"], field["type"], field["default"], field["help"]) for field in fields],
        title=f"Options, given as --mixer {name}:option=value; `width` is the model's",
    )
    told = describe(name)
    if told["position_encodings"]:
        print(f"\nPosition encodings: {', '.join(told['position_encodings'])}. Options of one stand behind its name:")
        print(f"--mixer {name}:position=rope:position.scaling=yarn:position.factor=4 (docs/positions.md)")
    print()
    _show_costs(costs, f"Cost of one layer of width {WIDTH}")
    return {
        "kind": "mixer",
        **told,
        "header": header,
        "classes": classes,
        "options": fields,
        "width": WIDTH,
        "cost": _plain(costs),
    }


def options(mixer: type[Mixer]) -> list[dict[str, Any]]:
    """The fields of a mixer's config: name, type, default (None where it must be given) and what it means."""
    told = field_docs(mixer.Config)
    rows = []
    for field in dataclasses.fields(mixer.Config):
        kind = field.type.__name__ if isinstance(field.type, type) else str(field.type).replace("typing.", "")
        missing = field.default is dataclasses.MISSING
        default = "(required)" if missing else repr(field.default)
        rows.append({"name": field.name, "type": kind, "default": default, "help": told.get(field.name, "")})
    return rows


def field_docs(cls: type) -> dict[str, str]:
    """The strings that stand below the fields of a class and of those that it is derived from."""
    found: dict[str, str] = {}
    for owner in reversed(cls.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, below in zip(body.body, body.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
                value = below.value
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    found[field.target.id] = " ".join(value.value.split())
    return found


def _run(folder: Path) -> dict[str, object]:
    model = load(folder)
    parts, shared = parameters(model), shared_tensors(model)
    total = sum(parts.values())
    costs = {label: model.cost(length) for label, length in LENGTHS.items()}
    console.fields({name: _text(value) for name, value in to_dict(model.config).items()}, title="Shape")
    print()
    console.table(
        ["part", "parameters", "share"],
        [(part, f"{number:,}", f"{number / total:.1%}") for part, number in parts.items()],
        title=f"Parameters: {total:,} ({console.size(4 * total)} in float32)",
    )
    for names in shared:
        print(f"One tensor: {' and '.join(names)}")
    print()
    _show_costs(costs, "Cost of the whole model")
    return {
        "kind": "run",
        "run": str(folder),
        "config": to_dict(model.config),
        "parameters": total,
        "parts": parts,
        "shared": shared,
        "cost": _plain(costs),
    }


def parameters(model: LanguageModel) -> dict[str, int]:
    """How many numbers each part learns; a tensor that two parts share counts for the first."""
    parts: dict[str, int] = defaultdict(int)
    for name, parameter in model.named_parameters():
        words = name.split(".")
        if words[0] == "blocks":
            mixer = describe_layer(model, int(words[1]))
            part = f"block {words[1]}: {mixer if words[2] == 'mixer' else words[2].replace('_', ' ')}"
        else:
            part = words[0]
        parts[part] += parameter.numel()
    return dict(parts)


def describe_layer(model: LanguageModel, layer: int) -> str:
    """The name of a layer's mixer."""
    return mixers.base.name_of(model.config.pattern()[layer][0])


def shared_tensors(model: nn.Module) -> list[list[str]]:
    """The names of tensors that are one and the same."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    return [same for same in names.values() if len(same) > 1]


def _show_costs(costs: dict[str, Cost], title: str) -> None:
    console.table(
        ["tokens before", "FLOPs a token", "state of a sequence", "parameters"],
        [
            (label, console.count(cost.flops_per_token), console.size(cost.state_bytes), console.count(cost.parameters))
            for label, cost in costs.items()
        ],
        title=title,
    )


def _plain(costs: dict[str, Cost]) -> dict[str, dict[str, int]]:
    return {label: {"length": LENGTHS[label], **dataclasses.asdict(cost)} for label, cost in costs.items()}


def _text(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)

"""Lists the mixers: what each is, which forms it has, how its state grows."""

import importlib
import inspect
from typing import Any

from everlong import mixers
from everlong.cli import console
from everlong.config import config
from everlong.ops.dispatch import FORMS

GROWTH = {"constant": "constant", "window": "up to a window", "linear": "with the length"}


@config
class Arguments:
    """Lists the mixers: what each is, which forms it has, how its state grows.

    Example: everlong mixers
    A mixer of your own is named as "package.module:Class" wherever a mixer's name is asked for.
    """


def run(arguments: Arguments) -> dict[str, object]:
    """Shows one row for each mixer."""
    found = [describe(name) for name in mixers.names()]
    console.fields({mixer["name"]: mixer["summary"] for mixer in found})
    print()
    console.table(
        ["mixer", "forms", "direction", "state grows", "positions"],
        [
            (
                mixer["name"],
                ", ".join(mixer["forms"]),
                ", ".join(mixer["directions"]),
                GROWTH[mixer["growth"]],
                ", ".join(mixer["positions"]) or "-",
            )
            for mixer in found
        ],
    )
    print("\n`everlong explain NAME` shows the equations, the options and the cost of one;")
    print("`everlong train --data SRC --mixer NAME --out RUN` trains a model of it.")
    return {"mixers": found}


def describe(name: str) -> dict[str, Any]:
    """The traits of a mixer as plain values, and the sentence with which its file opens."""
    mixer = mixers.load(name)
    traits = mixer.traits
    header = inspect.getdoc(importlib.import_module(mixer.__module__)) or ""
    return {
        "name": name,
        "summary": " ".join(header.partition("\n\n")[0].split()),
        "forms": [form for form in FORMS if form in traits.forms],
        "directions": [way for way, has in (("causal", traits.causal), ("bidirectional", traits.bidirectional)) if has],
        "growth": traits.growth,
        "positions": sorted(traits.positions),
        "trees": traits.trees,
        "owns_feed_forward": traits.owns_feed_forward,
    }

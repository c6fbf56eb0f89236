"""Lists the mixers: what each is, which forms it has, how its state grows, how exact it is."""

import importlib
import inspect
from typing import Any

from everlong import mixers
from everlong.cli import console
from everlong.config import config
from everlong.lab.bench import comparison
from everlong.lab.bench.result import stored
from everlong.nn import positions
from everlong.ops.dispatch import FORMS

GROWTH = {"constant": "constant", "window": "up to a window", "linear": "with the length"}


@config
class Arguments:
    """Lists the mixers: what each is, which forms it has, how its state grows, how exact it is.

    The error is the largest one against somebody else's implementation, relative to the largest value, over outputs and
    gradients; `everlong bench mixers --only error` measures it again.
    Example: everlong mixers
    A mixer of your own is named as "package.module:Class" wherever a mixer's name is asked for.
    """


def run(arguments: Arguments) -> dict[str, object]:
    """Shows one row for each mixer."""
    found = [describe(name) for name in mixers.names()]
    console.fields({mixer["name"]: mixer["summary"] for mixer in found})
    print()
    console.table(
        ["mixer", "forms", "direction", "state grows", "positions", "error"],
        [
            (
                mixer["name"],
                ", ".join(mixer["forms"]),
                ", ".join(mixer["directions"]),
                GROWTH[mixer["growth"]],
                ", ".join(mixer["position_encodings"]) or "-",
                "-" if mixer["largest_relative_error"] is None else f"{mixer['largest_relative_error']:.0e}",
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
    oracle, error = compared(name)
    return {
        "name": name,
        "summary": " ".join(header.partition("\n\n")[0].split()),
        "forms": [form for form in FORMS if form in traits.forms],
        "directions": [way for way, has in (("causal", traits.causal), ("bidirectional", traits.bidirectional)) if has],
        "growth": traits.growth,
        "positions": sorted(traits.positions),
        "position_encodings": positions.fitting(traits.positions) if traits.positions else [],
        "trees": traits.trees,
        "owns_feed_forward": traits.owns_feed_forward,
        "oracle": oracle,
        "largest_relative_error": error,
    }


def compared(name: str) -> tuple[str | None, float | None]:
    """Whose implementation a mixer was compared with, and the largest error that was found; None where it was not."""
    result = stored("mixers")
    for row in result["rows"] if result is not None else ():
        if row["measure"] == comparison.measure(name):
            return row["peer"], row["value"]
    return None, None

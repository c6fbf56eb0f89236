"""Measures the operators, the mixers, training or decoding on this machine."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from everlong.cli import console
from everlong.config import config
from everlong.lab.bench import result
from everlong.lab.bench.result import Row


@config
class Arguments:
    """Measures the operators, the mixers, training or decoding on this machine.

    Example: everlong bench decode --only gated_deltanet
    """

    suite: Positional[Literal["ops", "mixers", "train", "decode"]]
    """What to measure."""
    only: str | None = None
    """Run only the rows whose measure contains this text."""
    data: str | None = None
    """What `mixers` are trained on, byte by byte: a file, or anything else that `everlong prepare` takes; by default
    python-stdlib."""
    store: bool = False
    """Write the result, and its picture if it has one, under benchmarks/results/ of the current folder; with --only,
    into what is there."""


def run(arguments: Arguments) -> dict[str, object]:
    """Shows each row as it comes, and returns them with the machine."""
    module = importlib.import_module(f"everlong.lab.bench.{arguments.suite}")
    if arguments.data is not None and arguments.suite != "mixers":
        raise ValueError(f"--data is what `mixers` are trained on: leave it out of `bench {arguments.suite}`")
    text = {} if arguments.data is None else {"text": arguments.data}
    made: Iterator[Row] = module.rows(arguments.only, **text)
    rows = []
    with console.progress(f"bench {arguments.suite}") as report:
        for row in made:
            rows.append(row)
            report(len(rows), row.measure)
    marks = {True: "met", False: "missed", None: ""}
    console.table(
        ["measure", "value", "target", "", "peer"],
        [(row.measure, row.value, row.target or "", marks[row.met], row.peer or "") for row in rows],
    )
    if arguments.store:
        path = result.store(arguments.suite, rows, Path("benchmarks/results"), part=arguments.only is not None)
        print(f"stored in {path}")
        picture = getattr(module, "picture", None)  # of a suite that can be drawn
        if picture is not None and (drawn := result.draw(path, picture)) is not None:
            print(f"drawn in {drawn}")
    return {"machine": result.machine(), "rows": [row.as_dict() for row in rows]}

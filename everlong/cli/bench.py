"""Measures the operators, training or decoding on this machine."""

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
    """Measures the operators, training or decoding on this machine.

    Example: everlong bench decode --only gated_deltanet
    """

    suite: Positional[Literal["ops", "train", "decode"]]
    """What to measure."""
    only: str | None = None
    """Run only the rows whose measure contains this text."""
    store: bool = False
    """Write the result under benchmarks/results/ of the current folder."""


def run(arguments: Arguments) -> dict[str, object]:
    """Shows each row as it comes, and returns them with the machine."""
    module = importlib.import_module(f"everlong.lab.bench.{arguments.suite}")
    made: Iterator[Row] = module.rows(arguments.only)
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
        print(f"stored in {result.store(arguments.suite, rows, Path('benchmarks/results'))}")
    return {"machine": result.machine(), "rows": [row.as_dict() for row in rows]}

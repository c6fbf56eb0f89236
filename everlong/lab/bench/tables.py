"""Stored results as tables; `python -m everlong.lab.bench.tables PAGE...` renews those of pages.

A table stands between two comments, `<!-- NAME -->` and `<!-- end -->`.
"""

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from everlong.lab.bench.ops_lengths import MEASURE
from everlong.lab.bench.result import stored

Rows = list[dict[str, Any]]

ERROR = "largest relative error, "


def training(rows: Rows) -> str:
    """Every causal mixer after the same training, best first."""
    trained = sorted((row for row in rows if "mixer" in row["raw"]), key=lambda row: float(row["value"]))
    columns = ("mixer", "held-out nats a byte", "tokens/s", "state at 1k", "state at 16k", "parameters", "width")
    cells = []
    for row in trained:
        raw = row["raw"]
        states = (_bytes(raw["state_bytes"][label]) for label in ("1k", "16k"))
        loss = "diverged" if "diverged" in raw else f"{row['value']:.3f}"
        cells.append(
            (
                raw["mixer"],
                loss,
                f"{raw.get('tokens_per_second', 0):,}",
                *states,
                f"{raw['parameters']:,}",
                raw["width"],
            )
        )
    return _table(columns, cells)


def errors(rows: Rows) -> str:
    """Whose implementation each mixer was compared with, and how far it is from that."""
    compared = [row for row in rows if row["measure"].startswith(ERROR)]
    names = [row["measure"].partition(", ")[2] for row in compared]
    columns = ("mixer", "compared with", "comparisons", "largest relative error")
    cells = [
        (name, row["peer"], len(row["raw"]), f"{row['value']:.1e}") for name, row in zip(names, compared, strict=True)
    ]
    return _table(columns, cells)


def targets(rows: Rows) -> str:
    """What the operators were to reach, and what they do."""
    reached = {True: "yes", False: "no"}
    cells = [
        (row["measure"], _number(row["value"]), row["target"], reached[row["met"]], row["peer"] or "itself")
        for row in rows
        if row["target"] is not None and not row["measure"].startswith(ERROR)
    ]
    return _table(("measure", "value", "target", "reached", "beside"), cells)


def operator_errors(rows: Rows) -> str:
    """How far the operators are from other people's."""
    found = [row for row in rows if row["measure"].startswith(ERROR)]
    names = [row["measure"].removeprefix(ERROR).partition(" against ")[0] for row in found]
    cells = [(name, row["peer"], f"{row['value']:.1e}") for name, row in zip(names, found, strict=True)]
    return _table(("operator", "compared with", "largest relative error"), cells)


def lengths(rows: Rows) -> str:
    """Milliseconds of forward + backward at each length."""
    timed = {
        row["measure"].removeprefix(MEASURE): row["raw"]["ms"] for row in rows if row["measure"].startswith(MEASURE)
    }
    shown = sorted({int(length) for times in timed.values() for length in times})
    cells = [
        (name, *(_number(times[str(n)]) if str(n) in times else "" for n in shown)) for name, times in timed.items()
    ]
    return _table(("T", *(f"{n:,}" for n in shown)), cells)


class Table(NamedTuple):
    """Where a table's rows come from, and how it is made of them."""

    suite: str
    make: Callable[[Rows], str]


TABLES = {
    "training": Table("mixers", training),
    "errors": Table("mixers", errors),
    "targets": Table("ops", targets),
    "operator errors": Table("ops", operator_errors),
    "lengths": Table("ops", lengths),
}


def renewed(page: str, rows_of: Callable[[str], Rows]) -> str:
    """The page with each of its tables made from the rows of a suite.

    Raises:
        ValueError: the page has no place for any of them.
    """
    found = 0
    for name, table in TABLES.items():
        begin = f"<!-- {name} -->"
        if begin not in page:
            continue
        pattern, whole = f"{begin}.*?<!-- end -->", f"{begin}\n{table.make(rows_of(table.suite))}<!-- end -->"
        page, here = re.subn(pattern, lambda _, text=whole: text, page, flags=re.S)
        found += here
    if not found:
        places = " or ".join(f"<!-- {name} --> ... <!-- end -->" for name in TABLES)
        raise ValueError(f"the page has no place for a table, {places}")
    return page


def stored_rows(suite: str) -> Rows:
    """The rows of the result that came with everlong.

    Raises:
        ValueError: there is none.
    """
    result = stored(suite)
    if result is None:
        raise ValueError(f"there is no stored result: `everlong bench {suite} --store` makes it")
    rows: Rows = result["rows"]
    return rows


def _table(columns: Sequence[str], cells: Sequence[Sequence[object]]) -> str:
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *cells]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def _bytes(number: int) -> str:
    return f"{number / 1e6:.1f} MB" if number >= 1e6 else f"{number / 1e3:.1f} kB" if number >= 1e3 else f"{number} B"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def main() -> None:
    """Renews the tables of the pages that are named."""
    for page in map(Path, sys.argv[1:]):
        page.write_text(renewed(page.read_text(encoding="utf-8"), stored_rows), encoding="utf-8")


if __name__ == "__main__":
    main()

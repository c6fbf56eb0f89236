"""The stored result of `bench mixers` as tables; `python -m everlong.lab.bench.tables PAGE` renews those of a page.

A table stands between two comments, `<!-- NAME -->` and `<!-- end -->`.
"""

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from everlong.lab.bench.result import stored

Rows = list[dict[str, Any]]


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
    compared = [row for row in rows if row["measure"].startswith("largest relative error, ")]
    names = [row["measure"].partition(", ")[2] for row in compared]
    columns = ("mixer", "compared with", "comparisons", "largest relative error")
    cells = [
        (name, row["peer"], len(row["raw"]), f"{row['value']:.1e}") for name, row in zip(names, compared, strict=True)
    ]
    return _table(columns, cells)


TABLES: dict[str, Callable[[Rows], str]] = {"training": training, "errors": errors}


def renewed(page: str, rows: Rows) -> str:
    """The page with each of its tables made from these rows.

    Raises:
        ValueError: the page has no place for any of them.
    """
    found = 0
    for name, table in TABLES.items():
        begin, made = f"<!-- {name} -->", table(rows)
        pattern, whole = f"{begin}.*?<!-- end -->", f"{begin}\n{made}<!-- end -->"
        page, here = re.subn(pattern, lambda _, text=whole: text, page, flags=re.S)
        found += here
    if not found:
        places = " or ".join(f"<!-- {name} --> ... <!-- end -->" for name in TABLES)
        raise ValueError(f"the page has no place for a table, {places}")
    return page


def _table(columns: Sequence[str], cells: Sequence[Sequence[object]]) -> str:
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *cells]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def _bytes(number: int) -> str:
    return f"{number / 1e6:.1f} MB" if number >= 1e6 else f"{number / 1e3:.1f} kB" if number >= 1e3 else f"{number} B"


def main() -> None:
    """Renews the tables of the page that is named."""
    page, result = Path(sys.argv[1]), stored("mixers")
    if result is None:
        raise SystemExit("there is no stored result: `everlong bench mixers --store` makes it")
    page.write_text(renewed(page.read_text(encoding="utf-8"), result["rows"]), encoding="utf-8")


if __name__ == "__main__":
    main()

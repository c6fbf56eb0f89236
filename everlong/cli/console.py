"""What commands show: tables on standard output, progress on standard error, numbers as a person reads them."""

import json
import math
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

_WIDE = 200  # columns where no terminal says how many there are: nothing is cut in a file or a pipe
_SECONDS_BETWEEN_LINES = 5.0
_SECONDS_BEFORE_A_WORD = 2.0
_SECONDS_OF_SILENCE = 20.0


@runtime_checkable
class Report(Protocol):
    """How far something is: `done` of `total` in any unit, and a few words on how it goes."""

    def __call__(self, done: float, detail: str = "", *, total: float | None = None) -> None: ...


@contextmanager
def progress(title: str, total: float | None = None) -> Iterator[Report]:
    """Shows on standard error how far something is: one live line in a terminal, a line every few seconds elsewhere.

    The total may be told later, with a report; without one there is no share and no time left.
    """
    if sys.stderr.isatty():
        with _live(title, total) as report:
            yield report
    else:
        with _Lines(title, total) as lines:
            yield lines


@contextmanager
def _live(title: str, total: float | None) -> Iterator[Report]:
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        TextColumn("{task.fields[detail]}", markup=False),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=Console(stderr=True, highlight=False)) as bar:
        task = bar.add_task(title, total=total, detail="")

        def report(done: float, detail: str = "", *, total: float | None = None) -> None:
            if total is not None:
                bar.update(task, total=total)
            bar.update(task, completed=done, detail=detail)

        yield report


class _Lines:
    """Progress as plain lines, for a log file or another program; something is said also where nothing is reported."""

    def __init__(self, title: str, total: float | None) -> None:
        self.title, self.total = title, total
        self.began = self.told = time.monotonic()
        self.ended = threading.Event()

    def __enter__(self) -> "_Lines":
        threading.Thread(target=self._say_that_it_lasts, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.ended.set()

    def _say_that_it_lasts(self) -> None:
        patience = _SECONDS_BEFORE_A_WORD
        while not self.ended.wait(patience):
            now = time.monotonic()
            if now - self.told >= patience:
                self.told = now
                print(f"{self.title}: {duration(now - self.began)} so far", file=sys.stderr, flush=True)
            patience = _SECONDS_OF_SILENCE

    def __call__(self, done: float, detail: str = "", *, total: float | None = None) -> None:
        self.total = self.total if total is None else total
        now = time.monotonic()
        ended = self.total is not None and done >= self.total
        if now - self.told < _SECONDS_BETWEEN_LINES and not (ended and self.told > self.began):
            return
        self.told = now
        parts = [detail] if detail else []
        if self.total and done:
            parts.insert(0, f"{100 * min(1.0, done / self.total):.0f} %")
            left = (now - self.began) * (self.total - done) / done
            parts += [f"{duration(left)} left"] if left > 0 else []
        print(f"{self.title}: {', '.join(parts) or f'{done:g}'}", file=sys.stderr, flush=True)


def table(columns: Sequence[str], rows: Sequence[Sequence[object]], *, title: str | None = None) -> None:
    """Prints rows under column names; numbers stand on the right."""
    made = Table(box=None, pad_edge=False, title=title, title_justify="left", title_style="bold", header_style="bold")
    for place, column in enumerate(columns):
        numbers = bool(rows) and all(isinstance(row[place], int | float) for row in rows)
        made.add_column(column, justify="right" if numbers else "left", overflow="fold", no_wrap=place == 0)
    for row in rows:
        made.add_row(*(str(cell) for cell in row))
    _print(made)


def fields(values: Mapping[str, object], *, title: str | None = None) -> None:
    """Prints names and values, one pair a line."""
    made = Table(box=None, pad_edge=False, show_header=False, title=title, title_justify="left", title_style="bold")
    made.add_column()
    made.add_column(overflow="fold")
    for name, value in values.items():
        made.add_row(name, str(value))
    _print(made)


def _print(made: Table) -> None:
    # No markup: a shape such as [B, T, H] is no style. Made when needed: standard output may have been redirected.
    console = Console(width=None if sys.stdout.isatty() else _WIDE, markup=False, highlight=False, emoji=False)
    with console.capture() as drawn:
        console.print(made)
    print("\n".join(line.rstrip() for line in drawn.get().splitlines()))


def emit_json(result: Mapping[str, object]) -> None:
    """Prints a result as one line of JSON; what is no finite number becomes null, which every reader takes."""
    print(json.dumps(_finite(result), allow_nan=False, default=str), flush=True)


def _finite(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def count(value: float) -> str:
    """A number in thousands, millions, ...: 8.70 M."""
    return _scaled(value, 1000, ("", " k", " M", " G", " T", " P"))


def size(value: float) -> str:
    """A number of bytes: 12.6 MB."""
    return _scaled(value, 1000, (" B", " kB", " MB", " GB", " TB", " PB"))


def duration(seconds: float) -> str:
    """A time: 0:07, 12:34, 1:02:03."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


def _scaled(value: float, base: int, units: Sequence[str]) -> str:
    power = 0
    while abs(value) >= base * 0.9995 and power < len(units) - 1:
        value, power = value / base, power + 1
    digits = 0 if power == 0 and value == int(value) else max(0, 2 - len(str(int(abs(value)))) + 1)
    return f"{value:.{digits}f}{units[power]}"

"""Time against length: forward + backward of every operator and of torch's attention, as numbers and as a picture."""

import math
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

from everlong.lab.bench import peers
from everlong.lab.bench.cases import CASES, Shape, inputs
from everlong.lab.bench.result import Row, milliseconds
from everlong.lab.bench.turns import Side, forward_backward, in_turns
from everlong.lab.chart import Panel, chart

LENGTHS = tuple(2**n for n in range(8, 17))
LONGEST = 1.0  # second: where a call takes more, no longer one is tried
SDPA = "SDPA"
MEASURE = "exponent of time against length, forward + backward, "


def measures() -> dict[str, str]:
    """The rows' names, and what each is about."""
    return {MEASURE + name: name for name in (SDPA, *(name for name, case in CASES.items() if case.drawn))}


def rows(names: Sequence[str]) -> Iterator[Row]:
    """How fast the time grows at the end, 1 where it is linear; all that are named take turns at each length."""
    found: dict[str, dict[int, float]] = {name: {} for name in names}
    for length in LENGTHS:
        going = [name for name, times in found.items() if not times or max(times.values()) <= LONGEST]
        times = in_turns({name: _side(name, length) for name in going}, seconds=1.0, least=3, most=15, warmup=1)
        for name in going:
            found[name][length] = median(times[name])
    for name, by_length in found.items():
        raw = {"ms": {str(length): milliseconds([time]) for length, time in by_length.items()}}
        yield Row(MEASURE + name, exponent(by_length), raw=raw)


def _side(name: str, length: int) -> Side:
    if name == SDPA:
        return forward_backward(peers.sdpa, peers.sdpa_inputs(length))
    return forward_backward(CASES[name].on("auto"), inputs(CASES[name].names, Shape(length)))


def exponent(times: dict[int, float]) -> float:
    """p of time ~ length^p between the last length and a quarter of it."""
    *_, before, _, last = sorted(times)
    return round(math.log(times[last] / times[before]) / math.log(last / before), 3)


def picture(rows: Sequence[dict[str, Any]]) -> str | None:
    """Times of the stored rows, log-log; None where none of them has any."""
    lines = {
        row["measure"].removeprefix(MEASURE): [(float(length), time) for length, time in row["raw"]["ms"].items()]
        for row in rows
        if row["measure"].startswith(MEASURE)
    }
    if not lines:
        return None
    heads = {name: line for name, line in lines.items() if name == SDPA or "q" in CASES[name].names}
    channels = {name: line for name, line in lines.items() if name == SDPA or name not in heads}
    panels = [
        Panel(f"{what}: milliseconds, forward + backward", _short(group), scale="log")
        for what, group in (("8 heads of 64", heads), ("512 channels", channels))
        if group
    ]
    return chart("Time against length: float32, one sequence", panels, x_label="tokens")


def _short(lines: dict[str, Any]) -> dict[str, Any]:
    """Labels that fit beside a panel."""
    return {name.replace("decay of a ", "").replace("_attention", ""): line for name, line in lines.items()}

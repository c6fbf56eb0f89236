"""Line charts side by side in one SVG: what a README can show without a browser's scripts.

The drawing brings its own background, in light or dark as the reader's system is, so that it can stand on any page.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from statistics import fmean
from typing import Literal

Point = tuple[float, float]

WIDTH, HEIGHT = 920, 380
LEFT, TOP, BOTTOM = 52, 78, 52  # of a panel's plot: room for the ticks, the titles and the label below
LETTER = 6.6  # pixels, about
COLORS = (
    "#3b82f6",
    "#ea580c",
    "#16a34a",
    "#a855f7",
    "#0891b2",
    "#dc2626",
    "#a16207",
)  # each readable on white and on black
STYLE = """<style>
.card { fill: #ffffff; stroke: #d0d7de } .grid { stroke: #e5e7eb } .ink { fill: #1f2328 } .dim { fill: #6e7781 }
@media (prefers-color-scheme: dark) {
  .card { fill: #0d1117; stroke: #30363d } .grid { stroke: #262c36 } .ink { fill: #e6edf3 } .dim { fill: #8b949e }
}
</style>"""


@dataclass(frozen=True)
class Panel:
    """One chart. Each line and level is labelled at its right end with its name."""

    title: str  # what is drawn, and its unit
    lines: Mapping[str, Sequence[Point]]
    faint: Mapping[str, Sequence[Point]] = field(default_factory=dict)  # drawn behind the lines, in their colours
    levels: Mapping[str, float] = field(default_factory=dict)  # horizontal and dashed
    scale: Literal["linear", "log"] = "linear"  # of both axes; "log" leaves out what is not above 0

    @property
    def right(self) -> float:
        """Room for the labels."""
        return 20 + LETTER * max(len(name) for name in (*self.lines, *self.faint, *self.levels))


@dataclass(frozen=True)
class Axis:
    """What an axis reaches from and to, and where it is labelled."""

    low: float
    high: float
    ticks: Sequence[float]
    scale: Literal["linear", "log"] = "linear"

    def along(self, value: float) -> float:
        """Where a value stands: 0 at `low`, 1 at `high`."""
        if self.scale == "log":
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def axes(points: Sequence[Point], levels: Sequence[float], scale: Literal["linear", "log"]) -> tuple[Axis, Axis]:
    """Of a panel: time, or what x is, ends where the lines do; a value's axis ends at a round number."""
    xs, ys = [x for x, _ in points], [y for _, y in points] + list(levels)
    first, last = min(xs), max(xs)
    if scale == "log":
        labels, values = decades(first, last), decades(min(ys), max(ys))
        across = Axis(first, last if last > first else labels[-1], [t for t in labels if first <= t <= last], scale)
        return across, Axis(values[0], values[-1], values, scale)
    labels, values = ticks(first, last, 5), ticks(min(ys), max(ys))
    end = last if last > first else labels[-1]
    return Axis(labels[0], end, [t for t in labels if t <= end]), Axis(values[0], values[-1], values)


def chart(title: str, panels: Sequence[Panel], *, x_label: str) -> str:
    """An SVG document with the panels from left to right; all plots are equally wide.

    Raises:
        ValueError: a panel has no finite point to draw.
    """
    across = (WIDTH - sum(LEFT + panel.right for panel in panels)) / len(panels)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">',
        STYLE,
        f'<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="8" class="card"/>',
        _text(20, 30, title, size=16),
    ]
    left = 0.0
    for panel in panels:
        parts += _drawn(panel, left + LEFT, left + LEFT + across, x_label)
        left += LEFT + across + panel.right
    return "\n".join([*parts, "</svg>"]) + "\n"


def _drawn(panel: Panel, left: float, right: float, x_label: str) -> list[str]:
    """A panel between two edges of its plot."""
    lines, faint = (
        {name: drawable(line, panel.scale) for name, line in group.items()} for group in (panel.lines, panel.faint)
    )
    points = [point for line in (*lines.values(), *faint.values()) for point in line]
    if not points:
        raise ValueError("a chart needs at least one finite point in each panel")
    across, upwards = axes(points, list(panel.levels.values()), panel.scale)

    def column(x: float) -> float:
        return left + across.along(x) * (right - left)

    def row(y: float) -> float:
        return HEIGHT - BOTTOM - upwards.along(y) * (HEIGHT - TOP - BOTTOM)

    parts = [_text(left - 32, TOP - 18, panel.title), _text((left + right) / 2, HEIGHT - 14, x_label, anchor="middle")]
    for tick in upwards.ticks:
        parts.append(f'<path d="M{left:.1f} {row(tick):.1f}H{right:.1f}" class="grid"/>')
        parts.append(_text(left - 8, row(tick) + 4, f"{tick:g}", anchor="end", look="dim"))
    parts += [_text(column(t), HEIGHT - BOTTOM + 18, f"{t:g}", anchor="middle", look="dim") for t in across.ticks]
    labels = []
    for group, stroke in ((faint, 'stroke-width="1" stroke-opacity="0.35"'), (lines, 'stroke-width="2"')):
        for (name, line), color in zip(group.items(), COLORS, strict=False):
            path = " ".join(f"{column(x):.1f},{row(y):.1f}" for x, y in line)
            parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" {stroke}/>')
            if group is lines or name not in lines:  # what is drawn behind its own line needs no second label
                labels.append((row(line[-1][1]), name, color if group is lines else ""))
    for (name, level), color in zip(panel.levels.items(), COLORS[len(lines) :], strict=False):
        y = row(level)
        parts.append(
            f'<path d="M{left:.1f} {y:.1f}H{right:.1f}" stroke="{color}" stroke-width="1.5" stroke-dasharray="6 4"/>'
        )
        labels.append((y, name, color))
    placed = apart(labels, lowest=HEIGHT - BOTTOM)
    return parts + [_text(right + 8, y + 4, name, color=color, look="dim") for y, name, color in placed]


def finite(line: Sequence[Point]) -> list[Point]:
    """The points of a line that can be drawn."""
    return [(x, y) for x, y in line if math.isfinite(x) and math.isfinite(y)]


def drawable(line: Sequence[Point], scale: Literal["linear", "log"]) -> list[Point]:
    """The points of a line that have a place on axes of this scale."""
    return [(x, y) for x, y in finite(line) if scale == "linear" or (x > 0 and y > 0)]


def smoothed(line: Sequence[Point], share: float = 0.03) -> list[Point]:
    """Each point as the mean of those around it, in a window of this share of the line; shorter at its ends."""
    line = finite(line)
    reach = round(len(line) * share / 2)
    around = [line[max(0, i - reach) : i + reach + 1] for i in range(len(line))]
    return [(x, fmean(y for _, y in near)) for (x, _), near in zip(line, around, strict=True)]


def ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Round numbers from at most `low` to at least `high`, about `count` of them."""
    span = (high - low) or abs(high) or 1.0
    rough = span / max(1, count - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    last = max(last, first + 1)
    return [round(i * step, 12) for i in range(first, last + 1)]


def decades(low: float, high: float) -> list[float]:
    """Powers of ten and, where they are few, 2 and 5 times those, from at most `low` to at least `high`, above 0."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1,), (1, 2, 5)):
        fine = [float(f"{step}e{power}") for power in powers for step in steps]
        first = max((i for i, tick in enumerate(fine) if tick <= low * (1 + 1e-9)), default=0)
        last = min((i for i, tick in enumerate(fine) if tick >= high * (1 - 1e-9)), default=len(fine) - 1)
        if last - first >= 3:
            break
    return fine[first : max(last, first + 1) + 1]


def apart(
    labels: Sequence[tuple[float, str, str]], gap: float = 16.0, lowest: float = math.inf
) -> list[tuple[float, str, str]]:
    """The labels from top to bottom, moved where they would touch: down, and up again from the lowest place."""
    ordered = sorted(labels)
    places: list[float] = []
    for y, _, _ in ordered:
        places.append(max(y, places[-1] + gap) if places else y)
    for i in reversed(range(len(places))):
        places[i] = min(places[i], places[i + 1] - gap if i + 1 < len(places) else lowest)
    return [(y, name, color) for y, (_, name, color) in zip(places, ordered, strict=True)]


def _text(
    x: float, y: float, text: str, *, anchor: str = "start", size: int = 12, look: str = "ink", color: str = ""
) -> str:
    paint = f'fill="{color}"' if color else f'class="{look}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" {paint}>{escape(text)}</text>'

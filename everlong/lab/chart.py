"""Line charts side by side in one SVG: what a README can show without a browser's scripts.

The drawing brings its own background, in light or dark as the reader's system is, so that it can stand on any page.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from statistics import fmean

Point = tuple[float, float]

WIDTH, HEIGHT = 920, 380
LEFT, TOP, BOTTOM = 52, 78, 52  # of a panel's plot: room for the ticks, the titles and the label below
LETTER = 6.6  # pixels, about
COLORS = ("#3b82f6", "#ea580c", "#16a34a", "#a855f7", "#0891b2", "#dc2626")  # each readable on white and on black
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

    @property
    def right(self) -> float:
        """Room for the labels."""
        return 20 + LETTER * max(len(name) for name in (*self.lines, *self.faint, *self.levels))


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
    lines, faint = ({n: finite(line) for n, line in group.items()} for group in (panel.lines, panel.faint))
    points = [point for line in (*lines.values(), *faint.values()) for point in line]
    if not points:
        raise ValueError("a chart needs at least one finite point in each panel")
    ys = [y for _, y in points] + list(panel.levels.values())
    first, last = min(x for x, _ in points), max(x for x, _ in points)
    x_ticks, y_ticks = ticks(first, last, 5), ticks(min(ys), max(ys))
    # Time ends where the lines do; a value's axis ends at a round number.
    width = (last if last > first else x_ticks[-1]) - x_ticks[0]
    x_ticks = [tick for tick in x_ticks if tick <= x_ticks[0] + width]

    def place(x: float, y: float) -> Point:
        along = (x - x_ticks[0]) / width
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return left + along * (right - left), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = [_text(left - 32, TOP - 18, panel.title), _text((left + right) / 2, HEIGHT - 14, x_label, anchor="middle")]
    for tick in y_ticks:
        _, y = place(0, tick)
        parts.append(f'<path d="M{left:.1f} {y:.1f}H{right:.1f}" class="grid"/>')
        parts.append(_text(left - 8, y + 4, f"{tick:g}", anchor="end", look="dim"))
    parts += [_text(place(t, 0)[0], HEIGHT - BOTTOM + 18, f"{t:g}", anchor="middle", look="dim") for t in x_ticks]
    labels = []
    for group, stroke in ((faint, 'stroke-width="1" stroke-opacity="0.35"'), (lines, 'stroke-width="2"')):
        for (name, line), color in zip(group.items(), COLORS, strict=False):
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in line))
            parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" {stroke}/>')
            if group is lines or name not in lines:  # what is drawn behind its own line needs no second label
                labels.append((place(*line[-1])[1], name, color if group is lines else ""))
    for (name, level), color in zip(panel.levels.items(), COLORS[len(lines) :], strict=False):
        _, y = place(0, level)
        parts.append(
            f'<path d="M{left:.1f} {y:.1f}H{right:.1f}" stroke="{color}" stroke-width="1.5" stroke-dasharray="6 4"/>'
        )
        labels.append((y, name, color))
    placed = apart(labels, lowest=HEIGHT - BOTTOM)
    return parts + [_text(right + 8, y + 4, name, color=color, look="dim") for y, name, color in placed]


def finite(line: Sequence[Point]) -> list[Point]:
    """The points of a line that can be drawn."""
    return [(x, y) for x, y in line if math.isfinite(x) and math.isfinite(y)]


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

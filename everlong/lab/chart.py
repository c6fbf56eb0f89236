"""A line chart as SVG: what a README or a terminal's neighbour can show without a browser's scripts."""

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 720, 380
LEFT, RIGHT, TOP, BOTTOM = 64, 150, 48, 48
COLORS = ("#2563eb", "#dc2626", "#16a34a", "#9333ea", "#ea580c", "#0891b2")


def line_chart(
    title: str,
    lines: Mapping[str, Sequence[tuple[float, float]]],
    *,
    x_label: str,
    y_label: str,
    levels: Mapping[str, float] | None = None,
) -> str:
    """An SVG document of these lines, each a list of (x, y), and of horizontal dashed levels.

    Raises:
        ValueError: there is no finite point to draw.
    """
    levels = dict(levels or {})
    points = [(x, y) for line in lines.values() for x, y in line if math.isfinite(x) and math.isfinite(y)]
    if not points:
        raise ValueError("a chart needs at least one finite point")
    xs, ys = [x for x, _ in points], [y for _, y in points] + list(levels.values())
    x_ticks, y_ticks = ticks(min(xs), max(xs)), ticks(min(ys), max(ys))
    low_x, high_x, low_y, high_y = x_ticks[0], x_ticks[-1], y_ticks[0], y_ticks[-1]

    def place(x: float, y: float) -> tuple[float, float]:
        across, up = (x - low_x) / (high_x - low_x), (y - low_y) / (high_y - low_y)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        _text(LEFT, 20, title, size=15),
        _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10, x_label, anchor="middle"),
        _text(10, TOP - 10, y_label),
    ]
    for tick in y_ticks:
        x, y = place(low_x, tick)
        parts.append(f'<path d="M{x:.1f} {y:.1f}H{WIDTH - RIGHT}" stroke="#e5e7eb"/>')
        parts.append(_text(x - 8, y + 4, f"{tick:g}", anchor="end"))
    for tick in x_ticks:
        x, y = place(tick, low_y)
        parts.append(_text(x, y + 18, f"{tick:g}", anchor="middle"))
    colors = [COLORS[i % len(COLORS)] for i in range(len(lines) + len(levels))]
    labels = []
    for (name, line), color in zip(lines.items(), colors, strict=False):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*p) for p in line if all(map(math.isfinite, p))))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>')
        labels.append((place(*line[-1])[1], name, color))
    for (name, level), color in zip(levels.items(), colors[len(lines) :], strict=True):
        _, y = place(low_x, level)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="{color}" stroke-dasharray="6 4"/>')
        labels.append((y, name, color))
    parts += [_text(WIDTH - RIGHT + 8, y + 4, name, color=color) for y, name, color in apart(labels)]
    return "\n".join([*parts, "</svg>"]) + "\n"


def ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Round numbers from at most `low` to at least `high`, about `count` of them."""
    span = (high - low) or abs(high) or 1.0
    rough = span / max(1, count - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    last = max(last, first + 1)
    return [round(i * step, 12) for i in range(first, last + 1)]


def apart(labels: list[tuple[float, str, str]], gap: float = 15.0) -> list[tuple[float, str, str]]:
    """The labels from top to bottom, moved down where they would touch."""
    moved: list[tuple[float, str, str]] = []
    for y, name, color in sorted(labels):
        moved.append((max(y, moved[-1][0] + gap) if moved else y, name, color))
    return moved


def _text(x: float, y: float, text: str, *, anchor: str = "start", size: int = 12, color: str = "#111827") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{color}">{escape(text)}</text>'
    )

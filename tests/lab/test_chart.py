"""The chart is a well-formed drawing of the points that it was given."""

import xml.etree.ElementTree as ET
from itertools import pairwise

import pytest

from everlong.lab.chart import Panel, apart, chart, decades, smoothed, ticks

SVG = "{http://www.w3.org/2000/svg}"


def test_points_stand_where_they_belong():
    line = [(0, 4.0), (50, 2.0), (100, float("nan"))]
    panels = [
        Panel("nats", {"loss": line}, faint={"raw": [(0, 4.5), (50, 2.5)]}, levels={"floor": 3.0}),
        Panel("bits", {"held-out": line}),
    ]
    drawing = ET.fromstring(chart("a < b", panels, x_label="s"))
    raw, *lines = (drawn.get("points").split() for drawn in drawing.iter(f"{SVG}polyline"))
    assert [len(points) for points in (raw, *lines)] == [2, 2, 2]  # what is no number is left out
    assert raw[0].split(",")[0] == lines[0][0].split(",")[0]
    points = lines[0]
    assert float(lines[1][0].split(",")[0]) > float(points[1].split(",")[0])  # the second panel stands to the right
    (x0, y0), (x1, y1) = (map(float, point.split(",")) for point in points)
    assert x0 < x1
    assert y0 < y1  # a larger value stands higher
    texts = [text.text for text in drawing.iter(f"{SVG}text")]
    assert {"a < b", "nats", "loss", "raw", "floor", "bits", "held-out"} <= set(texts)


def test_a_line_and_what_is_faint_behind_it_have_one_label():
    line = [(0, 1.0), (1, 2.0)]
    drawing = ET.fromstring(chart("t", [Panel("y", {"a": line}, faint={"a": line, "b": line})], x_label="x"))
    texts = [text.text for text in drawing.iter(f"{SVG}text")]
    assert (texts.count("a"), texts.count("b")) == (1, 1)


def test_labels_stay_inside():
    panel = Panel(
        "a panel with levels close together", {"x": [(0, 1.0), (1, 1.0)]}, levels={"a": 1, "b": 1.001, "c": 9}
    )
    for text in ET.fromstring(chart("t", [panel], x_label="x")).iter(f"{SVG}text"):
        assert 0 < float(text.get("y")) < 380
        assert float(text.get("x")) + 6 * len(text.text) * (text.get("text-anchor") == "start") < 920


def test_smoothing_is_a_mean_of_neighbours():
    line = [(float(x), float(x % 2)) for x in range(100)]
    assert [x for x, _ in smoothed(line, 0.1)] == [x for x, _ in line]
    assert all(abs(y - 0.5) < 0.1 for _, y in smoothed(line, 0.1)[10:-10])
    assert smoothed(line, 0.0) == line
    assert smoothed([]) == []


@pytest.mark.parametrize(("low", "high"), [(0, 1), (1.31, 1.7), (-3, 250), (5, 5), (0, 0), (1e-9, 3e-9)])
def test_ticks_enclose_and_are_few(low, high):
    found = ticks(low, high)
    assert found[0] <= low + 1e-12
    assert found[-1] >= high - 1e-12
    assert 2 <= len(found) <= 12
    assert found == sorted(set(found))


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.3, 250, [0.1, 1, 10, 100, 1000]),
        (1, 1000, [1, 10, 100, 1000]),
        (256, 4096, [200, 500, 1000, 2000, 5000]),
        (5, 5, [5, 10]),
    ],
)
def test_ticks_of_a_logarithmic_axis_are_powers_of_ten_or_between(low, high, expected):
    assert decades(low, high) == expected


def test_logarithmic_axes_make_powers_straight():
    line = [(0, 1.0), *((float(x), x**1.5) for x in (1, 10, 100))]
    drawing = ET.fromstring(chart("t", [Panel("y", {"a": line}, scale="log")], x_label="x"))
    (drawn,) = drawing.iter(f"{SVG}polyline")
    points = [tuple(map(float, point.split(","))) for point in drawn.get("points").split()]
    assert len(points) == 3  # 0 has no place
    (x0, y0), (x1, y1), (x2, y2) = points
    assert x2 - x1 == pytest.approx(x1 - x0, abs=0.2)
    assert y2 - y1 == pytest.approx(y1 - y0, abs=0.2)
    assert y2 < y0


def test_labels_do_not_touch():
    places = [y for y, _, _ in apart([(10.0, "a", ""), (11.0, "b", ""), (50.0, "c", "")])]
    assert all(b - a >= 15 for a, b in pairwise(places))
    places = [y for y, _, _ in apart([(95.0, "a", ""), (99.0, "b", ""), (100.0, "c", "")], lowest=100.0)]
    assert places == [68.0, 84.0, 100.0]


def test_nothing_to_draw_is_an_error():
    with pytest.raises(ValueError, match="finite point"):
        chart("t", [Panel("y", {"a": []})], x_label="x")

"""The chart is a well-formed drawing of the points that it was given."""

import xml.etree.ElementTree as ET
from itertools import pairwise

import pytest

from everlong.lab.chart import apart, line_chart, ticks

SVG = "{http://www.w3.org/2000/svg}"


def test_points_stand_where_they_belong():
    drawing = ET.fromstring(
        line_chart(
            "a < b",
            {"loss": [(0, 4.0), (50, 2.0), (100, float("nan"))]},
            x_label="s",
            y_label="nats",
            levels={"floor": 3.0},
        )
    )
    points = drawing.find(f"{SVG}polyline").get("points").split()
    assert len(points) == 2  # what is no number is left out
    (x0, y0), (x1, y1) = (map(float, point.split(",")) for point in points)
    assert x0 < x1
    assert y0 < y1  # a larger value stands higher
    texts = [text.text for text in drawing.iter(f"{SVG}text")]
    assert {"a < b", "loss", "floor"} <= set(texts)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (1.31, 1.7), (-3, 250), (5, 5), (0, 0), (1e-9, 3e-9)])
def test_ticks_enclose_and_are_few(low, high):
    found = ticks(low, high)
    assert found[0] <= low + 1e-12
    assert found[-1] >= high - 1e-12
    assert 2 <= len(found) <= 12
    assert found == sorted(set(found))


def test_labels_do_not_touch():
    places = [y for y, _, _ in apart([(10.0, "a", ""), (11.0, "b", ""), (50.0, "c", "")])]
    assert all(b - a >= 15 for a, b in pairwise(places))


def test_nothing_to_draw_is_an_error():
    with pytest.raises(ValueError, match="finite point"):
        line_chart("t", {"a": []}, x_label="x", y_label="y")

"""Configs check what they are given, answer in one line, and survive JSON."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from everlong.config import config, divisible, from_dict, nearest, to_dict, unknown


@config
class Inner:
    size: int = 3


@config
class Outer:
    """An example."""

    name: str
    scale: float = 1.5
    inner: Inner = Inner()
    layers: tuple[str, ...] = ("a",)


@given(st.text(), st.floats(allow_nan=False, allow_infinity=False), st.integers(), st.lists(st.text()))
def test_round_trip_through_json(name, scale, size, layers):
    made = Outer(name=name, scale=scale, inner=Inner(size=size), layers=tuple(layers))
    assert from_dict(Outer, json.loads(json.dumps(to_dict(made)))) == made


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"nam": "x"}, "unknown option of Outer `nam`. Nearest: `name`"),
        ({"name": "x", "scale": "wide"}, "`scale` of Outer must be a number: got 'wide'"),
        ({"name": "x", "inner": {"size": 1.5}}, "`inner.size` of Outer must be a whole number: got 1.5"),
        ({}, "`name` of Outer is missing"),
    ],
)
def test_errors_are_one_line_with_the_way_out(values, message):
    with pytest.raises(ValueError, match=message) as error:
        from_dict(Outer, values)
    assert "\n" not in str(error.value)


def test_frozen():
    with pytest.raises(AttributeError):
        Outer(name="x").name = "y"


def test_divisible_names_the_nearest():
    divisible("width", 96, "num_heads", 8)
    with pytest.raises(ValueError, match="got width=100, num_heads=8. Nearest: 96 or 104"):
        divisible("width", 100, "num_heads", 8)
    with pytest.raises(ValueError, match="Nearest: 8$"):
        divisible("width", 3, "num_heads", 8)
    with pytest.raises(ValueError, match="must be positive"):
        divisible("width", 8, "num_heads", 0)


def test_nearest():
    assert nearest("mamba", ["mamba2", "attention"]) == "mamba2"
    assert nearest("zzz", ["mamba2"]) is None
    assert "There is: a, b" in str(unknown("thing", "zzzz", ["b", "a"]))

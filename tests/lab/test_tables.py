"""The tables of the manual are those of the stored results, and that of the mixers knows every mixer."""

from pathlib import Path

import pytest

from everlong import mixers
from everlong.cli.mixers import compared
from everlong.lab.bench import tables
from everlong.lab.bench.result import stored

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def rows():
    return stored("mixers")["rows"]


@pytest.mark.parametrize("name", ["mixers.md", "kernels.md"])
def test_the_page_shows_the_stored_result(name):
    page = (DOCS / name).read_text(encoding="utf-8")
    assert tables.renewed(page, tables.stored_rows) == page


@pytest.mark.parametrize("name", mixers.names())
def test_every_mixer_has_been_measured(rows, name):
    oracle, error = compared(name)
    assert oracle
    assert error <= 1e-4
    trained = [row for row in rows if row["raw"].get("mixer") == name]
    assert len(trained) == mixers.load(name).traits.causal
    for row in trained:
        assert "diverged" not in row["raw"]
        assert 0.85e6 < row["raw"]["parameters"] < 1.15e6  # a width is a multiple of 16
        assert row["raw"]["state_bytes"].keys() == {"1k", "16k"}


def test_a_page_without_a_place_is_refused():
    with pytest.raises(ValueError, match="the page has no place for a table"):
        tables.renewed("nothing", tables.stored_rows)

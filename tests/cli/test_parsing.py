"""Arguments: what can be given, and the one line that each mistake gets."""

import io
import sys
from pathlib import Path
from typing import Annotated, Literal

import pydantic
import pytest
import tyro

from everlong.cli.parsing import Names, one_line, options, parse
from everlong.config import config


@config
class Shared:
    """What several commands take."""

    seed: int = 0
    """The seed."""


@config
class Arguments(Shared):
    """Mixes paint.

    Example:
        everlong mix red --out pot --litres 3
    """

    colour: tyro.conf.Positional[Literal["red", "green", "blue"]]
    """The colour."""
    out: Path
    """The pot."""
    max_drops: int = 7
    """Drops at most."""
    litres: Annotated[float, pydantic.Field(gt=0)] = 1.0
    """How much."""
    limit: int | None = None
    """A limit."""
    stir: bool = True
    """Stir it."""
    method: Literal["auto", "on", "off"] = "auto"
    """How."""
    brushes: Names = ()
    """Brushes."""
    name: str = ""
    """A name."""

    def __post_init__(self) -> None:
        if self.name == "ugly":
            raise ValueError("`name` must be beautiful: got ugly")


def given(*words):
    return parse(Arguments, words, program="everlong mix")


def test_what_can_be_given():
    made = given(
        "red", "--out", "pot", "--max-drops", "9", "--no-stir", "--brushes", "a, b,c", "--seed=3", "--limit", "4"
    )
    assert made == Arguments(
        colour="red", out=Path("pot"), max_drops=9, stir=False, brushes=("a", "b", "c"), seed=3, limit=4
    )
    assert given("blue", "--out=pot", "--name=--x", "--max_drops", "1") == Arguments(
        colour="blue", out=Path("pot"), name="--x", max_drops=1
    )


def test_options_are_those_of_the_fields_inherited_ones_included():
    assert set(options(Arguments)) == {
        "--seed",
        "--out",
        "--max-drops",
        "--litres",
        "--limit",
        "--stir",
        "--no-stir",
        "--method",
        "--brushes",
        "--name",
        "--help",
        "--json",
    }


PAINT = ("red", "--out", "pot")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "needs `COLOUR` and `--out PATH`"),
        (("red",), "needs `--out PATH`"),
        (("--zzzzzz", "red"), "unknown option `--zzzzzz`"),
        (("--sed=3", "--out", "pot"), "unknown option `--sed`. Nearest: `--seed`"),
        (("red", "--ot", "pot"), "unknown option `--ot`. Nearest: `--out`"),
        ((*PAINT, "--max-drop", "3"), "unknown option `--max-drop`. Nearest: `--max-drops`"),
        ((*PAINT, "--max", "3"), "unknown option `--max`. Nearest: `--max-drops`"),
        ((*PAINT, "--zzzzzz"), "unknown option `--zzzzzz`"),
        ((*PAINT, "--sead=3"), "unknown option `--sead`. Nearest: `--seed`"),
        ((*PAINT, "-x"), "unknown option `-x`"),
        ((*PAINT, "green"), "nothing takes the word `green`"),
        ((*PAINT, "--stir", "yes"), "nothing takes the word `yes`"),
        ((*PAINT, "--max-drops", "many"), "`--max-drops` takes a whole number: got `many`"),
        ((*PAINT, "--max-drops=1.5"), "`--max-drops` takes a whole number: got `1.5`"),
        ((*PAINT, "--max_drops", "1.5"), "`--max-drops` takes a whole number: got `1.5`"),
        ((*PAINT, "--limit", "x"), "`--limit` takes a whole number: got `x`"),
        ((*PAINT, "--litres", "a lot"), "`--litres` takes a number: got `a lot`"),
        ((*PAINT, "--litres", "-1"), "`--litres`: input should be greater than 0, got -1.0"),
        ((*PAINT, "--method", "of"), "`--method` must be one of auto, on, off: got `of`. Nearest: `off`"),
        (("purple", "--out", "pot"), "`COLOUR` must be one of red, green, blue: got `purple`"),
        ((*PAINT, "--max-drops"), "`--max-drops` needs a value"),
        ((*PAINT, "--name", "--x"), "`--name` needs a value; one that begins with a hyphen is given as `--name=--x`"),
        ((*PAINT, "--name", "ugly"), "`name` must be beautiful: got ugly"),
    ],
)
@pytest.mark.parametrize("columns", ["200", "40"])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])  # tyro draws its box with what standard output can show
def test_each_mistake_gets_one_line(words, message, columns, encoding, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    with pytest.raises(ValueError, match=r"^[^\n]+$") as error:
        given(*words)
    told = str(error.value)
    assert told.startswith(message)
    assert told.removeprefix(message) == ". See `everlong mix --help`"
    assert (sys.stdout.tell(), capsys.readouterr().err) == (0, "")


def test_the_help_has_the_example_the_options_and_json(capsys):
    with pytest.raises(SystemExit) as end:
        given("--help")
    assert end.value.code == 0
    told = capsys.readouterr().out
    for part in ("    everlong mix red --out pot --litres 3\n", "Drops at most.", "--no-stir", "--json", "A,B,..."):
        assert part in told


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (FileNotFoundError(2, "No such file or directory", "a/b.txt"), "a/b.txt: no such file or directory"),
        (PermissionError(13, "Permission denied", Path("x")), "x: permission denied"),
        (OSError(28, "No space left on device"), "no space left on device"),
        (OSError("the disk is\nodd"), "the disk is odd"),
        (ValueError("two\n  lines"), "two lines"),
        (ValueError(), "ValueError"),
    ],
)
def test_errors_of_commands_become_one_line(error, message):
    assert one_line(error) == message

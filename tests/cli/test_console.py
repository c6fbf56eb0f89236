"""Output: numbers as a person reads them, JSON that every reader takes, progress on standard error."""

import json
import time

import pytest

from everlong.cli import console


@pytest.mark.parametrize(
    ("value", "told"),
    [(0, "0"), (7, "7"), (999, "999"), (999.9, "1.00 k"), (12_345, "12.3 k"), (8_700_000, "8.70 M"), (0.5, "0.50")],
)
def test_counts(value, told):
    assert console.count(value) == told


def test_sizes_and_durations():
    assert [console.size(value) for value in (0, 512, 12_600_000, 3e9)] == ["0 B", "512 B", "12.6 MB", "3.00 GB"]
    assert [console.duration(value) for value in (0.4, 7, 754, 3723)] == ["0:00", "0:07", "12:34", "1:02:03"]


def test_json_has_no_numbers_that_are_none(capsys):
    console.emit_json({"a": float("nan"), "b": [float("-inf"), 1], "c": (2, "é\n")})
    told = capsys.readouterr().out
    assert told.count("\n") == 1
    assert json.loads(told) == {"a": None, "b": [None, 1], "c": [2, "é\n"]}


def test_tables_show_what_they_are_given(capsys):
    console.table(["shape", "n"], [("[B, T, H]", 5), ("[red]x[/red] :smile:", 12)], title="Shapes")
    console.fields({"state [B]": "x" * 300})
    told = capsys.readouterr().out
    assert told.splitlines()[:4] == [
        "Shapes",
        "shape                  n",
        "[B, T, H]              5",
        "[red]x[/red] :smile:  12",
    ]
    assert told.count("x") >= 300


def test_progress_elsewhere_is_a_line_now_and_then(capsys, monkeypatch):
    now = iter([0.0, 1.0, 6.0, 7.0, 20.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(now))
    with console.progress("reading", 40) as report:
        report(1, "quick")
        report(10, "12 MB/s")
        report(12)
        report(40, "done")
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err == "reading: 25 %, 12 MB/s, 0:18 left\nreading: 100 %, done\n"


def test_what_reports_nothing_is_not_silent(capsys, monkeypatch):
    monkeypatch.setattr(console, "_SECONDS_BEFORE_A_WORD", 0.01)
    with console.progress("sorting"):
        for _ in range(500):
            if told := capsys.readouterr().err:
                break
            time.sleep(0.01)
    assert told == "sorting: 0:00 so far\n"


def test_progress_in_a_terminal_is_one_live_line(capsys, monkeypatch):
    monkeypatch.setattr(console.sys.stderr, "isatty", lambda: True)
    with console.progress("reading [a]") as report:
        report(1, "slow [b]")
        report(2, "fast", total=2)
    told = capsys.readouterr()
    assert told.out == ""
    assert "reading [a]" in told.err
    assert "fast" in told.err

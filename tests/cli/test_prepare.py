"""`everlong prepare`: what it prints, and what it says of bad input."""

import json

import pytest

from everlong.cli.main import main
from everlong.data.loader import Dataset


def test_it_prepares_and_reports(data, tmp_path, capsys):
    words = [
        "prepare",
        str(data / "text" / "tinyshakespeare.txt"),
        "--out",
        str(tmp_path / "out"),
        "--vocab-size",
        "300",
    ]
    assert main([*words, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    dataset = Dataset.open(tmp_path / "out")
    assert result["fingerprint"] == dataset.info.fingerprint
    assert result["vocab_size"] == 300
    assert result["splits"]["train"]["tokens"] == dataset.split("train").num_tokens
    assert result["splits"]["heldout"]["bytes_per_token"] > 1
    assert not result["reused"]
    assert main(words) == 0
    assert "holds this already" in capsys.readouterr().out


def test_rows_and_another_tokenizer(data, tmp_path, capsys):
    rows = str(data / "prompts" / "gsm8k_train.jsonl")
    first, second = str(tmp_path / "one"), str(tmp_path / "two")
    assert main(["prepare", rows, "--out", first, "--text-field", "question", "--vocab-size", "257"]) == 0
    assert main(["prepare", rows, "--out", second, "--text-field", "answer", "--tokenizer", first]) == 0
    assert Dataset.open(first).tokenizer.fingerprint == Dataset.open(second).tokenizer.fingerprint


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--vocab-size", "100"], "`vocab_size` must be at least 257"),
        (["--held-out", "2"], "`held_out` must be a share from 0 to 1"),
        (["--tokenizer", "nowhere"], "there is no tokenizer at `nowhere`"),
        (["--vocab-sise", "300"], "Nearest: `--vocab-size`"),
        (["nowhere.txt"], "there is no file or folder `nowhere.txt`"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, words, message):
    (tmp_path / "x.txt").write_text("text")
    assert main(["prepare", str(tmp_path / "x.txt"), *words, "--out", str(tmp_path / "out")]) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.err.count("\n") == 1
    assert shown.out == ""
    assert not (tmp_path / "out").exists()

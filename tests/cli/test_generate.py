"""`everlong generate` on a small run: what is shown, what is reported, what each mistake gets."""

import io
import json
import sys

import pytest
import torch

from everlong import LanguageModel, ModelConfig
from everlong.cli.main import main
from everlong.data.tokenizer import byte_tokenizer
from everlong.generate.decode import generate
from everlong.generate.sampling import Sampling
from everlong.models import run as runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    shape = ModelConfig(vocab_size=tokenizer.vocab_size, width=16, num_layers=1, layers=("linear_attention",))
    place = tmp_path_factory.mktemp("run")
    runs.save(LanguageModel(shape), place, tokenizer)
    return place


@pytest.fixture
def told(folder, capsys):
    """The result and the shown text of a call."""

    def call(*words):
        assert main(["generate", str(folder), *words, "--json"]) == 0
        captured = capsys.readouterr()
        return json.loads(captured.out), captured.err

    return call


def test_it_gives_what_the_library_gives(folder, told):
    result, shown = told("--prompt", "hello", "--max-new-tokens", "30", "--seed", "5", "--top-k", "90")
    model, tokenizer = runs.load(folder), byte_tokenizer()
    stops = (tokenizer.end,)
    expected = generate(
        model, [tokenizer.encode("hello")], max_new_tokens=30, sampling=Sampling(top_k=90), seed=5, stop_tokens=stops
    )[0]
    assert result["token_ids"] == expected
    assert result["tokens"] == len(expected)
    assert result["prompt_tokens"] == 5
    assert result["stopped_by"] == ("end of document" if expected[-1] == tokenizer.end else "length")
    assert shown.startswith(result["text"] + "\n")
    assert result["tokens_per_second"] > 0
    assert result["seconds"] > result["prompt_seconds"] > 0


def test_the_text_ends_before_a_stop_string(told):
    free, _ = told("--prompt", "a", "--max-new-tokens", "40", "--seed", "2")
    word = free["text"][7:9]
    result, shown = told("--prompt", "a", "--max-new-tokens", "40", "--seed", "2", "--stop", "nowhere", "--stop", word)
    assert result["text"] == free["text"].partition(word)[0]
    assert result["stopped_by"] == "stop string"
    assert word not in shown.partition("tokens")[0]


def test_prompts_from_a_file_and_from_standard_input(told, tmp_path, monkeypatch):
    (tmp_path / "prompt.txt").write_bytes("größe\n".encode())
    expected, _ = told("--prompt", "größe\n", "--max-new-tokens", "8")
    assert told("--prompt-file", str(tmp_path / "prompt.txt"), "--max-new-tokens", "8")[0]["text"] == expected["text"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("größe\n".encode())))
    assert told("--prompt", "-", "--max-new-tokens", "8")[0]["text"] == expected["text"]
    assert expected["prompt_tokens"] == 8


def test_an_empty_prompt_begins_a_document(told):
    assert told("--prompt", "", "--max-new-tokens", "2")[0]["prompt_tokens"] == 1


def test_mistakes(folder, tmp_path, capsys):
    (tmp_path / "binary").write_bytes(b"ab\xff\xfe")
    run = str(folder)
    for words, line in [
        ([run], "give the text to continue by one of"),
        ([run, "--prompt", "a", "--prompt-file", "b"], "give the text to continue by one of"),
        ([run, "--prompt-file", str(tmp_path / "none")], f"{tmp_path / 'none'}: no such file"),
        (
            [run, "--prompt-file", str(tmp_path / "binary")],
            f"{tmp_path / 'binary'} is no UTF-8 text: byte 0xff at offset 2",
        ),
        ([run, "--prompt", "\udcff"], "a text holds half a surrogate pair"),
        ([run, "--prompt", "a", "--temperature", "-1"], "`temperature` must be at least 0"),
        ([run, "--prompt", "a", "--stop", ""], "`--stop` must not be empty"),
        ([str(tmp_path), "--prompt", "a"], f"{tmp_path} is no run"),
        ([run, "--prompt", "a", "--top-k", "few"], "`--top-k` takes a whole number: got `few`"),
    ]:
        assert main(["generate", *words]) == 2
        shown = capsys.readouterr()
        assert shown.err.startswith(f"everlong generate: {line}")
        assert shown.err.count("\n") == 1
        assert shown.out == ""

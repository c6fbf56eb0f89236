"""Prepared real text and a tiny model, shared by the tests of training."""

import json

import pytest
import torch
from training_runs import TINY

from everlong.cli.main import main
from everlong.data.loader import Dataset
from everlong.data.packing import prepare
from everlong.models.lm import LanguageModel, ModelConfig

BYTES = 80_000


@pytest.fixture(autouse=True)
def _one_thread():
    """Models this small are slower on two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def text(data, tmp_path_factory):
    """The beginning of tinyshakespeare as sixteen files."""
    folder = tmp_path_factory.mktemp("text")
    whole = (data / "text" / "tinyshakespeare.txt").read_text(encoding="utf-8")[:BYTES]
    for i in range(16):
        (folder / f"{i:02}.txt").write_text(whole[i * BYTES // 16 : (i + 1) * BYTES // 16], encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def prepared(text, tmp_path_factory):
    """The prepared folder."""
    folder = tmp_path_factory.mktemp("prepared") / "data"
    prepare(text, folder, vocab_size=384, held_out=0.2)
    return folder


@pytest.fixture
def dataset(prepared):
    return Dataset.open(prepared)


@pytest.fixture
def make_model(dataset):
    """Makes the same tiny model each time."""

    def make(**shape):
        torch.manual_seed(0)
        config = {"width": 32, "num_layers": 2, "layers": ("attention",), **shape}
        return LanguageModel(ModelConfig(vocab_size=dataset.tokenizer.vocab_size, **config))

    return make


@pytest.fixture
def call(capsys):
    """Runs a command: the JSON result and what stood on standard error, or the exit code and the line."""

    def run(*words):
        code = main([*map(str, words), "--json"])
        out, err = capsys.readouterr()
        if code:
            return code, err.strip()
        return json.loads(out.strip().splitlines()[-1]), err

    return run


@pytest.fixture
def trained(call, prepared, tmp_path):
    """A run of ten steps, and its result."""
    result, _ = call("train", "--data", prepared, "--mixer", "attention", "--out", tmp_path / "run", *TINY)
    return tmp_path / "run", result

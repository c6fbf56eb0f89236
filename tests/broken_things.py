"""A folder of good and of broken things, for the table of bad input."""

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import torch

from everlong import LanguageModel, ModelConfig
from everlong.data.packing import prepare
from everlong.data.tokenizer import byte_tokenizer
from everlong.models import run as runs

TEXT = "".join(f"line {i} of a short story about {i * i}\n" for i in range(400))

FILES: dict[str, str | bytes] = {
    "text.txt": TEXT,
    "empty.txt": "",
    "short.txt": "only a few words",
    "latin.txt": "Größe ".encode("latin-1"),
    "wide.txt": "some text".encode("utf-16"),
    "binary": bytes(range(256)),
    "nul.txt": b"abc\0def",
    "cut.txt.gz": gzip.compress(TEXT.encode())[:200],
    "no.txt.gz": b"this is no gzip",
    "no.txt.xz": b"this is no xz",
    "no.txt.bz2": b"this is no bz2",
    "no.txt.zst": b"this is no zst",
    "broken.jsonl": '{"text": "a"}\n{"text": "b"\n',
    "array.json": '[{"text": "a"}]\n',
    "pretty.json": '[\n{"text": "a"}\n]\n',
    "number.jsonl": '{"text": "a"}\n7\n',
    "null.jsonl": '{"text": "a"}\n{"text": null}\n',
    "list.jsonl": '{"text": ["a"]}\n',
    "other.jsonl": '{"text": "a"}\n{"txet": "b"}\n',
    "blank.jsonl": '{"text": ""}\n',
    "half.jsonl": '{"text": "\\ud800"}\n',
    "deep.jsonl": "[" * 100_000 + "\n",
    "no.parquet": "no parquet at all",
    "folder/a.txt": "hello",
    "folder/b.txt": b"\xff\xfe",
    "lacking.py": "import nothing_at_all\n",
    "broken.py": "def x(:\n",
    "failing.py": "raise RuntimeError('in\\ntwo lines')\n",
    "partial.py": "from everlong.mixers.base import Mixer\n\nclass Partial(Mixer):\n    pass\n",
}


def make(place: Path) -> None:
    """Fills a folder."""
    for name, content in FILES.items():
        path = place / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    (place / "hollow").mkdir()
    (place / "begun" / "training").mkdir(parents=True)
    table = place / "table.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a", "b"], "n": [1, 2]}), table)
    (place / "cut.parquet").write_bytes(table.read_bytes()[:200])
    _make_data(place)
    _make_runs(place)


def _make_data(place: Path) -> None:
    source = place / "text.txt"
    prepare(source, place / "data", vocab_size=257)
    prepare(source, place / "other-data", vocab_size=300)
    prepare(source, place / "trained-data", vocab_size=257, held_out=0)
    tokens = _copy(place, "data", "cut-data") / "train-00000.bin"
    tokens.write_bytes(tokens.read_bytes()[:-10])
    (_copy(place, "data", "listed-data") / "dataset.json").write_text("[]")
    shutil.copy(place / "other-data" / "tokenizer.json", _copy(place, "data", "swapped-data"))


def _make_runs(place: Path) -> None:
    run = place / "run"
    _save(run, width=16, layers=("linear_attention",))
    _save(place / "positions", width=16, layers=("linear_attention",), learned_positions=8)
    weights = (run / runs.WEIGHTS).read_bytes()
    (_copy(place, "run", "cut-weights") / runs.WEIGHTS).write_bytes(weights[: len(weights) // 2])
    (_copy(place, "run", "no-weights") / runs.WEIGHTS).unlink()
    for name, shape in {
        "wider-weights": {"width": 32, "layers": ("linear_attention",)},
        "mixed-weights": {"width": 16, "layers": ("mamba2",)},
    }.items():
        _save(place / name, **shape)
        shutil.copy(run / runs.CONFIG, place / name)
    good = json.loads((run / runs.CONFIG).read_text())
    for name, content in {
        "no-json": "{oops",
        "listed": "[1]",
        "transformer": json.dumps({"model_type": "gpt2", "n_embd": 768}),
        "unknown-mixer": json.dumps({**good, "layers": ["mambo"]}),
        "unknown-key": json.dumps({**good, "widht": 8}),
        "worded": json.dumps({**good, "width": "wide"}),
        "numbered": json.dumps({**good, "layers": [7]}),
        "unsized": json.dumps({key: value for key, value in good.items() if key != "vocab_size"}),
        "huge": json.dumps({**good, "width": 10**9}),
    }.items():
        (_copy(place, "run", name) / runs.CONFIG).write_text(content)
    (_copy(place, "run", "no-tokenizer") / "tokenizer.json").unlink()
    (_copy(place, "run", "broken-tokenizer") / "tokenizer.json").write_text("{oops")
    (_copy(place, "run", "binary-tokenizer") / "tokenizer.json").write_bytes(b"\xff\xff")
    shutil.copy(place / "other-data" / "tokenizer.json", _copy(place, "run", "larger-tokenizer"))
    (_copy(place, "run", "listed-settings") / "tokenizer_config.json").write_text("[]")
    (_copy(place, "run", "endless-settings") / "tokenizer_config.json").write_text('{"eos_token": ["a"]}')
    unset = _copy(place, "run", "unset") / "training"
    unset.mkdir()
    (unset / "settings.json").write_text("{}")


def _save(folder: Path, **shape: Any) -> None:
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    runs.save(LanguageModel(ModelConfig(vocab_size=tokenizer.vocab_size, num_layers=1, **shape)), folder, tokenizer)


def _copy(place: Path, source: str, name: str) -> Path:
    return Path(shutil.copytree(place / source, place / name))

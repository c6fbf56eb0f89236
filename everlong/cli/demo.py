"""Trains and shows a real language model in a few minutes: Python's own standard library, predicted."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from everlong.cli import console, eval, generate, prepare, train
from everlong.cli.places import check_free_for_run
from everlong.config import config
from everlong.data.disk import write, write_json
from everlong.lab.chart import Panel, chart, smoothed
from everlong.train.folder import SETTINGS, check_free, read_settings
from everlong.train.log import LOG

# What four minutes on two cores are best spent on: many small updates of a small model, and none of the time on
# compiling, which takes longer than it would save.
SHAPE: dict[str, Any] = {"layers": ("gated_deltanet",), "width": 256, "num_layers": 5}
TRAINING: dict[str, Any] = {
    "length": 512,
    "batch_tokens": 4096,
    "matrix_learning_rate": 0.02,
    "decay": 0.6,
    "compile": "off",
    "final_tokens": 16_384,
}
# Of the evaluation: a constant state reads on beyond the length that it was trained on.
CONTEXT: dict[str, Any] = {"length": 1024, "stride": 768}
VOCABULARY = 2048
SUMMARY, PICTURE = "summary.json", "picture.svg"
PROMPTS = (
    "import os\nimport sys\n\ndef main(",
    "class Queue:\n    def __init__(self, maxsize=0):\n",
    'def read_file(path):\n    """Return the',
)


@config
class Arguments:
    """Trains a language model on Python's own standard library and shows what it has learned.

    Example: everlong demo --minutes 4
    """

    out: Path = Path("runs/demo")
    """The run folder; an earlier demo in it is replaced."""
    minutes: float = 3.6
    """Of training, compilation included."""
    seed: int = 0
    """Of the first weights and of the data's order."""


def run(arguments: Arguments) -> dict[str, object]:
    """Four commands, as a person would type them, and what came of them."""
    began, out = time.perf_counter(), arguments.out
    data = out.parent / "python-stdlib"
    chosen = {"minutes": arguments.minutes, "seed": arguments.seed, **SHAPE, **TRAINING}
    training = train.Arguments(data=str(data), out=str(out), overwrite=True, **chosen)
    check_free_for_run(out)
    _check_place(out)
    _typed(f"everlong prepare python-stdlib --out {data} --vocab-size {VOCABULARY}")
    prepare.run(prepare.Arguments(sources=("python-stdlib",), out=data, vocab_size=VOCABULARY))
    _typed(f"everlong train --data {data} --out {out} {_options(chosen)}")
    trained = train.run(training)
    _typed(f"everlong eval {out} --data {data} {_options(CONTEXT)}")
    evaluated: Any = eval.run(eval.Arguments(run=str(out), data=str(data), **CONTEXT))
    for prompt in PROMPTS:
        _typed(f"everlong generate {out} --temperature 0.5 --max-new-tokens 80 --prompt {prompt!r}")
        generate.run(generate.Arguments(run=out, prompt=prompt, temperature=0.5, max_new_tokens=80))
    bits = {"model": evaluated["bits_per_byte"], **evaluated["baselines"]}
    summary = {
        "bits_per_byte": bits,
        "seconds": time.perf_counter() - began,
        "tokens_per_second": trained["tokens_per_second"],
        "steps": trained["steps"],
        "parameters": trained["parameters"],
        "held_out_documents": evaluated["documents"],
        "held_out_bytes": evaluated["bytes"],
    }
    write_json(out / SUMMARY, summary)
    write(out / PICTURE, picture(out / LOG, bits).encode())
    _close(out, data, bits)
    return summary


def _check_place(out: Path) -> None:
    """Raises ValueError where `out` holds anything that the demo would replace and that no earlier demo made."""
    if is_demo(out):
        return
    there = next((name for name in (SUMMARY, PICTURE) if (out / name).exists()), None)
    if there is not None:
        raise ValueError(f"{out} holds {there}, which no demo made: choose another folder for --out")
    try:
        check_free(out, overwrite=False)
    except ValueError:
        raise ValueError(f"{out} holds something that is no earlier demo: choose another folder for --out") from None


def is_demo(folder: Path) -> bool:
    """Whether the training in a folder was set up as the demo sets it up."""
    if not (folder / SETTINGS).is_file():
        return False
    recorded = read_settings(folder)
    known = {**recorded["model"], **recorded["train"]}
    wanted = json.loads(json.dumps({**SHAPE, **TRAINING}))
    return all(known.get(name) == value for name, value in wanted.items())


def picture(log: Path, bits: dict[str, float]) -> str:
    """The training loss, and bits per byte on held-out text above the baselines' levels, against time."""
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    loss = [(row["seconds"], row["loss"]) for row in rows if row["loss"] is not None]
    held_out = [(row["seconds"], row["held_out_bits_per_byte"]) for row in rows if "held_out_bits_per_byte" in row]
    levels = {"byte 5-gram": bits["five_gram"], "xz -9": bits["xz"], "model, all files": bits["model"]}
    return chart(
        "Python's standard library, predicted by a model trained on this machine",
        [
            Panel("training loss, nats per token", {"running mean": smoothed(loss)}, faint={"each update": loss}),
            Panel(
                "held-out files, bits per byte",
                {"while training": held_out},
                levels={f"{name}: {value:.2f}": value for name, value in levels.items()},
            ),
        ],
        x_label="seconds of training",
    )


def _typed(command: str) -> None:
    print(f"\n$ {command}", flush=True)


def _options(values: Mapping[str, Any]) -> str:
    words = {name: ",".join(value) if isinstance(value, tuple) else value for name, value in values.items()}
    return " ".join(f"--{name.replace('_', '-')} {word}" for name, word in words.items())


def _close(out: Path, data: Path, bits: dict[str, float]) -> None:
    names = {"model": "this model", "five_gram": "byte 5-gram", "xz": "xz -9"}
    console.table(
        ["on files that training never saw", "bits per byte"],
        [(names[key], f"{value:.3f}") for key, value in sorted(bits.items(), key=lambda item: item[1])],
    )
    print(f"The figures are in {out / SUMMARY}, the learning curve in {out / PICTURE}. Next:")
    print(f"  .venv/bin/everlong generate {out} --prompt 'def fibonacci(n):'")
    print(f"  .venv/bin/everlong train --data {data} --mixer mamba2 --minutes 5 --out runs/mamba2")
    print("  .venv/bin/everlong train --data YOUR_TEXT.txt --mixer gated_deltanet --minutes 10 --out runs/mine")
    print("  .venv/bin/everlong mixers")

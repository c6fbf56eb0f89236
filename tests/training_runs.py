"""What the tests of training say about runs: what they have in common, and processes that make them."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from everlong.train import checkpoint, log

OPTIONS = {
    "steps": 10,
    "width": 32,
    "num-layers": 2,
    "vocab-size": 384,
    "batch-tokens": 256,
    "length": 32,
    "compile": "off",
    "precision": "float32",
    "checkpoint-every": 4,
    "warmup": 4,
}


def tiny(**changed):
    """The words for a tiny training; an option may be given only once, so what differs is said here."""
    values = OPTIONS | {name.replace("_", "-"): value for name, value in changed.items()}
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


TINY = tiny()
CLOCK = {"seconds", "tokens_per_second", "memory_bytes"}


def told(run):
    """The log without what depends on the clock and the memory."""
    return [{key: value for key, value in row.items() if key not in CLOCK} for row in log.read(run)]


def same_tensors(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def same_weights(one, other):
    return same_tensors(*(load_file(run / "model.safetensors") for run in (one, other)))


def check_same(one, other):
    """Two runs are the same bit for bit: log, weights, and all that the last checkpoint remembers."""
    assert told(one) == told(other)
    assert same_weights(one, other)
    first, second = (checkpoint.latest(run / "training").checkpoint for run in (one, other))
    assert first.step == second.step
    for group in ("weights", "optimizer", "random"):
        assert first.tensors(group)
        assert same_tensors(first.tensors(group), second.tensors(group)), group
    states = [
        {key: value for key, value in found.state.items() if key not in {"seconds", "log_bytes"}}
        for found in (first, second)
    ]
    assert states[0] == states[1]


def content(folder):
    """Every file and what is in it."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(call, *words):
    """The one line with which a command ends that cannot work."""
    code, told = call(*words)
    assert code == 2
    line = told.splitlines()[-1]
    assert line.startswith(f"everlong {words[0]}: ")
    assert "Traceback" not in told
    return line


def spawn(prepared, run, *options, **how):
    """Starts train/worker.py; see there for the options. What it prints begins with the step that it goes on from."""
    worker = Path(__file__).parent / "train" / "worker.py"
    place = {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "1000"}
    return subprocess.Popen(
        [sys.executable, "-W", "error", str(worker), str(prepared), str(run), *options],
        env=os.environ | place,
        stdout=subprocess.PIPE,
        text=True,
        **how,
    )


def everlong(*words, **how):
    """Starts the command line in a process and a group of its own, as a terminal would."""
    place = {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "1000"}
    return subprocess.Popen(
        [sys.executable, "-m", "everlong", *map(str, words)],
        env=os.environ | place,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **how,
    )

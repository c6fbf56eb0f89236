"""Ctrl-C and SIGTERM to the command line itself: what it does, what it says, how it exits."""

import os
import signal
import time

import pytest
from training_runs import everlong, tiny

from everlong.models import run as runs
from everlong.train import checkpoint, compilation, log


def endless(**changed):
    """A training that only a signal ends."""
    return ("--mixer", "attention", *tiny(**{"steps": 1_000_000, "checkpoint_every": 1_000_000, **changed}))


ENDLESS = endless()
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


def wait_until(process, ready):
    """Until the command is where the signal shall find it."""
    while not ready():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)


def send(process, number):
    """To all its processes, as Ctrl-C in a terminal does."""
    os.killpg(process.pid, number)


def last_line(process, number):
    """The last line of standard error, which is a line and no traceback."""
    told = process.communicate(timeout=300)[1]
    assert process.returncode == CODES[number], told
    assert "Traceback" not in told
    return told.splitlines()[-1]


def steps_of(run):
    file = run / "log.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


@pytest.mark.parametrize("number", CODES)
def test_while_training_it_saves_and_says_how_to_go_on(prepared, tmp_path, number):
    run = tmp_path / "run"
    process = everlong("train", "--data", prepared, "--out", run, *ENDLESS)
    wait_until(process, lambda: steps_of(run) > 2)
    send(process, number)
    line, step = last_line(process, number), log.read(run)[-1]["step"]
    name = signal.Signals(number).name
    way = f"everlong train --out {run} --resume"
    assert line == f"everlong train: stopped by {name} after step {step}; go on with: {way}"
    assert checkpoint.latest(run / "training").checkpoint.step == step
    assert runs.load(run)


@pytest.mark.parametrize("command", ["train", "prepare"])
def test_while_preparing_nothing_is_left(data, tmp_path, command):
    source, out = tmp_path / "text", tmp_path / "out"
    source.mkdir()
    for i in range(8):
        (source / f"{i}.txt").write_bytes((data / "text" / "tinyshakespeare.txt").read_bytes())
    if command == "train":
        process = everlong("train", "--data", source, "--out", out, *ENDLESS)
        partial = out / ".data.partial"
    else:
        process, partial = everlong("prepare", source, "--out", out), tmp_path / ".out.partial"
    wait_until(process, lambda: (partial / "spool.texts").exists())
    send(process, signal.SIGTERM)
    line = last_line(process, signal.SIGTERM)
    assert line.startswith(f"everlong {command}: ")
    assert "interrupted" in line or line.endswith("at once; it had not begun to train: start it again")
    assert not partial.exists()
    assert not (out / "data").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", CODES)
def test_while_evaluating_it_finishes_the_step(prepared, tmp_path, number):
    run = tmp_path / "run"
    words = ("--evaluate-every", "1", "--evaluate-tokens", "100000", *endless(width=128))
    process = everlong("train", "--data", prepared, "--out", run, *words)
    wait_until(process, lambda: steps_of(run) > 1)
    send(process, number)
    assert "go on with" in last_line(process, number)
    assert checkpoint.latest(run / "training").checkpoint.step == log.read(run)[-1]["step"]
    assert "held_out_loss" in log.read(run)[-1]


@pytest.mark.slow
@pytest.mark.parametrize("number", CODES)
def test_a_second_one_ends_it_at_once(prepared, tmp_path, number):
    run = tmp_path / "run"
    process = everlong("train", "--data", prepared, "--out", run, *endless(batch_tokens=65536))
    wait_until(process, lambda: steps_of(run) > 1)
    send(process, number)
    time.sleep(0.1)
    send(process, number)
    assert f"stopped by {signal.Signals(number).name} " in last_line(process, number)


@pytest.mark.slow
@pytest.mark.skipif(compilation.obstacle() is not None, reason=str(compilation.obstacle()))
@pytest.mark.parametrize("number", CODES)
@pytest.mark.parametrize("after", [0.5, 6.0])
def test_while_compiling_it_ends_at_once(prepared, tmp_path, number, after):
    run = tmp_path / "run"
    process = everlong("train", "--data", prepared, "--out", run, *endless(compile="on"))
    for line in process.stderr:
        if "compiling" in line:
            break
    time.sleep(after)
    send(process, number)
    assert last_line(process, number).endswith(f"go on with: everlong train --out {run} --resume")

"""A save that ends at any instant leaves a whole run: the process is killed at each of its file operations in turn."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch

from everlong.data.tokenizer import Tokenizer
from everlong.models import run as runs
from everlong.train import checkpoint

OPERATIONS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree"}


def save(model, dataset, folder, step):
    """What a training writes at a checkpoint: the checkpoint, and the model with its tokenizer."""
    with torch.no_grad():
        for value in model.parameters():
            value.fill_(float(step))
    groups = {"weights": checkpoint.weights(model), "optimizer": {"memory": torch.full((9,), float(step))}}
    checkpoint.save(folder / "training", step, groups, {"step": step})
    runs.save(model, folder, dataset.tokenizer)


def die_at(number, monkeypatch):
    """From now on the process is killed before its file operation of this number, or when a file is half written."""
    count = 0

    def operation():
        nonlocal count
        count += 1
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def halved(write):
        def both(tensors, file, **options):
            operation()
            write(tensors, file, **options)
            if count == number - 1:
                os.truncate(file, file.stat().st_size // 2)
            operation()

        return both

    def in_halves(write):
        def both(path, content, **options):
            write(path, content[: len(content) // 2], **options)
            operation()
            return write(path, content, **options)

        return both

    def synced(descriptor, sync=os.fsync):
        operation()
        sync(descriptor)

    monkeypatch.setattr(checkpoint, "save_file", halved(checkpoint.save_file))
    monkeypatch.setattr(runs, "save_file", halved(runs.save_file))
    monkeypatch.setattr(Path, "write_bytes", in_halves(Path.write_bytes))
    monkeypatch.setattr(Path, "write_text", in_halves(Path.write_text))
    monkeypatch.setattr(os, "fsync", synced)
    sys.addaudithook(lambda event, arguments: operation() if event in OPERATIONS else None)


def ends_in_a_fork(work):
    """Runs `work` in a fork of this process; how that ended."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def check_whole(folder, steps):
    """The newest checkpoint is whole and of one of these steps, and so is the model."""
    found = checkpoint.latest(folder / "training")
    assert found.damaged == ()
    step = found.checkpoint.step if found.checkpoint else None
    assert step in steps
    if step is not None:
        assert found.checkpoint.state == {"step": step}
        for group in ("weights", "optimizer"):
            assert all((value == step).all() for value in found.checkpoint.tensors(group).values())
    if (folder / "config.json").exists():  # with which a folder becomes a run
        values = {value.detach().unique().item() for value in runs.load(folder).parameters()}
        assert len(values) == 1
        assert values <= steps
        json.loads((folder / "generation_config.json").read_text())
    if (folder / "tokenizer.json").exists():
        Tokenizer.load(folder)


@pytest.mark.parametrize("before", [pytest.param(None, marks=pytest.mark.slow), 4])
def test_at_every_instant_of_a_save_the_run_is_whole(make_model, dataset, tmp_path, monkeypatch, before):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # a killed process loses nothing that the system has
    model = make_model(num_layers=1, width=16)
    save(model, dataset, tmp_path / "before", 2)  # also: whatever is imported for it is so now
    if before is None:
        shutil.rmtree(tmp_path / "before")
        (tmp_path / "before").mkdir()
    else:
        save(model, dataset, tmp_path / "before", before)
    number, code = 0, -signal.SIGKILL
    while code == -signal.SIGKILL:
        number += 1
        folder = tmp_path / "now"
        shutil.copytree(tmp_path / "before", folder)

        def work(number=number, folder=folder):
            die_at(number, monkeypatch)
            save(model, dataset, folder, 6)

        code = ends_in_a_fork(work)
        assert code in (0, -signal.SIGKILL)
        check_whole(folder, {before, 6})
        save(model, dataset, folder, 8)
        check_whole(folder, {8})
        assert not list(folder.rglob("*.tmp*"))
        shutil.rmtree(folder)
    print(f"killed at each of {number - 1} operations")
    assert number > 40

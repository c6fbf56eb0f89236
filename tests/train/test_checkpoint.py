"""Checkpoints: whole at every instant, and what is not whole is named."""

import json
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from everlong.train import checkpoint


def write(training, step, keep=2, size=64):
    groups = {"weights": {"w": torch.full((size,), float(step))}, "random": {}}
    return checkpoint.save(training, step, groups, {"step": step, "list": [1, 2.5, None]}, keep=keep)


def test_what_is_written_is_read_and_the_newest_are_kept(tmp_path):
    for step in (1, 20, 300):
        write(tmp_path, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000020", "step-00000300"]
    found = checkpoint.latest(tmp_path)
    assert found.damaged == ()
    assert found.checkpoint.step == 300
    assert found.checkpoint.state == {"step": 300, "list": [1, 2.5, None]}
    assert torch.equal(found.checkpoint.tensors("weights")["w"], torch.full((64,), 300.0))
    assert found.checkpoint.tensors("random") == {}


def test_an_empty_folder_has_none(tmp_path):
    assert checkpoint.latest(tmp_path / "missing") == checkpoint.Found(None, ())


def flip(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


DAMAGES = {
    "flipped bit": lambda path: flip(path / "weights.safetensors"),
    "truncated": lambda path: (path / "weights.safetensors").write_bytes(b"12345678"),
    "missing file": lambda path: (path / "weights.safetensors").unlink(),
    "no manifest": lambda path: (path / "manifest.json").unlink(),
    "half a manifest": lambda path: (path / "manifest.json").write_text('{"weights'),
    "strange manifest": lambda path: (path / "manifest.json").write_text("[1, 2]"),
    "state": lambda path: (path / "state.json").write_text("{}"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_is_named_and_the_one_before_it_is_taken(tmp_path, damage):
    write(tmp_path, 1)
    DAMAGES[damage](write(tmp_path, 2))
    found = checkpoint.latest(tmp_path)
    assert found.checkpoint.step == 1
    assert len(found.damaged) == 1
    assert "step-00000002 is damaged" in found.damaged[0]
    assert "\n" not in found.damaged[0]
    if damage in {"flipped bit", "truncated", "missing file"}:
        assert "weights.safetensors" in found.damaged[0]
    assert [path.name for path in checkpoint.set_aside_after(tmp_path, 1)] == ["step-00000002.damaged"]
    write(tmp_path, 2)
    assert checkpoint.latest(tmp_path).checkpoint.step == 2


def test_remains_of_a_killed_save_are_ignored_and_removed(tmp_path):
    write(tmp_path, 1)
    (tmp_path / "step-00000002.tmp").mkdir()
    (tmp_path / "step-00000002.tmp" / "weights.safetensors").write_bytes(b"half")
    assert checkpoint.latest(tmp_path).checkpoint.step == 1
    write(tmp_path, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000003"]


def test_a_full_disk_leaves_the_last_one(tmp_path):
    """A limit on the size of files stands for the disk: the write fails in the middle of the weights."""
    write(tmp_path, 1)
    code = (
        "import resource, sys, torch; from pathlib import Path; from everlong.train import checkpoint\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try: checkpoint.save(Path(sys.argv[1]), 2, {'weights': {'w': torch.zeros(1_000_000)}}, {'step': 2})\n"
        "except OSError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert "step 2 could not be written" in done.stdout
    assert "the last one there is" in done.stdout
    assert "step-00000001" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert checkpoint.latest(tmp_path).checkpoint.step == 1


def test_tied_weights_are_kept_once_and_come_back_tied():
    def make():
        model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False), nn.BatchNorm1d(5))
        model[1].weight = model[0].weight
        return model

    one, other = make(), make()
    values = checkpoint.weights(one)
    assert set(values) == {"0.weight", "2.weight", "2.bias", "2.running_mean", "2.running_var", "2.num_batches_tracked"}
    checkpoint.restore(other, values)
    assert torch.equal(other[1].weight, one[0].weight)
    with pytest.raises(ValueError, match=r"another model: `0.weight` is torch.float32 \(5, 4\) here, nothing there"):
        checkpoint.restore(other, {})
    with pytest.raises(ValueError, match="another model"):
        checkpoint.restore(other, values | {"2.bias": torch.zeros(6)})


def test_the_generators_come_back():
    def draw():
        return torch.rand(3).tolist(), random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn()  # noqa: NPY002

    draw()
    tensors, others = checkpoint.random_state()
    others = json.loads(json.dumps(others))
    expected = draw()
    draw()
    checkpoint.set_random_state(tensors, others)
    assert draw() == expected

"""`everlong train --init`: going on from a run's weights with new data, a new optimizer and a new schedule."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from training_runs import content, refused, same_weights, tiny

from everlong.data.loader import Dataset, Loader
from everlong.models import run as runs
from everlong.train import checkpoint, folder, log

# Without the model's shape and the tokenizer's size, which come from the run.
SHAPE = {"--width", "--num-layers", "--vocab-size"}


def fine(**changed):
    words = tiny(**changed)
    return [word for i, word in enumerate(words) if words[i - i % 2] not in SHAPE]


FINE = fine()


def test_it_begins_with_the_weights_of_the_run_and_leaves_that_alone(call, trained, text, tmp_path):
    run, result = trained
    before, out = content(run), tmp_path / "more"
    more, _ = call("train", "--init", run, "--data", text, "--out", out, *fine(steps=30))
    assert content(run) == before
    dataset = Dataset.open(out / "data")
    assert dataset.info.tokenizer == runs.load_tokenizer(run).fingerprint
    batch = Loader(dataset.split("train"), length=32, batch_size=8).next()
    first = runs.load(run).loss(batch.tokens, batch.targets).item()
    assert log.read(out)[0]["loss"] == pytest.approx(first, rel=1e-5)
    assert more["loss"] < result["loss"] - 0.1
    assert not same_weights(run, out)
    assert runs.load_config(out) == runs.load_config(run)
    assert folder.read_settings(out)["init"]["run"] == str(run.resolve())
    shutil.rmtree(run)
    again, _ = call("train", "--out", out, "--resume", "--steps", 32)
    assert again["steps"] == 32


def test_a_model_of_another_hand_will_do(call, trained, prepared, tmp_path):
    """Config, weights in bfloat16 and tokenizer are all that it needs."""
    run, _ = trained
    model = runs.load(run).bfloat16()
    runs.save(model, tmp_path / "imported", runs.load_tokenizer(run))
    assert load_file(tmp_path / "imported" / "model.safetensors")["norm.weight"].dtype == torch.bfloat16
    result, _ = call("train", "--init", tmp_path / "imported", "--data", prepared, "--out", tmp_path / "out", *FINE)
    assert result["steps"] == 10
    assert load_file(tmp_path / "out" / "model.safetensors")["norm.weight"].dtype == torch.float32


def test_before_the_first_checkpoint_the_same_weights_are_needed(call, trained, prepared, tmp_path):
    run, _ = trained
    out = tmp_path / "out"
    result, _ = call("train", "--init", run, "--data", prepared, "--out", out, *FINE)
    for name in folder.MODEL:
        (out / name).unlink()
    checkpoint.remove_all(out / "training")
    again, told = call("train", "--init", run, "--out", out, "--resume")
    assert "begins again" in told
    assert again["loss"] == result["loss"]
    for name in folder.MODEL:
        (out / name).unlink()
    checkpoint.remove_all(out / "training")
    model = runs.load(run)
    with torch.no_grad():
        model.norm.weight.add_(1)
    runs.save(model, run)
    assert "other weights than" in refused(call, "train", "--out", out, "--resume")
    run.rename(tmp_path / "gone")
    assert "is gone" in refused(call, "train", "--out", out, "--resume")


def test_what_does_not_fit_is_told_in_one_line(call, trained, prepared, text, tmp_path):
    run, _ = trained
    base, out = ("train", "--init", run, "--data", prepared), tmp_path / "out"
    assert "both" in refused(call, *base, "--out", run, "--overwrite")
    assert "of other layers" in refused(call, *base, "--out", out, "--mixer", "mamba2")
    assert "width=32" in refused(call, *base, "--out", out, "--width", 64)
    assert "is no run" in refused(call, "train", "--init", tmp_path, "--data", prepared, "--out", out)
    call("prepare", text, "--out", tmp_path / "other", "--vocab-size", 300)
    line = refused(call, "train", "--init", run, "--data", tmp_path / "other", "--out", out)
    assert "another tokenizer" in line
    assert f"--tokenizer {run}" in line
    assert not (out / "training" / "settings.json").exists()
    result, _ = call(*base, "--out", out, *FINE, "--mixer", "attention", "--width", 32)
    assert result["steps"] == 10
    assert "began from" in refused(call, "train", "--out", out, "--resume", "--init", tmp_path / "other")
    assert "random weights" in refused(call, "train", "--out", run, "--resume", "--init", out)
    (run / "tokenizer.json").unlink()
    assert "--init needs a run with its tokenizer" in refused(call, *base, "--out", tmp_path / "next")

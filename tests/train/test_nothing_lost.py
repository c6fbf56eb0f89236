"""Whatever is asked of a run by the command line, nothing of value is lost, and one line says why."""

import json
import shutil

import pytest
import torch
from training_runs import TINY, content, refused, tiny

from everlong.cli import demo
from everlong.models.lm import LanguageModel
from everlong.train import checkpoint, log

ANEW = ("--mixer", "attention", *TINY)


def test_what_no_training_made_is_never_overwritten(call, prepared, trained, tmp_path):
    run, _ = trained
    model = tmp_path / "downloaded"
    model.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        shutil.copy(run / name, model)
    data = tmp_path / "prepared"
    shutil.copytree(prepared, data)
    made_elsewhere = "holds model.safetensors, which no training of its own made"
    for folder, rule in ((model, made_elsewhere), (data, "holds prepared data")):
        before = content(folder)
        for words in ((), ("--overwrite",)):
            line = refused(call, "train", "--data", prepared, "--out", folder, *ANEW, *words)
            assert rule in line
        assert content(folder) == before


def test_a_folder_with_other_files_keeps_them(call, prepared, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "plan.txt").write_text("mine too")
    call("train", "--data", prepared, "--out", tmp_path, *ANEW)
    words = ("--mixer", "attention", *tiny(steps=4), "--overwrite")
    again, _ = call("train", "--data", prepared, "--out", tmp_path, *words)
    assert again["steps"] == 4
    assert (tmp_path / "notes" / "a.txt").read_text() == "mine"
    assert (tmp_path / "training" / "plan.txt").read_text() == "mine too"
    assert len(log.read(tmp_path)) == 4


def test_the_old_run_stays_until_the_new_one_is_ready(call, text, tmp_path):
    run, source = tmp_path / "run", tmp_path / "source"
    shutil.copytree(text, source)
    call("train", "--data", source, "--out", run, *ANEW)
    before = content(run)
    assert "no file or folder" in refused(call, "train", "--data", run / "no", "--out", run, *ANEW, "--overwrite")
    (source / "00.txt").write_bytes(b"\xff")
    assert "UTF-8" in refused(call, "train", "--data", source, "--out", run, *ANEW, "--overwrite")
    assert content(run) == before
    (source / "00.txt").write_text("another text\n" * 300)
    call("train", "--data", source, "--out", run, *ANEW, "--overwrite")
    assert content(run / "data") != {path: before[path] for path in content(run / "data") if path in before}
    assert not (run / ".data.new").exists()
    call("train", "--out", run, "--resume")


def test_data_inside_the_folder_survives_overwriting(call, text, tmp_path):
    run = tmp_path / "run"
    call("train", "--data", text, "--out", run, *ANEW)
    data = content(run / "data")
    call("train", "--data", run / "data", "--out", run, *ANEW, "--overwrite", "--seed", 1)
    assert content(run / "data") == data
    # What the run did not prepare itself is not removed with it.
    mine = tmp_path / "mine"
    call("prepare", text, "--out", mine / "data", "--vocab-size", 384)
    data = content(mine / "data")
    call("train", "--data", mine / "data", "--out", mine, *ANEW)
    call("train", "--data", run / "data", "--out", mine, *ANEW, "--overwrite")
    assert content(mine / "data") == data


def test_a_run_that_is_at_work_is_not_overwritten(call, prepared, trained):
    from everlong.train.folder import alone

    run, _ = trained
    before = content(run)
    with alone(run):
        for words in (("--data", prepared, *ANEW, "--overwrite"), ("--resume", "--steps", 99)):
            assert "another process is training" in refused(call, "train", "--out", run, *words)
    assert content(run) == before


def test_the_demo_replaces_nothing_but_a_demo(call, trained, tmp_path):
    run, _ = trained
    before = content(run)
    assert "no earlier demo" in refused(call, "demo", "--out", run)
    assert content(run) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "summary.json").write_text("{}")
    assert "summary.json, which no demo made" in refused(call, "demo", "--out", tmp_path / "mine")
    settings = json.loads((run / "training" / "settings.json").read_text())
    settings["model"] |= demo.SHAPE
    settings["train"] |= demo.TRAINING
    (run / "training" / "settings.json").write_text(json.dumps(settings))
    assert demo.is_demo(run)


def test_settings_that_are_damaged_are_taken_from_a_checkpoint(call, prepared, trained):
    run, result = trained
    place = run / "training" / "settings.json"
    for damage in ('{"data": ', "[]", "{}", None):
        place.unlink() if damage is None else place.write_text(damage)
        line = refused(call, "train", "--out", run, "--resume")
        assert "settings.json" in line
        assert "--data" in line
    again, told = call("train", "--out", run, "--resume", "--data", prepared)
    assert "taking the settings of" in told
    assert again["loss"] == result["loss"]
    again, _ = call("train", "--out", run, "--resume")
    assert again["loss"] == result["loss"]


def test_data_that_was_moved_is_found_or_asked_for(call, text, tmp_path):
    run, moved = tmp_path / "run", tmp_path / "moved"
    call("prepare", text, "--out", tmp_path / "data", "--vocab-size", 384)
    call("train", "--data", tmp_path / "data", "--out", run, *ANEW)
    (tmp_path / "data").rename(moved)
    assert "say by --data where it is now" in refused(call, "train", "--out", run, "--resume")
    call("prepare", text, "--out", tmp_path / "other", "--vocab-size", 300)
    line = refused(call, "train", "--out", run, "--resume", "--data", tmp_path / "other")
    assert "is not the data" in line
    call("train", "--out", run, "--resume", "--data", moved)
    call("train", "--out", run, "--resume", "--steps", 12)
    # A run that was moved takes the data that it prepared with it.
    call("train", "--data", text, "--out", tmp_path / "own", *ANEW)
    (tmp_path / "own").rename(tmp_path / "carried")
    more, _ = call("train", "--out", tmp_path / "carried", "--resume", "--steps", 12)
    assert more["steps"] == 12


def test_a_log_that_was_shortened_is_told_and_goes_on_at_a_line(call, trained):
    run, _ = trained
    file = run / "log.jsonl"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    whole = file.read_bytes().count(b"\n")
    _, told = call("train", "--out", run, "--resume", "--steps", 12)
    assert "log.jsonl was shortened" in told
    assert [row["step"] for row in log.read(run)] == [*range(1, whole + 1), 11, 12]
    file.unlink()
    _, told = call("train", "--out", run, "--resume", "--steps", 13)
    assert "log.jsonl was shortened" in told
    assert [row["step"] for row in log.read(run)] == [13]


def test_a_model_without_its_checkpoints_is_not_begun_again(call, trained):
    run, _ = trained
    checkpoint.remove_all(run / "training")
    before = content(run)
    assert "--init" in refused(call, "train", "--out", run, "--resume")
    assert content(run) == before


class NotANumber(torch.autograd.Function):
    """The identity, whose gradient is no number."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("nan")


@pytest.fixture
def poison(monkeypatch):
    """From the update after `first` on, gradients are no numbers; the losses are."""
    loss, calls = LanguageModel.loss, []

    def poison(first):
        def broken(model, tokens, targets):
            calls.append(1)
            value = loss(model, tokens, targets)
            return NotANumber.apply(value) if len(calls) > first else value

        monkeypatch.setattr(LanguageModel, "loss", broken)

    return poison


def test_a_gradient_that_is_no_number_stops_the_command(call, prepared, tmp_path, poison):
    poison(5)
    line = refused(call, "train", "--data", prepared, "--out", tmp_path, *ANEW)
    assert "the gradient's norm nan at step 6; the batch's documents: " in line
    assert "training/step-00000004" in line
    assert checkpoint.latest(tmp_path / "training").checkpoint.step == 4


def test_skipping_comes_to_an_end(call, prepared, tmp_path, poison):
    poison(5)
    words = ("--on-nan", "skip", "--mixer", "attention", *tiny(steps=1000))
    line = refused(call, "train", "--data", prepared, "--out", tmp_path, *words)
    assert "at step 25, as in the 19 updates before, which were skipped" in line
    rows = log.read(tmp_path)
    assert [row.get("skipped") for row in rows] == [None] * 5 + list(range(1, 20))


def test_skipped_updates_are_counted_across_a_resume(call, prepared, tmp_path, poison):
    poison(2)
    words = ("--on-nan", "skip", "--mixer", "attention", *tiny(steps=8))
    result, told = call("train", "--data", prepared, "--out", tmp_path, *words)
    assert result["skipped"] == 6
    assert "6 updates" in told
    result, _ = call("train", "--out", tmp_path, "--resume", "--steps", 10)
    assert result["skipped"] == 8
    assert "as in the 19 updates before" in refused(call, "train", "--out", tmp_path, "--resume", "--steps", 40)
    assert len(log.read(tmp_path)) == 21

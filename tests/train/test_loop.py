"""The loop: what a step computes, and that nothing is lost whatever ends a run."""

import dataclasses
import os
import resource
import signal
import subprocess

import numpy as np
import pytest
import torch
from training_runs import same_weights, spawn, told

from everlong.data.loader import Loader
from everlong.models import run as runs
from everlong.train import checkpoint, compilation, log, loop
from everlong.train.loop import NotFinite, train
from everlong.train.settings import TrainConfig

SMALL = TrainConfig(
    steps=12, batch_tokens=256, length=32, warmup=4, precision="float32", compile="off", checkpoint_every=4
)
needs_compiler = pytest.mark.skipif(compilation.obstacle() is not None, reason=str(compilation.obstacle()))


def small(**values):
    return dataclasses.replace(SMALL, **values)


def test_the_loss_falls_on_real_text(make_model, dataset, tmp_path):
    seen = []
    settings = small(steps=60, batch_tokens=1024, evaluate_every=20)
    result = train(make_model(), dataset, settings, tmp_path / "run", report=seen.append)
    rows = log.read(tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(1, 61))
    assert [row["step"] for row in rows if "held_out_loss" in row] == [20, 40, 60]
    assert rows[0]["loss"] > 5.8
    assert rows[-1]["loss"] < 5.0
    assert result.held_out.loss == rows[-1]["held_out_loss"] < 5.2
    assert result.step == 60
    assert result.stopped_by is None
    assert result.peak_memory_bytes > 10**7
    assert result.tokens_per_second > 0
    assert [row["tokens"] for row in rows[:2]] == [1024, 2048]
    assert seen[-1].step == seen[-1].steps == 60
    assert {now.activity for now in seen} == {"training", "evaluating", "saving"}
    assert list((tmp_path / "run" / "training" / "tensorboard").iterdir())
    model = runs.load(tmp_path / "run")
    assert runs.load_tokenizer(tmp_path / "run").fingerprint == dataset.tokenizer.fingerprint
    assert same_weights(tmp_path / "run", tmp_path / "run")
    assert sum(p.numel() for p in model.parameters()) > 0


class Ignoring(Loader):
    """Batches in which every third token is no target, so that the parts of a batch have different numbers of them."""

    def next(self):
        batch = super().next()
        return dataclasses.replace(batch, targets=batch.targets.masked_fill(batch.tokens % 3 == 0, -1))


def test_accumulated_gradients_are_those_of_the_batch(make_model, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "Loader", Ignoring)
    settings, weights = small(steps=2, optimizer="adamw", clip=1e9), []
    for micro_batch in (8, 2, 1):
        model = make_model().double()
        train(model, dataset, dataclasses.replace(settings, micro_batch=micro_batch), tmp_path / str(micro_batch))
        weights.append(checkpoint.weights(model))
    first, *others = [[row["loss"] for row in log.read(tmp_path / str(n))] for n in (8, 2, 1)]
    for name, value in weights[0].items():
        for other in weights[1:]:
            torch.testing.assert_close(other[name], value, rtol=0, atol=1e-9)
    assert all(other == pytest.approx(first, rel=1e-12) for other in others)


def test_a_long_gradient_is_shortened(make_model, dataset, tmp_path):
    """AdamW's first update does not depend on the gradient's length, its memory of it does."""
    for clip in (1e9, 0.01):
        train(make_model(), dataset, small(steps=1, optimizer="adamw", clip=clip), tmp_path / str(clip))
    long, short = (
        checkpoint.latest(tmp_path / str(clip) / "training").checkpoint.tensors("optimizer") for clip in (1e9, 0.01)
    )
    norm = log.read(tmp_path / "0.01")[0]["gradient_norm"]
    assert norm == log.read(tmp_path / "1000000000.0")[0]["gradient_norm"] > 0.02
    for name, value in long.items():
        if name.endswith("exp_avg"):
            torch.testing.assert_close(short[name], value * (0.01 / norm), rtol=1e-3, atol=1e-9)


def noisy(model):
    """The model with a loss that draws from global generators; not from Python's, which the checks of types use."""
    loss = model.loss

    def drawn(tokens, targets):
        return loss(tokens, targets) * (1 + torch.rand(()) + np.random.rand())  # noqa: NPY002

    model.loss = drawn
    return model


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_resumed_in_one_process_it_ends_with_the_same_bits(make_model, dataset, tmp_path, precision):
    settings = small(precision=precision, evaluate_every=3)
    train(noisy(make_model()), dataset, settings, tmp_path / "whole")

    def stop(now):
        if now.step == 7 and now.activity == "training":
            os.kill(os.getpid(), signal.SIGTERM)

    result = train(noisy(make_model()), dataset, settings, tmp_path / "parts", report=stop)
    assert result.stopped_by == signal.SIGTERM
    assert 7 <= result.step < 12
    start = checkpoint.latest(tmp_path / "parts" / "training").checkpoint
    assert start.step == result.step
    generators = checkpoint.random_state()
    result = train(noisy(make_model()), dataset, settings, tmp_path / "parts", start=start)
    assert torch.equal(checkpoint.random_state()[0]["cpu"], generators[0]["cpu"])
    assert checkpoint.random_state()[1]["numpy"] == generators[1]["numpy"]
    assert result.step == 12
    assert told(tmp_path / "whole") == told(tmp_path / "parts")
    assert same_weights(tmp_path / "whole", tmp_path / "parts")


def test_an_older_checkpoint_drops_what_came_after(make_model, dataset, tmp_path):
    run = tmp_path / "run"
    train(make_model(), dataset, small(), run)
    before, weights = told(run), (run / "model.safetensors").read_bytes()
    older = checkpoint.load(run / "training" / "step-00000008")
    train(make_model(), dataset, small(), run, start=older)
    assert told(run) == before
    assert (run / "model.safetensors").read_bytes() == weights


def test_more_steps_go_on_from_the_end(make_model, dataset, tmp_path):
    constant = small(schedule="constant")
    train(make_model(), dataset, constant, tmp_path / "whole")
    train(make_model(), dataset, dataclasses.replace(constant, steps=5), tmp_path / "more")
    start = checkpoint.latest(tmp_path / "more" / "training").checkpoint
    train(make_model(), dataset, constant, tmp_path / "more", start=start)
    assert same_weights(tmp_path / "whole", tmp_path / "more")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_after_the_step_with_a_checkpoint(prepared, tmp_path, number):
    process = spawn(prepared, tmp_path / "run", "steps=100000", "final_tokens=100")
    for line in process.stdout:
        if int(line) >= 3:
            process.send_signal(number)
            break
    process.communicate()
    assert process.returncode == 128 + number
    rows = log.read(tmp_path / "run")
    assert checkpoint.latest(tmp_path / "run" / "training").checkpoint.step == rows[-1]["step"] >= 3
    assert runs.load(tmp_path / "run").config.width == 32


def test_a_full_disk_stops_it_with_the_last_checkpoint_intact(prepared, tmp_path):
    """A limit on the size of files stands for the disk; it is reached by the weights, and by the log."""
    run, options = tmp_path / "run", ("checkpoint_every=2", "evaluate_every=1000")
    first = spawn(prepared, run, "steps=4", "schedule=constant", *options)
    assert first.communicate()[0]
    for limit in (50_000, (run / "log.jsonl").stat().st_size + 600):

        def limited(limit=limit):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        full = spawn(
            prepared, run, "steps=9", "schedule=constant", *options, preexec_fn=limited, stderr=subprocess.PIPE
        )
        told = full.communicate()[1]
        assert full.returncode == 1
        assert "could not be written" in told
        assert "step-00000004" in told
        found = checkpoint.latest(run / "training")
        assert (found.checkpoint.step, found.damaged) == (4, ())
    last = spawn(prepared, run, "steps=9", "schedule=constant", *options)
    assert last.communicate()[0]
    assert last.returncode == 0
    assert [row["step"] for row in log.read(run)] == list(range(1, 10))


def test_a_damaged_checkpoint_is_passed_over(make_model, dataset, tmp_path):
    run = tmp_path / "run"
    train(make_model(), dataset, small(), run)
    before = told(run)
    (run / "training" / "step-00000012" / "weights.safetensors").write_bytes(b"torn")
    found = checkpoint.latest(run / "training")
    assert "step-00000012" in found.damaged[0]
    train(make_model(), dataset, small(), run, start=found.checkpoint)
    assert told(run) == before
    assert checkpoint.latest(run / "training").checkpoint.step == 12


def poisoned(model, at):
    """The model with a loss that is no number in the update after `at` of them."""
    loss, calls = model.loss, []

    def broken(tokens, targets):
        calls.append(1)
        return loss(tokens, targets) * (float("nan") if len(calls) == at + 1 else 1.0)

    model.loss = broken
    return model


def test_a_loss_that_is_no_number_stops_with_all_that_helps(make_model, dataset, tmp_path):
    with pytest.raises(NotFinite) as caught:
        train(poisoned(make_model(), 5), dataset, small(), tmp_path / "run")
    message = str(caught.value)
    assert "the loss is nan" in message
    assert "at step 6" in message
    assert "step-00000004" in message
    assert any(name in message for name in dataset.split("train").names)
    assert "\n" not in message
    assert len(told(tmp_path / "run")) == 5


def test_a_loss_that_is_no_number_can_be_skipped(make_model, dataset, tmp_path):
    result = train(poisoned(make_model(), 5), dataset, small(on_nan="skip"), tmp_path / "run")
    rows = told(tmp_path / "run")
    assert result.step == len(rows) == 12
    assert [row["step"] for row in rows if row["loss"] is None] == [6]
    assert rows[6]["loss"] < 10


def test_another_run_is_never_overwritten(make_model, dataset, tmp_path):
    train(make_model(), dataset, small(steps=1), tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="holds a run already"):
        train(make_model(), dataset, small(), tmp_path / "run")
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_two_processes_never_train_into_one_folder(prepared, tmp_path):
    process = spawn(prepared, tmp_path / "run", "steps=100000", "checkpoint_every=2")
    for line in process.stdout:
        if int(line) >= 5:
            break
    second = spawn(prepared, tmp_path / "run", "steps=5")
    assert len(second.communicate()[0].split()) == 1  # the step that it would have gone on from
    assert second.returncode == 1
    process.terminate()
    process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    rows = log.read(tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))


def test_a_checkpoint_of_something_else_is_refused(make_model, dataset, text, tmp_path):
    from everlong.data.loader import Dataset
    from everlong.data.packing import prepare

    train(make_model(), dataset, small(steps=4), tmp_path / "run")
    start = checkpoint.latest(tmp_path / "run" / "training").checkpoint
    with pytest.raises(ValueError, match="another model"):
        train(make_model(width=64), dataset, small(), tmp_path / "run", start=start)
    prepare(text, tmp_path / "other", vocab_size=384, held_out=0.3)
    with pytest.raises(ValueError, match="is not the data"):
        train(make_model(), Dataset.open(tmp_path / "other"), small(), tmp_path / "run", start=start)


def test_minutes_become_a_number_of_steps_once(make_model, dataset, tmp_path):
    settings = small(minutes=0.05, checkpoint_every=None, evaluate_tokens=100, final_tokens=100)
    result = train(make_model(), dataset, settings, tmp_path / "run")
    rows = log.read(tmp_path / "run")
    fixed = [row for row in rows if "steps" in row]
    assert [row["steps"] for row in fixed] == [result.step] == [rows[-1]["step"]]
    assert checkpoint.latest(tmp_path / "run" / "training").checkpoint.state["steps"] == result.step
    assert rows[-1]["learning_rate"] < rows[result.step // 2]["learning_rate"]


def test_without_held_out_text_it_trains_all_the_same(make_model, text, tmp_path):
    from everlong.data.loader import Dataset
    from everlong.data.packing import prepare

    prepare(text, tmp_path / "data", vocab_size=384, held_out=0.0)
    result = train(make_model(), Dataset.open(tmp_path / "data"), small(steps=3, evaluate_every=1), tmp_path / "run")
    assert result.held_out is None
    assert result.step == 3


@needs_compiler
def test_compiled_it_computes_the_same(prepared, tmp_path):
    """In processes without run-time checks of shapes, which torch would compile as well."""
    for mode in ("off", "on"):
        process = spawn(prepared, tmp_path / mode, "steps=3", "micro_batch=4", "compile=" + mode)
        assert process.communicate()[0]
        assert process.returncode == 0
    eager, compiled = (log.read(tmp_path / mode) for mode in ("off", "on"))
    assert [row["loss"] for row in compiled] == pytest.approx([row["loss"] for row in eager], rel=1e-4)
    assert checkpoint.latest(tmp_path / "on" / "training").checkpoint.state["compiled"] is True


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match=r"`batch_tokens` must be a multiple of `length`.*Nearest: 90 or 120"):
        TrainConfig(batch_tokens=100, length=30)
    with pytest.raises(ValueError, match="micro_batch"):
        TrainConfig(batch_tokens=96, length=32, micro_batch=2)
    for wrong in ({"steps": 0}, {"minutes": 0.0}, {"learning_rate": -1.0}, {"decay": 2.0}, {"optimizer": "sgd"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            TrainConfig(**wrong)


def test_micro_batches_divide_the_batch_and_shrink_with_the_model():
    settings = TrainConfig(batch_tokens=24_576, length=1024)
    assert settings.micro_rows(width=384, num_layers=6) == 8
    assert settings.micro_rows(width=2048, num_layers=24) == 1
    assert TrainConfig(batch_tokens=1 << 20, length=1 << 20).micro_rows(384, 6) == 1
    assert TrainConfig(micro_batch=4).micro_rows(384, 6) == 4

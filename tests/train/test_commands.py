"""`everlong train` and `everlong eval` as they are typed: results, and one line for what cannot work."""

import lzma
import math
import shutil

import pytest
from training_runs import TINY, refused

from everlong.cli.train import parse_layer
from everlong.models import run as runs
from everlong.train import checkpoint, log
from everlong.train.settings import TrainConfig


def test_a_run_and_what_it_tells(trained):
    run, result = trained
    assert result["run"] == str(run)
    assert result["steps"] == 10
    assert result["perplexity"] == pytest.approx(math.exp(result["loss"]))
    assert result["parameters"] == sum(p.numel() for p in runs.load(run).parameters())
    assert result["bits_per_byte"] > 0
    assert result["tokens_per_second"] > 0
    assert result["seconds"] > 0
    assert result["peak_memory_bytes"] > 10**7
    assert len(log.read(run)) == 10


def test_a_source_is_prepared_on_the_way(call, text, tmp_path):
    result, _ = call("train", "--data", text, "--layers", "attention:window=8,attention", "--out", tmp_path, *TINY)
    assert (tmp_path / "data" / "dataset.json").is_file()
    assert result["steps"] == 10
    assert runs.load_config(tmp_path).layers == ({"mixer": "attention", "window": 8}, "attention")


def test_resume_needs_the_folder_only_and_ends_with_the_same_bits(call, prepared, trained, tmp_path):
    whole, _ = trained
    shutil.copytree(whole, tmp_path / "cut")
    for name in ("step-00000010", "step-00000008"):
        (tmp_path / "cut" / "training" / name / "weights.safetensors").write_bytes(b"damaged")
    code, told = call("train", "--out", tmp_path / "cut", "--resume")
    assert code == 2
    assert "step-00000010 is damaged" in told
    assert "no whole checkpoint" in told.splitlines()[-1]
    shutil.rmtree(tmp_path / "cut")
    shutil.copytree(whole, tmp_path / "cut")
    (tmp_path / "cut" / "training" / "step-00000010" / "weights.safetensors").write_bytes(b"damaged")
    _, told = call("train", "--out", tmp_path / "cut", "--resume")
    assert "step-00000010 is damaged" in told
    assert "going on from" in told
    assert (whole / "model.safetensors").read_bytes() == (tmp_path / "cut" / "model.safetensors").read_bytes()


def test_resume_with_the_words_that_began_it(call, prepared, trained):
    run, result = trained
    words = ("train", "--data", prepared, "--mixer", "attention", "--out", run, *TINY, "--resume")
    again, _ = call(*words)
    assert again["loss"] == result["loss"]
    more, _ = call("train", "--out", run, "--resume", "--steps", "14")
    assert more["steps"] == 14
    assert [row["step"] for row in log.read(run)] == list(range(1, 15))
    again, _ = call("train", "--out", run, "--resume")
    assert again["steps"] == 14


def test_resume_before_the_first_checkpoint_begins_again(call, trained):
    run, result = trained
    shutil.rmtree(run / "training" / "step-00000008")
    shutil.rmtree(run / "training" / "step-00000010")
    for name in ("config.json", "model.safetensors"):
        (run / name).unlink()
    again, told = call("train", "--out", run, "--resume")
    assert "begins again" in told
    assert again["loss"] == result["loss"]


def test_resume_refuses_to_become_another_run(call, trained, tmp_path):
    run, _ = trained
    assert "batch_tokens=256" in refused(call, "train", "--out", run, "--resume", "--batch-tokens", "512")
    assert "width=32" in refused(call, "train", "--out", run, "--resume", "--width", "64")
    assert "other layers" in refused(call, "train", "--out", run, "--resume", "--mixer", "mamba2")
    assert "no training to go on with" in refused(call, "train", "--out", tmp_path / "none", "--resume")
    assert "give one of them" in refused(call, "train", "--out", run, "--resume", "--overwrite")


def test_a_run_is_only_overwritten_when_asked(call, prepared, trained):
    run, result = trained
    (run / "mine.txt").write_text("kept")
    words = ("train", "--data", prepared, "--mixer", "attention", "--out", run, *TINY)
    assert "holds a run already" in refused(call, *words)
    assert checkpoint.latest(run / "training").checkpoint.step == 10
    again, _ = call(*words, "--overwrite", "--seed", "1")
    assert again["loss"] != result["loss"]
    assert (run / "mine.txt").read_text() == "kept"


def test_what_cannot_work_is_told_in_one_line(call, prepared, text, tmp_path):
    base = ("train", "--out", tmp_path / "run")
    assert "--data" in refused(call, *base)
    assert "--mixer" in refused(call, *base, "--data", prepared)
    assert "--layers" in refused(call, *base, "--data", prepared, "--mixer", "attention", "--layers", "mamba2")
    assert "Nearest: `attention`" in refused(call, *base, "--data", prepared, "--mixer", "atention")
    assert "Nearest: `window`" in refused(call, *base, "--data", prepared, "--mixer", "attention:windo=8")
    assert "key=value" in refused(call, *base, "--data", prepared, "--layers", "attention:a=1:b")
    assert "no file or folder" in refused(call, *base, "--data", tmp_path / "none", "--mixer", "attention")
    assert "Nearest" in refused(call, *base, "--data", prepared, "--mixer", "attention", "--length", "100")
    long = ("--length", "1000000", "--batch-tokens", "1000000", *TINY[:2])
    assert "smaller length" in refused(call, *base, "--data", prepared, "--mixer", "attention", *long)
    result, _ = call(*base, "--data", prepared, "--mixer", "attention", *TINY)  # nothing of the above is in the way
    assert result["steps"] == 10


def test_layers_are_parsed():
    assert parse_layer("mamba2") == "mamba2"
    assert parse_layer("attention:window=128:qk-norm=true") == {"mixer": "attention", "window": 128, "qk_norm": True}
    assert parse_layer("place.module:Mixer") == "place.module:Mixer"
    assert parse_layer("place.module:Mixer:size=2") == {"mixer": "place.module:Mixer", "size": 2}
    assert parse_layer("a:x=None:y=0.5:z=rope") == {"mixer": "a", "x": None, "y": 0.5, "z": "rope"}


def test_every_setting_is_an_option():
    from dataclasses import fields

    from everlong.cli.train import Arguments

    assert {field.name for field in fields(TrainConfig)} <= {field.name for field in fields(Arguments)}


def test_eval_beside_its_baselines(call, trained, prepared, text):
    run, _ = trained
    result, _ = call("eval", run, "--data", prepared)
    assert result["length"] == 32
    assert result["bits_per_byte"] == pytest.approx(result["loss"] * result["tokens"] / math.log(2) / result["bytes"])
    assert sum(row["tokens"] for row in result["loss_by_position"]) == result["tokens"]
    whole = b"".join(sorted(path.read_bytes() for path in text.iterdir()))
    assert 1.5 < result["baselines"]["five_gram"] < 4
    assert result["baselines"]["xz"] > 8 * len(lzma.compress(whole, preset=9)) / len(whole)
    # The source itself, prepared with the run's tokenizer and split as the training's was: the same documents.
    again, _ = call("eval", run, "--data", text)
    for key in ("tokens", "bytes", "documents", "baselines"):
        assert again[key] == result[key]
    assert again["loss"] == pytest.approx(result["loss"], rel=1e-6)


def test_eval_of_the_other_splits(call, trained, prepared):
    run, _ = trained
    parts = [
        call("eval", run, "--data", prepared, "--split", name, "--no-baselines")[0] for name in ("train", "heldout")
    ]
    whole, _ = call("eval", run, "--data", prepared, "--split", "all", "--no-baselines")
    assert whole["tokens"] == sum(part["tokens"] for part in parts)
    assert whole["baselines"] == {}
    bits = sum(part["bits_per_byte"] * part["bytes"] for part in parts)
    assert whole["bits_per_byte"] == pytest.approx(bits / whole["bytes"])


def test_eval_says_what_is_wrong(call, trained, prepared, text, tmp_path):
    run, _ = trained
    assert "is no run" in refused(call, "eval", tmp_path, "--data", prepared)
    assert "stride=64" in refused(call, "eval", run, "--data", prepared, "--stride", "64")
    other, _ = call("prepare", text, "--out", tmp_path / "other", "--vocab-size", "300")
    assert other
    assert "another tokenizer" in refused(call, "eval", run, "--data", tmp_path / "other")

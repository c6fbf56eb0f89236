"""The commands that tell: `mixers`, `explain` and `doctor`."""

import json

import pytest
import torch

from everlong import LanguageModel, ModelConfig, mixers
from everlong.cli import doctor, explain
from everlong.cli.main import main
from everlong.models import run as runs
from everlong.ops import dispatch


@pytest.fixture
def told(capsys):
    def call(*words):
        assert main([*words, "--json"]) == 0
        captured = capsys.readouterr()
        return json.loads(captured.out), captured.err

    return call


def test_mixers_lists_every_one_with_its_traits(told):
    result, shown = told("mixers")
    assert [mixer["name"] for mixer in result["mixers"]] == mixers.names()
    for mixer in result["mixers"]:
        traits = mixers.load(mixer["name"]).traits
        assert set(mixer["forms"]) == traits.forms
        assert ("causal" in mixer["directions"], "bidirectional" in mixer["directions"]) == (
            traits.causal,
            traits.bidirectional,
        )
        assert mixer["growth"] == traits.growth
        assert mixer["summary"].endswith(".")
        assert mixer["summary"].split()[0] in shown


@pytest.mark.parametrize("name", mixers.names())
def test_explain_a_mixer(told, name):
    result, shown = told("explain", name)
    for part in ("Shapes", "State", "Cost", "Source"):
        assert part in result["header"]
    assert result["header"] in shown
    assert result["classes"][-2:] == ["everlong.mixers.base.Mixer", "torch.nn.modules.module.Module"]
    mixer = mixers.load(name)
    width = next(option for option in result["options"] if option["name"] == "width")
    assert (width["type"], width["default"]) == ("int", "(required)")
    made = mixer(mixer.Config(width=result["width"]))
    assert result["cost"]["16k"]["parameters"] == sum(parameter.numel() for parameter in made.parameters())
    if mixer.traits.growth == "constant":
        assert result["cost"]["1k"]["state_bytes"] == result["cost"]["256k"]["state_bytes"]


def test_explain_a_mixer_from_outside(told):
    assert told("explain", "everlong.mixers.mamba2:Mamba2")[0]["header"].startswith("Mamba-2")


def test_field_docs_are_the_strings_below_fields():
    class Options:
        """Options."""

        a: int
        b: int = 2
        """What b
        means."""
        c = 3
        """No field."""

    assert explain.field_docs(Options) == {"b": "What b means."}


@pytest.mark.parametrize("tied", [True, False])
def test_explain_a_run(told, tmp_path, tied):
    layers = ("mamba2", {"mixer": "attention", "num_heads": 2})
    model = LanguageModel(ModelConfig(vocab_size=40, width=32, num_layers=3, layers=layers, tie_embeddings=tied))
    runs.save(model, tmp_path)
    result, shown = told("explain", str(tmp_path))
    assert result["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert result["parameters"] == sum(result["parts"].values()) == result["cost"]["1k"]["parameters"]
    assert result["parts"]["block 1: attention"] == sum(p.numel() for p in model.blocks[1].mixer.parameters())
    assert result["shared"] == ([["embedding.weight", "head.weight"]] if tied else [])
    assert ("One tensor: embedding.weight and head.weight" in shown) == tied
    assert result["config"]["width"] == 32


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("mamba3", "`mamba3` is no mixer and no folder. Nearest: `mamba`. The mixers are: attention, "),
        ("runs/x", "`runs/x` is no mixer and no folder. The mixers are: "),
        ("everlong.config:config", "`everlong.config:config` is not derived from everlong.mixers.Mixer"),
        ("nothing.there:X", "mixer `nothing.there:X` cannot be loaded: No module named 'nothing'"),
    ],
)
def test_explain_what_there_is_not(capsys, name, line):
    assert main(["explain", name]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"everlong explain: {line}")
    assert told.count("\n") == 1


def test_doctor(told):
    result, shown = told("doctor")
    assert result["backends"].keys() == dispatch.TABLE.keys()
    assert result["processor"]["torch_threads"] == torch.get_num_threads()
    assert result["torch"]["version"] == torch.__version__
    assert result["bf16"]["ratio"] == pytest.approx(result["bf16"]["bf16_gflops"] / result["bf16"]["float32_gflops"])
    assert isinstance(result["keeps_freed_memory"], bool)
    for problem in result["problems"]:
        assert f"Problem: {problem['problem']}. Remedy: {problem['remedy']}." in shown


SOUND = {
    "processor": {
        "architecture": "x86_64",
        "flags": {"avx2": True},
        "cores": 8,
        "usable": 8,
        "torch_threads": 8,
        "load": 0.3,
    },
    "memory": {"available": 8 << 30},
    "compiler": {"name": "g++", "path": "/usr/bin/g++", "python_headers": True},
    "bf16": {"instructions": True, "ratio": 3.0},
    "kernels": {"built": True, "path": "/cache/kernels.so", "missing": None},
    "keeps_freed_memory": True,
}


@pytest.mark.parametrize(
    ("part", "change", "problem"),
    [
        ("processor", {"flags": {"avx2": False}}, "no AVX2"),
        ("processor", {"torch_threads": 1}, "torch uses 1 of 8 cores"),
        ("processor", {"usable": 2}, "8 threads where 2 cores are granted"),
        ("processor", {"load": 9.0}, "other work keeps the cores busy"),
        ("memory", {"available": 1 << 30}, "of memory are free"),
        ("compiler", {"path": None}, "there is no C++ compiler `g++`"),
        ("kernels", {"missing": {"reason": "no compiler", "remedy": "apt install g++"}}, "without its kernels"),
        ("compiler", {"python_headers": False}, "Python.h is missing"),
        ("bf16", {"ratio": 1.0}, "bf16 is only 1.0 times as fast"),
    ],
)
def test_a_problem_is_named_with_its_remedy(part, change, problem):
    assert doctor.problems(SOUND) == []
    (found,) = doctor.problems({**SOUND, part: {**SOUND[part], **change}})
    assert problem in found["problem"]
    assert found["remedy"]

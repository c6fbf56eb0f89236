"""Checkpoints of RWKV: what others make of them, what comes back from writing, and what is damaged."""

import importlib.util
import math
import struct

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import everlong
from everlong.interop import rwkv
from everlong.lab.bench.oracles.rwkv6 import package
from everlong.mixers.base import Context
from everlong.models.lm import LanguageModel, ModelConfig

LAYERS = {
    "4": {"mixer": "rwkv4", "feed_forward": 72},
    "5.2": {"mixer": "rwkv6", "variant": "eagle", "num_heads": 2},
    "6": {"mixer": "rwkv6", "num_heads": 2, "mix_rank": 3, "decay_rank": 5},
    "7": {"mixer": "rwkv7", "num_heads": 2, "decay_rank": 3, "rate_rank": 4, "value_rank": 5, "gate_rank": 6},
}
versions = pytest.mark.parametrize("version", LAYERS)
TOKENS = torch.tensor([[5, 1, 39, 39, 7, 0, 22]])


def build(version, **options):
    config = ModelConfig(
        **{
            "vocab_size": 40,
            "width": 16,
            "num_layers": 3,
            "layers": (LAYERS[version],),
            "tie_embeddings": False,
            "norm": "layer",
            **options,
        }
    )
    model = LanguageModel(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@torch.no_grad()
def logits(model, context=Context()):
    return model(TOKENS, None, context).logits[0]


@pytest.mark.parametrize("name", ["6v0-1m", "7v0-834K"])
@torch.no_grad()
def test_the_tiny_models_give_the_logits_expected(data, name):
    folder = data / "models" / "rwkv-tiny"
    model = rwkv.load(folder / f"tiny-rwkv-{name}-FP32.bin")
    expected = torch.from_numpy(np.fromfile(folder / f"expected-logits-{name}.bin", dtype=np.float32))
    prompt = torch.tensor([list(b'"in')])
    for form in ("auto", *model.blocks[0].mixer.traits.forms):
        assert (model(prompt, None, Context(form=form)).logits[0, -1] - expected).abs().max() < 1e-5
    state = None
    for token in prompt.unbind(1):
        found, state = model(token[:, None], state)
    assert (found[0, -1] - expected).abs().max() < 1e-5
    assert model.cost(3).parameters == sum(parameter.numel() for parameter in model.parameters())


@versions
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_what_is_written_comes_back(tmp_path, version, suffix):
    model = build(version)
    rwkv.write(model, tmp_path / f"a{suffix}")
    back = rwkv.load(tmp_path / f"a{suffix}")
    assert rwkv.version(rwkv.read(tmp_path / f"a{suffix}")) == version
    torch.testing.assert_close(logits(back), logits(model), atol=1e-5, rtol=1e-5)
    back.save(tmp_path / "run")
    assert torch.equal(logits(everlong.load(tmp_path / "run")), logits(back))


@versions
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # theirs is written in TorchScript
def test_the_authors_program_reads_what_is_written(tmp_path, version, monkeypatch):
    if importlib.util.find_spec("rwkv") is None:
        pytest.skip("rwkv is not installed: pip install --no-deps rwkv")
    for switch in ("JIT", "CUDA"):
        monkeypatch.setenv(f"RWKV_{switch}_ON", "0")
    model = build(version)
    rwkv.write(model, tmp_path / "a.pth")
    theirs = package(RWKV_V7_ON=str(int(version == "7"))).RWKV(str(tmp_path / "a"), "cpu fp32")
    found, _ = theirs.forward(TOKENS[0].tolist(), None, full_output=True)
    torch.testing.assert_close(logits(model), found, atol=1e-4, rtol=1e-4)


def as_rwkv_cpp(weights, version, half=False):
    """A file in rwkv.cpp's format, with what its converter does to each version's tensors."""
    vocab, width = weights["emb.weight"].shape
    depth = sum(name.endswith("ln1.weight") for name in weights)
    content = [struct.pack("<6i", 0x67676D66, 101, vocab, width, depth, int(half))]
    named = dict(weights)
    if version == "7":
        for layer in range(depth):
            rows = [named.pop(f"blocks.{layer}.att.x_{label}") for label in "rwkvag"]
            named[f"blocks.{layer}.att.x_rwkvag"] = torch.cat(rows)
    heads = len(weights["blocks.0.att.time_faaaa"]) if version == "6" else None
    for name, value in named.items():
        part = name.rpartition(".")[2]
        value = value.squeeze() if part.startswith("time_") else value
        if version == "7" and len(part) == 2 and part[1] in "12":
            value = value.T
        elif version in ("5.2", "6") and part == "time_faaaa":
            value = value[..., None]
        elif version == "6" and part in ("time_maa_w1", "time_decay_w1", "time_decay_w2"):
            value = value.T
        elif version == "6" and part == "time_maa_w2":
            value = value.mT
        elif part == "time_decay":
            rates = {"4": lambda x: -x.exp(), "5.2": lambda x: (-x.exp()).exp()[..., None]}
            value = rates.get(version, lambda x: x.view(heads, -1, 1))(value)
        small = half and value.dim() == 2 and name.endswith("weight")
        array = value.contiguous().numpy().astype(np.float16 if small else np.float32)
        sizes = array.shape[::-1]
        content.append(struct.pack(f"<3i{len(sizes)}i", len(sizes), len(name), int(small), *sizes))
        content += [name.encode(), array.tobytes()]
    return b"".join(content)


@versions
def test_files_of_rwkv_cpp(tmp_path, version):
    model = build(version)
    weights = rwkv.state_dict(model)
    for half in (False, True):
        (tmp_path / "a.bin").write_bytes(as_rwkv_cpp(weights, version, half))
        back = rwkv.load(tmp_path / "a.bin")
        atol = 5e-2 if half else 1e-4
        torch.testing.assert_close(logits(back), logits(model), atol=atol, rtol=atol)
    assert {name: value.shape for name, value in rwkv.read(tmp_path / "a.bin").items()} == {
        name: value.shape for name, value in weights.items()
    }


def test_half_precision_and_unused_tensors_of_the_first_layer(tmp_path):
    weights = {name: value.bfloat16() for name, value in rwkv.state_dict(build("7")).items()}
    weights |= {f"blocks.0.att.v{i}": torch.zeros(3) for i in range(3)}
    torch.save(weights, tmp_path / "a.pth")
    assert rwkv.read(tmp_path / "a.pth")["emb.weight"].dtype == torch.bfloat16
    model = rwkv.load(tmp_path / "a.pth")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_model_of_one_layer():
    weights = rwkv.state_dict(build("7", num_layers=1))
    assert torch.isfinite(logits(rwkv.from_weights(weights))).all()


@pytest.mark.parametrize(
    "options",
    [
        {"norm": "rms"},
        {"block": "post"},
        {"positions": "sinusoidal"},
        {"layers": ("rwkv4", "rwkv7")},
        {"layers": ("mamba2",)},
    ],
    ids=str,
)
def test_only_what_their_programs_can_run_is_written(tmp_path, options):
    with pytest.raises(ValueError, match="only a model of one version of RWKV"):
        rwkv.write(build("7", **options), tmp_path / "a.pth")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"norm_eps=0\.01"):
        rwkv.write(build("7", norm_eps=0.01), tmp_path / "a.pth")


def change(version, **changes):
    """A state dict with tensors replaced, or taken out where None; dots stand as double underscores."""
    weights = rwkv.state_dict(build(version))
    for name, value in changes.items():
        weights.pop(name.replace("__", "."), None)
        if value is not None:
            weights[name.replace("__", ".")] = value
    return weights


WRONG = {
    "nothing": ({}, "is no checkpoint of RWKV"),
    "another": ({"model.embed_tokens.weight": torch.zeros(2, 2)}, "begins with model.embed_tokens.weight"),
    "nested": ({"model": {"emb.weight": torch.zeros(2, 2)}}, "more than tensors by name"),
    "missing": (lambda: change("6", blocks__2__att__gate__weight=None), "lacks 1 tensors of RWKV 6: blocks.2.att.gate"),
    "gap": (lambda: change("4", blocks__99__ln1__weight=torch.zeros(16)), "lacks .* tensors of RWKV 4: blocks.3"),
    "far": (lambda: change("4", blocks__999999999__ln1__weight=torch.zeros(16)), "lacks .* tensors of RWKV 4"),
    "unknown": (lambda: change("7", blocks__1__ffn__s_emb=torch.zeros(2)), "does not have: blocks.1.ffn.s_emb"),
    "size": (
        lambda: change("7", blocks__1__att__w0=torch.zeros(1, 1, 15)),
        r"att.w0` must be \[16\] .* got \[1, 1, 15\]",
    ),
    "turned": (lambda: change("7", blocks__1__att__w1=torch.zeros(3, 16)), "`blocks.1.att.w1` must be"),
    "flat": (lambda: change("4", emb__weight=torch.zeros(640)), "`emb.weight` must have two axes"),
    "heads": (lambda: change("6", blocks__0__att__time_faaaa=torch.zeros(5, 3)), "sizes that make no model"),
    "5.1": (lambda: change("5.2", blocks__0__att__time_decay=torch.zeros(2)), "RWKV 5.0 or 5.1"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_checkpoint_of_something_else_is_told_in_one_line(tmp_path, name):
    weights, message = WRONG[name]
    weights = weights() if callable(weights) else weights
    torch.save(weights, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=message) as error:
        rwkv.load(tmp_path / "a.pth")
    assert "\n" not in str(error.value)
    assert "a.pth" in str(error.value)


@pytest.mark.parametrize("kind", ["pth", "safetensors", "bin"])
def test_a_damaged_file_is_told_in_one_line(tmp_path, kind):
    weights = rwkv.state_dict(build("7"))
    path = tmp_path / f"a.{kind}"
    if kind == "bin":
        path.write_bytes(as_rwkv_cpp(weights, "7"))
    elif kind == "safetensors":
        save_file(weights, path)
    else:
        torch.save(weights, path)
    whole = path.read_bytes()
    cuts = {0, 1, 3, 4, 10, 24, 30, 40, len(whole) // 3, len(whole) // 2, len(whole) - 5000, len(whole) - 1}
    random = np.random.default_rng(0)
    cuts |= set(random.integers(len(whole), size=30).tolist())
    for cut in sorted(cuts):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"a\.") as error:
            rwkv.load(path)
        assert "\n" not in str(error.value)
    for place in (*range(60), *random.integers(len(whole), size=60).tolist()):  # what is still a model may be read
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(random.integers(8))
        path.write_bytes(damaged)
        try:
            rwkv.load(path)
        except ValueError as error:
            assert "\n" not in str(error)  # noqa: PT017


def test_what_is_no_file_of_rwkv_is_told_in_one_line(tmp_path):
    for name, content, message in (
        ("a.bin", b"GGUF" + bytes(100), "is a GGUF file"),
        ("b.pth", b"some text", "no checkpoint that torch can read"),
        ("c.bin", struct.pack("<6i", 0x67676D66, 7, 1, 1, 1, 0), "is of version 7"),
        ("d.bin", struct.pack("<6i", 0x67676D66, 101, 1, 1, 1, 0), "cut short"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message) as error:
            rwkv.load(tmp_path / name)
        assert "\n" not in str(error.value)
    quantised = as_rwkv_cpp(rwkv.state_dict(build("4")), "4").replace(
        struct.pack("<3i", 2, len("emb.weight"), 0), struct.pack("<3i", 2, len("emb.weight"), 7), 1
    )
    (tmp_path / "q.bin").write_bytes(quantised)
    for path, message in (
        (tmp_path / "q.bin", r"is quantised \(Q5_0\)"),
        (tmp_path, "is a folder"),
        (tmp_path / "none.pth", "does not exist"),
    ):
        with pytest.raises(ValueError, match=message):
            rwkv.load(path)


def test_a_rate_that_no_float_holds_is_read_as_no_decay(tmp_path):
    weights = rwkv.state_dict(build("5.2"))
    weights["blocks.0.att.time_decay"] = torch.full((2, 8), -40.0)  # e^{-e^-40} is 1
    (tmp_path / "a.bin").write_bytes(as_rwkv_cpp(weights, "5.2"))
    rate = rwkv.load(tmp_path / "a.bin").blocks[0].mixer.log_rate
    assert torch.isfinite(rate).all()
    assert rate.max().item() < math.log(1e-7)

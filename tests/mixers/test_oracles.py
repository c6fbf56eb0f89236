"""Each mixer against somebody else's implementation, with the same weights: outputs and the gradient of the input."""

import os

import pytest
import torch

from everlong import mixers
from everlong.config import from_dict

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers", reason="pip install transformers")
pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers and its fallbacks


def make(name, **options):
    mixer = mixers.load(name)
    return mixer(from_dict(mixer.Config, options))


def agree(ours, theirs, x, tolerance=2e-5):
    """Both functions of the same input give the same output and the same gradient."""
    results = []
    for run in (ours, theirs):
        own = x.clone().requires_grad_()
        y = run(own)
        results.append((y.detach(), torch.autograd.grad(y.square().sum(), own)[0]))
    for one, other in zip(*results, strict=True):
        scale = other.abs().max()
        assert float((one - other).abs().max() / scale) < tolerance


@pytest.mark.parametrize("length", [1, 7, 130])
def test_alibi_is_blooms(length):
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    from everlong.nn.positions import Alibi

    for heads in (4, 6, 8):
        theirs = build_alibi_tensor(torch.ones(1, length), heads, torch.float32).view(heads, length)
        where = torch.arange(length)
        ours = Alibi(heads, 8).score_bias(where, where)
        seen = torch.ones(length, length).tril().bool()
        difference = ours - theirs[:, None]  # equal up to a constant a row, which the softmax removes
        row = torch.where(seen, difference, torch.nan)
        assert torch.allclose(row[:, :, :1].expand_as(row)[:, seen], row[:, seen], atol=1e-5)


@pytest.mark.parametrize(("groups", "kernel"), [(1, 4), (2, 3)])
@pytest.mark.parametrize("length", [1, 7, 130])
def test_mamba2_is_transformers(length, groups, kernel):
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Config, Mamba2Mixer

    config = Mamba2Config(
        hidden_size=32,
        expand=2,
        num_heads=4,
        head_dim=16,
        state_size=12,
        n_groups=groups,
        conv_kernel=kernel,
        chunk_size=32,
    )
    theirs = Mamba2Mixer(config, 0).eval()
    ours = make("mamba2", width=32, num_heads=4, num_groups=groups, state_size=12, kernel=kernel)
    inner, shared = 64, 12 * groups
    parts = [inner, inner, shared, shared, 4]
    for label, part in zip(("gate", "v", "k", "q", "step"), theirs.in_proj.weight.split(parts), strict=True):
        getattr(ours, label).weight.data = part.data
    weights, biases = theirs.conv1d.weight.squeeze(1).split(parts[1:4]), theirs.conv1d.bias.split(parts[1:4])
    for label, weight, bias in zip("vkq", weights, biases, strict=True):
        getattr(ours, f"{label}_conv").weight.data, getattr(ours, f"{label}_conv").bias.data = weight.data, bias.data
    theirs.norm.weight.data.uniform_(0.5, 1.5)
    theirs.D.data.uniform_(0.5, 1.5)
    ours.norm.weight.data = theirs.norm.weight.data.view(groups, -1)
    ours.o.weight.data, ours.skip.data = theirs.out_proj.weight.data, theirs.D.data
    ours.log_rate.data, ours.step_bias.data = theirs.A_log.data, theirs.dt_bias.data
    agree(lambda x: ours(x)[0], theirs, torch.randn(2, length, 32))


@pytest.mark.parametrize("length", [1, 7, 130])
def test_gated_deltanet_is_qwens(length):
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextConfig, Qwen3NextGatedDeltaNet

    config = Qwen3NextConfig(
        hidden_size=32,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=12,
        linear_conv_kernel_dim=4,
        rms_norm_eps=1e-5,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
    )
    theirs = Qwen3NextGatedDeltaNet(config, 0)
    ours = make("gated_deltanet", width=32, num_heads=4, num_key_heads=2, key_size=8, value_expansion=1.5)
    rows = theirs.in_proj_qkvz.weight.view(2, 2 * 8 + 2 * 24, 32).split([8, 8, 24, 24], dim=1)
    for label, part in zip(("q", "k", "v", "gate"), rows, strict=True):
        getattr(ours, label).weight.data = part.reshape(-1, 32).data
    for label, part in zip(("beta", "step"), theirs.in_proj_ba.weight.view(2, 4, 32).split(2, dim=1), strict=True):
        getattr(ours, label).weight.data = part.reshape(-1, 32).data
    for label, part in zip("qkv", theirs.conv1d.weight.squeeze(1).split([16, 16, 48]), strict=True):
        getattr(ours, f"{label}_conv").weight.data = part.data
    theirs.norm.weight.data.uniform_(0.5, 1.5)
    ours.norm.weight.data = theirs.norm.weight.data[None]
    ours.o.weight.data, ours.log_rate.data = theirs.out_proj.weight.data, theirs.A_log.data
    ours.step_bias.data = theirs.dt_bias.data
    agree(lambda x: ours(x)[0], theirs, torch.randn(2, length, 32), tolerance=5e-5)

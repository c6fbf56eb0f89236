"""Mamba-2 against transformers' layer, the path without kernels."""

from collections.abc import Iterator

import torch

from everlong.lab.bench.comparison import Comparison, make

ORACLE = "transformers, Mamba2Mixer"


def comparisons() -> Iterator[Comparison]:
    """One group of heads and two, at three lengths."""
    for groups, kernel in ((1, 4), (2, 3)):
        for length in (1, 7, 130):
            yield _layer(length, groups, kernel)


def _layer(length: int, groups: int, kernel: int) -> Comparison:
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

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
    with torch.no_grad():
        parts = [getattr(ours, name).weight for name in ("gate", "v", "k", "q", "step")]
        theirs.in_proj.weight.copy_(torch.cat(parts))
        for name in ("weight", "bias"):
            filters = torch.cat([getattr(getattr(ours, f"{label}_conv"), name) for label in "vkq"])
            getattr(theirs.conv1d, name).copy_(filters.view_as(getattr(theirs.conv1d, name)))
        theirs.norm.weight.copy_(ours.norm.weight.flatten())
        theirs.D.copy_(ours.skip)
        theirs.A_log.copy_(ours.log_rate)
        theirs.dt_bias.copy_(ours.step_bias)
        theirs.out_proj.weight.copy_(ours.o.weight)
    return Comparison(f"{groups} groups, T={length}", lambda x: ours(x)[0], theirs, torch.randn(2, length, 32))

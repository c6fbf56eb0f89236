"""Mamba against transformers' layer, and against mambapy's, whose scan is a tree."""

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from everlong.lab.bench.comparison import Comparison, make

ORACLE = "transformers, MambaMixer; mambapy, MambaBlock"


def comparisons() -> Iterator[Comparison]:
    """The whole layer at three lengths; then with other sizes and biases, and beside mambapy's."""
    for length in (1, 7, 130):
        yield _compare(f"transformers, T={length}", length, _transformers)
    options = {"expansion": 3.0, "state_size": 7, "kernel": 2, "step_rank": 5, "bias": True}
    yield _compare("transformers, other sizes", 33, _transformers, **options)
    for length in (1, 130):
        yield _compare(f"mambapy, T={length}", length, _mambapy)
    yield _compare("mambapy, other sizes", 33, _mambapy, **options)


def _compare(case: str, length: int, build: Callable[[Any], Callable[[Tensor], Tensor]], **options: Any) -> Comparison:
    ours = make("mamba", width=24, **options)
    return Comparison(case, lambda x: ours(x)[0], build(ours), torch.randn(2, length, 24))


def _transformers(ours: Any) -> Callable[[Tensor], Tensor]:
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer

    c = ours.config
    theirs = MambaMixer(
        MambaConfig(
            hidden_size=c.width,
            expand=int(c.expansion),
            state_size=c.state_size,
            conv_kernel=c.kernel,
            time_step_rank=c.rank,
            use_bias=c.bias,
        ),
        0,
    )
    _fill(theirs, ours)
    return theirs


def _mambapy(ours: Any) -> Callable[[Tensor], Tensor]:
    mambapy = importlib.import_module("mambapy.mamba")
    c = ours.config
    theirs: Callable[[Tensor], Tensor] = mambapy.MambaBlock(
        mambapy.MambaConfig(
            d_model=c.width,
            n_layers=1,
            expand_factor=int(c.expansion),
            d_state=c.state_size,
            d_conv=c.kernel,
            dt_rank=c.rank,
            bias=c.bias,
        )
    )
    _fill(theirs, ours)
    return theirs


def _fill(theirs: Any, ours: Any) -> None:
    """Gives a layer of the authors' layout our weights."""
    weights = {
        "in_proj.weight": torch.cat([ours.v.weight, ours.gate.weight]),
        "conv1d.weight": ours.v_conv.weight[:, None],
        "conv1d.bias": ours.v_conv.bias,
        "x_proj.weight": torch.cat([ours.step[0].weight, ours.k.weight, ours.q.weight]),
        "dt_proj.weight": ours.step[1].weight,
        "dt_proj.bias": ours.step_bias,
        "A_log": ours.log_rate,
        "D": ours.skip,
        "out_proj.weight": ours.o.weight,
    }
    if ours.config.bias:
        weights |= {"in_proj.bias": torch.cat([ours.v.bias, ours.gate.bias]), "out_proj.bias": ours.o.bias}
    assert isinstance(theirs, nn.Module)
    theirs.load_state_dict(weights)

"""RWKV-6 and RWKV-5.2 against the authors' own inference code, whole layers, one token after another."""

import contextlib
import functools
import importlib.util
import io
import os
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F

from everlong.lab.bench.comparison import Comparison, make

ORACLE = "rwkv, RWKV.att_one_v6_0, att_one_v5_1, ffn_one_v6 and ffn_one"


def comparisons() -> Iterator[Comparison]:
    """Both variants at three lengths; later layers."""
    for variant in ("finch", "eagle"):
        for length in (1, 7, 130):
            yield _compared(variant, length, first=True)
        yield _compared(variant, 33, first=False)


@functools.cache
def package(**switches: str) -> ModuleType:
    """The module `rwkv.model`, which reads from its environment at import what it is going to be."""
    found = importlib.util.find_spec("rwkv")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("no rwkv", name="rwkv")
    spec = importlib.util.spec_from_file_location("rwkv_model", os.path.join(os.path.dirname(found.origin), "model.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    switches = {"RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0", "RWKV_V7_ON": "0", **switches}
    quiet = contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings()
    with mock.patch.dict("os.environ", switches), quiet[0], quiet[1]:  # it announces itself, and warns of what it uses
        warnings.simplefilter("ignore")
        spec.loader.exec_module(module)
    return module


def norm(layer: torch.nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """Its gain and bias."""
    return layer.weight, layer.bias


def _compared(variant: str, length: int, *, first: bool) -> Comparison:
    ours = make("rwkv6", width=24, num_heads=3, variant=variant, first=first)
    run = package().RWKV
    nothing = [None] * 4  # scales of quantised matrices
    ffn = ours.feed_forward
    matrices = [linear.weight.T for linear in (ours.k, ours.v, ours.q, ours.gate, ours.o)]
    channel = [linear.weight.T for linear in (ffn.up, ffn.down, ffn.gate)]
    heads = ours.group_norm.weight.flatten(), ours.group_norm.bias.flatten()
    bonus = ours.bonus[..., None]

    def attend(x: Tensor, last: Tensor, memory: Tensor) -> Any:
        norms = (*norm(ours.norm), *heads)
        if variant == "eagle":
            rate = torch.exp(-torch.exp(ours.log_rate)).view(3, -1, 1)
            return run.att_one_v5_1(
                None, x, last, memory, *norms, *(1 - ours.mix), rate, bonus, *matrices, *nothing * 5
            )
        w, k, v, q, gate = ours.mix
        low = ours.mix_down.weight.T, ours.mix_up, ours.decay.down.weight.T, ours.decay.up.weight.T
        mixes = (ours.mix_base, w, k, v, q, gate)
        rate = ours.decay.base.view(3, -1, 1)
        return run.att_one_v6_0(None, x, last, memory, *norms, *mixes, *low, rate, bonus, *matrices, *nothing * 5)

    def theirs(x: Tensor) -> Tensor:
        rows = []
        for row in x if ours.embedding_norm is None else F.layer_norm(x, (24,), *norm(ours.embedding_norm)):
            last, before, memory, outputs = x.new_zeros(24), x.new_zeros(24), x.new_zeros(3, 8, 8), []
            for token in row:
                token, last, memory = attend(token, last, memory)
                args = (None, token, before, *norm(ffn.norm))
                if variant == "eagle":
                    token, before = run.ffn_one(*args, *(1 - ffn.mix), *channel, *nothing * 3)
                else:
                    token, before = run.ffn_one_v6(*args, *ffn.mix, *channel, *nothing * 3)
                outputs.append(token)
            rows.append(torch.stack(outputs))
        return torch.stack(rows) - x

    label = f"{variant}, {'first' if first else 'later'} layer, T={length}"
    return Comparison(label, lambda x: ours(x)[0], theirs, torch.randn(2, length, 24))

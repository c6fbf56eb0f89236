"""RWKV-4 against transformers' whole block, as the first layer and as a later one."""

from collections.abc import Iterator

import torch
from torch import Tensor

from everlong.lab.bench.comparison import Comparison, make

ORACLE = "transformers, RwkvBlock"


def comparisons() -> Iterator[Comparison]:
    """Three lengths; the second layer; more channels inside of the channel mix than usual."""
    for length in (1, 7, 130):
        yield _compared(length, first=True)
    yield _compared(65, first=False)
    yield _compared(65, first=True, feed_forward=150)


def _compared(length: int, *, first: bool, feed_forward: int | None = None) -> Comparison:
    from transformers import RwkvConfig
    from transformers.models.rwkv.modeling_rwkv import RwkvBlock

    ours = make("rwkv4", width=24, feed_forward=feed_forward, first=first)
    for linear in (ours.k, ours.v, ours.gate):
        torch.nn.init.normal_(linear.weight, std=0.5)
    config = RwkvConfig(hidden_size=24, attention_hidden_size=24, intermediate_size=ours.config.hidden)
    theirs = RwkvBlock(config, layer_id=0 if first else 1)
    time, channel = theirs.attention, theirs.feed_forward
    if first:
        theirs.pre_ln = ours.embedding_norm
    theirs.ln1, theirs.ln2 = ours.norm, ours.feed_forward.norm
    time.key, time.value, time.receptance, time.output = ours.k, ours.v, ours.gate, ours.o
    channel.key, channel.value, channel.receptance = (
        getattr(ours.feed_forward, name) for name in ("up", "down", "gate")
    )
    time.time_decay, time.time_first = ours.decay, ours.bonus
    for part, mix, names in (
        (time, ours.mix, "key value receptance"),
        (channel, ours.feed_forward.mix, "key receptance"),
    ):
        for name, row in zip(names.split(), 1 - mix.detach(), strict=True):
            setattr(part, f"time_mix_{name}", torch.nn.Parameter(row[None, None]))

    def run(x: Tensor) -> Tensor:
        y: Tensor = theirs(x)[0] - x
        return y

    label = f"{'first' if first else 'later'} layer, F={ours.config.hidden}, T={length}"
    return Comparison(label, lambda x: ours(x)[0], run, torch.randn(2, length, 24))

"""Griffin's recurrent block against transformers' RecurrentGemma."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from everlong.lab.bench.comparison import Comparison, make

ORACLE = "transformers, RecurrentGemmaRecurrentBlock"


def comparisons() -> Iterator[Comparison]:
    """The whole block at four lengths; then with other sizes, and as the second half of a sequence."""
    for length in (1, 7, 130):
        yield _compare(f"T={length}", length, num_heads=3)
    yield _compare("one head, other sizes", 33, num_heads=1, hidden=30, kernel=2)
    yield _compare("blocks of one", 33, num_heads=24)
    yield _continued()


def _compare(case: str, length: int, **options: Any) -> Comparison:
    ours = make("rg_lru", width=24, bias=True, **options)
    return Comparison(case, lambda x: ours(x)[0], _block(ours), torch.randn(2, length, 24))


def _continued() -> Comparison:
    ours = make("rg_lru", width=24, bias=True, num_heads=3)

    def run(x: Tensor) -> Tensor:
        left, state = ours(x[:, :20])
        right, _ = ours(x[:, 20:], state)
        return torch.cat([left, right], 1)

    return Comparison("in two calls", run, _block(ours), torch.randn(2, 47, 24))


def _block(ours: Any) -> Callable[[Tensor], Tensor]:
    from transformers import RecurrentGemmaConfig
    from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRecurrentBlock

    c = ours.config
    theirs = RecurrentGemmaRecurrentBlock(
        RecurrentGemmaConfig(
            hidden_size=c.width, lru_width=c.inner, num_attention_heads=c.heads, conv1d_width=c.kernel
        ),
        0,
    )
    weights = {
        "conv_1d.weight": ours.v_conv.weight[:, None],
        "conv_1d.bias": ours.v_conv.bias,
        "rg_lru.recurrent_param": ours.rate,
    }
    for name, label in (("linear_x", "v"), ("linear_y", "gate"), ("linear_out", "o")):
        layer = getattr(ours, label)
        weights |= {f"{name}.weight": layer.weight, f"{name}.bias": layer.bias}
    for name, gate in (("input_gate", ours.input_gate), ("recurrent_gate", ours.recurrence_gate)):
        weights |= {f"rg_lru.{name}_weight": gate.weight, f"rg_lru.{name}_bias": gate.bias.view(c.heads, -1)}
    theirs.load_state_dict(weights)

    def run(x: Tensor) -> Tensor:
        y: Tensor = theirs(x, torch.arange(x.shape[1])[None].expand(x.shape[:2]), None, use_cache=False)[0]
        return y

    return run

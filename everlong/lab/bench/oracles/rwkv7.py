"""RWKV-7 against the authors' own inference code: whole layers, one token after another, and two that share values."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from everlong.lab.bench.comparison import Comparison
from everlong.lab.bench.oracles.rwkv6 import norm, package
from everlong.mixers.base import Context
from everlong.mixers.rwkv7 import RWKV7, Options

ORACLE = "rwkv, RWKV_x070_TMix_one and RWKV_x070_CMix_one"


def comparisons() -> Iterator[Comparison]:
    """One layer and two, at three lengths."""
    for depth in (1, 2):
        for length in (1, 7, 130):
            yield _compared(length, depth)


def _compared(length: int, depth: int) -> Comparison:
    ours = [RWKV7(Options(width=24, num_heads=3), layer=i, depth=depth) for i in range(depth)]
    with torch.no_grad():
        for parameter in (parameter for layer in ours for parameter in layer.parameters()):
            parameter += 0.05 * torch.randn_like(parameter)
    theirs = package(RWKV_V7_ON="1")

    def run(x: Tensor) -> Tensor:
        context = Context(first={})
        start = x
        for layer in ours:
            x = x + layer(x, None, context)[0]
        return x - start

    def attend(i: int, x: Tensor, last: Tensor, first: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        own = ours[i]
        q, w, k, v, a, g = own.mix

        def low(part: torch.nn.Module | None, base: bool = True) -> list[Tensor]:
            if part is None:
                return [x, x, x]  # which the first layer ignores
            names = ["base", "down.weight", "up.weight"][0 if base else 1 :]
            return [part.get_parameter(name).T if "." in name else part.get_parameter(name) for name in names]

        low_rank = (*low(own.decay), *low(own.rate), *low(own.share), *low(own.gate, base=False))
        keys = own.k_scale, own.k_rate, own.bonus.flatten()
        matrices = (linear.weight.T for linear in (own.q, own.k, own.v, own.o))
        heads = own.group_norm.weight.flatten(), own.group_norm.bias.flatten()
        found: tuple[Tensor, Tensor, Tensor, Tensor] = theirs.RWKV_x070_TMix_one(
            i, 3, 8, x, last, first, memory, q, w, k, v, a, g, *low_rank, *keys, *matrices, *heads
        )
        return found

    def loop(x: Tensor) -> Tensor:
        rows, embedding = [], ours[0].embedding_norm
        assert embedding is not None
        for row in F.layer_norm(x, (24,), *norm(embedding)):
            lasts, befores = x.new_zeros(2, depth, 24).unbind(0)
            last, before, memory = list(lasts), list(befores), list(x.new_zeros(depth, 3, 8, 8))
            outputs = []
            for token in row:
                first = token
                for i, own in enumerate(ours):
                    ffn, now = own.feed_forward, F.layer_norm(token, (24,), *norm(own.norm))
                    y, last[i], memory[i], first = attend(i, now, last[i], first, memory[i])
                    token = token + y
                    now = F.layer_norm(token, (24,), *norm(ffn.norm))
                    channel = ffn.mix[0], ffn.up.weight.T, ffn.down.weight.T
                    y, before[i] = theirs.RWKV_x070_CMix_one(now, before[i], *channel)
                    token = token + y
                outputs.append(token)
            rows.append(torch.stack(outputs))
        return torch.stack(rows) - x

    return Comparison(f"{depth} of {depth} layers, T={length}", run, loop, torch.randn(2, length, 24))

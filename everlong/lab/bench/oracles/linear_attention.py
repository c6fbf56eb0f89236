"""Linear attention against flash-linear-attention's loop, and without causality against its dense weights."""

from collections.abc import Iterator

import torch
from torch import Tensor

from everlong.lab.bench.comparison import Comparison, make
from everlong.lab.bench.errors import naive

ORACLE = "fla-core, linear_attn/naive.py"


def comparisons() -> Iterator[Comparison]:
    """The normalised sum at three lengths; then the other direction as well, as a dense matrix."""
    for length in (1, 7, 130):
        yield _fla(length)
    yield _dense()


def _fla(length: int) -> Comparison:
    ours = make("linear_attention", width=48, num_heads=3)
    run = naive("fla/ops/linear_attn/naive.py").naive_recurrent_linear_attn

    def theirs(x: Tensor) -> Tensor:
        q, k, v = (getattr(ours, label)(x).unflatten(-1, (3, -1)) for label in "qkv")
        o, _ = run(torch.nn.functional.elu(q) + 1, torch.nn.functional.elu(k) + 1, v, normalize=True)
        y: Tensor = ours.o(o.flatten(-2))
        return y

    return Comparison(f"T={length}", lambda x: ours(x)[0], theirs, torch.randn(2, length, 48))


def _dense() -> Comparison:
    ours = make("linear_attention", width=24, num_heads=2, causal=False).double()

    def theirs(x: Tensor) -> Tensor:
        q, k, v = (getattr(ours, label)(x).unflatten(-1, (2, -1)) for label in "qkv")
        q, k = (torch.nn.functional.elu(y) + 1 for y in (q, k))
        weights = torch.einsum("bthk,bshk->bhts", q, k)
        y: Tensor = ours.o(torch.einsum("bhts,bshv->bthv", weights / weights.sum(-1, keepdim=True), v).flatten(-2))
        return y

    x = torch.randn(2, 17, 24, dtype=torch.float64)
    return Comparison("bidirectional", lambda x: ours(x)[0], theirs, x, bound=1e-9)

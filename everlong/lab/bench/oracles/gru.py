"""The gated recurrent unit against torch's cell, stepped in Python, which shares no kernel with ours."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from everlong.lab.bench.comparison import Comparison, make

ORACLE = "torch, nn.GRUCell in a loop"


def comparisons() -> Iterator[Comparison]:
    """Three lengths in float64; then another size, torch's beginning, and float32."""
    for length in (1, 7, 130):
        yield _compare(f"T={length}", length)
    yield _compare("11 channels", 33, hidden=11)
    yield _compare("no output matrix, uniform", 33, output="none", initialization="uniform")
    yield _compare("float32, T=130", 130, torch.float32)


def _compare(case: str, length: int, dtype: torch.dtype = torch.float64, **options: object) -> Comparison:
    ours = make("gru", width=24, **options).to(dtype)
    cell = nn.GRUCell(24, ours.config.size).to(dtype)
    cell.load_state_dict(ours.cells.state_dict())

    def theirs(x: Tensor) -> Tensor:
        h, outputs = None, []
        for x_t in x.unbind(1):
            h = cell(x_t, h)
            outputs.append(ours.o(h))
        return torch.stack(outputs, 1)

    bound = 1e-9 if dtype == torch.float64 else 2e-5
    return Comparison(case, lambda x: ours(x)[0], theirs, torch.randn(2, length, 24, dtype=dtype), bound)

"""The gated recurrent unit against torch's cell, stepped in Python, and torch's layer."""

from collections.abc import Iterator

from torch import nn

from everlong.lab.bench import cells
from everlong.lab.bench.comparison import Comparison

ORACLE = "torch, nn.GRUCell in a loop and nn.GRU"


def comparisons() -> Iterator[Comparison]:
    """At several lengths and sizes, in float64 and float32, and over packed sequences."""
    yield from cells.comparisons("gru", nn.GRUCell, nn.GRU)

"""Long short-term memory against torch's cell, stepped in Python, and torch's layer."""

from collections.abc import Iterator

from torch import nn

from everlong.lab.bench import cells
from everlong.lab.bench.comparison import Comparison

ORACLE = "torch, nn.LSTMCell in a loop and nn.LSTM"


def comparisons() -> Iterator[Comparison]:
    """At several lengths and sizes, in float64 and float32, and over packed sequences.

    In float64 the layer is the kernel that ours calls too, so that only states, packing and weights are compared there;
    the cells are not. In float32 ours is oneDNN's.
    """
    yield from cells.comparisons("lstm", nn.LSTMCell, nn.LSTM)

"""The simple recurrent network against torch's cell, stepped in Python, and torch's layer."""

from collections.abc import Iterator
from dataclasses import replace

from torch import nn

from everlong.lab.bench import cells
from everlong.lab.bench.comparison import Comparison

ORACLE = "torch, nn.RNNCell in a loop and nn.RNN"


def comparisons() -> Iterator[Comparison]:
    """At several lengths and sizes, in float64 and float32, and over packed sequences."""
    yield from cells.comparisons("rnn", nn.RNNCell, nn.RNN)
    for comparison in cells.comparisons("rnn", nn.RNNCell, nn.RNN, nonlinearity="relu"):
        yield replace(comparison, case=f"relu, {comparison.case}")

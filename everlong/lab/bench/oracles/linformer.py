"""Linformer against the package of that name; what it has not got, by torch's pooling, convolution and attention."""

import importlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from everlong.lab.bench.comparison import Comparison, make
from everlong.lab.bench.errors import heads_first

ORACLE = "linformer, LinformerSelfAttention; torch's pooling, convolution and attention"

WIDTH, HEADS, SLOTS, LENGTH = 24, 3, 5, 130


def comparisons() -> Iterator[Comparison]:
    """The package's layer with E and F, and with one for both; one for each head; every kind of window; identity."""
    for length in (1, 7, 130):
        yield _package(length, "headwise")
    yield _package(37, "key_value")
    yield _package(37, "layerwise")
    for length in (7, 130):
        yield _by_torch(length, sharing="none")
        for projection in ("mean", "max", "convolution"):
            yield _by_torch(length, projection=projection)
    yield _identity()


def _package(length: int, sharing: str) -> Comparison:
    theirs = importlib.import_module("linformer").LinformerSelfAttention(WIDTH, LENGTH, k=SLOTS, heads=HEADS).double()
    options: dict[str, Any] = {"length": LENGTH, "slots": SLOTS, "sharing": sharing}
    ours = make("linformer", width=WIDTH, num_heads=HEADS, bias=True, **options).double()
    for own, other in ((ours.q, theirs.to_q), (ours.k, theirs.to_k), (ours.v, theirs.to_v), (ours.o, theirs.to_out)):
        own.weight.data = other.weight.data
        own.bias.data = torch.zeros_like(own.bias) if other.bias is None else other.bias.data
    theirs.proj_k.data = ours.projections[0][0].data.T
    theirs.proj_v.data = ours.projections[-1][0].data.T  # where E is F there is one of them
    x = torch.randn(2, length, WIDTH, dtype=torch.float64)
    return Comparison(f"linformer, {sharing}, T={length}", lambda x: ours(x)[0], theirs, x, bound=1e-9)


def _by_torch(length: int, **options: str) -> Comparison:
    shape: dict[str, Any] = {"length": LENGTH, "slots": SLOTS, **options}
    ours = make("linformer", width=WIDTH, num_heads=HEADS, bias=True, **shape).double()
    stride = LENGTH // SLOTS
    kind = options.get("projection", "learned")

    def along(y: Tensor, which: int) -> Tensor:
        """Keys or values [B, H, T, K] in their slots."""
        if kind == "learned":
            return torch.einsum("hst,bhtk->bhsk", ours.projections[which][:, :, :length], y)
        line = y.mT.flatten(0, 2)[:, None]
        if kind == "mean":
            line = F.avg_pool1d(line, stride, ceil_mode=True)
        elif kind == "max":
            line = F.max_pool1d(line, stride, ceil_mode=True)
        else:
            line = F.conv1d(F.pad(line, (0, -length % stride)), ours.projections[which][:, None], stride=stride)
        return line.view(*y.shape[:2], y.shape[3], -1).mT

    def theirs(x: Tensor) -> Tensor:
        q, k, v = heads_first(*(getattr(ours, label)(x).unflatten(-1, (HEADS, -1)) for label in "qkv"))
        o = F.scaled_dot_product_attention(q, along(k, 0), along(v, 1))
        y: Tensor = ours.o(o.transpose(1, 2).flatten(-2))
        return y

    x = torch.randn(2, length, WIDTH, dtype=torch.float64)
    label = ", ".join(f"{name} {value}" for name, value in options.items())
    return Comparison(f"torch, {label}, T={length}", lambda x: ours(x)[0], theirs, x, bound=1e-9)


def _identity() -> Comparison:
    """With a slot for each token and E = F = 1 it is attention."""
    ours = make("linformer", width=WIDTH, num_heads=HEADS, length=9, slots=9, sharing="key_value").double()
    ours.projections[0].data = torch.eye(9, dtype=torch.float64)[None]

    def theirs(x: Tensor) -> Tensor:
        q, k, v = heads_first(*(getattr(ours, label)(x).unflatten(-1, (HEADS, -1)) for label in "qkv"))
        y: Tensor = ours.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))
        return y

    x = torch.randn(2, 9, WIDTH, dtype=torch.float64)
    return Comparison("torch, identity, T=9", lambda x: ours(x)[0], theirs, x, bound=1e-9)

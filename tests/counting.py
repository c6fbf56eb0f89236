"""Counts the FLOPs of a call by the convention of `Cost`: a multiply-add is 2, elementwise work is 0.

Matrix products are counted by torch's own counter. An operator of everlong counts by its recurrence whatever form it is
computed in, so that what is counted of one token is what the recurrent form needs.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.utils.flop_counter import FlopCounterMode

from everlong import ops


def _matrix(per_entry: int) -> Callable[..., int]:
    def count(q, k, v, *rest, normalize=False, **options) -> int:
        entries = v.shape[2] * q.shape[3] * (v.shape[3] + (1 if normalize else 0))
        return per_entry * entries * v.shape[0] * v.shape[1]

    return count


def _softmax(q, k, v, *, causal=True, window=None, mask=None, cu_seqlens=None, **options) -> int:
    assert cu_seqlens is None
    rows, columns = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1], torch.arange(k.shape[1])
    seen = columns <= rows if causal else torch.ones_like(rows + columns, dtype=torch.bool)
    if window is not None:
        seen &= (rows - columns).abs() < window
    seen = seen.expand(q.shape[0], q.shape[2], *seen.shape)
    seen = seen if mask is None else seen & mask
    return 2 * (q.shape[3] + v.shape[3]) * int(seen.sum())


def _scan(a, b, **options) -> int:
    return 4 * b.numel() if b.dim() == 4 else 2 * b.numel()  # a complex multiply-add is four real ones


FORMULAS: dict[str, Callable[..., int]] = {
    "linear_attention": _matrix(4),
    "delta_rule": _matrix(6),
    "dplr": _matrix(8),
    "softmax_attention": _softmax,
    "linear_scan": _scan,
    "selective_scan": lambda u, dt, A, *rest, **options: 4 * u.shape[0] * u.shape[1] * A.numel(),
    "causal_conv1d": lambda x, weight, **options: 2 * x.shape[0] * x.shape[1] * weight.numel(),
}


class Counter:
    """What has been counted so far."""

    def __init__(self) -> None:
        self.products = FlopCounterMode(display=False)
        self.flops = 0

    def operator(self, run: Callable, formula: Callable[..., int]) -> Callable:
        """`run`, counted by its formula and not by what it computes inside."""

        def counted(*arguments, **options):
            before = self.products.get_total_flops()
            result = run(*arguments, **options)
            self.flops += formula(*arguments, **options) - (self.products.get_total_flops() - before)
            return result

        return counted


@contextmanager
def counting(*modules: str) -> Iterator[Counter]:
    """Counts what everlong's mixers and layers, and these modules, compute inside of the block."""
    counter, replaced = Counter(), []
    for name, formula in FORMULAS.items():
        run = getattr(ops, name)
        counted = counter.operator(run, formula)
        for place, module in list(sys.modules.items()):
            ours = place == "everlong.ops" or place.startswith(("everlong.mixers", "everlong.nn")) or place in modules
            for label in [label for label, value in vars(module).items() if value is run] if ours else []:
                replaced.append((module, label, run))
                setattr(module, label, counted)
    try:
        with counter.products, torch.no_grad():
            yield counter
    finally:
        for module, label, run in replaced:
            setattr(module, label, run)
    counter.flops += counter.products.get_total_flops()

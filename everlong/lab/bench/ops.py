"""The operators: how exact they are against other people's, how fast, what they hold, what they make of a training.

The rows come from `errors` (other people's implementations), `ops_speed`, `ops_memory`, `ops_training` and
`ops_lengths`; those that set forward + backward beside softmax at two shapes are here.
"""

from collections.abc import Callable, Iterator

import torch
from torch.nn import functional as F

from everlong import ops
from everlong.lab.bench import errors, ops_lengths, ops_memory, ops_speed, ops_training, peers
from everlong.lab.bench.cases import CASES, DELTA, LINEAR, WINDOWED, Shape, inputs
from everlong.lab.bench.ops_lengths import picture
from everlong.lab.bench.result import Row, milliseconds, wanted
from everlong.lab.bench.turns import forward_backward, in_turns, ratio

__all__ = ["picture", "rows"]

SHAPES = (Shape(512, batch=8, heads=5), Shape(4096))
AGAINST_SDPA = "largest relative error, softmax_attention against SDPA"
NAMES = {"operator", "oracle", "form", "case"}

TIMED = ("softmax_attention", WINDOWED, "linear_attention", LINEAR, DELTA)


def rows(only: str | None = None) -> Iterator[Row]:
    """Errors against each oracle, forward + backward over SDPA's, and what each part measures; lengths at the end."""
    single, lengths = measures(), ops_lengths.measures()
    chosen = wanted([*single, *lengths], only)
    for measure in chosen:
        if measure in single:
            yield single[measure](measure)
    if along := [lengths[measure] for measure in chosen if measure in lengths]:
        yield from ops_lengths.rows(along)


def measures() -> dict[str, Callable[[str], Row]]:
    """How to measure each row that is measured by itself."""
    made: dict[str, Callable[[str], Row]] = {AGAINST_SDPA: _exact_softmax}
    for oracle in errors.ORACLES:
        made[f"largest relative error, {oracle.operator} against {oracle.name}"] = lambda measure, oracle=oracle: (
            _exact(measure, oracle)
        )
    for shape in SHAPES:
        for name in TIMED:
            made[f"forward + backward over SDPA, {name}, {(shape.batch, shape.length, shape.heads, shape.size)}"] = (
                lambda measure, name=name, shape=shape: _timed(measure, name, shape)
            )
    return {**made, **ops_speed.measures(), **ops_memory.measures(), **ops_training.measures()}


def _exact_softmax(measure: str) -> Row:
    worst = _against_sdpa()
    return Row(measure, max(worst.values()), "<= 1e-4", "torch SDPA (MATH)", worst)


def _exact(measure: str, oracle: errors.Oracle) -> Row:
    """Over all forms and cases."""
    worst: dict[str, float] = {}
    for row in errors.rows((oracle,)):
        for name, value in row.items():
            if name not in NAMES:
                worst[name] = max(worst.get(name, 0.0), float(value))
    return Row(measure, max(worst.values()), "<= 1e-4", f"fla-core, {oracle.name}", worst)


def _against_sdpa() -> dict[str, float]:
    """Softmax attention in each form against torch's plain implementation, at odd lengths, with packed sequences."""
    torch.manual_seed(0)
    worst: dict[str, float] = {}
    bounds = torch.tensor([0, 65, 66, 196])
    made = [torch.randn(1, 196, heads, 24) for heads in (6, 2, 2)]
    for form in ("auto", "chunk", "parallel", "recurrent"):
        for packed in (False, True):
            inputs = [x.clone().requires_grad_() for x in made]
            pieces = list(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)) if packed else [(0, 196)]
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
                parts = [[x[:, a:b].transpose(1, 2) for x in inputs] for a, b in pieces]
                theirs = [F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True) for q, k, v in parts]
            expected = torch.cat(theirs, 2).transpose(1, 2)
            o = ops.softmax_attention(*inputs, cu_seqlens=bounds if packed else None, form=form)
            weight = torch.randn_like(o)
            gradients = [torch.autograd.grad((y * weight).sum(), inputs) for y in (o, expected)]
            for name, ours, other in zip(
                ("o", "q", "k", "v"), (o, *gradients[0]), (expected, *gradients[1]), strict=True
            ):
                worst[name] = max(worst.get(name, 0.0), errors.relative(ours, other))
    return worst


def _timed(measure: str, name: str, shape: Shape) -> Row:
    """Both sides in turns, in one process."""
    case = CASES[name]
    sides = {
        "ours": forward_backward(case.on("auto"), inputs(case.names, shape)),
        "sdpa": forward_backward(
            peers.sdpa, peers.sdpa_inputs(shape.length, batch=shape.batch, heads=shape.heads, size=shape.size)
        ),
    }
    times = in_turns(sides, seconds=2.0, least=7)
    raw = {f"{side}_ms": milliseconds(values) for side, values in times.items()}
    return Row(measure, ratio(times, "ours", "sdpa"), peer="torch SDPA", raw=raw)

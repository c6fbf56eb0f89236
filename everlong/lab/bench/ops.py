"""The operators: how exact they are against other people's, and what a training step of each costs beside softmax."""

import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from everlong import ops
from everlong.lab.bench import errors
from everlong.lab.bench.result import Row, milliseconds, wanted

SHAPES = ((8, 512, 5, 64), (1, 4096, 8, 64))  # batch, length, heads, channels of a head
ROUNDS = 7
AGAINST_SDPA = "largest relative error, softmax_attention against SDPA"
NAMES = {"operator", "oracle", "form", "case"}


def rows(only: str | None = None) -> Iterator[Row]:
    """The largest relative error against each oracle, then forward + backward over SDPA's at two shapes."""
    exact = {f"largest relative error, {o.operator} against {o.name}": o for o in errors.ORACLES}
    timed = {f"forward + backward over SDPA, {name}, {shape}": (name, shape) for shape in SHAPES for name in _RUNS}
    found: list[dict[str, str | float]] | None = None
    for measure in wanted([AGAINST_SDPA, *exact, *timed], only):
        if measure in timed:
            yield _timed(measure, *timed[measure])
            continue
        if measure == AGAINST_SDPA:
            worst = _against_sdpa()
            yield Row(measure, max(worst.values()), "<= 1e-4", "torch SDPA (MATH)", worst)
            continue
        found = errors.rows() if found is None else found
        own = [r for r in found if (r["operator"], r["oracle"]) == (exact[measure].operator, exact[measure].name)]
        worst = {}
        for row in own:
            for name, value in row.items():
                if name not in NAMES:
                    worst[name] = max(worst.get(name, 0.0), float(value))
        yield Row(measure, max(worst.values()), "<= 1e-4", f"fla-core, {exact[measure].name}", worst)


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


def _sdpa(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def _timed(measure: str, name: str, shape: tuple[int, int, int, int]) -> Row:
    """Both sides in turns, in one process."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(*shape) for _ in range(3))
    gate = torch.rand(*shape[:3])
    times: dict[str, list[float]] = {"ours": [], "SDPA": []}
    for turn in range(ROUNDS + 2):
        for side, run in (("ours", _RUNS[name]), ("SDPA", _sdpa)):
            own = [x.clone().requires_grad_() for x in (q, F.normalize(k, dim=-1), v)]
            began = time.perf_counter()
            torch.autograd.grad(run(own[0], own[1], own[2], gate).sum(), own)
            if turn >= 2:
                times[side].append(time.perf_counter() - began)
    ours, sdpa = (milliseconds(values) for values in times.values())
    return Row(measure, round(ours / sdpa, 3), peer="torch SDPA", raw={"ours_ms": ours, "sdpa_ms": sdpa})


_Run = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
_RUNS: dict[str, _Run] = {
    "softmax_attention": lambda q, k, v, g: ops.softmax_attention(q, k, v),
    "softmax_attention, window 128": lambda q, k, v, g: ops.softmax_attention(q, k, v, window=128),
    "linear_attention": lambda q, k, v, g: ops.linear_attention(q, k, v)[0],
    "linear_attention, decay of a token": lambda q, k, v, g: ops.linear_attention(q, k, v, log_decay=-g)[0],
    "delta_rule, decay of a token": lambda q, k, v, g: ops.delta_rule(q, k, v, g, log_decay=-g)[0],
}

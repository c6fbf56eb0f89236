"""How fast the operators are: beside products of matrices, torch's attention, the torch backend, and other packages.

Both sides of a ratio take turns in one process; a figure is the median of each side's times.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from everlong.lab.bench import peers
from everlong.lab.bench.cases import CASES, DELTA, LINEAR, SELECTIVE, WINDOW, WINDOWED, Shape, inputs, native
from everlong.lab.bench.result import Row, milliseconds
from everlong.lab.bench.turns import Side, forward, forward_backward, in_turns, ratio

Measures = dict[str, Callable[[str], Row]]

PRODUCT = 2048  # rows and columns of the matrices that operators are compared with
SDPA = "torch SDPA, causal, float32"


def measures() -> Measures:
    """All rows by name."""
    return {
        **_shares(),
        **_beside_sdpa(),
        **_beside_the_torch_backend(),
        **_beside_loops(),
        **_along_the_length(),
        "times faster with 2 threads than with 1, linear attention, forward + backward, T = 4,096": _threads,
    }


def compared(measure: str, sides: Mapping[str, Side], target: str | None, peer: str, **turns: float | int) -> Row:
    """The second side's time over the first's: how many times faster the first is."""
    below, above = sides
    times = in_turns(sides, **turns)  # type: ignore[arg-type]
    raw = {f"{side}_ms": milliseconds(values) for side, values in times.items()}
    return Row(measure, ratio(times, above, below), target, peer, {**raw, "turns": len(times[above])})


def flops(length: int, heads: int, size: int) -> int:
    """Of linear attention: four products a chunk with K = V = C, whatever is really computed (triangles are half)."""
    return 4 * 2 * size * size * length * heads


def _shares() -> Measures:
    made: Measures = {}
    for dtype, size, target in (
        (torch.float32, 64, ">= 0.65"),
        (torch.bfloat16, 64, ">= 0.30"),
        (torch.bfloat16, 128, ">= 0.40"),
    ):
        name = {torch.float32: "sgemm", torch.bfloat16: "bf16 gemm"}[dtype]
        made[f"FLOP/s of linear attention over those of {name}, forward, T = 4,096, K = {size}"] = (
            lambda measure, dtype=dtype, size=size, target=target: _share(measure, dtype, size, target)
        )
    return made


def _share(measure: str, dtype: torch.dtype, size: int, target: str) -> Row:
    shape = Shape(4096, size=size, dtype=dtype)
    case = CASES[LINEAR]
    torch.manual_seed(0)
    left, right = (torch.randn(PRODUCT, PRODUCT, dtype=dtype) for _ in range(2))
    out = torch.empty_like(left)
    sides: dict[str, Side] = {
        "ours": forward(case.on("auto"), inputs(case.names, shape)),
        "gemm": lambda: torch.mm(left, right, out=out),
    }
    times = in_turns(sides, least=15)
    ours = flops(shape.length, shape.heads, size) / milliseconds(times["ours"]) / 1e6
    gemm = 2 * PRODUCT**3 / milliseconds(times["gemm"]) / 1e6
    raw = {f"{side}_ms": milliseconds(values) for side, values in times.items()}
    rates = {"ours_gflops": round(ours, 1), "gemm_gflops": round(gemm, 1)}
    return Row(measure, round(ours / gemm, 4), target, f"torch.mm of {PRODUCT:,} x {PRODUCT:,}", {**raw, **rates})


def _beside_sdpa() -> Measures:
    made: Measures = {
        f"times faster than SDPA, linear attention, forward + backward, T = {length:,}": (
            lambda measure, length=length, target=target: _faster_than_sdpa(measure, LINEAR, length, target)
        )
        for length, target in ((1024, ">= 5"), (4096, ">= 18"), (16_384, ">= 70"))
    }
    made["length from which linear attention is faster than SDPA, forward + backward"] = _crossover
    windowed = f"times faster than SDPA over all tokens, window {WINDOW}, forward + backward, T = 16,384"
    made[windowed] = lambda measure: _faster_than_sdpa(measure, WINDOWED, 16_384, ">= 8")
    return made


def beside_sdpa(name: str, length: int) -> dict[str, Side]:
    """Forward + backward of a case and of SDPA."""
    case = CASES[name]
    return {
        "ours": forward_backward(case.on("auto"), inputs(case.names, Shape(length))),
        "sdpa": forward_backward(peers.sdpa, peers.sdpa_inputs(length)),
    }


def _faster_than_sdpa(measure: str, name: str, length: int, target: str) -> Row:
    long = length > 8192
    return compared(measure, beside_sdpa(name, length), target, SDPA, least=3 if long else 7, warmup=1 if long else 2)


def crossover(ratios: Mapping[int, float]) -> float:
    """The shortest length from which on ours is faster, at all longer ones too; the largest number if it never is.

    Args:
        ratios: how many times faster ours is, by length.
    """
    found = sys.float_info.max
    for length in sorted(ratios, reverse=True):
        if ratios[length] <= 1:
            break
        found = length
    return found


def _crossover(measure: str) -> Row:
    found = {}
    for length in (64, 128, 256, 512, 1024, 2048, 4096):
        found[length] = ratio(in_turns(beside_sdpa(LINEAR, length), seconds=1.0, least=15), "sdpa", "ours")
    return Row(measure, crossover(found), "<= 512", SDPA, {"times_faster": {str(n): r for n, r in found.items()}})


def _beside_the_torch_backend() -> Measures:
    """A row for each way to call each operator that has native kernels."""
    return {
        f"times faster than the torch backend, {name}, {case.passes}, T = {length:,}": (
            lambda measure, name=name, length=length: _native(measure, name, length)
        )
        for name, case in native().items()
        for length in case.lengths
    }


def _native(measure: str, name: str, length: int) -> Row:
    case = CASES[name]
    given = inputs(case.names, Shape(length))
    timed = forward if case.passes == "forward" else forward_backward
    sides = {backend: timed(case.on(backend), given) for backend in ("native", "torch")}
    return compared(measure, sides, ">= 4", "everlong, backend torch", seconds=2.5, least=3, warmup=1)


def _beside_loops() -> Measures:
    made: Measures = {
        "times faster than fla-core, gated delta rule, forward + backward, T = 4,096": _beside_fla,
        "time of gated delta rule over linear attention, same decay, forward + backward, T = 4,096": _price_of_delta,
    }
    for name, theirs, target in (
        ("a torch loop", peers.sequential_scan, ">= 30"),
        ("a torch associative scan", peers.associative_scan, ">= 5"),
    ):
        made[f"times faster than {name}, selective scan, forward + backward, T = 2,048, D = 1,024"] = (
            lambda measure, theirs=theirs, target=target, name=name: _scans(measure, theirs, target, name)
        )
    return made


def _beside_fla(measure: str) -> Row:
    case = CASES[DELTA]
    given = inputs(case.names, Shape(4096))
    sides = {
        "ours": forward_backward(case.on("auto"), given),
        "fla": forward_backward(peers.fla_gated_delta, given),
    }
    return compared(measure, sides, ">= 30", "fla-core, naive_chunk_gated_delta_rule", least=5, warmup=1)


def _price_of_delta(measure: str) -> Row:
    sides = {
        label: forward_backward(CASES[name].on("auto"), inputs(CASES[name].names, Shape(4096)))
        for label, name in (("linear", LINEAR), ("delta", DELTA))
    }
    return compared(measure, sides, "<= 1.6", "everlong, linear_attention", least=9)


def _scans(measure: str, theirs: Callable[..., Tensor], target: str, peer: str) -> Row:
    case = CASES[SELECTIVE]
    given = inputs(case.names, Shape(2048, heads=16))
    sides = {"ours": forward_backward(case.on("auto"), given), "theirs": forward_backward(theirs, given)}
    return compared(measure, sides, target, peer, seconds=5.0, least=3, warmup=1)


def _along_the_length() -> Measures:
    return {
        "time per token, linear attention, forward + backward, T = 131,072 over T = 4,096": lambda measure: _per_token(
            measure, LINEAR, forward_backward, 131_072, 4096
        ),
        f"time per token, window {WINDOW}, forward, T = 131,072 over T = 16,384": lambda measure: _per_token(
            measure, WINDOWED, forward, 131_072, 16_384
        ),
    }


def _per_token(measure: str, name: str, way: Callable[..., Side], long: int, short: int) -> Row:
    case = CASES[name]
    sides = {str(length): way(case.on("auto"), inputs(case.names, Shape(length))) for length in (long, short)}
    times = in_turns(sides, seconds=8.0, least=3, warmup=1)
    raw = {f"{length}_ms": milliseconds(values) for length, values in times.items()}
    return Row(measure, round(ratio(times, str(long), str(short)) * short / long, 4), "<= 1.15", raw=raw)


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Inside, torch computes with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _threads(measure: str) -> Row:
    case = CASES[LINEAR]
    run = forward_backward(case.on("auto"), inputs(case.names, Shape(4096)))

    def on(number: int) -> Side:
        def call() -> None:
            with threads(number):
                run()

        return call

    return compared(measure, {"2_threads": on(2), "1_thread": on(1)}, ">= 1.8", "everlong, 1 thread", least=15)

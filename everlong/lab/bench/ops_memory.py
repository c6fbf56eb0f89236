"""What the operators do with memory: the most that a training step holds, and what a step of decoding moves."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from everlong import ops
from everlong.lab.bench.cases import CASES, DELTA, LINEAR, SELECTIVE, WINDOWED, Case, Shape, inputs
from everlong.lab.bench.result import Row, milliseconds
from everlong.lab.bench.turns import in_turns
from everlong.train.memory import keep_freed_memory

STATUS = Path("/proc/self/status")
LONG = 65_536
HELD = (LINEAR, DELTA, "dplr, decay of a channel", WINDOWED, "linear_scan", SELECTIVE, "causal_conv1d")

LAYERS, SEQUENCES = 30, 16  # whose states no cache holds
COPIED = 1 << 26  # float32 numbers: 256 MB
CACHES, CACHE, GROUP = (
    16,
    16_384,
    4,
)  # layers, tokens of a softmax layer's cache, and query heads that share a head of it


def measures() -> dict[str, Callable[[str], Row]]:
    """All rows by name; those of peak memory where the system tells of it."""
    made: dict[str, Callable[[str], Row]] = {}
    if STATUS.exists():
        made |= {
            f"peak memory over inputs, outputs and their gradients, {name}, forward + backward, T = {LONG:,}": (
                lambda measure, name=name: _peak(measure, name)
            )
            for name in HELD
        }
    made |= {
        f"time of a decode step over that of copying what it moves, {name}": lambda measure, name=name: _decode(
            measure, name
        )
        for name in (LINEAR, DELTA, "dplr, decay of a channel")
    }
    made[f"time of a decode step over that of copying what it moves, softmax_attention, {CACHE:,} tokens"] = _cached
    return made


def resident(line: str) -> int:
    """Bytes of memory that this process has now ("VmRSS") or has had at most ("VmHWM").

    `ru_maxrss` would not do: a new process inherits it from the one that started it.
    """
    found = next(text for text in STATUS.read_text().splitlines() if text.startswith(f"{line}:"))
    return int(found.split()[1]) * 1024


def _step(case: Case, length: int) -> int:
    """One forward and backward; the bytes of inputs, output and the gradients of all of them."""
    leaves = [x.requires_grad_() for x in inputs(case.names, Shape(length))]
    o = case.on("auto")(*leaves)
    gradients = torch.autograd.grad(o, leaves, torch.randn_like(o))
    return 2 * o.nbytes + sum(x.nbytes for x in (*leaves, *gradients))


def growth(name: str, length: int = LONG) -> tuple[int, int]:
    """By how many bytes the most memory that this process has had grows with one step, and those that it must have.

    Only a process that has never had more can tell, so it is asked of a fresh one.
    """
    keep_freed_memory()
    _step(CASES[name], 256)  # what is loaded, built and set up once is none of the step's
    before = resident("VmRSS")
    must = _step(CASES[name], length)
    return resident("VmHWM") - before, must


def _peak(measure: str, name: str) -> Row:
    code = f"from everlong.lab.bench.ops_memory import growth; print(*growth({name!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    peak, must = map(int, done.stdout.split())
    raw = {"peak_bytes": peak, "inputs_outputs_gradients_bytes": must}
    return Row(measure, round(peak / must, 3), "<= 2.5", "one process, VmHWM", raw)


def _decode(measure: str, name: str) -> Row:
    """One token of many sequences through many layers, each state read once and written once."""
    shape = Shape(1, batch=SEQUENCES)
    given = dict(zip(CASES[name].names, inputs(CASES[name].names, shape), strict=True))
    decay = {"log_decay": given.pop(next(label for label in given if label.startswith("decay")))}
    operator = getattr(ops, CASES[name].operator)
    states = [torch.randn(shape.memory) for _ in range(LAYERS)]

    def step() -> None:
        for layer in range(LAYERS):
            _, states[layer] = operator(*given.values(), **decay, initial_state=states[layer])

    return _beside_copying(measure, step, moved=2 * sum(x.nbytes for x in states))


def _cached(measure: str) -> Row:
    """One token over long caches, which are read once, with query heads in groups."""
    torch.manual_seed(0)
    q = torch.randn(1, 1, 8, 64)
    caches = [[torch.randn(1, CACHE, 8 // GROUP, 64) for _ in range(2)] for _ in range(CACHES)]

    def step() -> None:
        for k, v in caches:
            ops.softmax_attention(q, k, v)

    return _beside_copying(measure, step, moved=sum(x.nbytes for cache in caches for x in cache))


def _beside_copying(measure: str, step: Callable[[], None], moved: int) -> Row:
    """A copy reads each number once and writes it once: twice its bytes."""
    source: Tensor = torch.randn(COPIED)
    target = torch.empty_like(source)
    with torch.inference_mode():
        times = in_turns({"step": step, "copy": lambda: target.copy_(source)}, least=9)
    rates = {
        "step": moved / milliseconds(times["step"]) / 1e6,
        "copy": 2 * source.nbytes / milliseconds(times["copy"]) / 1e6,
    }
    raw = {f"{side}_ms": milliseconds(values) for side, values in times.items()}
    raw |= {f"{side}_gb_per_second": round(rate, 2) for side, rate in rates.items()}
    return Row(
        measure, round(rates["copy"] / rates["step"], 3), "<= 2", "torch copy_ of 256 MB", {**raw, "bytes": moved}
    )

"""What HiPPO's three memories keep of a signal, as a picture and as numbers.

    python -m everlong.lab.findings.hippo [--out FOLDER] [--samples N] [--order N]

A smooth random signal goes, sample by sample, into as many numbers as `--order` says: under LegS, under LegT with a
window of a quarter of the signal, under LagT. What can be rebuilt at the end is compared with what was there.
docs/hippo.md says what to read from it.
"""

import argparse
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from everlong.lab.chart import Panel, Point, chart, smoothed
from everlong.nn.hippo import RULES, Memory

ORDERS = (4, 8, 16, 32, 64)


def signal_of(samples: int, cycles: int = 20) -> Float[Tensor, " T"]:
    """A sum of waves with up to so many periods over the whole, of random phases; its mean square is 1."""
    random = torch.Generator().manual_seed(0)
    s = (torch.arange(samples, dtype=torch.float64) + 0.5) / samples
    k = torch.arange(1, cycles + 1, dtype=torch.float64)[:, None]
    phase = 2 * math.pi * torch.rand(cycles, 1, dtype=torch.float64, generator=random)
    signal = (torch.sin(2 * math.pi * k * s + phase) / k.sqrt()).sum(0)
    return signal / signal.square().mean().sqrt()


def memories(order: int, samples: int, rule: str = "zoh") -> dict[str, tuple[Memory, int]]:
    """The three memories, and how many samples each is asked to rebuild."""
    quarter = samples // 4
    return {
        "LegS": (Memory(order, "legs", rule=rule), samples),
        "LegT": (Memory(order, "legt", window=quarter, rule=rule), quarter),
        "LagT": (Memory(order, "lagt", window=samples / 32, rule=rule), quarter),
    }


def rebuilt(memory: Memory, signal: Float[Tensor, " T"], length: int) -> Float[Tensor, " length"]:
    """The last samples, from nothing but the numbers that are kept."""
    kept, _ = memory.compress(signal)
    return memory.reconstruct(kept, length)


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def picture(signal: Float[Tensor, " T"], order: int) -> str:
    """The signal with what is rebuilt of it, and how wrong that is at each sample."""
    samples = len(signal)
    found = {name: rebuilt(memory, signal, n) for name, (memory, n) in memories(order, samples).items()}

    def points(values: Tensor) -> list[Point]:
        line = [(float(t), y) for t, y in enumerate(values.tolist(), samples - len(values))]
        return line[:: max(1, samples // 512)]

    wrong = {name: points((y - signal[-len(y) :]).abs().clamp_min(1e-12).log10()) for name, y in found.items()}
    # Where LagT has forgotten, what its polynomials say is beyond all scales.
    limit = 1.5 * signal.abs().max().item()
    shown = {name: [(t, y) for t, y in points(values) if abs(y) < limit] for name, values in found.items()}
    return chart(
        f"{samples:,} samples of a signal, kept as {order} numbers",
        [
            Panel("what is rebuilt at the end", {**shown, "signal": points(signal)}),
            Panel("log10 of its error", {name: smoothed(line, 0.05) for name, line in wrong.items()}),
        ],
        x_label="sample",
    )


def report(signal: Float[Tensor, " T"], orders: Sequence[int] = ORDERS) -> Iterator[str]:
    """The numbers, line by line."""
    samples = len(signal)
    names = {name: n for name, (_, n) in memories(orders[0], samples).items()}
    yield "error of what is rebuilt, root of the mean square (the signal's is 1)"
    yield f"{'numbers':>8}" + "".join(f"{f'{name}, last {n:,}':>20}" for name, n in names.items())
    for order in orders:
        found = memories(order, samples).values()
        errors = (rms(rebuilt(memory, signal, n) - signal[-n:]) for memory, n in found)
        yield f"{order:8d}" + "".join(f"{error:20.2g}" for error in errors)
    yield ""
    order = orders[len(orders) // 2]
    yield f"distance of {order} numbers from those of the exact step (zoh), by rule of discretisation"
    yield f"{'rule':>8}" + "".join(f"{name:>20}" for name in names)
    exact = {name: memory.compress(signal)[0].values for name, (memory, _) in memories(order, samples).items()}
    for rule in RULES[:-1]:
        ruled = memories(order, samples, rule).items()
        distances = (rms(memory.compress(signal)[0].values - exact[name]) for name, (memory, _) in ruled)
        yield f"{rule:>8}" + "".join(f"{distance:20.2g}" for distance in distances)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the numbers and draws the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("."), help="the folder for the picture")
    parser.add_argument("--samples", type=int, default=2048, help="of the signal")
    parser.add_argument("--order", type=int, default=32, help="numbers kept, in the picture")
    chosen = parser.parse_args(arguments)
    signal = signal_of(chosen.samples)
    print("\n".join(report(signal)))
    chosen.out.mkdir(parents=True, exist_ok=True)
    (chosen.out / "hippo.svg").write_text(picture(signal, chosen.order), encoding="utf-8")


if __name__ == "__main__":
    main()

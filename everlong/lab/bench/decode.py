"""Generation: what a token costs after a short and after a long context."""

import time
from collections.abc import Iterator

import torch

from everlong import mixers
from everlong.lab.bench.result import Row, milliseconds, wanted
from everlong.models.lm import LanguageModel, ModelConfig

SHORT, LONG, STEPS, PIECE = 1_000, 50_000, 200, 1_000
TARGETS = {"gated_deltanet": "<= 1.1"}


def rows(only: str | None = None) -> Iterator[Row]:
    """Time of a token at 50,000 tokens of context over that at 1,000, for every causal mixer."""
    measures = {f"time per token, {name}, {LONG:,} over {SHORT:,} tokens of context": name for name in causal()}
    for measure in wanted(measures, only):
        name = measures[measure]
        short, long, state_bytes = at_two_lengths(name)
        raw = {"short_ms": milliseconds(short), "long_ms": milliseconds(long), "state_bytes": state_bytes}
        yield Row(measure, round(milliseconds(long) / milliseconds(short), 4), TARGETS.get(name), raw=raw)


def causal() -> list[str]:
    """The mixers that can generate."""
    return [name for name in mixers.names() if mixers.load(name).traits.causal]


def at_two_lengths(name: str) -> tuple[list[float], list[float], int]:
    """Seconds of single steps behind both contexts, taken in turns, and the bytes of the state behind the longer."""
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(vocab_size=4096, width=320, num_layers=6, layers=(name,))).eval()
    tokens = torch.randint(model.config.vocab_size, (1, LONG))
    with torch.inference_mode():
        states, state = {}, None
        for start in range(0, LONG, PIECE):
            _, state = model.hidden(tokens[:, start : start + PIECE], state)
            if start + PIECE in (SHORT, LONG):
                states[start + PIECE] = state
        times: dict[int, list[float]] = {SHORT: [], LONG: []}
        for step in range(STEPS):
            for length, before in states.items():
                began = time.perf_counter()
                x, states[length] = model.hidden(tokens[:, step : step + 1], before)
                model.logits(x)
                times[length].append(time.perf_counter() - began)
    state_bytes = sum(leaf.numel() * leaf.element_size() for layer in states[LONG] for leaf in layer)
    return times[SHORT], times[LONG], state_bytes

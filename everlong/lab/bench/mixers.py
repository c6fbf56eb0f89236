"""The mixers: how far each is from somebody else's implementation, and what each learns when all are trained alike."""

import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from everlong import mixers
from everlong.data.loader import Dataset
from everlong.data.packing import prepare
from everlong.data.sources import STDLIB
from everlong.lab.bench import comparison
from everlong.lab.bench.result import Row, wanted
from everlong.models.lm import LanguageModel, ModelConfig
from everlong.train.beginning import first_model
from everlong.train.loop import NotFinite, train
from everlong.train.settings import TrainConfig

PARAMETERS = 1_000_000
NUM_LAYERS = 4
BYTES = 257  # the vocabulary of a tokenizer whose tokens are bytes
LENGTH = 256
SETTINGS: dict[str, Any] = {
    "steps": 400,
    "batch_tokens": 4 * LENGTH,
    "length": LENGTH,
    "precision": "float32",
    "compile": "off",
    "evaluate_every": 400,
    "final_tokens": 65_536,
    "checkpoint_every": 1_000,
}
STATES = {"1k": 1_024, "16k": 16_384}


def rows(only: str | None = None, text: str = STDLIB) -> Iterator[Row]:
    """The largest relative error of every mixer, then the held-out loss of every causal one after the same training.

    Args:
        text: what is trained on, byte by byte: a file, or anything else that `everlong prepare` takes.
    """
    errors = {comparison.measure(name): name for name in mixers.names()}
    causal = [name for name in mixers.names() if mixers.load(name).traits.causal]
    trained = {f"nats a byte on held-out text after {SETTINGS['steps']} steps, {name}": name for name in causal}
    chosen = wanted([*errors, *trained], only)
    for measure in chosen:
        if measure in errors:
            yield _error(measure, errors[measure])
    if not any(measure in trained for measure in chosen):
        return
    with TemporaryDirectory(prefix="everlong-") as place:
        prepare(text, Path(place) / "data", vocab_size=BYTES)
        for measure in chosen:
            if measure in trained:
                yield _trained(measure, trained[measure], Path(place), text)


def _error(measure: str, name: str) -> Row:
    """Over all comparisons with the oracle, each within its own bound or the target is missed."""
    raw, worst = {}, 0.0
    for case, errors in comparison.compare(name):
        raw[case.case] = errors
        worst = max(worst, *errors.values())
    return Row(measure, worst, "<= 1e-4", comparison.oracle(name), raw)


def shape(name: str) -> ModelConfig:
    """A model of this mixer whose width, a multiple of 16, brings it closest to a million parameters."""
    found: dict[int, ModelConfig] = {}
    for width in range(48, 400, 16):
        config = ModelConfig(vocab_size=BYTES, width=width, num_layers=NUM_LAYERS, layers=(name,))
        found[abs(LanguageModel(config).cost(0).parameters - PARAMETERS)] = config
    return found[min(found)]


def _trained(measure: str, name: str, place: Path, text: str) -> Row:
    """A model of about a million parameters, trained like all others; the largest number where it diverges."""
    model = first_model(shape(name), seed=0)
    costs = {label: model.cost(length) for label, length in STATES.items()}
    raw: dict[str, Any] = {
        "mixer": name,
        "text": Path(text).name,
        "width": model.config.width,
        "parameters": costs["1k"].parameters,
        "flops_per_token": costs["1k"].flops_per_token,
        "state_bytes": {label: cost.state_bytes for label, cost in costs.items()},
    }
    try:
        result = train(model, Dataset.open(place / "data"), TrainConfig(**SETTINGS), place / name)
    except NotFinite as error:
        return Row(measure, sys.float_info.max, raw={**raw, "diverged": str(error)})
    assert result.held_out is not None
    raw |= {"tokens_per_second": round(result.tokens_per_second), "seconds": round(result.seconds, 1)}
    return Row(measure, round(result.held_out.loss, 4), raw=raw)

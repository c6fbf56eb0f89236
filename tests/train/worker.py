"""One training in a process of its own, for tests that kill it.

    worker.py PREPARED RUN [key=value ...]

Beside the training's settings it takes `layers`, `width`, `num_layers` and `threads`. It goes on from the newest
checkpoint of RUN where there is one, prints its step, and then the step after each report.
"""

import sys
from pathlib import Path

import torch

from everlong.data.loader import Dataset
from everlong.models.lm import LanguageModel, ModelConfig
from everlong.train import checkpoint
from everlong.train.loop import train
from everlong.train.settings import TrainConfig


def main(prepared: str, run: str, *options: str) -> None:
    values = {"batch_tokens": 256, "length": 32, "precision": "float32", "compile": "off", "warmup": 4}
    values |= dict(option.split("=") for option in options)
    torch.set_num_threads(int(values.pop("threads", 1)))
    shape = {"width": int(values.pop("width", 32)), "num_layers": int(values.pop("num_layers", 2))}
    shape["layers"] = tuple(values.pop("layers", "attention").split(","))
    settings = TrainConfig(**values)
    dataset = Dataset.open(prepared)
    start = checkpoint.latest(Path(run) / "training").checkpoint
    print(start.step if start else 0, flush=True)
    torch.manual_seed(settings.seed)
    model = LanguageModel(ModelConfig(vocab_size=dataset.tokenizer.vocab_size, **shape))
    result = train(model, dataset, settings, run, start=start, report=lambda now: print(now.step, flush=True))
    sys.exit(0 if result.stopped_by is None else 128 + result.stopped_by)


if __name__ == "__main__":
    main(*sys.argv[1:])

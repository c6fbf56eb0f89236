"""How a model is trained: the settings that, with the data, determine a run."""

import dataclasses
import math
from typing import Literal

from everlong.config import config, divisible
from everlong.train import compilation, optimizers
from everlong.train.precision import Asked

MICRO_BATCH_TOKENS = 8192
ACTIVATIONS = 1 << 25  # tokens x width x layers of a micro-batch at most: about 6 GB


@config
class TrainConfig:
    """How a model is trained."""

    steps: int = 1000
    """Updates of the weights."""
    minutes: float | None = None
    """Instead of --steps: a time for the whole training, compilation and evaluation included. The number of updates is
    fixed from the speed of the first 20."""
    batch_tokens: int = 4096
    """Tokens of one update: the global batch."""
    length: int = 512
    """Tokens of one training sequence."""
    micro_batch: int | None = None
    """Sequences at a time; gradients are accumulated up to the batch. By default about 8,192 tokens."""
    optimizer: optimizers.Kind = "muon"
    """What updates the matrices. Embeddings, gains and biases always have AdamW."""
    learning_rate: float = 3e-3
    """Of gains, biases and all else that is neither a matrix nor an embedding."""
    matrix_learning_rate: float = 1e-2
    """Of the matrices. With --optimizer adamw about 2e-3 is usual."""
    embedding_learning_rate: float = 1e-2
    """Of embeddings and heads: each token's row is seldom updated, and takes larger steps."""
    schedule: optimizers.Schedule = "wsd"
    """The learning rate over time: warm-up, then stable and decayed to 0 (wsd), cosine to 0, or constant."""
    warmup: int = 40
    """Updates over which the learning rate rises."""
    decay: float = 0.5
    """The last fraction of a wsd run, over which the learning rate falls to 0."""
    weight_decay: float = 0.1
    """Decoupled decay of the matrices."""
    clip: float = 1.0
    """The largest norm of the gradient; a longer one is shortened to it."""
    seed: int = 0
    """Of the first weights and of the data's order."""
    precision: Asked = "auto"
    """Of matrix products; auto is bf16 where the processor has instructions for it."""
    compile: compilation.Mode = "auto"
    """torch.compile; auto is on where a C++ compiler is there and the run is long enough to pay for it."""
    evaluate_every: int | None = None
    """Updates between evaluations on held-out text; by default ten in a run, fewer in a short one."""
    evaluate_tokens: int = 16_384
    """Tokens of an evaluation while training."""
    final_tokens: int = 131_072
    """Tokens of the evaluation at the end."""
    checkpoint_every: int | None = None
    """Updates between checkpoints; by default one every two minutes."""
    keep: int = 2
    """Checkpoints to keep."""
    on_nan: Literal["stop", "skip"] = "stop"
    """What to do with a batch whose loss or gradient is no finite number."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"`{field.name}` must be a finite number: got {value}")
        for name in ("steps", "length", "evaluate_tokens", "final_tokens", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1: got {getattr(self, name)}")
        for name in ("minutes", "evaluate_every", "checkpoint_every", "clip"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"`{name}` must be above 0: got {getattr(self, name)}")
        for name in ("learning_rate", "matrix_learning_rate", "embedding_learning_rate", "weight_decay", "warmup"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must not be negative: got {getattr(self, name)}")
        if not 0 <= self.seed < 1 << 63:
            raise ValueError(f"`seed` must be at least 0 and below 2^63: got {self.seed}")
        if not 0 <= self.decay <= 1:
            raise ValueError(f"`decay` is a fraction of the run, from 0 to 1: got {self.decay}")
        divisible("batch_tokens", self.batch_tokens, "length", self.length)
        if self.micro_batch is not None:
            divisible("batch_tokens / length", self.rows, "micro_batch", self.micro_batch)

    @property
    def rows(self) -> int:
        """Sequences of one update."""
        return self.batch_tokens // self.length

    def evaluation_interval(self, steps: int) -> int:
        """Updates between evaluations in a run of so many, so that they take less than a tenth of its time."""
        if self.evaluate_every is not None:
            return self.evaluate_every
        return max(1, steps // 10, 4 * self.evaluate_tokens // self.batch_tokens)

    def micro_rows(self, width: int, num_layers: int) -> int:
        """Sequences at a time for a model of this size."""
        if self.micro_batch is not None:
            return self.micro_batch
        fitting = min(MICRO_BATCH_TOKENS, ACTIVATIONS // (width * num_layers)) // self.length
        return max(n for n in range(1, self.rows + 1) if self.rows % n == 0 and n <= max(1, fitting))

"""The training loop: from a model and prepared data to a run folder, one update after another.

A run is its configuration: the data's order, the learning rate and the number of updates depend on nothing else, so
that a run that was stopped and one that was not end with the same weights. `minutes` is the one exception, made once:
the number of updates is fixed from the speed of the first ones, and recorded.
"""

import resource
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

import psutil
import torch
from jaxtyping import Int
from safetensors import SafetensorError
from torch import Tensor

from everlong.config import from_dict, to_dict
from everlong.data.loader import Batch, Dataset, Loader, Position
from everlong.models import run
from everlong.models.lm import LanguageModel
from everlong.train import checkpoint, compilation, optimizers, precision, signals
from everlong.train.checkpoint import Checkpoint
from everlong.train.evaluate import Evaluation, evaluate
from everlong.train.folder import alone, holds_model
from everlong.train.log import LOG, Log
from everlong.train.settings import TrainConfig

CALIBRATION = 20  # updates that are timed before `minutes` becomes a number of updates
MARGIN = 0.96  # the share of the time that is planned for: speed drifts
SAVE_SECONDS = 120.0  # between checkpoints where no number of updates is given
SKIPS = 20  # updates in a row that are skipped before a training gives up: its weights are past recovering

Activity = Literal["training", "compiling", "evaluating", "saving"]


@dataclass(frozen=True)
class Progress:
    """Where a training is."""

    activity: Activity
    step: int
    steps: int | None  # None: not fixed yet
    loss: float | None
    tokens_per_second: float | None
    seconds: float
    seconds_left: float | None
    peak_memory_bytes: int
    held_out: Evaluation | None  # the newest
    note: str | None = None  # something that a person should read


@dataclass(frozen=True)
class Result:
    """What a training came to."""

    step: int
    held_out: Evaluation | None  # None where a signal stopped it
    seconds: float
    tokens_per_second: float
    peak_memory_bytes: int
    skipped: int  # updates whose loss or gradient was no finite number
    stopped_by: int | None  # the signal's number


Report = Callable[[Progress], None]


def quiet(progress: Progress) -> None:
    """Reports nothing."""


class NotFinite(ValueError):
    """A loss, gradient or weight that is no finite number."""


def train(
    model: LanguageModel,
    dataset: Dataset,
    config: TrainConfig,
    folder: str | Path,
    *,
    start: Checkpoint | None = None,
    report: Report = quiet,
) -> Result:
    """Trains a model into a run folder; with `start`, from a checkpoint of that folder exactly on.

    SIGINT and SIGTERM end it after the current update, with a checkpoint. The global random generators are left as they
    were found.

    Raises:
        ValueError: the folder holds another run's model or checkpoints; the data is too short; the checkpoint is of
            another model or other data.
        NotFinite: the loss or the gradient is no number; step, documents and the last checkpoint are named.
        OSError: the disk is full, and the last checkpoint is named; or another process trains into the folder.
        Stopped: a signal came while there was nothing to save yet, or a second one after the first.
    """
    folder = Path(folder)
    if start is None and holds_model(folder):
        raise ValueError(f"{folder} holds a run already: go on with it (--resume), or choose another folder")
    with alone(folder), precision.deterministic(), checkpoint.random_state_kept(), signals.at_once():
        trainer = _Trainer(model, dataset, config, folder, start, report)
        try:
            with signals.noted() as caught:
                return trainer.run(caught)
        finally:
            trainer.log.close()


def peak_memory() -> int:
    """The most memory that this process has had in use, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class _Trainer:
    """One training: what changes from update to update, and what it needs."""

    def __init__(
        self,
        model: LanguageModel,
        dataset: Dataset,
        config: TrainConfig,
        folder: Path,
        start: Checkpoint | None,
        report: Report,
    ) -> None:
        self.model, self.dataset, self.config, self.folder, self.report = model, dataset, config, folder, report
        self.device = next(model.parameters()).device
        self.optimizers = optimizers.Optimizers(
            model,
            config.optimizer,
            learning_rate=config.learning_rate,
            matrix_learning_rate=config.matrix_learning_rate,
            embedding_learning_rate=config.embedding_learning_rate,
            weight_decay=config.weight_decay,
        )
        self.process = psutil.Process()
        self.began, self.before = time.perf_counter(), 0.0
        self.step, self.steps = 0, config.steps if config.minutes is None else None
        self.saved, self.saved_at = 0, self.began
        self.durations: deque[float] = deque(maxlen=200)
        self.loss: float | None = None
        self.held_out: Evaluation | None = None
        self.precision = precision.resolve(config.precision, self.device.type)
        self.compiled: bool | None = None
        self.skipped = self.skipped_in_a_row = 0
        self.caught: list[int] = []
        position, log_bytes = Position(seed=config.seed), 0
        if start is not None:
            position, log_bytes = self._restore(start)
        self.held_out_text = dataset.split("heldout")
        self.loader = Loader(dataset.split("train"), length=config.length, batch_size=config.rows, position=position)
        self.position = position
        self.micro_rows = config.micro_rows(model.config.width, model.config.num_layers)
        self.loss_of = self._choose_loss()
        checkpoint.seed_all(config.seed)
        if start is not None:
            checkpoint.set_random_state(start.tensors("random"), start.state["random"])
        self.log = Log(folder, length=log_bytes, step=self.step)
        if self.log.missing:
            self._tell("training", f"{folder / LOG} was shortened: it lacks lines of steps up to {self.step}.")

    @property
    def seconds(self) -> float:
        """Spent on this run, in all processes that worked on it."""
        return self.before + time.perf_counter() - self.began

    def run(self, caught: list[int]) -> Result:
        """Trains to the end, or until a signal is on the list."""
        self.caught = caught
        self.model.train()
        while self.steps is None or self.step < self.steps:
            row = self._update()
            if fixed := self._fix_steps():
                row["steps"] = fixed
            if self._finished:
                row |= self._evaluate(self.config.final_tokens)
            elif self.steps is not None and self.step % self.config.evaluation_interval(self.steps) == 0:
                row |= self._evaluate(self.config.evaluate_tokens)
            self._write(row)
            self._tell("training")
            if caught and not self._finished:
                self._save()
                return self._result(caught[0])
            if self._save_due():
                self._save()
        if self.held_out is None:
            self._evaluate(self.config.final_tokens)
        self._save()
        return self._result(None)

    @property
    def _finished(self) -> bool:
        return self.steps is not None and self.step >= self.steps

    def _update(self) -> dict[str, Any]:
        """One update of the weights; what the log says about it."""
        began = time.perf_counter()
        batch = self.loader.next()
        factor = optimizers.rate(
            self.config.schedule, self.step, self.steps, warmup=self.config.warmup, decay=self.config.decay
        )
        self.optimizers.set_rate(factor)
        loss = self._gradient(batch.tokens, batch.targets)
        gradients = [p.grad for p in self.optimizers.parameters.values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        finite = bool(torch.isfinite(loss)) and bool(torch.isfinite(norm))
        if finite:
            if norm > self.config.clip:
                torch.nn.utils.clip_grads_with_norm_(self.optimizers.parameters.values(), self.config.clip, norm)
            self.optimizers.step()
        else:
            self._skip(loss, norm, batch)
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row
        self.optimizers.zero_grad()
        self.step, self.position = self.step + 1, batch.position
        self.loss = loss.item() if finite else self.loss
        duration = time.perf_counter() - began
        self.durations.append(duration)
        return {
            "step": self.step,
            **({} if finite else {"skipped": self.skipped}),
            "loss": loss.item() if finite else None,
            "learning_rate": self.config.learning_rate * factor,
            "gradient_norm": norm.item() if finite else None,
            "tokens": self.step * self.config.batch_tokens,
            "tokens_per_second": self.config.batch_tokens / duration,
            "seconds": self.seconds,
            "memory_bytes": self.process.memory_info().rss,
            "epoch": self.position.epoch,
            "index": self.position.index,
        }

    def _gradient(self, tokens: Int[Tensor, "B T"], targets: Int[Tensor, "B T"]) -> Tensor:
        """Accumulates the gradient of the mean loss over all targets of the batch; the loss."""
        parts = list(zip(torch.split(tokens, self.micro_rows), torch.split(targets, self.micro_rows), strict=True))
        everything = max(1, int((targets >= 0).sum()))
        shares = []
        for part, wanted in parts:
            with precision.autocast(self.precision, self.device.type):
                loss = self.loss_of(part.to(self.device), wanted.to(self.device))
            share = loss * (int((wanted >= 0).sum()) / everything)
            share.backward()  # type: ignore[no-untyped-call]
            shares.append(share.detach())
        return torch.stack(shares).sum()

    def _choose_loss(self) -> compilation.Loss:
        """The loss in eager mode or compiled: as it was before, as configured, or as it pays."""
        before: dict[bool | None, compilation.Mode] = {None: self.config.compile, True: "on", False: "off"}
        loss, self.compiled = compilation.choose(
            self.model,
            before[self.compiled],
            required=self.config.compile == "on",
            eager_seconds=self._eager_seconds,
            rehearse=self._rehearse,
            tell=lambda note: self._tell("compiling", note),
        )
        return loss

    def _eager_seconds(self, eager: compilation.Loss) -> float:
        """How long the training would take without compilation."""
        if self.config.minutes is not None:
            return 60 * self.config.minutes
        assert self.steps is not None
        times = [self._rehearse(eager) for _ in range(2)]
        return min(times) * self.config.rows / self.micro_rows * (self.steps - self.step)

    def _rehearse(self, loss_of: compilation.Loss) -> float:
        """Seconds of a micro-batch's gradient, which is thrown away."""
        began = time.perf_counter()
        tokens = torch.zeros(self.micro_rows, self.config.length, dtype=torch.long, device=self.device)
        self.model.train()
        targets = torch.zeros_like(tokens)  # not `tokens` again: what is compiled would be for equal arguments only
        with precision.autocast(self.precision, self.device.type):
            loss = loss_of(tokens, targets)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizers.zero_grad()
        return time.perf_counter() - began

    def _fix_steps(self) -> int | None:
        """Turns `minutes` into a number of updates once their speed is known; the number, when that happens."""
        if self.steps is not None or self.config.minutes is None:
            return None
        budget = 60 * self.config.minutes
        if self.step < CALIBRATION and (self.seconds < 0.2 * budget or len(self.durations) < 3):
            return None
        duration = median(list(self.durations)[len(self.durations) // 2 :])  # the first ones also fetch memory
        speed = 1.5 * self.config.batch_tokens / duration  # of evaluation, at least: it has no backward pass
        held_out = self.held_out_text.num_tokens
        evaluation = min(self.config.evaluate_tokens, held_out) / speed
        left = MARGIN * budget - self.seconds - min(self.config.final_tokens, held_out) / speed
        interval = self.config.evaluation_interval(self.step + max(0, int(left / duration)))
        self.steps = self.step + max(0, int(left / (duration + evaluation / interval)))
        self._tell("training", f"{self.steps:,} updates fit into {self.config.minutes:g} minutes.")
        return self.steps

    def _evaluate(self, max_tokens: int) -> dict[str, float]:
        """Scores held-out text where there is some; what the log says about it."""
        if not self.held_out_text.num_tokens:
            return {}
        self._tell("evaluating")
        self.held_out = evaluate(
            self.model,
            self.held_out_text,
            length=self.config.length,
            stride=self.config.length,
            max_tokens=max_tokens,
            precision=self.precision,
            report=self._reassure(),
        )
        return {"held_out_loss": self.held_out.loss, "held_out_bits_per_byte": self.held_out.bits_per_byte}

    def _reassure(self) -> Callable[[int, int], None]:
        """Says once that a signal was heard, where what goes on may take a minute."""
        told = bool(self.caught)

        def report(done: int, total: int) -> None:
            nonlocal told
            if self.caught and not told:
                told = True
                self._tell("evaluating", "Stopping after this evaluation; a second signal stops without saving.")

        return report

    def _write(self, row: dict[str, Any]) -> None:
        """A line of the log."""
        try:
            self.log.write(row)
        except OSError as error:
            raise self._log_lost(error) from error

    def _sync_log(self) -> int:
        """Puts the log on the disk; its length in bytes."""
        try:
            return self.log.sync()
        except OSError as error:
            raise self._log_lost(error) from error

    def _log_lost(self, error: OSError) -> OSError:
        return OSError(f"the log of {self.folder} could not be written: {error}; {self._last()}")

    def _save_due(self) -> bool:
        if self.config.checkpoint_every is not None:
            return self.step % self.config.checkpoint_every == 0
        return time.perf_counter() - self.saved_at > SAVE_SECONDS

    def _save(self) -> None:
        """A checkpoint of now, and the run's model."""
        if self.saved == self.step:
            return
        self._tell("saving")
        weights = checkpoint.weights(self.model)
        for name, value in weights.items():
            if not bool(torch.isfinite(value).all()):
                raise NotFinite(f"`{name}` is no finite number after step {self.step}; {self._last()}")
        tensors, others = checkpoint.random_state()
        state = {
            "step": self.step,
            "steps": self.steps,
            "position": to_dict(self.position),
            "seconds": self.seconds,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "log_bytes": self._sync_log(),
            "config": to_dict(self.config),
            "model": to_dict(self.model.config),
            "data": self.dataset.info.fingerprint,
            "precision": self.precision,
            "compiled": self.compiled,
            "random": others,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        }
        groups = {"weights": weights, "optimizer": self.optimizers.state_dict(), "random": tensors}
        checkpoint.save(self.folder / "training", self.step, groups, state, keep=self.config.keep)
        self.saved, self.saved_at = self.step, time.perf_counter()
        try:
            run.save(self.model, self.folder, self.dataset.tokenizer)
        except (OSError, SafetensorError) as error:
            raise OSError(f"the model could not be written to {self.folder}: {error}; {self._last()}") from error

    def _restore(self, start: Checkpoint) -> tuple[Position, int]:
        """Takes over a checkpoint; the position in the data and the length of the log."""
        state = start.state
        if state["data"] != self.dataset.info.fingerprint:
            raise ValueError(
                f"{self.dataset.folder} is not the data that {start.path} was trained on: prepare that again"
            )
        checkpoint.restore(self.model, start.tensors("weights"))
        self.optimizers.load_state_dict(start.tensors("optimizer"))
        self.step = self.saved = start.step
        if self.config.minutes is not None:
            self.steps = state["steps"]
        self.before, self.precision, self.compiled = state["seconds"], state["precision"], state["compiled"]
        self.skipped = state.get("skipped", 0)  # not counted by the first versions
        self.skipped_in_a_row = state.get("skipped_in_a_row", 0)
        there, here = (state["torch"], state["threads"]), (torch.__version__, torch.get_num_threads())
        if there != here:
            words = "torch {} with {} threads".format
            self._tell("training", f"The run began on {words(*there)}, this is {words(*here)}: last bits may differ.")
        checkpoint.set_aside_after(self.folder / "training", start.step)
        return from_dict(Position, state["position"]), state["log_bytes"]

    def _skip(self, loss: Tensor, norm: Tensor, batch: Batch) -> None:
        """Counts an update that is left out; NotFinite where that is not wanted, or has been done too often."""
        self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
        if self.config.on_nan == "skip" and self.skipped_in_a_row < SKIPS:
            return
        names = list(dict.fromkeys(name for row in batch.documents for name in row))
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if names[8:] else "")
        again = f", as in the {SKIPS - 1} updates before, which were skipped" if self.config.on_nan == "skip" else ""
        remedy = "may help" if again else "may help, or --on-nan skip"
        raise NotFinite(
            f"the loss is {loss.item()} and the gradient's norm {norm.item()} at step {self.step + 1}{again}; the "
            f"batch's documents: {shown}; {self._last()}. A lower --learning-rate {remedy}"
        )

    def _last(self) -> str:
        """Where the last good checkpoint is."""
        if not self.saved:
            return "there is no checkpoint yet"
        return f"the last good checkpoint is {self.folder / 'training' / f'step-{self.saved:08d}'}"

    def _speed(self) -> float | None:
        return self.config.batch_tokens / median(self.durations) if self.durations else None

    def _tell(self, activity: Activity, note: str | None = None) -> None:
        left = None
        if self.steps is not None and self.durations:
            left = (self.steps - self.step) * median(self.durations)
        elif self.config.minutes is not None:
            left = max(0.0, 60 * self.config.minutes - self.seconds)
        self.report(
            Progress(
                activity=activity,
                step=self.step,
                steps=self.steps,
                loss=self.loss,
                tokens_per_second=self._speed(),
                seconds=self.seconds,
                seconds_left=left,
                peak_memory_bytes=peak_memory(),
                held_out=self.held_out,
                note=note,
            )
        )

    def _result(self, stopped_by: int | None) -> Result:
        return Result(
            step=self.step,
            held_out=None if stopped_by else self.held_out,
            seconds=self.seconds,
            tokens_per_second=self._speed() or 0.0,
            peak_memory_bytes=peak_memory(),
            skipped=self.skipped,
            stopped_by=stopped_by,
        )

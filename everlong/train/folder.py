"""The run folder as a training uses it: what is the training's there, how it was set up, and who is at work in it."""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from everlong.config import to_dict
from everlong.data import disk, tokenizer
from everlong.data.loader import Dataset
from everlong.models import run
from everlong.models.lm import ModelConfig
from everlong.train import checkpoint
from everlong.train.log import BOARD, LOG
from everlong.train.settings import TrainConfig

TRAINING = "training"
SETTINGS = Path(TRAINING) / "settings.json"
DATA = "data"  # where a source is prepared that was not
MODEL = (run.WEIGHTS, run.CONFIG, "generation_config.json", tokenizer.FILE, tokenizer.SETTINGS)


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keeps other processes from working on the same run; the lock ends with the process, however that ends.

    Raises:
        OSError: another process has it.
    """
    training = folder / TRAINING
    training.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(training, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OSError(f"another process is training into {folder}: let it end first") from None
        yield
    finally:
        os.close(descriptor)


def holds_model(folder: Path) -> bool:
    """Whether this folder holds what a training makes: a model or a checkpoint."""
    return any((folder / name).exists() for name in MODEL[:2]) or checkpoint.any_in(folder / TRAINING)


def check_free(folder: Path, *, overwrite: bool) -> None:
    """Whether a new run may be made here; with `overwrite`, in the place of another one.

    A training that has written neither a line of its log nor a checkpoint has made nothing that could be lost.

    Raises:
        ValueError: it holds a run and `overwrite` is not asked for, or what a run would replace was made by something
            else, which is never removed.
    """
    there = next((name for name in (*MODEL, LOG) if (folder / name).exists() and (folder / name).stat().st_size), None)
    if there is None and not checkpoint.any_in(folder / TRAINING):
        return
    if not (folder / SETTINGS).exists():
        there = there or "checkpoints"
        raise ValueError(f"{folder} holds {there}, which no training of its own made: choose another folder for --out")
    if not overwrite:
        raise ValueError(f"{folder} holds a run already: go on with it by --resume, or remove it by --overwrite")


def clear(folder: Path, *, keep: Path | None = None) -> None:
    """Removes what a training made, and nothing else: its settings last, so that it can be done again after a crash.

    Args:
        keep: data that is needed still, also where this training prepared it.
    """
    checkpoint.remove_all(folder / TRAINING)
    if (folder / BOARD).exists():
        shutil.rmtree(folder / BOARD)
    for name in (*MODEL, LOG):
        (folder / name).unlink(missing_ok=True)
    data = folder / DATA
    if prepared_here(folder) and data.is_dir() and not (keep and keep.samefile(data)):
        disk.remove(data)
    (folder / SETTINGS).unlink(missing_ok=True)


def prepared_here(folder: Path) -> bool:
    """Whether the training that is recorded here prepared the data in the folder itself."""
    try:
        return bool(read_settings(folder).get("prepared_here", False))
    except ValueError:  # nothing that can be read says so
        return False


def record(
    folder: Path,
    dataset: Dataset,
    shape: ModelConfig,
    settings: TrainConfig,
    *,
    prepared_here: bool,
    init: Mapping[str, str] | None,
) -> None:
    """Writes down how a training is set up, so that going on with it needs nothing else.

    Args:
        init: the run whose weights it began with, and their digest.
    """
    (folder / SETTINGS).parent.mkdir(parents=True, exist_ok=True)
    described = {
        "data": str(dataset.folder.resolve()),
        "data_fingerprint": dataset.info.fingerprint,
        "prepared_here": prepared_here,
        "init": init,
        "model": to_dict(shape),
        "train": to_dict(settings),
    }
    disk.write_json(folder / SETTINGS, described)


def read_settings(folder: Path) -> dict[str, Any]:
    """How the training of a run was set up: "data", "model", "train" and what else `record` writes.

    Raises:
        ValueError: no training was begun there, or what it wrote down is damaged.
    """
    place = folder / SETTINGS
    if not place.is_file():
        raise ValueError(
            f"{folder} holds no training to go on with: there is no {SETTINGS}. `everlong train --data SRC --mixer "
            f"NAME --out {folder}` begins one"
        )
    try:
        settings = json.loads(place.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{place} is damaged: {error}") from None
    missing = [key for key in ("data", "model", "train") if not isinstance(settings, dict) or key not in settings]
    if missing:
        raise ValueError(f"{place} is damaged: it does not say {' or '.join(missing)}")
    return dict(settings)

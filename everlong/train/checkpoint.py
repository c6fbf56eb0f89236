"""Checkpoints from which a run goes on exactly where it was, and of which one is whole at every instant.

    RUN/training/step-00000200/
        weights.safetensors  optimizer.safetensors  random.safetensors     tensors
        state.json                                                         everything else
        manifest.json                                                      size and SHA-256 of each of them

A checkpoint is written aside as `step-00000200.tmp`, brought to the disk file by file, and renamed.
"""

import contextlib
import hashlib
import json
import random
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from everlong.data.disk import digest, remove, sync

MANIFEST, STATE = "manifest.json", "state.json"
_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk."""

    path: Path
    step: int
    state: dict[str, Any]

    def tensors(self, group: str) -> dict[str, Tensor]:
        """The tensors of one group: "weights", "optimizer" or "random"."""
        return load_file(self.path / f"{group}.safetensors")


@dataclass(frozen=True)
class Found:
    """The newest whole checkpoint of a run, None where there is none, and what is wrong with newer ones."""

    checkpoint: Checkpoint | None
    damaged: tuple[str, ...]


def save(
    training: Path, step: int, groups: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], *, keep: int = 2
) -> Path:
    """Writes a checkpoint and removes all but the newest `keep`.

    Raises:
        OSError: it could not be written (a full disk, say); the ones before are untouched.
    """
    path = training / f"step-{step:08d}"
    aside = path.with_name(f"{path.name}.tmp")
    try:
        training.mkdir(parents=True, exist_ok=True)
        _sweep(training)
        aside.mkdir()
        for group, tensors in groups.items():
            save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, _file(aside, group))
        (aside / STATE).write_text(json.dumps(state), encoding="utf-8")
        manifest = {
            file.name: {"bytes": file.stat().st_size, "sha256": digest(file)} for file in sorted(aside.iterdir())
        }
        (aside / MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")
        for file in (*aside.iterdir(), aside):
            sync(file)
        if path.exists():  # a damaged one of the same step
            remove(path)
        aside.rename(path)
        sync(training)
        sync(training.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        there = _listed(training)
        rest = f"the last one there is {there[0][1]}" if there else "there is none before it"
        raise OSError(f"the checkpoint of step {step} could not be written: {error}; {rest}") from error
    for _, old in _listed(training)[keep:]:
        remove(old)
    return path


def latest(training: Path) -> Found:
    """Looks for the newest checkpoint that is whole."""
    damaged: list[str] = []
    for _, path in _listed(training):
        try:
            return Found(load(path), tuple(damaged))
        except ValueError as error:
            damaged.append(str(error))
    return Found(None, tuple(damaged))


def any_in(training: Path) -> bool:
    """Whether there is a checkpoint, whole or not."""
    return bool(_listed(training))


def load(path: Path) -> Checkpoint:
    """Opens one checkpoint after comparing every file with the manifest.

    Raises:
        ValueError: it is not whole; the file is named.
    """
    match = _NAME.fullmatch(path.name)
    if match is None or not path.is_dir():
        raise ValueError(f"{path} is no checkpoint: those are folders named like step-00000200")
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if STATE not in manifest:
            raise ValueError(f"{MANIFEST} does not list {STATE}")
        for name, expected in manifest.items():
            size = (path / name).stat().st_size
            if size != expected["bytes"]:
                raise ValueError(f"{name} has {size:,} bytes instead of {expected['bytes']:,}")
            if digest(path / name) != expected["sha256"]:
                raise ValueError(f"{name} has another SHA-256 than when it was written")
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"checkpoint {path} is damaged: {error}") from None
    return Checkpoint(path, int(match[1]), state)


def set_aside_after(training: Path, step: int) -> list[Path]:
    """Renames checkpoints of later steps to `*.damaged`, so that none of them is taken for the newest again."""
    moved = []
    for number, path in _listed(training):
        if number > step:
            target = path.with_name(f"{path.name}.damaged")
            shutil.rmtree(target, ignore_errors=True)
            moved.append(path.rename(target))
    return moved


def remove_all(training: Path) -> None:
    """Removes every checkpoint, whole or not, and what was set aside."""
    for _, path in _listed(training):
        remove(path)
    for path in training.glob("step-*.damaged"):
        remove(path)
    _sweep(training)


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The model's parameters and buffers, each storage once under its first name."""
    seen: dict[int, str] = {}
    return {
        name: value
        for name, value in model.state_dict(keep_vars=True).items()
        if seen.setdefault(id(value), name) == name
    }


def restore(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Copies weights back, bit for bit.

    Raises:
        ValueError: they are of another model.
    """
    own = weights(model)
    for name, value in own.items():
        if name not in values or values[name].shape != value.shape or values[name].dtype != value.dtype:
            there = "nothing" if name not in values else f"{values[name].dtype} {tuple(values[name].shape)}"
            raise ValueError(
                f"the checkpoint is of another model: `{name}` is {value.dtype} {tuple(value.shape)} here, "
                f"{there} there"
            )
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(values[name])


def fingerprint(model: nn.Module) -> str:
    """The SHA-256 of a model's weights, whatever files they come from."""
    everything = hashlib.sha256()
    for name, value in sorted(weights(model).items()):
        everything.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        everything.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return everything.hexdigest()


def random_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The global generators: torch's as tensors, Python's and NumPy's as JSON values."""
    tensors = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors |= {f"cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    version, words, gauss = random.getstate()
    name, key, *rest = np.random.get_state()  # noqa: NPY002 (the global generator is what is to be kept)
    return tensors, {"python": [version, list(words), gauss], "numpy": [name, np.asarray(key).tolist(), *rest]}


def set_random_state(tensors: Mapping[str, Tensor], others: Mapping[str, Any]) -> None:
    """Puts the global generators back to where they were."""
    torch.set_rng_state(tensors["cpu"])
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            if f"cuda.{i}" in tensors:
                torch.cuda.set_rng_state(tensors[f"cuda.{i}"], i)
    version, words, gauss = others["python"]
    random.setstate((version, tuple(words), gauss))
    name, key, *rest = others["numpy"]
    np.random.set_state((name, np.asarray(key, dtype=np.uint32), *rest))  # noqa: NPY002


def seed_all(seed: int) -> None:
    """Seeds the global generators: torch's, Python's and NumPy's."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % (1 << 32))  # noqa: NPY002


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """Leaves the global generators as they were found."""
    before = random_state()
    try:
        yield
    finally:
        set_random_state(*before)


def _listed(training: Path) -> list[tuple[int, Path]]:
    """The checkpoints there are, newest first."""
    entries = training.iterdir() if training.is_dir() else ()
    found = [(int(match[1]), path) for path in entries if (match := _NAME.fullmatch(path.name))]
    return sorted(found, reverse=True)


def _sweep(training: Path) -> None:
    """Removes what a process left that was killed while it wrote or removed a checkpoint."""
    for remains in training.glob("step-*.tmp*"):
        shutil.rmtree(remains, ignore_errors=True)


def _file(folder: Path, group: str) -> Path:
    return folder / f"{group}.safetensors"

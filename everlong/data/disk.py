"""Files that are whole at every instant: written aside, brought to the disk, and only then given their name.

A process may be killed between any two of these steps, and the machine may lose its power: under a file's name stands
what it held before or what it was to hold, never a part of either.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A place beside `path` to write to; what stands there at the end takes the place of `path`.

    After an error nothing is left of it, so that a full disk is no fuller than before.

    Raises:
        OSError: it could not be brought to the disk; `path` is as it was.
    """
    aside = path.with_name(f"{path.name}.tmp")
    try:
        with naming(path):
            yield aside
            sync(aside)
            aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    sync(path.parent)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors of the file system that name no file name this one: those of a full disk, above all."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


def write(path: Path, content: bytes) -> None:
    """Writes a file that is whole at every instant."""
    with replacing(path) as aside:
        aside.write_bytes(content)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Writes a JSON file that is whole at every instant."""
    write(path, (json.dumps(values, indent=2) + "\n").encode())


def remove(folder: Path) -> None:
    """Removes a folder. It loses its name first, so that a crash leaves no half of it there.

    What a crash or an error leaves is called like the folder, with `.tmp-old` behind, and is in nobody's way.
    """
    nameless = folder.with_name(f"{folder.name}.tmp-old")
    shutil.rmtree(nameless, ignore_errors=True)
    shutil.rmtree(folder.rename(nameless), ignore_errors=True)


def sync(path: Path) -> None:
    """Waits until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest(file: Path) -> str:
    """The SHA-256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

"""The record of a run: `log.jsonl` with one line a step, and the same as scalars for TensorBoard."""

import contextlib
import json
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LOG = "log.jsonl"
BOARD = Path("training") / "tensorboard"


class Log:
    """Appends to a run's log. A line is handed to the system as it is written, and is on the disk after `sync`."""

    def __init__(self, run: Path, *, length: int = 0, step: int = 0) -> None:
        """Goes on behind the first `length` bytes, which end with the line of `step`; what follows them is dropped."""
        run.mkdir(parents=True, exist_ok=True)
        # Without a buffer: what a full disk did not take is not tried once more when the file is closed.
        self._file = (run / LOG).open("ab", buffering=0)
        there = self._file.tell()
        self.missing = max(0, length - there)  # bytes of the first `length` that somebody else has removed
        self._file.truncate(_last_line(run / LOG) if self.missing else length)
        self._file.seek(0, os.SEEK_END)
        self._board = _Board(run / BOARD, step + 1)

    def write(self, row: Mapping[str, Any]) -> None:
        """One line. Every number but the step is a scalar as well.

        Raises:
            OSError: the disk did not take it.
        """
        line = (json.dumps(row) + "\n").encode()
        while line:
            line = line[self._file.write(line) :]
        self._board.write(row)

    def sync(self) -> int:
        """Puts what was written on the disk; the length of the file in bytes."""
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        """Closes the files."""
        self._file.close()
        self._board.close()


class _Board:
    """Scalars as TensorBoard reads them.

    Its own writer works in a thread, which would tell a full disk by a traceback of its own.
    """

    def __init__(self, folder: Path, step: int) -> None:
        """Takes the place of whatever was written for `step` and later ones."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder.mkdir(parents=True, exist_ok=True)
        self._event, self._summary = Event, Summary
        now = time.time()
        name = f"events.out.tfevents.{int(now)}.{socket.gethostname()}.{os.getpid()}"
        self._file = (folder / name).open("ab")
        self._records = RecordWriter(self._file)
        self._add(Event(wall_time=now, file_version="brain.Event:2"))
        self._add(Event(wall_time=now, step=step, session_log=SessionLog(status=SessionLog.START)))

    def write(self, row: Mapping[str, Any]) -> None:
        values = [
            self._summary.Value(tag=key, simple_value=value)
            for key, value in row.items()
            if isinstance(value, int | float) and key != "step"
        ]
        self._add(self._event(wall_time=time.time(), step=row["step"], summary=self._summary(value=values)))

    def _add(self, event: Any) -> None:
        self._records.write(event.SerializeToString())
        self._file.flush()

    def close(self) -> None:
        # Something waits to be written only where a `flush` has failed, which was told already.
        with contextlib.suppress(OSError):
            self._file.close()


def _last_line(file: Path) -> int:
    """Where the last whole line of a file ends."""
    return file.read_bytes().rfind(b"\n") + 1


def read(run: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's log.

    Raises:
        ValueError: there is none, or a line is no JSON.
    """
    path = Path(run) / LOG
    if not path.is_file():
        raise ValueError(f"{run} has no {LOG}: it is no run, or its training has not begun")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is no JSON: {error}") from None
    return rows

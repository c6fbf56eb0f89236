"""SIGINT and SIGTERM: either they end what runs at once, or they are noted until it is safe to stop."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

STOPPING = (signal.SIGINT, signal.SIGTERM)
Handler = Callable[[int, FrameType | None], None]


class Stopped(KeyboardInterrupt):
    """A signal ended what ran, wherever it was."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def _stop(number: int, frame: FrameType | None) -> None:
    raise Stopped(number)


@contextlib.contextmanager
def at_once() -> Iterator[None]:
    """Either signal raises `Stopped`: what is half made is cleared away, which SIGTERM by itself would not do."""
    with _handled_by(_stop):
        yield


@contextlib.contextmanager
def noted() -> Iterator[list[int]]:
    """The first signal is only put on the list; the second one raises `Stopped`."""
    caught: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if caught:
            raise Stopped(number)
        caught.append(number)

    with _handled_by(note):
        yield caught


@contextlib.contextmanager
def _handled_by(handler: Handler) -> Iterator[None]:
    """Only the main thread is told of signals; in others nothing is changed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in STOPPING}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)

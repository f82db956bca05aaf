"""Signals that ask a run to stop, which it does between two batches."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

__all__ = ["STOP_SIGNALS", "Stop", "interruptible", "stop_requests"]

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop(Exception):
    """A signal asked the run to stop; raised between two batches, when all state is whole."""

    def __init__(self, number: int) -> None:
        super().__init__(number)  # so that it can be pickled
        self.number = number

    def __str__(self) -> str:
        return signal.Signals(self.number).name


@contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM interrupts like Ctrl-C inside, and both leave the context as a `Stop`. A run that goes on inside collects its own."""
    seen: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        seen.append(number)
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGTERM)
    here = threading.current_thread() is threading.main_thread()  # only the main thread may set handlers
    try:
        if here:
            signal.signal(signal.SIGTERM, interrupt)
        yield
    except KeyboardInterrupt:
        raise Stop(seen[0] if seen else signal.SIGINT) from None
    finally:
        if here:
            signal.signal(signal.SIGTERM, before)


@contextmanager
def stop_requests(numbers: Sequence[int] = STOP_SIGNALS) -> Iterator[list[int]]:
    """Collect signals in the list that is yielded, instead of raising in the middle of a step.

    The second one is not collected: it does what it did before, for a user who does not want to wait.
    """
    seen: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield seen  # only the main thread may set handlers
        return
    previous = {number: signal.getsignal(number) for number in numbers}

    def collect(number: int, frame: FrameType | None) -> None:
        seen.append(number)
        for name, handler in previous.items():
            signal.signal(name, handler)

    try:
        for number in previous:
            signal.signal(number, collect)
        yield seen
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)

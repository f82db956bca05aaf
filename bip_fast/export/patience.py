"""A line on stderr about work that takes long, so that nobody takes it for a hang."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

__all__ = ["followed"]

T = TypeVar("T")
FIRST, NEXT = 3.0, 10.0  # seconds without a word: at the beginning, and then where stderr is no terminal


def followed(items: Sequence[T], line: str) -> Iterator[T]:
    """The items one after the other. Once that takes more than 3 seconds, ``line`` is shown, with the number of the item and of all."""
    terminal = bool(sys.stderr) and sys.stderr.isatty()
    begin, end = ("\r", "") if terminal else ("", "\n")
    due, shown = time.monotonic() + FIRST, False
    try:
        for number, item in enumerate(items, 1):
            if sys.stderr and time.monotonic() >= due:
                print(f"{begin}{line.format(number, len(items))}", end=end, file=sys.stderr, flush=True)
                due, shown = time.monotonic() + (0.2 if terminal else NEXT), True
            yield item
    finally:
        if shown and terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)

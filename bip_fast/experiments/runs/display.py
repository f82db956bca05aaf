"""Progress: one bar for the whole run on a terminal, a line every few seconds where stderr is a file or a pipe."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

__all__ = ["Display", "Lines", "clock", "make"]

NAMES = {"pretrain": "dense training", "prune": "pruning"}


class Display:
    """What a run says while it goes. This one is silent; `total` counts batches over all stages."""

    def __enter__(self) -> Display:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        return None

    def begin(self, total: int, done: int) -> None:
        """Start of the run: ``done`` of ``total`` batches were done before it was interrupted."""

    def wants(self) -> bool:
        """Whether it is time for an `update`: figures are only read from the device when somebody sees them."""
        return False

    def update(self, stage: str, epoch: str, done: int, loss: float, accuracy: float, sparsity: float) -> None:
        """State after ``done`` batches."""

    def say(self, text: str) -> None:
        """One line that stays."""


class Lines(Display):
    """A plain line every ``interval`` seconds."""

    def __init__(self, interval: float = 5.0) -> None:
        self.interval = interval
        self.last = 0.0

    def begin(self, total: int, done: int) -> None:
        self.total, self.first, self.start = total, done, time.monotonic()

    def wants(self) -> bool:
        return time.monotonic() - self.last >= self.interval

    def update(self, stage: str, epoch: str, done: int, loss: float, accuracy: float, sparsity: float) -> None:
        self.last = time.monotonic()
        left = (self.last - self.start) / max(done - self.first, 1) * (self.total - done)
        self.say(
            f"{NAMES.get(stage, stage)}: epoch {epoch}, loss {loss:.3f}, accuracy {100 * accuracy:.1f} %, "
            f"sparsity {100 * sparsity:.2f} %, {clock(left)} left"
        )

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
    """Minutes and seconds, with hours if there are some."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Bar(Display):
    """A progress bar of `rich` on stderr."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TextColumn("loss {task.fields[loss]}  accuracy {task.fields[accuracy]}  sparsity {task.fields[sparsity]}"),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
        )
        self.progress = Progress(*columns, console=Console(stderr=True), expand=True)
        self.last = 0.0

    def __enter__(self) -> Display:
        self.progress.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.progress.stop()

    def begin(self, total: int, done: int) -> None:
        self.task = self.progress.add_task("starting", total=total, completed=done, loss="-", accuracy="-", sparsity="-")

    def wants(self) -> bool:
        return time.monotonic() - self.last >= 0.2

    def update(self, stage: str, epoch: str, done: int, loss: float, accuracy: float, sparsity: float) -> None:
        self.last = time.monotonic()
        self.progress.update(
            self.task,
            completed=done,
            description=f"{NAMES.get(stage, stage)} {epoch}",
            loss=f"{loss:.3f}",
            accuracy=f"{100 * accuracy:.1f} %",
            sparsity=f"{100 * sparsity:.2f} %",
        )

    def say(self, text: str) -> None:
        self.progress.console.print(text, highlight=False, markup=False, soft_wrap=True)


def make() -> Display:
    """The display that fits stderr."""
    return Bar() if sys.stderr.isatty() else Lines()

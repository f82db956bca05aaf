"""Progress of a whole comparison: runs finished, what every run does, and the time left, which rich estimates from the epochs done."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from ..runs.display import clock
from .grid import Cell

__all__ = ["Bars", "Lines", "Progress", "make"]


class Progress:
    """What a comparison says while it goes. This one is silent; it knows how much is left. The unit is an epoch.

    Args:
        console: of rich, that the bars go to; None: nothing is drawn.
        now: a clock, in seconds.
    """

    def __init__(self, console: Any = None, now: Callable[[], float] = time.monotonic) -> None:
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Rich

        columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.fields[text]}"))
        # All samples count for the speed: runs of several kinds alternate.
        self.rich = Rich(*columns, console=console, disable=console is None, get_time=now, speed_estimate_period=float("inf"))

    def __enter__(self) -> Progress:
        self.rich.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.rich.stop()

    def begin(self, cells: Sequence[Cell], done: set[str]) -> None:
        """All runs, and the addresses of those that are finished."""
        self.left = {cell.address: float(cell.epochs) for cell in cells if cell.address not in done}
        self.epochs = max(1.0, sum(float(cell.epochs) for cell in cells))
        self.runs, self.finished, self.failures = len(cells), len(done), 0
        self.whole = self.rich.add_task("comparison", total=self.epochs, text="")
        self.rich.update(self.whole, completed=self.epochs - sum(self.left.values()))
        self._show(0.0)

    def update(self, cell: Cell, share: float, text: str, *, fresh: bool = False) -> None:
        """``share`` of a run is done; ``fresh``: it has just begun, or taken up where it was."""
        before, self.left[cell.address] = self.left[cell.address], (1 - share) * cell.epochs
        self._show(0.0 if fresh else before - self.left[cell.address])  # what was done earlier says nothing of the speed

    def finish(self, cell: Cell) -> None:
        """A run is finished."""
        self.finished += 1
        self._show(self.left.pop(cell.address, 0.0))

    def fail(self, cell: Cell, why: str) -> None:
        """A run has failed, or cannot start."""
        self.failures += 1
        self.left.pop(cell.address, None)
        self._show(0.0)

    def say(self, text: str) -> None:
        """One line that stays."""

    def _show(self, epochs: float) -> None:
        """So many more epochs are done."""
        self.rich.update(self.whole, advance=epochs)
        self.rich.update(self.whole, text=self.summary())

    @property
    def _task(self) -> Any:
        return self.rich.tasks[self.rich.task_ids.index(self.whole)]

    def summary(self) -> str:
        epochs, speed = sum(self.left.values()), self._task.speed
        failed = f", {self.failures} failed" if self.failures else ""
        left = f", {clock(epochs / speed)} left" if speed else ""
        share = 1 - epochs / self.epochs
        return f"{self.finished} of {self.runs} runs{failed}, {100 * share:.1f} % of the epochs{left}"


class Lines(Progress):
    """A plain line for every run that ends, and one every ``interval`` seconds."""

    def __init__(self, interval: float = 30.0) -> None:
        super().__init__()
        self.interval = interval
        self.last = time.monotonic()

    def update(self, cell: Cell, share: float, text: str, *, fresh: bool = False) -> None:
        super().update(cell, share, text, fresh=fresh)
        if time.monotonic() - self.last >= self.interval:
            self.say(self.summary())

    def finish(self, cell: Cell) -> None:
        super().finish(cell)
        self.say(f"{self.summary()}: finished {cell.name}")

    def fail(self, cell: Cell, why: str) -> None:
        super().fail(cell, why)
        self.say(f"failed: {cell.name}: {why}")

    def say(self, text: str) -> None:
        self.last = time.monotonic()
        print(text, file=sys.stderr, flush=True)


class Bars(Progress):
    """Bars of rich on stderr: one for the comparison, one for each run that goes on."""

    def __init__(self) -> None:
        from rich.console import Console

        super().__init__(Console(stderr=True))
        self.bars: dict[str, Any] = {}

    def update(self, cell: Cell, share: float, text: str, *, fresh: bool = False) -> None:
        if cell.address not in self.bars:
            self.bars[cell.address] = self.rich.add_task(cell.name, total=1.0, text="")
        self.rich.update(self.bars[cell.address], completed=share, text=text)
        super().update(cell, share, text, fresh=fresh)

    def finish(self, cell: Cell) -> None:
        self._drop(cell)
        super().finish(cell)

    def fail(self, cell: Cell, why: str) -> None:
        self._drop(cell)
        super().fail(cell, why)
        self.say(f"failed: {cell.name}: {why}")

    def _drop(self, cell: Cell) -> None:
        if cell.address in self.bars:
            self.rich.remove_task(self.bars.pop(cell.address))

    def say(self, text: str) -> None:
        self.rich.console.print(text, highlight=False, markup=False, soft_wrap=True)


def make() -> Progress:
    """The progress that fits stderr."""
    return Bars() if sys.stderr.isatty() else Lines()

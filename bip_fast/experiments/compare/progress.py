"""Progress of a whole comparison: runs finished, what every process does, and the time left."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from ..runs.display import clock
from .grid import Cell

__all__ = ["Lines", "Progress", "make"]


class Progress:
    """What a comparison says while it goes. This one is silent; it knows how much is left.

    The unit is an epoch. Epochs of the same data and model take the same time, which is measured on the way.
    """

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        return None

    def begin(self, cells: Sequence[Cell], done: set[str], jobs: int) -> None:
        """All runs, the addresses of those that are finished, and how many go at a time."""
        self.left = {cell.address: float(cell.epochs) for cell in cells if cell.address not in done}
        self.cells = {cell.address: cell for cell in cells}
        self.epochs = max(1.0, sum(float(cell.epochs) for cell in cells))
        self.jobs = jobs
        self.finished, self.failures = len(done), 0
        self.texts: dict[str, str] = {}
        self._began: dict[str, tuple[float, float]] = {}  # when a run began here, and the epochs it then had left
        self._speeds: dict[Any, tuple[float, float]] = {}  # epochs and seconds by kind of run

    def update(self, cell: Cell, share: float, text: str, *, fresh: bool = False) -> None:
        """``share`` of a run is done; ``fresh``: it has just begun, or taken up where it was."""
        self.left[cell.address] = (1 - share) * cell.epochs
        if fresh:
            self._began[cell.address] = time.monotonic(), self.left[cell.address]
        if text:
            self.texts[cell.address] = text

    def finish(self, cell: Cell) -> None:
        """A run is finished."""
        self.left.pop(cell.address, None)
        self.texts.pop(cell.address, None)
        self.finished += 1
        if cell.address in self._began:
            began, epochs = self._began.pop(cell.address)
            before = self._speeds.get(self._kind(cell), (0.0, 0.0))
            self._speeds[self._kind(cell)] = before[0] + epochs, before[1] + time.monotonic() - began

    def fail(self, cell: Cell, why: str) -> None:
        """A run has failed, or cannot start."""
        for kept in (self.left, self.texts, self._began):
            kept.pop(cell.address, None)
        self.failures += 1

    def say(self, text: str) -> None:
        """One line that stays."""

    def share(self) -> float:
        """Of all epochs that are done."""
        return 1 - sum(self.left.values()) / self.epochs

    def seconds_left(self) -> float | None:
        """Until the last run is finished; None while nothing is known."""
        speeds = {kind: list(speed) for kind, speed in self._speeds.items()}
        for address, (began, epochs) in self._began.items():
            known = speeds.setdefault(self._kind(self.cells[address]), [0.0, 0.0])
            known[0] += epochs - self.left[address]
            known[1] += time.monotonic() - began
        per_epoch = {kind: seconds / epochs for kind, (epochs, seconds) in speeds.items() if epochs > 0.5}
        if not per_epoch:
            return None
        usual = sum(per_epoch.values()) / len(per_epoch)
        all_left = sum(epochs * per_epoch.get(self._kind(self.cells[address]), usual) for address, epochs in self.left.items())
        return all_left / max(1, min(self.jobs, len(self.left)))

    def _kind(self, cell: Cell) -> Any:
        s = cell.settings
        return s.data, s.train_images, s.stride, s.model, s.width, s.batch_size

    def summary(self) -> str:
        seconds = self.seconds_left()
        failed = f", {self.failures} failed" if self.failures else ""
        left = "" if seconds is None else f", {clock(seconds)} left"
        return f"{self.finished} of {len(self.cells)} runs{failed}, {100 * self.share():.1f} % of the epochs{left}"


class Lines(Progress):
    """A plain line for every run that ends, and one every ``interval`` seconds."""

    def __init__(self, interval: float = 30.0) -> None:
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
    """Bars of `rich` on stderr: one for the comparison, one for each run that goes on."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Rich

        columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.fields[text]}"))
        self.rich = Rich(*columns, console=Console(stderr=True))
        self.bars: dict[str, Any] = {}

    def __enter__(self) -> Progress:
        self.rich.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.rich.stop()

    def begin(self, cells: Sequence[Cell], done: set[str], jobs: int) -> None:
        super().begin(cells, done, jobs)
        self.whole = self.rich.add_task("comparison", total=1.0, text=self.summary())

    def update(self, cell: Cell, share: float, text: str, *, fresh: bool = False) -> None:
        super().update(cell, share, text, fresh=fresh)
        if cell.address not in self.bars:
            self.bars[cell.address] = self.rich.add_task(cell.name, total=1.0, text="")
        self.rich.update(self.bars[cell.address], completed=share, text=text)
        self._show()

    def finish(self, cell: Cell) -> None:
        super().finish(cell)
        self._drop(cell)

    def fail(self, cell: Cell, why: str) -> None:
        super().fail(cell, why)
        self._drop(cell)
        self.say(f"failed: {cell.name}: {why}")

    def _drop(self, cell: Cell) -> None:
        if cell.address in self.bars:
            self.rich.remove_task(self.bars.pop(cell.address))
        self._show()

    def _show(self) -> None:
        self.rich.update(self.whole, completed=self.share(), text=self.summary())

    def say(self, text: str) -> None:
        self.rich.console.print(text, highlight=False, markup=False, soft_wrap=True)


def make() -> Progress:
    """The progress that fits stderr."""
    return Bars() if sys.stderr.isatty() else Lines()

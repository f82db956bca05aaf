"""A comparison on its way: which cells are finished, which are to do, what failed; and the way to run them one after another.

The files in the run folders alone decide what is finished. So whatever is killed at any moment, the same command goes on where every run
stood. `cluster` runs cells at the same time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .. import ranks
from ..runs.folder import RunFolder, snapshot_name
from ..runs.signals import interruptible
from .cell import CellTask, finished, run_cell
from .grid import Cell, Grid
from .progress import Progress

__all__ = ["Comparison", "follow", "run_here"]


@dataclass
class Comparison:
    """A grid on its way.

    Args:
        grid: what to run.
        out: folder of the run folders.
        data_dir: of the data sets.
        device: name of the device of all runs.
        shown: tells a person how far it is.
        after_cell: called when another run is finished.

    Attributes:
        failed: why runs failed, or could not start, by address.
        waiting: runs that are not finished, the longest way to the end first, and every run after the one it starts from.
    """

    grid: Grid
    out: Path
    data_dir: Path | None
    device: str
    shown: Progress
    after_cell: Callable[[], None] = lambda: None
    failed: dict[str, str] = field(default_factory=dict)
    waiting: list[Cell] = field(default_factory=list)
    _finished: set[str] = field(default_factory=set)

    def folder(self, cell: Cell) -> Path:
        return self.out / cell.folder

    def is_finished(self, cell: Cell) -> bool:
        """Whether it has all that is asked of it, in whole files."""
        folder, snapshots = self.folder(cell), self.grid.snapshots.get(cell.address, ())
        if cell.address not in self._finished and finished(folder, snapshots):
            if RunFolder(folder).damaged(snapshots):
                return False
            self._finished.add(cell.address)
        return cell.address in self._finished

    def begin(self) -> None:
        """Look at all folders, and set damaged files aside."""
        self._discard_damaged()
        cells = list(self.grid.cells.values())
        to_do = [cell for cell in cells if not self.is_finished(cell)]
        urgency = self._urgencies()
        self.waiting = sorted(to_do, key=lambda cell: -urgency[cell.address])
        self.shown.begin(cells, {cell.address for cell in cells} - {cell.address for cell in to_do})

    def _discard_damaged(self) -> None:
        """Set damaged files aside. Snapshots are made again beside a finished run. For any other file the whole run is done again, so its
        report is set aside as well. What an earlier call has set aside goes where all is whole now."""
        for cell in self.grid.cells.values():
            folder = RunFolder(self.folder(cell))
            snapshots = self.grid.snapshots.get(cell.address, ())
            if folder.finished and (damaged := folder.damaged(snapshots)):
                kept = damaged.keys() <= {folder.path / snapshot_name(epoch) for epoch in snapshots}
                self.shown.say(f"{cell.folder}: {', '.join(damaged.values())}: {'made' if kept else 'run'} again")
                for path in damaged.keys() | (set() if kept else {folder.path / "report.json"}):
                    folder.set_aside(path)
            elif folder.finished:
                folder.remove_set_aside()

    def _urgencies(self) -> dict[str, int]:
        """Epochs of every run and of the longest chain of runs that start from it."""
        urgency: dict[str, int] = {}
        for cell in reversed(list(self.grid.cells.values())):  # a run stands after the one it starts from
            urgency[cell.address] = max(cell.epochs, 1) + urgency.get(cell.address, 0)
            if cell.parent is not None:
                urgency[cell.parent.address] = max(urgency.get(cell.parent.address, 0), urgency[cell.address])
        return urgency

    def task(self, cell: Cell, device: str, alone: bool) -> CellTask:
        """What a process has to know to run it."""
        parent, dense = (self.folder(c) if c is not None else None for c in (cell.parent, cell.dense))
        snapshots = frozenset(self.grid.snapshots.get(cell.address, ()))
        return CellTask(cell.address, cell.settings, self.folder(cell), parent, dense, cell.start, snapshots, self.data_dir, device, alone)

    def heard(self, kind: str, address: str, what: object) -> None:
        """Pass on what a run tells (`cell.Tell`)."""
        cell = self.grid.cells[address]
        if kind == "note":
            self.shown.say(f"{cell.folder}: {what}")
        elif kind == "begin":
            self.shown.update(cell, float(str(what)), "", fresh=True)
        elif isinstance(what, tuple):
            self.shown.update(cell, *what)

    def ended(self, cell: Cell, why: str | None) -> None:
        """A run came to its end: ``why`` it failed, or None. Runs that start from one that failed are left out."""
        if why is None and not self.is_finished(cell):
            why = "it ended, but its folder is not complete"
        if why is None:
            self.shown.finish(cell)
            self.after_cell()
            return
        self._fail(cell, why)
        for other in self.waiting:
            if other.address not in self.failed and any(ancestor.address == cell.address for ancestor in other.ancestors()):
                self._fail(other, f"it starts from {cell.folder}, which failed")

    def _fail(self, cell: Cell, why: str) -> None:
        self.failed[cell.address] = why
        self.shown.fail(cell, why)


def run_here(comparison: Comparison) -> None:
    """Run all that is not finished in this process, one after another. A process that is killed loses at most a minute of one run.

    Of several ranks the first calls this and the others `follow`: all train in every run, and only the first knows of the rest.

    Raises:
        Stop: a signal came; the run has saved where it stands.
    """

    def tell(kind: str, address: str, what: object) -> bool:
        comparison.heard(kind, address, what)
        return False

    threads = torch.get_num_threads()
    try:
        with interruptible(), comparison.shown:
            comparison.begin()
            for cell in comparison.waiting:
                if cell.address not in comparison.failed:
                    task = ranks.broadcast_object(comparison.task(cell, comparison.device, alone=True))
                    comparison.ended(cell, run_cell(task, tell))
            ranks.broadcast_object(None)
    finally:
        torch.set_num_threads(threads)


def follow() -> None:
    """Train in the runs of rank 0 until there are no more.

    Raises:
        Stop: as from `run_here`.
    """
    nothing: CellTask | None = None
    with interruptible():
        while (task := ranks.broadcast_object(nothing)) is not None:
            run_cell(task, lambda kind, address, what: False)

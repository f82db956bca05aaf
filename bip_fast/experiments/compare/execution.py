"""`bip-fast compare`: the runs of a grid in several processes, then tables and pictures of all that is finished.

Each process runs one cell at a time; cells wait for the one they start from, and those that most others wait for come first. Killed at any
moment, the same command goes on where every run stood; and a run whose process was stopped or killed goes on in another one.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from ..runs.folder import RunFolder, snapshot_name
from ..runs.signals import Stop, stop_requests
from .grid import Cell, Grid
from .progress import Progress
from .worker import Order, finished, work

__all__ = ["Comparison"]

ATTEMPTS = 2  # of a run whose process is stopped or killed by somebody else


@dataclass
class _Slot:
    """A process, and what it is doing."""

    process: BaseProcess
    pipe: Connection
    cell: Cell | None = None


@dataclass
class Comparison:
    """A grid on its way.

    Args:
        grid: what to run.
        out: folder of the run folders.
        data_dir: of the data sets.
        device: name of the device of all runs.
        jobs: runs at the same time.
        shown: tells a person how far it is.
        after_cell: called when another run is finished.
    """

    grid: Grid
    out: Path
    data_dir: Path | None
    device: str
    jobs: int
    shown: Progress
    after_cell: Callable[[], None] = lambda: None
    failed: dict[str, str] = field(default_factory=dict)
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

    def _discard_damaged(self) -> None:
        """Set aside what is damaged. Snapshots are made again beside a finished run; for anything else it runs again, so its report
        goes as well."""
        for cell in self.grid.cells.values():
            folder = RunFolder(self.folder(cell))
            snapshots = self.grid.snapshots.get(cell.address, ())
            if folder.finished and (damaged := folder.damaged(snapshots)):
                kept = damaged.keys() <= {folder.path / snapshot_name(epoch) for epoch in snapshots}
                self.shown.say(f"{cell.folder}: {', '.join(damaged.values())}: {'made' if kept else 'run'} again")
                for path in damaged.keys() | (set() if kept else {folder.path / "report.json"}):
                    folder.set_aside(path)

    def run(self) -> None:
        """Run all that is not finished. Runs that fail, and those that start from them, are left out: `failed` says why.

        Raises:
            Stop: a signal came; every run has saved where it stands.
        """
        self._discard_damaged()
        self._done = {address for address, cell in self.grid.cells.items() if self.is_finished(cell)}
        self._waiting = {address: cell for address, cell in self.grid.cells.items() if address not in self._done}
        self._urgency = self._urgencies()
        self._slots: list[_Slot] = []
        self._lost_processes: Counter[str] = Counter()
        with stop_requests() as signals, self.shown:
            self.shown.begin(list(self.grid.cells.values()), self._done, self.jobs)
            try:
                while self._waiting or any(slot.cell for slot in self._slots):
                    if signals:
                        self._stop()
                        raise Stop(signals[0])
                    self._give_orders()
                    self._check_nothing_is_forgotten()
                    self._listen()
            finally:
                for slot in self._slots:
                    slot.pipe.close()
                    if slot.process.is_alive() and slot.cell is not None:
                        slot.process.terminate()

    def _urgencies(self) -> dict[str, int]:
        """Epochs of the longest way through the runs that wait for a run, itself included."""
        urgency: dict[str, int] = {}
        for cell in reversed(list(self.grid.cells.values())):  # a run stands after the one it starts from
            own = cell.epochs + urgency.get(cell.address, 0)
            urgency[cell.address] = own
            if cell.parent is not None:
                urgency[cell.parent.address] = max(urgency.get(cell.parent.address, 0), own)
        return urgency

    def _ready(self) -> Cell | None:
        ready = [cell for cell in self._waiting.values() if cell.parent is None or cell.parent.address in self._done]
        return max(ready, key=lambda cell: self._urgency[cell.address], default=None)

    def _give_orders(self) -> None:
        while (cell := self._ready()) is not None:
            slot = next((slot for slot in self._slots if slot.cell is None), None)
            if slot is None:
                if len(self._slots) >= self.jobs:
                    return
                slot = self._start_process()
            parent, dense = (self.folder(c) if c is not None else None for c in (cell.parent, cell.dense))
            snapshots = self.grid.snapshots.get(cell.address, set())
            slot.cell = self._waiting.pop(cell.address)
            with suppress(OSError):  # the process is gone, as `_listen` will find
                slot.pipe.send(Order(cell.address, cell.settings, self.folder(cell), parent, dense, cell.start, frozenset(snapshots)))

    def _check_nothing_is_forgotten(self) -> None:
        running = {slot.cell.address for slot in self._slots if slot.cell is not None}
        known = self._done | self.failed.keys() | self._waiting.keys() | running
        if known != self.grid.cells.keys() or (self._waiting and not running):
            raise RuntimeError(f"runs that nothing leads to: {sorted(self.grid.cells.keys() - self._done - self.failed.keys() - running)}")

    def _start_process(self) -> _Slot:
        # Spawned: threads and CUDA do not survive a fork. No daemon: those may not have children, and images are loaded by some.
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=work, args=(theirs, self.data_dir, self.device, self.jobs == 1))
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # which the child inherits: Ctrl-C is for this process alone
        try:
            process.start()
        finally:
            signal.signal(signal.SIGINT, before)
        theirs.close()
        self._slots.append(_Slot(process, ours))
        return self._slots[-1]

    def _listen(self) -> None:
        """Take what the processes have to say, for at most a second."""
        by_pipe = {slot.pipe: slot for slot in self._slots}
        for pipe in wait(list(by_pipe), timeout=1.0):
            slot = by_pipe[pipe]  # type: ignore[index]
            try:
                kind, address, what = slot.pipe.recv()
            except (EOFError, OSError):
                self._lost(slot)
                continue
            cell = self.grid.cells[address]
            if kind in ("begin", "progress"):
                share, text = what if kind == "progress" else (what, "")
                self.shown.update(cell, share, text, fresh=kind == "begin")
                continue
            if kind == "note":
                self.shown.say(f"{cell.folder}: {what}")
                continue
            slot.cell = None
            if kind == "done" and not self.is_finished(cell):
                self._fail(cell, "it ended, but its folder is not complete")
            elif kind == "done":
                self._done.add(address)
                self.shown.finish(cell)
                self.after_cell()
            else:
                self._fail(cell, str(what))

    def _lost(self, slot: _Slot) -> None:
        """A process is gone: stopped, killed, or out of memory. Its run goes on in another one, a few times."""
        slot.process.join()
        self._slots.remove(slot)
        if slot.cell is None:
            return
        cell, ended = slot.cell, f"its process ended with exit code {slot.process.exitcode}"
        self._lost_processes[cell.address] += 1
        if self._lost_processes[cell.address] < ATTEMPTS:
            self.shown.say(f"{cell.folder}: {ended}; another one goes on with it")
            self._waiting[cell.address] = cell
        else:
            self._fail(cell, f"{ended}, {ATTEMPTS} times; the next start continues it")

    def _fail(self, cell: Cell, why: str) -> None:
        self.failed[cell.address] = why
        self.shown.fail(cell, why)
        for other in list(self._waiting.values()):
            if any(ancestor.address == cell.address for ancestor in other.ancestors()):
                del self._waiting[other.address]
                self.failed[other.address] = f"it starts from {cell.folder}, which failed"
                self.shown.fail(other, self.failed[other.address])

    def _stop(self) -> None:
        """Ask every process to save and stop, and wait for them. A second signal ends this one and leaves the last checkpoints."""
        self.shown.say("stopping: every run saves where it stands")
        for slot in self._slots:
            if slot.cell is not None:
                slot.process.terminate()
        for slot in self._slots:
            while slot.cell is not None:
                try:
                    kind, _, _ = slot.pipe.recv()
                except (EOFError, OSError):  # it has stopped
                    slot.cell = None
                    continue
                if kind in ("done", "failed"):
                    slot.cell = None

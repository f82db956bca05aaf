"""A process that runs one cell of a comparison after another, and tells its parent how far it is.

Ctrl-C reaches only the parent, which asks it to stop with one SIGTERM: it saves where the run stands, and ends. A parent that is gone
counts as one. Data sets stay loaded from cell to cell.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import shutil
import signal
import threading
import time
import traceback
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ...errors import UserError, one_line
from ..data.parts import AnyData
from ..data.sources import load as load_data
from ..runs import display
from ..runs.folder import DamagedCheckpoint, RunFolder, snapshot_name
from ..runs.resolve import changed
from ..runs.signals import Stop
from ..settings import Settings

__all__ = ["Order", "finished", "work"]

GRACE = 60.0  # seconds in which a process has to save and end, whose parent is gone


class Order(NamedTuple):
    """A run to do: into ``folder``, from the networks in the folders ``parent``, of sparsity ``start``, and ``dense``."""

    address: str
    settings: Settings
    folder: Path
    parent: Path | None
    dense: Path | None
    start: float
    snapshots: Collection[int]


def finished(folder: Path, snapshots: Collection[int]) -> bool:
    """Whether the run in ``folder`` has all that is asked of it."""
    return RunFolder(folder).finished and all((folder / snapshot_name(epoch)).is_file() for epoch in snapshots)


class _Telling(display.Display):
    """Sends (kind, address, what) to the parent."""

    def __init__(self, pipe: Connection, address: str) -> None:
        self.pipe, self.address = pipe, address
        self.last = 0.0

    def begin(self, total: int, done: int) -> None:
        self.total = max(total, 1)
        self._tell("begin", done / self.total)

    def wants(self) -> bool:
        return time.monotonic() - self.last >= 0.5

    def update(self, stage: str, epoch: str, done: int, loss: float, accuracy: float, sparsity: float) -> None:
        self.last = time.monotonic()
        self._tell("progress", (done / self.total, f"{stage} {epoch}, loss {loss:.3f}, accuracy {100 * accuracy:.1f} %"))

    def note(self, text: str) -> None:
        """A line that the parent shows."""
        self._tell("note", text)

    def _tell(self, kind: str, what: object) -> None:
        with suppress(OSError):  # the parent is gone, as `end_with_parent` sees
            self.pipe.send((kind, self.address, what))


def end_with_parent(grace: float = GRACE) -> None:
    """Wait until the parent is gone, then ask this process to save and stop, and end it if it cannot within ``grace`` seconds, in a model
    that is busy or hangs."""
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(grace)
        os.kill(os.getpid(), signal.SIGKILL)


def work(pipe: Connection, data_dir: Path | None, device_name: str, alone: bool) -> None:
    """Take orders from ``pipe`` until it closes; ``alone``: no other process does."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    device = torch.device(device_name)
    load = functools.lru_cache(maxsize=2)(load_data)
    while True:
        try:
            order: Order = pipe.recv()
        except (EOFError, OSError):
            return
        torch.set_num_threads(order.settings.threads or 1)
        answer: tuple[str, str, str | None]
        try:
            _run(order, load(order.settings.data, data_dir), device, _Telling(pipe, order.address), alone)
            answer = ("done", order.address, None)
        except Stop:  # the end of the pipe says so
            return
        except UserError as error:
            answer = ("failed", order.address, str(error))
        except Exception as error:  # of the user's model, or a defect: the other runs go on
            where = traceback.extract_tb(error.__traceback__)[-1]
            answer = ("failed", order.address, f"{one_line(error, 300, named=True)} ({Path(where.filename).name}:{where.lineno})")
        try:
            pipe.send(answer)
        except OSError:
            return


def _run(order: Order, loaded: AnyData, device: torch.device, shown: _Telling, alone: bool) -> None:
    from ..runs.job import Job

    settings = order.settings
    if order.parent is not None:
        paths = {"checkpoint": str(order.parent / "model.safetensors")}
        if settings.rewind not in (None, "lr") and order.dense is not None:
            epoch = 0 if settings.rewind == "init" else settings.rewind
            paths["rewind_checkpoint"] = str(order.dense / snapshot_name(str(epoch)))
        settings = changed(settings, **paths)
    options: dict[str, Any] = {"start": order.start, "score_start": False, "alone": alone, "stop_on": [signal.SIGTERM]}

    def resumed(job: Job) -> Job | None:
        """The job where its checkpoint stands; None if that is damaged, which is then set aside."""
        try:
            job.resume()
        except DamagedCheckpoint as error:
            shown.note(f"{error.why}; it starts afresh")
            job.folder.set_aside(error.path)
            return None
        return job

    def go(folder: RunFolder, snapshots: Collection[int], until: int | None = None) -> None:
        new = functools.partial(Job, settings, folder, loaded, device, shown, snapshots=snapshots, until=until, **options)
        same = folder.began_with(settings)
        if folder.begun and not same:
            shown.note("began with other settings; it starts afresh")
        job = resumed(new()) if same else None
        if job is None:  # and what one that could not resume had on the device is free
            job = new()
            job.start()
            folder.open(settings, overwrite=True)
        job.run()

    with _held(order.folder, shown) as folder:  # first of all: whoever had it may have finished the run
        if not folder.finished:
            go(folder, order.snapshots)
        (folder.path / "checkpoint.pt").unlink(missing_ok=True)
        missing = sorted(epoch for epoch in order.snapshots if not (folder.path / snapshot_name(epoch)).is_file())
        if missing:  # another file asks for them: trained again beside the finished run, as far as they go
            with _held(folder.path / f"until-{'-'.join(map(str, missing))}", shown) as beside:
                go(beside, missing, until=missing[-1])
                for epoch in missing:
                    os.replace(beside.path / snapshot_name(epoch), folder.path / snapshot_name(epoch))
                shutil.rmtree(beside.path)


@contextmanager
def _held(path: Path, shown: _Telling) -> Iterator[RunFolder]:
    """The folder, made where it is none, when no other process has it any more."""
    folder = RunFolder(path, patience=GRACE + 30, say=shown.note)
    try:
        folder.make()
        folder.lock()
        yield folder
    finally:
        folder.release()

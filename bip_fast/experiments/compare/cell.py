"""One cell of a comparison, run in this process. Nothing, a part or all of it may be done already in its folder."""

from __future__ import annotations

import functools
import os
import signal
import time
import traceback
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from ...errors import UserError, one_line
from .. import ranks
from ..data.parts import AnyRead
from ..data.sources import load
from ..runs.display import Display
from ..runs.folder import DamagedCheckpoint, RunFolder, snapshot_name
from ..runs.job import Job
from ..runs.resolve import changed
from ..runs.signals import Stop
from ..settings import Settings

__all__ = ["CellTask", "Tell", "finished", "run_cell"]

PATIENCE = 90.0  # seconds to wait for a process that has the folder, because it was lost and is still saving

Tell = Callable[[str, str, object], bool]  # (kind, address, what) -> whether the run is asked to save and stop
_load = functools.lru_cache(maxsize=2)(load)  # data sets stay loaded from cell to cell


class CellTask(NamedTuple):
    """A cell, with all that another process has to know.

    Args:
        folder: of the run.
        parent: folder of the run whose network it starts from, which has the sparsity ``start``.
        dense: folder of the dense run, whose early weights it may rewind to.
        snapshots: epochs of dense training whose weights other cells want.
        alone: whether no other run uses the device at the same time.
    """

    address: str
    settings: Settings
    folder: Path
    parent: Path | None
    dense: Path | None
    start: float
    snapshots: Collection[int]
    data_dir: Path | None
    device: str
    alone: bool


def finished(folder: Path, snapshots: Collection[int]) -> bool:
    """Whether the run in ``folder`` has all that is asked of it."""
    return RunFolder(folder).finished and all((folder / snapshot_name(epoch)).is_file() for epoch in snapshots)


class _Telling(Display):
    """Tells how far the run is. When the answer is to stop, it sends this process the signal at which the run saves and ends."""

    def __init__(self, tell: Tell, address: str) -> None:
        self.told, self.address = tell, address
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
        """A line that stays, with the name of the run."""
        self._tell("note", text)

    def _tell(self, kind: str, what: object) -> None:
        if self.told(kind, self.address, what):
            os.kill(os.getpid(), signal.SIGTERM)


def run_cell(task: CellTask, tell: Tell) -> str | None:
    """Run it to its end, with as many threads as its settings say.

    Returns:
        None, or why it failed.

    Raises:
        Stop: this process was asked to stop; the run has saved where it stands.
        Exception: it failed on some of several ranks, and the others cannot go on.
    """
    torch.set_num_threads(task.settings.threads or 1)
    try:
        _run(task, _load(task.settings.data, task.data_dir), torch.device(task.device), _Telling(tell, task.address))
    except Stop:
        raise
    except Exception as error:
        if not ranks.all_failed():
            raise
        if isinstance(error, UserError):
            return str(error)
        # of the user's model, or a defect: the other runs go on
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"{one_line(error, 300, named=True)} ({Path(where.filename).name}:{where.lineno})"
    return None


def _run(task: CellTask, loaded: AnyRead, device: torch.device, shown: _Telling) -> None:
    settings = task.settings
    if task.parent is not None:
        paths = {"checkpoint": str(task.parent / "model.safetensors")}
        if settings.rewind not in (None, "lr") and task.dense is not None:
            epoch = 0 if settings.rewind == "init" else settings.rewind
            paths["rewind_checkpoint"] = str(task.dense / snapshot_name(str(epoch)))
        settings = changed(settings, **paths)

    def go(folder: RunFolder, snapshots: Collection[int], until: int | None = None) -> None:
        def new() -> Job:
            return Job(
                settings,
                folder,
                loaded,
                device,
                shown,
                snapshots=snapshots,
                until=until,
                start=task.start,
                score_start=False,
                alone=task.alone,
            )

        begun, same = ranks.broadcast_object((folder.begun, folder.began_with(settings)))
        if begun and not same:
            shown.note("began with other settings; it starts afresh")
        job = _resumed(new(), shown) if same else None
        if job is None:  # the memory of a job that could not resume is free again
            job = new()
            job.start()
            folder.open(settings, overwrite=True)
        job.run()

    with _held(task.folder, shown) as folder:  # before anything else: the process that had it may have finished the run
        if not ranks.broadcast_object(folder.finished):
            go(folder, task.snapshots)
        folder.remove_checkpoint()
        missing = ranks.broadcast_object(sorted(epoch for epoch in task.snapshots if not (folder.path / snapshot_name(epoch)).is_file()))
        if missing:  # another file asks for them: trained again beside the finished run, as far as they go
            with _held(folder.path / f"until-{'-'.join(map(str, missing))}", shown) as beside:
                go(beside, missing, until=missing[-1])
                folder.take(missing, beside.path)


def _resumed(job: Job, shown: _Telling) -> Job | None:
    """The job where its checkpoint stands; None if that is damaged for any rank, and it is then set aside."""
    why = None
    try:
        job.resume()
    except DamagedCheckpoint as error:
        why = error.why
    [anywhere] = ranks.all_reduce_max(why is not None)  # all have read it now
    if not anywhere:
        return job
    shown.note(f"{why or 'checkpoint.pt cannot be read by another process'}; it starts afresh")
    job.folder.set_aside(job.folder.path / "checkpoint.pt")
    return None


@contextmanager
def _held(path: Path, shown: _Telling) -> Iterator[RunFolder]:
    """Make the folder if there is none, and hold it as soon as no other process does."""
    folder = RunFolder(path, patience=PATIENCE, say=shown.note)
    try:
        folder.make()
        folder.lock()
        yield folder
    finally:
        folder.release()

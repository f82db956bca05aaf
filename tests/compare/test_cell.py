"""A cell of a comparison in this process: what it does where a folder already has something."""

import errno
import json
from dataclasses import replace

import pytest
import torch
from compare_runs import SHORT, unreadable, written

from bip_fast.errors import UserError
from bip_fast.experiments.compare import cell, grid
from bip_fast.experiments.data import sources
from bip_fast.experiments.runs.folder import RunFolder
from bip_fast.experiments.runs.signals import Stop


class Listener:
    """Keeps what the run tells."""

    def __init__(self):
        self.heard = []

    def __call__(self, kind, address, what):
        self.heard.append((kind, what))
        return False

    @property
    def notes(self):
        return [what for kind, what in self.heard if kind == "note"]


@pytest.fixture
def task(tmp_path):
    """Of a dense run of one epoch that nothing has begun."""
    (only,) = grid.read(written(tmp_path, SHORT + "  dense: {epochs: 0}")).cells.values()
    return cell.CellTask(only.address, only.settings, tmp_path / "run", None, None, 0.0, frozenset(), None, "cpu", True)


def do(task, tell=None):
    cell._run(task, sources.load("digits"), torch.device("cpu"), cell._Telling(tell or Listener(), task.address))


def begin(task, checkpoint):
    task.folder.mkdir()
    (task.folder / "config.json").write_text(json.dumps(task.settings.as_dict()))
    (task.folder / "checkpoint.pt").write_bytes(checkpoint)


MACHINE = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB"),
    RuntimeError("CUDA error: unspecified launch failure"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    MemoryError(),
    OSError(errno.EMFILE, "Too many open files"),
]


@pytest.mark.parametrize("where", ["torch.load", "bip_fast.experiments.runs.job.load_into"])
@pytest.mark.parametrize("error", MACHINE, ids=repr)
def test_an_error_of_the_machine_leaves_the_checkpoint(task, monkeypatch, where, error):
    def fail(*_, **__):
        raise error

    begin(task, b"kept")
    if where != "torch.load":
        monkeypatch.setattr(torch, "load", lambda *_, **__: {"model": {}})
    monkeypatch.setattr(where, fail)
    with pytest.raises(type(error)):
        do(task)
    assert (task.folder / "checkpoint.pt").read_bytes() == b"kept"
    assert not (task.folder / "report.json").exists()


def test_settings_that_cannot_be_read_are_not_other_ones(task, monkeypatch):
    begin(task, b"kept")
    unreadable(monkeypatch, task.folder / "config.json")
    with pytest.raises(UserError, match=r"cannot read .*config\.json: Too many open files"):
        do(task)
    assert (task.folder / "checkpoint.pt").read_bytes() == b"kept"


def test_a_damaged_checkpoint_is_set_aside(task):
    begin(task, b"half of a file")
    listener = Listener()
    do(task, listener)
    (note,) = listener.notes
    assert note.startswith("checkpoint.pt is damaged (")
    assert note.endswith("); it starts afresh")
    assert (task.folder / "checkpoint.pt.damaged").read_bytes() == b"half of a file"
    assert cell.finished(task.folder, ())
    assert not (task.folder / "checkpoint.pt").exists()


def test_a_run_that_another_process_finishes_meanwhile_is_left_as_it_is(task, monkeypatch):
    """The other one has the folder when this one comes, with a checkpoint and without a report."""
    do(task)
    report = task.folder / "report.json"
    contents = report.read_bytes()
    report.unlink()
    (task.folder / "checkpoint.pt").write_bytes(b"of the other one")
    other = RunFolder(task.folder)
    other.lock()
    note = cell._Telling.note

    def end(said):
        report.write_bytes(contents)
        other.release()

    monkeypatch.setattr(cell._Telling, "note", lambda self, text: (note(self, text), end(text)))
    before = {path.name: path.stat().st_mtime_ns for path in task.folder.glob("*.safetensors")}
    listener = Listener()
    do(task, listener)
    assert listener.notes == ["in use by another run, and waits for that to end"]
    assert report.read_bytes() == contents
    assert {path.name: path.stat().st_mtime_ns for path in task.folder.glob("*.safetensors")} == before
    assert not (task.folder / "checkpoint.pt").exists()


def test_a_run_removes_its_checkpoint_while_it_has_the_folder(task, monkeypatch):
    seen = []

    def release(self):
        seen.append((self._lock.is_locked, (task.folder / "checkpoint.pt").exists()))

    monkeypatch.setattr(RunFolder, "release", release)
    do(task)
    assert seen == [(True, False)]


def test_it_saves_and_stops_when_it_is_told_to(task):
    """What a run hears as the answer to its report."""
    with pytest.raises(Stop):
        cell.run_cell(task, lambda kind, address, what: kind == "begin")
    assert not cell.finished(task.folder, ())
    assert cell.run_cell(task, Listener()) is None
    assert cell.finished(task.folder, ())


def test_it_saves_the_batch_at_which_it_hears_that_it_shall_stop(task, monkeypatch):
    """The answer to a report in the middle of an epoch, which is no moment to save otherwise."""
    monkeypatch.setattr(cell._Telling, "wants", lambda self: True)
    longer = task._replace(settings=replace(task.settings, batch_size=50))  # four batches
    with pytest.raises(Stop):
        cell.run_cell(longer, lambda kind, address, what: kind == "progress")
    assert RunFolder(task.folder).load_checkpoint()["cursor"]["step"] == 1

"""A run of a comparison in this process: what it does where a folder already has something."""

import errno
import json

import pytest
import torch
from compare_runs import SHORT, unreadable, written

from bip_fast.commands import environment
from bip_fast.errors import UserError
from bip_fast.experiments.compare import grid, worker
from bip_fast.experiments.data import sources
from bip_fast.experiments.runs import folder
from bip_fast.experiments.runs.folder import RunFolder

if missing := environment.missing_extras():
    pytest.skip(f"needs {', '.join(missing)}: {environment.INSTALL}", allow_module_level=True)


class Pipe:
    """Keeps what the run says."""

    def __init__(self):
        self.said = []

    def send(self, message):
        self.said.append(message)

    @property
    def notes(self):
        return [what for kind, _, what in self.said if kind == "note"]


@pytest.fixture
def order(tmp_path):
    """Of a dense run of one epoch that nothing has begun."""
    (cell,) = grid.read(written(tmp_path, SHORT + "  dense: {epochs: 0}")).cells.values()
    return worker.Order(cell.address, cell.settings, tmp_path / "run", None, None, 0.0, frozenset())


def do(order, pipe=None):
    worker._run(order, sources.load("digits"), torch.device("cpu"), worker._Telling(pipe or Pipe(), order.address), True)


def begin(order, checkpoint):
    order.folder.mkdir()
    (order.folder / "config.json").write_text(json.dumps(order.settings.as_dict()))
    (order.folder / "checkpoint.pt").write_bytes(checkpoint)


MACHINE = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB"),
    RuntimeError("CUDA error: unspecified launch failure"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    MemoryError(),
    OSError(errno.EMFILE, "Too many open files"),
]


@pytest.mark.parametrize("where", ["torch.load", "bip_fast.experiments.runs.job.load_into"])
@pytest.mark.parametrize("error", MACHINE, ids=repr)
def test_an_error_of_the_machine_leaves_the_checkpoint(order, monkeypatch, where, error):
    def fail(*_, **__):
        raise error

    begin(order, b"kept")
    if where != "torch.load":
        monkeypatch.setattr(torch, "load", lambda *_, **__: {"model": {}})
    monkeypatch.setattr(where, fail)
    with pytest.raises(type(error)):
        do(order)
    assert (order.folder / "checkpoint.pt").read_bytes() == b"kept"
    assert not (order.folder / "report.json").exists()


def test_settings_that_cannot_be_read_are_not_other_ones(order, monkeypatch):
    begin(order, b"kept")
    unreadable(monkeypatch, order.folder / "config.json")
    with pytest.raises(UserError, match=r"cannot read .*config\.json: Too many open files"):
        do(order)
    assert (order.folder / "checkpoint.pt").read_bytes() == b"kept"


def test_a_damaged_checkpoint_is_set_aside(order):
    begin(order, b"half of a file")
    pipe = Pipe()
    do(order, pipe)
    (note,) = pipe.notes
    assert note.startswith("checkpoint.pt is damaged (")
    assert note.endswith("); it starts afresh")
    assert (order.folder / "checkpoint.pt.damaged").read_bytes() == b"half of a file"
    assert worker.finished(order.folder, ())
    assert not (order.folder / "checkpoint.pt").exists()


def test_a_run_that_another_process_finishes_meanwhile_is_left_as_it_is(order, monkeypatch):
    """The other one has the folder when this one comes, with a checkpoint and without a report."""
    do(order)
    report = order.folder / "report.json"
    contents = report.read_bytes()
    report.unlink()
    (order.folder / "checkpoint.pt").write_bytes(b"of the other one")
    other = RunFolder(order.folder)
    other.lock()

    def end(seconds):
        report.write_bytes(contents)
        other.release()

    monkeypatch.setattr(folder.time, "sleep", end)
    before = {path.name: path.stat().st_mtime_ns for path in order.folder.glob("*.safetensors")}
    pipe = Pipe()
    do(order, pipe)
    assert pipe.notes == ["in use by another run, and waits for that to end"]
    assert report.read_bytes() == contents
    assert {path.name: path.stat().st_mtime_ns for path in order.folder.glob("*.safetensors")} == before
    assert not (order.folder / "checkpoint.pt").exists()


def test_a_run_removes_its_checkpoint_while_it_has_the_folder(order, monkeypatch):
    seen = []

    def release(self):
        seen.append((self._held is not None, (order.folder / "checkpoint.pt").exists()))

    monkeypatch.setattr(folder.RunFolder, "release", release)
    do(order)
    assert seen == [(True, False)]

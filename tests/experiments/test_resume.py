"""Stop and resume: the same bits, however a run was stopped; whole files only; a resume that cannot be is one line."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from cli_runs import FILES, OWN, SMALL, Interrupting, one_line, prune

import bip_fast
from bip_fast.commands import cli
from bip_fast.commands import prune as prune_command
from bip_fast.errors import UserError
from bip_fast.experiments.runs import display
from bip_fast.experiments.runs.folder import RunFolder
from bip_fast.state_dicts import write_safetensors


# 10 batches of dense training, then 15 of pruning; after an even number of those the next step is a lower one.
@pytest.mark.slow
@pytest.mark.parametrize("after", [[1], [5], [10], [11], [12, 1], [3, 4, 8], [25]])
def test_stop_and_resume_gives_the_same_bits(finished_run, tmp_path, monkeypatch, capsys, after):
    out, resume = tmp_path / "run", []
    for batches in after:
        monkeypatch.setattr(display, "make", lambda n=batches: Interrupting(n))
        assert prune(out, *resume) == 130
        assert f"continue with: bip-fast prune --resume {out}" in one_line(capsys.readouterr().err)
        assert not (out / "report.json").exists()
        resume = ["--resume"]
    monkeypatch.setattr(display, "make", display.Display)
    assert cli.main(["prune", "--resume", str(out)]) == 0  # the settings come from the folder
    assert {path.name for path in out.iterdir()} == FILES
    for name in ("model.safetensors", "dense.safetensors"):
        assert (out / name).read_bytes() == (finished_run / name).read_bytes(), name
    first, second = (json.loads((folder / "report.json").read_text()) for folder in (finished_run, out))
    for stage in ("pretrain", "prune"):
        for a, b in zip(first["history"][stage], second["history"][stage], strict=True):
            assert {**a, "seconds": 0} == {**b, "seconds": 0}


def test_random_state_of_the_model_is_resumed(tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text(OWN)
    options = [
        "prune",
        "--model",
        f"{tmp_path / 'own.py'}:random",
        "--epochs",
        "2",
        "--pretrain-epochs",
        "2",
        "--batch-size",
        "200",
        "--out",
    ]
    monkeypatch.setattr(display, "make", display.Display)
    assert cli.main([*options, str(tmp_path / "whole")]) == 0
    monkeypatch.setattr(display, "make", lambda: Interrupting(13))
    assert cli.main([*options, str(tmp_path / "parts")]) == 130
    torch.manual_seed(999)
    monkeypatch.setattr(display, "make", display.Display)
    assert cli.main(["prune", "--resume", str(tmp_path / "parts")]) == 0
    assert (tmp_path / "parts" / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


class Unread(display.Display):
    """Nobody reads what it says after so many batches."""

    def __init__(self, after):
        self.after = after

    def wants(self):
        self.after -= 1
        return self.after == 0

    def update(self, *_):
        if self.after <= 0:
            raise BrokenPipeError


@pytest.mark.slow
@pytest.mark.parametrize(("after", "batches"), [(3, 3), (10, 10), (25, 25), (0, 10)])
def test_progress_that_nobody_reads_loses_nothing(finished_run, tmp_path, monkeypatch, after, batches):
    """`bip-fast prune 2>&1 | head -1`"""
    out = tmp_path / "run"
    options = vars(cli.parser("prune").parse_args(["prune", *SMALL, "--out", str(out)]))
    monkeypatch.setattr(display, "make", lambda: Unread(after))
    with pytest.raises(BrokenPipeError):
        prune_command.run(options)
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    assert 5 * (2 * (state["stage"] == "prune") + state["cursor"]["epoch"]) + state["cursor"]["step"] == batches
    monkeypatch.setattr(display, "make", display.Display)
    assert cli.main(["prune", "--resume", str(out)]) == 0
    for name in ("model.safetensors", "dense.safetensors"):
        assert (out / name).read_bytes() == (finished_run / name).read_bytes(), name


LONGER = ["--width", "2", "--batch-size", "200", "--pretrain-epochs", "10", "--epochs", "10", "--sparsity", "0.8"]


@pytest.fixture(scope="module")
def longer(tmp_path_factory):
    """Long enough to be interrupted from outside: 100 batches."""
    out = tmp_path_factory.mktemp("runs") / "longer"
    assert cli.main(["prune", *LONGER, "--out", str(out)]) == 0
    return out


def start(out, *options):
    root = str(Path(bip_fast.__file__).resolve().parents[1])
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
    env |= {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "bip_fast", "prune", *LONGER, "--out", str(out), *options]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(path, process, seconds=60):
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, f"no {path.name} after {seconds} s"
        time.sleep(0.002)


@pytest.mark.slow
def test_ctrl_c_of_a_process_leaves_a_good_checkpoint(longer, tmp_path):
    out = tmp_path / "run"
    process = start(out)
    assert process.stderr.readline().startswith("dense training: epoch 1/10")
    process.send_signal(signal.SIGINT)
    printed, shown = process.communicate(timeout=60)
    assert process.returncode == 130
    assert shown.splitlines()[-1] == f"stopped; continue with: bip-fast prune --resume {out}"
    assert "Traceback" not in shown
    assert printed == ""
    assert cli.main(["prune", "--resume", str(out)]) == 0
    assert (out / "model.safetensors").read_bytes() == (longer / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_killed_process_leaves_whole_files(longer, tmp_path):
    out = tmp_path / "run"
    process = start(out)
    wait_for(out / "dense.safetensors", process)  # pruning begins
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (out / "report.json").exists()
    assert cli.main(["prune", "--resume", str(out)]) == 0
    assert {path.name for path in out.iterdir()} == FILES
    assert (out / "model.safetensors").read_bytes() == (longer / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_run_killed_before_its_first_checkpoint_starts_again(finished_run, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "config.json").write_bytes((finished_run / "config.json").read_bytes())
    assert cli.main(["prune", "--resume", str(out)]) == 0
    assert (out / "model.safetensors").read_bytes() == (finished_run / "model.safetensors").read_bytes()


def test_a_failed_write_leaves_the_old_file(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write("a.txt", lambda path: path.write_text("old"))

    def fail(path):
        path.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        folder.write("a.txt", fail)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"


def test_a_folder_in_use_is_waited_for(tmp_path):
    holder, said = RunFolder(tmp_path), []
    holder.lock()

    def say(text):
        said.append(text)
        holder.release()

    waiting = RunFolder(tmp_path, patience=30, say=say)
    waiting.lock()
    assert said == ["in use by another run, and waits for that to end"]
    with pytest.raises(UserError, match="is in use by another run"):
        RunFolder(tmp_path, patience=0.3).lock()
    waiting.release()


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_worked_on_without(tmp_path, monkeypatch, recwarn, code):
    def flock(file, operation):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(pytest.importorskip("fcntl"), "flock", flock)
    said = []
    folder = RunFolder(tmp_path, patience=30, say=said.append)
    folder.lock()
    folder.release()
    assert not said
    assert not recwarn
    assert all(path.read_bytes() == b"" for path in tmp_path.iterdir())  # no mark that a killed process would leave


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_named(tmp_path):
    folder, model = RunFolder(tmp_path), torch.nn.Linear(100, 100)
    for name, save in (
        ("checkpoint.pt", lambda: folder.save_checkpoint(model.state_dict())),
        ("model.safetensors", lambda: folder.write("model.safetensors", lambda path: write_safetensors(path, model))),
    ):
        (tmp_path / f".{os.getpid()}-{name}").symlink_to("/dev/full")
        with pytest.raises(OSError, match=f"No space left on device: '{tmp_path / name}'"):
            save()
        assert not list(tmp_path.iterdir())


def damage(name):
    def change(folder):
        (folder / name).write_bytes((folder / name).read_bytes()[:100])

    return change


def change_checkpoint(change):
    def damage(folder):
        state = torch.load(folder / "checkpoint.pt", weights_only=True)
        change(state)
        torch.save(state, folder / "checkpoint.pt")

    return damage


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "change", "message"),
    [
        (["--sparsity", "0.9"], None, "--resume continues a run with --sparsity 0.8, got 0.9"),
        (["--model", "resnet32"], None, "--resume continues a run with --model resnet20, got resnet32"),
        ([], damage("checkpoint.pt"), "checkpoint.pt is damaged"),
        ([], damage("config.json"), "config.json is damaged"),
        ([], lambda folder: (folder / "config.json").write_text("[]"), "config.json is damaged"),
        ([], lambda folder: (folder / "config.json").write_text('{"speed": 1}'), "unknown settings: speed"),
        ([], lambda folder: (folder / "config.json").write_text('{"sparsity": "most"}'), "config.json is damaged"),
        ([], lambda folder: torch.save({"model": {}}, folder / "checkpoint.pt"), "does not fit the model"),
        ([], change_checkpoint(lambda state: state["cursor"].update(epoch=99)), "does not fit this version"),
        ([], change_checkpoint(lambda state: state["cursor"].update(step="x")), "does not fit this version"),
        ([], change_checkpoint(lambda state: state["optimizer"].update(param_groups=None)), "does not fit this version"),
        ([], change_checkpoint(lambda state: state.update(done={})), "does not fit this version"),
        ([], lambda folder: (folder / "config.json").write_text("[" * 100_000), "config.json is damaged"),
        ([], lambda folder: torch.save({"step": 1}, folder / "checkpoint.pt"), "checkpoint.pt does not fit this version"),
    ],
)
def test_a_resume_that_cannot_be_is_one_line(tmp_path, monkeypatch, capsys, options, change, message):
    monkeypatch.setattr(display, "make", lambda: Interrupting(11))
    assert prune(tmp_path) == 130
    capsys.readouterr()
    if change:
        change(tmp_path)
    assert cli.main(["prune", "--resume", str(tmp_path), *options]) == 2
    assert message in one_line(capsys.readouterr().err)


@pytest.mark.parametrize("text", ["{}", '{"layers": [', "[]"])
def test_a_finished_run_with_a_damaged_report_is_one_line(tmp_path, capsys, text):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "report.json").write_text(text)
    assert cli.main(["prune", "--resume", str(tmp_path)]) == 2
    assert "report.json is damaged" in capsys.readouterr().err


def test_an_unfinished_run_is_not_overwritten(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(display, "make", lambda: Interrupting(3))
    assert prune(tmp_path) == 130
    capsys.readouterr()
    assert prune(tmp_path) == 2
    assert "not finished; --resume continues it" in one_line(capsys.readouterr().err)

"""`bip-fast compare`: runs over processes, stop and go on, damaged files, lost processes and failures."""

import json
import os
import signal
import statistics
import subprocess
import sys
import time

import pytest
import torch
from cli_runs import one_line
from compare_runs import JOBS, SHORT, TINY, compare, rows_of, unreadable, written

from bip_fast.commands import cli
from bip_fast.experiments.compare import cluster
from bip_fast.experiments.compare.execution import Comparison

pytestmark = pytest.mark.slow


def test_every_figure_of_every_run(finished):
    rows = rows_of(finished / "runs.csv")
    assert len(rows) == 14
    for row in rows:
        report = json.loads((finished / row["folder"] / "report.json").read_text())
        assert float(row["accuracy"]) == report["pruned"]["accuracy"]
        n, kept = int(row["total"]), int(row["kept"])
        assert kept == n - round(float(row["sparsity"]) * n)
        assert float(row["sparsity_exact"]) == 1 - kept / n
        own = {"dense": 2, "BiP": 2, "imp": 1, "random": 4}[row["label"]]
        total = own + {"dense": 0, "BiP": 2, "random": 0, "imp": 2 if row["sparsity"] == "0.5" else 4}[row["label"]]
        assert int(row["image_passes"]) == own * 1000
        assert int(row["image_passes_total"]) == total * 1000
        assert float(row["seconds_total"]) >= float(row["seconds"]) > 0
        dense = next(other for other in rows if other["label"] == "dense" and other["seed"] == row["seed"])
        assert row["dense_accuracy"] == ("" if row["label"] == "random" else dense["accuracy"])
        assert not (finished / row["folder"] / "checkpoint.pt").exists()
    for line in rows_of(finished / "summary.csv"):
        own = [float(row["accuracy"]) for row in rows if (row["label"], row["sparsity"]) == (line["row"], line["sparsity"])]
        assert len(own) == 2
        assert float(line["accuracy"]) == pytest.approx(statistics.mean(own))
        assert float(line["accuracy_std"]) == pytest.approx(statistics.stdev(own))


def test_finished_runs_are_not_repeated(finished, tmp_path, capsys):
    stamps = {path: path.stat().st_mtime_ns for path in finished.rglob("report.json")}
    assert compare(written(tmp_path), finished, "--list") == 0
    listed = capsys.readouterr().out
    assert "16 runs, 0 epochs to do" in listed
    assert "imp, on the way, 75 %, seed 1" in listed
    assert compare(written(tmp_path), finished) == 0
    out = capsys.readouterr().out
    assert "| digits, resnet20 of width 2 | 50 % | 80 % | epochs | minutes |" in out
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("report.json")} == stamps


DAMAGE = {
    "report.json is damaged": lambda folder: (folder / "report.json").write_bytes((folder / "report.json").read_bytes()[:100]),
    "it has no layers": lambda folder: (folder / "report.json").write_text("{}"),
    "model.safetensors is missing": lambda folder: (folder / "model.safetensors").unlink(),
    "model.safetensors is damaged": lambda folder: os.truncate(folder / "model.safetensors", 4000),
    "epoch-1.safetensors is damaged": lambda folder: os.truncate(folder / "epoch-1.safetensors", 4000),
}


def test_a_run_whose_files_are_damaged_is_run_again(tmp_path, capsys):
    text = f"seed: {[*range(len(DAMAGE))]}{SHORT}  omp: {{rewind: 1}}".replace("epochs: 1", "epochs: 2")
    config, out = written(tmp_path, text), tmp_path / "out"
    assert compare(config, out) == 0
    folders = sorted(path.parent for path in out.glob("*/epoch-1.safetensors"))
    before = [(folder / "model.safetensors").read_bytes() for folder in folders]
    snapshot = (folders[4] / "epoch-1.safetensors").read_bytes()
    reports = [(folder / "report.json").stat().st_mtime_ns for folder in folders]
    for folder, damage in zip(folders, DAMAGE.values(), strict=True):
        damage(folder)
    (folders[0] / "epoch-7.safetensors").write_bytes(b"of another file's rewind")
    capsys.readouterr()
    assert compare(config, out, "--list") == 0
    assert capsys.readouterr().out.count("to do") == len(DAMAGE) + 1
    assert compare(config, out) == 0
    shown = capsys.readouterr().err
    for folder, what in zip(folders, DAMAGE, strict=True):
        again = "made again" if what.startswith("epoch") else "run again"
        (line,) = [line for line in shown.splitlines() if line.startswith(folder.name) and line.endswith(" again")]
        assert what in line
        assert line.endswith(again)
        assert "epoch-7" not in line
    assert [(folder / "model.safetensors").read_bytes() for folder in folders] == before
    after = [(folder / "report.json").stat().st_mtime_ns for folder in folders]
    assert [x == y for x, y in zip(reports, after, strict=True)] == [False, False, False, False, True], "weights of an epoch are not a run"
    assert os.path.getsize(folders[3] / "model.safetensors.damaged") == 4000
    assert (folders[4] / "epoch-1.safetensors").read_bytes() == snapshot
    assert len(rows_of(out / "runs.csv")) == len(DAMAGE)
    (folders[0] / "of-a-person.damaged").write_text("kept")
    assert compare(config, out) == 0  # all is whole: what was set aside before goes
    assert [path.name for path in sorted(out.glob("*/*.damaged"))] == ["of-a-person.damaged"]


@pytest.mark.parametrize("name", ["report.json", "model.safetensors"])
def test_a_file_that_cannot_be_read_is_not_damaged(tmp_path, monkeypatch, capsys, name):
    config, out = written(tmp_path, SHORT + "  dense: {epochs: 0}"), tmp_path / "out"
    assert compare(config, out) == 0
    (folder,) = out.glob("*/")
    stored = {path: path.read_bytes() for path in folder.iterdir()}
    capsys.readouterr()
    with monkeypatch.context() as patch:
        unreadable(patch, folder / name)
        assert compare(config, out) == 2
    error = one_line(capsys.readouterr().err)
    assert str(folder / name) in error
    assert "Too many open files" in error
    assert {path: path.read_bytes() for path in folder.iterdir()} == stored


@pytest.mark.parametrize(
    ("label", "own"), [("BiP", ["--levels", "joint"]), ("imp", ["--method", "imp", "--rewind", "1", "--per-round", "0.5"])]
)
def test_the_same_bits_as_a_run_alone(finished, tmp_path, label, own):
    """A cell is the run that `bip-fast prune` makes in one folder, dense training and all rounds included."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        options = ["--width", "2", "--batch-size", "200", "--pretrain-epochs", "2", "--epochs", "2", "--seed", "1"]
        assert cli.main(["prune", *options, *own, "--sparsity", "0.8", "--device", "cpu", "--out", str(tmp_path / "run")]) == 0
    finally:
        torch.set_num_threads(threads)
    row = next(row for row in rows_of(finished / "runs.csv") if (row["label"], row["sparsity"], row["seed"]) == (label, "0.8", "1"))
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == (finished / row["folder"] / "model.safetensors").read_bytes()


def test_a_finished_dense_run_is_not_repeated_for_another_rewind(tmp_path):
    text = TINY.replace("seed: [0, 1]", "seed: 0").replace("pretrain_epochs: 2", "pretrain_epochs: 3").split("  BiP")[0]
    out = tmp_path / "out"

    def files_after(epoch):
        more = f"  BiP: {{method: bip, sparsity: 0.5, rewind: {epoch}}}\n"
        assert compare(written(tmp_path, text + more), out, "--jobs", "1") == 0
        (folder,) = out.glob("digits-resnet20-dense-*")
        return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}

    first = files_after(2)
    for epoch in ("init", 1):
        after = files_after(epoch)
        assert first.items() <= after.items(), "what was there is there, untouched"
        assert after.keys() - first.keys() == {f"epoch-{0 if epoch == 'init' else 1}.safetensors"}
        first = after
    fresh = tmp_path / "fresh"
    assert compare(written(tmp_path, text + "  BiP: {method: bip, sparsity: 0.5, rewind: 1}\n"), fresh, "--jobs", "1") == 0
    (path,) = fresh.glob("*/epoch-1.safetensors")
    assert path.read_bytes() == first["epoch-1.safetensors"][1]


def test_a_run_whose_folder_is_not_complete_is_not_done(tmp_path, monkeypatch, capsys):
    is_finished = Comparison.is_finished
    monkeypatch.setattr(Comparison, "is_finished", lambda self, cell: not cell.label and is_finished(self, cell))
    text = "data: digits\nwidth: 2\nbatch_size: 200\npretrain_epochs: 1\nepochs: 1\nmethods: {bip: }"
    assert compare(written(tmp_path, text), tmp_path / "out", "--jobs", "1") == 1
    assert "it ended, but its folder is not complete" in capsys.readouterr().err


def test_threads_are_a_setting_and_not_what_jobs_leave(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(4), raising=False)
    for jobs, settings, threads in (("1", "", 1), *([("2", "threads: 2", 2)] if cluster.available() else [])):
        assert compare(written(tmp_path, SHORT + f"  random: {{{settings}}}"), tmp_path / jobs, "--jobs", jobs) == 0
        (row,) = rows_of(tmp_path / jobs / "runs.csv")
        assert row["device"] == f"CPU, {threads} threads"


def start_process(config, out, jobs):
    command = [sys.executable, "-m", "bip_fast", "compare", str(config), "--out", str(out), "--device", "cpu", "--jobs", jobs]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)


def test_without_stderr(tmp_path):
    """`2>&-`"""
    config = written(tmp_path, SHORT + "  random:")
    command = [sys.executable, "-m", "bip_fast", "compare", str(config), "--out", str(tmp_path / "out"), "--device", "cpu"]
    done = subprocess.run(["sh", "-c", 'exec "$@" 2>&-', "sh", *command], stdout=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == 0
    assert "| random | " in done.stdout


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("jobs", JOBS)
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_stopped_or_killed_it_goes_on_with_the_same_bits(finished, tmp_path, how, jobs):
    text = TINY.replace("seed: [0, 1]", "seed: 0")
    out = tmp_path / "out"
    process = start_process(written(tmp_path, text), out, jobs)
    wait_for(lambda: any(out.glob("*/report.json")), process)
    if how == signal.SIGINT:
        os.killpg(process.pid, how)  # as a terminal does, to all processes
    else:
        process.send_signal(how)
    _, error = process.communicate(timeout=60)
    if how != signal.SIGKILL:
        assert process.returncode == 128 + how
        assert "the same command goes on" in error
        assert "Traceback" not in error
    for path in out.rglob("*.json"):
        json.loads(path.read_text())
    before = {path.parent.name: path.stat().st_mtime_ns for path in out.glob("*/report.json")}
    assert len(before) < 8
    assert compare(written(tmp_path, text), out) == 0
    for name, stamp in before.items():
        assert (out / name / "report.json").stat().st_mtime_ns == stamp
    folders = [path.parent.name for path in out.glob("*/report.json")]
    assert len(folders) == 8
    for name in folders:
        assert (out / name / "model.safetensors").read_bytes() == (finished / name / "model.safetensors").read_bytes()


@pytest.mark.parametrize("jobs", JOBS)
def test_a_run_that_fails_leaves_the_others_alone(tmp_path, capsys, jobs):
    (tmp_path / "own.py").write_text(
        "from torch import nn\n"
        "def net(channels, classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, classes))\n"
        "def broken(channels, classes):\n"
        "    raise RuntimeError('not today')\n"
    )
    text = f"""
data: digits
model: ["{tmp_path}/own.py:net", "{tmp_path}/own.py:broken"]
batch_size: 200
pretrain_epochs: 1
epochs: 1
sparsity: 0.5
methods: {{bip: , random: }}
"""
    assert compare(written(tmp_path, text), tmp_path / "out", "--jobs", jobs) == 1
    captured = capsys.readouterr()
    assert "RuntimeError: not today" in captured.err
    assert "it starts from digits-" in captured.err, "what stands on it is not tried"
    rows = rows_of(tmp_path / "out" / "runs.csv")
    assert sorted(row["label"] for row in rows) == ["bip", "random"]
    assert all(row["model"].endswith(":net") for row in rows)
    assert str(tmp_path) not in "".join(path.name for path in (tmp_path / "out").iterdir())


def test_two_at_once_is_an_error(finished, tmp_path, capsys):
    from bip_fast.experiments.runs.folder import RunFolder

    holder = RunFolder(finished)
    holder.lock()
    try:
        assert compare(written(tmp_path), finished) == 2
    finally:
        holder.release()
    assert "is in use by another run" in one_line(capsys.readouterr().err)


def test_jobs_must_be_positive(tmp_path, capsys):
    assert cli.main(["compare", str(written(tmp_path)), "--jobs", "0"]) == 2
    assert "--jobs must be at least 1, got 0" in one_line(capsys.readouterr().err)

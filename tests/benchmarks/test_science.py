"""The GPU study on a CPU, with tiny networks and images: stopped when its time is over, taken up again; what it writes; its processes."""

import csv
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from data_files import write_cifar

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
FILES = {"accuracy.png", "runs.csv", "runs.tar.gz", "summary.json", "table.md"}


@pytest.fixture
def science(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from bench.science import __main__, outcome, plan, pool, probe, study

    return type("Science", (), {"main": __main__.main, "outcome": outcome, "plan": plan, "pool": pool, "probe": probe, "study": study})


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_cifar(folder / "cifar-10-batches-py", 10, 20)
    return folder


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_stopped_at_the_limit_and_taken_up_again(science, data, tmp_path, monkeypatch, capsys):
    out, work = tmp_path / "out", tmp_path / "out.work"
    options = ["--data", str(data / "cifar-10-batches-py"), "--device", "cpu", "--tiny", "--epochs", "4", "30"]

    def left(study):
        """The time is over when the dense network is there and a pruned run stands in the middle."""
        return 0.0 if any(share > 0.1 and study.runs[x].sparsity for x, share in study.shares.items() if x in study.runs) else 100.0

    with monkeypatch.context() as patch:
        patch.setattr(science.study.Study, "left", property(left))
        assert science.main([str(out), *options]) == 0
    said = capsys.readouterr().out
    assert "plan: dense 4 epochs, every pruned run 30 epochs" in said
    assert "the time is over: 2 runs save and stop" in said
    assert {path.name for path in out.iterdir()} == FILES
    (dense,) = rows_of(out / "runs.csv")
    assert [dense[name] for name in ("label", "lr", "dense_epochs", "epochs", "image_passes")] == ["dense", "0.1", "4", "4", "400"]
    assert len(list(work.glob("*/checkpoint.pt"))) == 2
    assert len(json.loads((out / "summary.json").read_text())["not_finished"]) == 4
    with tarfile.open(out / "runs.tar.gz") as tar:
        assert {Path(name).name for name in tar.getnames()} == {"plan.json", "report.json", "config.json", "model.safetensors"}

    # Without what the machine with the GPU lacks; in a process as there.
    for name in ("ray", "rich", "yaml", "sklearn", "torch_pruning", "onnx", "pynvml"):
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('there is no {name}')")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PATH": path, "CIFAR10": str(data)}
    again = subprocess.run(
        [ROOT / ".ci/gpu-science", out, "--device", "cpu", "--tiny", "--epochs", "4", "30", "--limit", "100"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert again.returncode == 0, again.stderr
    assert "5 runs, 1 of them finished" in again.stdout
    assert "finished: dense" not in again.stdout
    rows = rows_of(out / "runs.csv")
    assert rows[0] == dense
    assert sorted(row["label"] for row in rows[1:]) == sorted(science.study.METHODS)
    assert len({row["folder"] for row in rows}) == 5
    for row in rows[1:]:
        report = json.loads((work / row["folder"] / "report.json").read_text())
        assert float(row["accuracy"]) == report["pruned"]["accuracy"]
        assert row["image_passes"] == "3000"  # the same for all
        assert row["dense_accuracy"] == dense["accuracy"]
    assert not list(work.glob("*/checkpoint.pt"))
    assert {path.name for path in out.iterdir()} == FILES
    assert "| BiP joint | " in (out / "table.md").read_text()
    summary = json.loads((out / "summary.json").read_text())
    assert (len(summary["finished"]), summary["not_finished"], summary["failed"]) == (5, [], {})
    assert summary["data"].startswith("not the official files")

    # On another machine, from what came back.
    elsewhere = tmp_path / "elsewhere"
    assert science.main([str(elsewhere), *options, "--from", str(out / "runs.tar.gz")]) == 0
    assert "everything is finished" in capsys.readouterr().out
    assert sorted(map(str, rows_of(elsewhere / "runs.csv"))) == sorted(map(str, rows))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--data must name the folder"),
        (["--data", "nowhere"], "--data must have the files of CIFAR-10, or a folder cifar-10-batches-py with them, got nowhere"),
        (["--jobs", "0"], "--jobs must be at least 1, got 0"),
        (["--from", "nothing"], "--from must be a file runs.tar.gz, got nothing"),
    ],
)
def test_what_is_wrong_with_the_arguments(science, data, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.delenv("CIFAR10", raising=False)
    if options and options[0] != "--data":
        options = [*options, "--data", str(data)]
    assert science.main([str(tmp_path / "out"), "--device", "cpu", "--tiny", *options]) == 2
    assert message in capsys.readouterr().err


def test_only_measured(science, data, tmp_path, capsys):
    options = ["--data", str(data), "--device", "cpu", "--tiny", "--jobs", "1", "--amp", "--measure"]
    assert science.main([str(tmp_path / "out"), *options]) == 0
    said = capsys.readouterr().out
    assert " s alone and " in said
    assert "plan" not in said
    assert not list((tmp_path / "out").iterdir())
    assert not list((tmp_path / "out.work").glob("probe-*"))


def test_a_process_that_is_lost_is_replaced(science):
    pool = science.pool.Pool(1, "cpu")
    try:
        (ready,) = until(pool, "ready")
        assert pool.free == {0}
        os.kill(pool.processes[0][0].pid, signal.SIGKILL)
        *_, lost = until(pool, "lost")
        assert (lost.worker, lost.what, pool.free) == (0, -signal.SIGKILL, set())
        *_, ready = until(pool, "ready")
        assert (ready.worker, pool.free) == (0, {0})
    finally:
        assert pool.close(10)


def until(pool, kind):
    found, end = [], time.monotonic() + 60
    while not found or found[-1].kind != kind:
        assert time.monotonic() < end
        found += pool.letters(0.5)
    return found


def test_the_speed_of_a_probe(science):
    def letter(at, epochs, kind="progress"):
        return science.pool.Letter(0, kind, "probe-0", (epochs / science.probe.EPOCHS, ""), at)

    told = [letter(1.0, 0.1), letter(2.0, 2.0), letter(2.5, 9.0, "note"), letter(4.0, 6.0)]
    assert science.probe.speed(told, 2.0) == pytest.approx(0.5)
    assert science.probe.speed(told, 3.0) == float("inf")
    assert science.probe.speed([], 0.0) == float("inf")


ROW = {"label": "GMP", "method": "gmp", "sparsity": 0.892626, "accuracy": 0.90, "seed": 0, "folder": "a"}


def test_a_row_is_appended_once(science, tmp_path):
    path = tmp_path / "runs.csv"
    assert science.outcome.append_rows(path, []) == []
    assert science.outcome.append_rows(path, [ROW]) == [ROW]
    other = {**ROW, "folder": "b", "unknown": 1}
    assert science.outcome.append_rows(path, [ROW, other]) == [other]
    assert [(row["folder"], row["accuracy"], row["loss"]) for row in rows_of(path)] == [("a", "0.9", ""), ("b", "0.9", "")]


def test_the_table_stands_beside_the_paper(science):
    rows = [ROW, {**ROW, "seed": 1, "accuracy": 0.91}, {**ROW, "label": "dense", "sparsity": 0.0, "accuracy": 0.92}]
    lines = science.outcome.table(rows, ["dense", "GMP", "BiP"], [0.67232, 0.892626]).splitlines()
    assert lines[0] == "| | 67.23 % | 89.26 % |"
    assert lines[2:5] == ["| dense | 92.00 (1) | 92.00 (1) |", "| GMP |  | 90.50 ± 0.71 (2) |", "| BiP |  |  |"]
    assert "| the paper: BiP | 92.13 | 90.96 |" in lines
    assert "| the paper: OMP | 90.44 |  |" in lines
    assert science.outcome.of_the_paper("BiP", 0.7) is None


CONTROL = """#!/bin/sh
echo "$@$(test -t 0 || [ "$1" ] || cat)" >>"{log}"
exit {code}
"""


@pytest.mark.parametrize(("code", "said"), [(0, ["-d", "quit"]), (1, ["-d"])])
def test_the_multi_process_service(science, tmp_path, monkeypatch, code, said):
    program = tmp_path / "nvidia-cuda-mps-control"
    program.write_text(CONTROL.format(log=tmp_path / "log", code=code))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    before = dict(os.environ)
    with science.pool.multi_process_service() as why:
        assert (why is None) == (code == 0)
        assert ("CUDA_MPS_PIPE_DIRECTORY" in os.environ) == (code == 0)
    assert dict(os.environ) == before
    assert (tmp_path / "log").read_text().split() == said
    monkeypatch.setenv("PATH", "")
    with science.pool.multi_process_service() as why:
        assert why == "there is no nvidia-cuda-mps-control"


def test_a_plan_that_becomes_too_long_stays(science, data, tmp_path, monkeypatch, capsys):
    """Dense training takes so long that nothing else would fit: what does after all is done with the epochs that were planned."""
    times = science.plan.Times(1e-3, 1e-3, 1)
    monkeypatch.setattr(science.study, "measure", lambda *_: times)
    monkeypatch.setattr(science.plan.Times, "slower", lambda self, factor: science.plan.Times(1e6, 1e6, 1))
    options = ["--data", str(data), "--device", "cpu", "--tiny", "--jobs", "1", "--epochs", "2", "1"]
    assert science.main([str(tmp_path / "out"), *options]) == 0
    said = capsys.readouterr().out
    assert "seconds must be at least 4000000 for one column of one epoch" in said
    assert "; the plan stays" in said
    assert [row["epochs"] for row in rows_of(tmp_path / "out" / "runs.csv")] == ["2", "1", "1", "1", "1"]

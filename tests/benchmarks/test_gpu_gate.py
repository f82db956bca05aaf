"""`.ci/gpu`, without a GPU: the order of its stages, their limits, and what is left when one of them fails."""

import importlib.machinery
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / ".ci" / "gpu"
FILES = {"archive.tar.gz", "log.txt", "results.json", "summary.json"}


@pytest.fixture
def gate(monkeypatch):
    loader = importlib.machinery.SourceFileLoader("gpu_gate", str(SCRIPT))
    spec = importlib.util.spec_from_loader("gpu_gate", loader)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_gate", module)
    loader.exec_module(module)
    return module


def stages_of(gate, monkeypatch, *stages):
    monkeypatch.setattr(gate, "first", lambda out, stand_in: [gate.Stage(*stage) for stage in stages])


def summary(out):
    return {row["stage"]: row["status"] for row in json.loads((out / "summary.json").read_text())}


def code(text):
    return (sys.executable, "-c", text)


def test_a_failed_stage_ends_the_run_only_where_others_need_it(gate, monkeypatch, tmp_path, capsys):
    stages_of(
        gate,
        monkeypatch,
        ("one", 20, (code("print('fine')"),)),
        ("two", 20, (code("raise SystemExit(3)"), code("print('beside it')"))),
        ("three", 20, (code("1 / 0"),), True),
        ("four", 20, (code("print('never')"),)),
    )
    assert gate.main([str(tmp_path), "first", "--stand-in"]) == 1
    assert summary(tmp_path) == {"one": 0, "two": 3, "three": 1}
    assert {path.name for path in tmp_path.iterdir()} == FILES
    text = capsys.readouterr().out
    assert "ZeroDivisionError" in text
    assert "the rest is left out: it needs three" in text
    with tarfile.open(tmp_path / "archive.tar.gz") as archive:
        logs = {Path(name).name for name in archive.getnames()}
    assert {"one.log", "two.log", "two-2.log", "three.log"} <= logs


@pytest.mark.slow
def test_a_stage_at_its_limit_writes_what_it_has(gate, monkeypatch, tmp_path):
    write = "open(r'{0}', 'w').write('{{}}'); print('begun', flush=True)"
    child = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
    stages_of(
        gate,
        monkeypatch,
        (
            "slow",
            2,
            (code(write.format(tmp_path / "seen") + "; import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('saved')"),),
        ),
        ("deaf", 1, (code(f"import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); {child}; time.sleep(60)"),)),
    )
    start = time.monotonic()
    assert gate.main([str(tmp_path), "first", "--stand-in"]) == 1
    assert time.monotonic() - start < 30
    assert summary(tmp_path) == {"slow": "stopped after 2 s", "deaf": "stopped after 1 s"}
    assert "saved" in (tmp_path / "log.txt").read_text()


@pytest.mark.slow
def test_results_of_benchmarks_are_kept_and_the_rest_is_not(gate, tmp_path):
    scratch, out = tmp_path / "scratch", tmp_path / "out"
    scratch.mkdir()
    out.mkdir()
    (scratch / "lockstep.json").write_text('[{"case": "600k", "passed": true}]')
    row = {
        "group": "upper",
        "extra_info": {"implementation": "bip_fast", "calls": 1, "n": 10},
        "stats": {"median": 1, "min": 1, "iqr": 0, "rounds": 3},
    }
    raw = {"machine_info": {"device": "NVIDIA X"}, "datetime": "2026-01-01T00:00", "benchmarks": [row]}
    (scratch / "steps.json").write_text(json.dumps(raw))
    (scratch / "empty.json").touch()
    gate.collect(scratch, out)
    results = json.loads((out / "results.json").read_text())
    assert results["lockstep.json"][0]["passed"]
    assert results["results/steps/nvidia-x/results.json"]["rows"][0]["median_seconds"] == 1
    assert not (scratch / "steps.json").exists()


def test_unknown_stages_and_no_gpu(gate, tmp_path, capsys, monkeypatch):
    with pytest.raises(SystemExit):
        gate.main([str(tmp_path), "first", "--stand-in", "--only", "nothing"])
    assert (
        "--only must name stages of ['build', 'device', 'lockstep', 'tests', 'steps', 'profile'], got ['nothing']"
        in capsys.readouterr().err
    )
    monkeypatch.setattr(gate.shutil, "which", lambda name: None)
    assert gate.main([str(tmp_path), "first"]) == 1
    assert "nvidia-smi shows no GPU" in capsys.readouterr().err


@pytest.mark.slow
def test_the_stand_in_runs_kernels(tmp_path):
    done = subprocess.run(
        [sys.executable, SCRIPT, tmp_path, "first", "--stand-in", "--only", "device"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert summary(tmp_path) == {"device": 0}


def test_an_interrupted_gate_leaves_nothing_running(tmp_path):
    """What a stage has started ends with the script."""

    def of_the_stage():
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                if f"MARK={tmp_path}".encode() in path.read_bytes() and b"large_lockstep" in path.with_name("cmdline").read_bytes():
                    found.append(path.parent.name)
            except OSError:  # it has ended
                continue
        return found

    command = [sys.executable, SCRIPT, tmp_path / "out", "first", "--stand-in", "--only", "lockstep"]
    gate = subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "MARK": str(tmp_path)})
    deadline = time.monotonic() + 30
    while len(of_the_stage()) < 2:  # the script and a case of it
        assert time.monotonic() < deadline
        assert gate.poll() is None
        time.sleep(0.05)
    gate.send_signal(signal.SIGTERM)
    assert gate.wait(20) == 143
    while left := of_the_stage():
        assert time.monotonic() < deadline + 20, left
        time.sleep(0.05)

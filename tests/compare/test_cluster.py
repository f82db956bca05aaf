"""Runs at the same time, on Ray: the same bits, lost processes and nodes, a cluster of several nodes, and what one of them may lack."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import pytest
from cli_runs import one_line
from compare_runs import SHORT, TINY, compare, written

import bip_fast
from bip_fast.commands import cli
from bip_fast.errors import UserError
from bip_fast.experiments.compare import cluster, grid
from bip_fast.experiments.compare.execution import Comparison
from bip_fast.experiments.compare.progress import Progress

pytestmark = pytest.mark.slow

pytest.importorskip("ray", reason=f"needs Ray: {cluster.INSTALL}")

ONE_SEED = TINY.replace("seed: [0, 1]", "seed: 0")


def same_networks(out, finished):
    names = [path.parent.name for path in out.glob("*/report.json")]
    for name in names:
        assert (out / name / "model.safetensors").read_bytes() == (finished / name / "model.safetensors").read_bytes(), name
    return len(names)


def lose_processes(monkeypatch, how, times):
    """End the worker of the first run that has a checkpoint, so many times; returns what is left to do."""
    left, collect = [how] * times, cluster._Run._collect

    def watched(self, running):
        collect(self, running)
        for cell in running.values():
            pid = self.started.get(cell.address)
            if left and pid and (self.comparison.folder(cell) / "checkpoint.pt").exists():
                os.kill(pid, left.pop())
                del self.started[cell.address]
                return

    monkeypatch.setattr(cluster._Run, "_collect", watched)
    return left


def test_no_more_runs_at_a_time_than_jobs(finished):
    """From when a run has written its settings, until it has written its report."""
    spans = [(path.with_name("config.json").stat().st_mtime, path.stat().st_mtime) for path in finished.glob("*/report.json")]
    moments = sorted([(start, 1) for start, _ in spans] + [(end, -1) for _, end in spans])
    running = most = 0
    for _, change in moments:
        running += change
        most = max(most, running)
    assert len(spans) >= 6
    assert most == 2


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_process_that_is_lost_is_replaced(finished, tmp_path, monkeypatch, capsys, how):
    text = ONE_SEED.replace("  imp: {rewind: 1, per_round: 0.5}\n", "")
    left, noted = lose_processes(monkeypatch, how, 1), []
    monkeypatch.setattr(Comparison, "heard", lambda self, kind, address, what: noted.append((kind, what)))
    assert compare(written(tmp_path, text), tmp_path / "out", "--jobs", "2") == 0
    assert not left
    assert same_networks(tmp_path / "out", finished) == 5


def test_a_run_that_is_stopped_again_and_again_has_failed(tmp_path, monkeypatch, capsys):
    """By SIGTERM of somebody else, whose `Stop` comes back through Ray."""
    text = ONE_SEED.replace("pretrain_epochs: 2", "pretrain_epochs: 60").split("  BiP")[0]
    left = lose_processes(monkeypatch, signal.SIGTERM, 2)
    assert compare(written(tmp_path, text), tmp_path / "out", "--jobs", "2") == 1
    assert not left
    error = capsys.readouterr().err
    # A process that is told to end before its handlers are in place ends at once, and counts as lost.
    assert "its process was stopped by somebody else 2 times" in error or "its process was lost 2 times" in error
    assert "; the next start continues it" in error


def test_nothing_to_do_starts_no_ray(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "_ray", None)
    assert compare(written(tmp_path), finished, "--jobs", "2") == 0


def test_a_second_start_of_a_run_is_said(tmp_path):
    """That is how this process learns that a worker was lost."""

    class Ray:
        get = staticmethod(lambda letters: letters)

    class Box:
        class collect:
            remote = staticmethod(lambda: [("started", "a", 1), ("begin", "a", 0.0), ("started", "a", 2), ("stopped", "a", None)])

    heard = []
    run = cluster._Run.__new__(cluster._Run)
    run.ray, run.mailbox, run.started = Ray, Box, {}
    run.comparison = type("C", (), {"heard": lambda self, *what: heard.append(what)})()
    run._listen()
    assert heard == [("begin", "a", 0.0), ("note", "a", "its process was lost; another one goes on with it")]
    assert run.started == {"a": 2}


def test_a_run_that_loses_every_process_has_failed(tmp_path, monkeypatch, capsys):
    text = ONE_SEED.replace("pretrain_epochs: 2", "pretrain_epochs: 60").split("  imp")[0]
    left = lose_processes(monkeypatch, signal.SIGKILL, 2)
    assert compare(written(tmp_path, text), tmp_path / "out", "--jobs", "2") == 1
    assert not left
    error = capsys.readouterr().err
    assert "its process was lost; another one goes on with it" in error or "its process was lost 2 times" in error
    assert "its process was lost 2 times; the next start continues it" in error
    assert error.count("it starts from digits-") == 4, "two rows, said while it goes and at the end"


def test_the_last_node_is_lost(finished, tmp_path):
    """SIGKILL of the raylet: this process ends, with one line, and the same command goes on."""
    config, out = written(tmp_path, ONE_SEED.replace("pretrain_epochs: 2", "pretrain_epochs: 60")), tmp_path / "out"
    command = [sys.executable, "-m", "bip_fast", "compare", str(config), "--out", str(out), "--device", "cpu", "--jobs", "2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    end = time.monotonic() + 90
    while not any(out.glob("*/checkpoint.pt")):
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.1)
    (raylet,) = [pid for pid, name in children(process.pid) if name == "raylet"]
    os.kill(raylet, signal.SIGKILL)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 2, error
    assert cluster.GONE in error
    assert "Traceback" not in error
    quick = written(tmp_path, ONE_SEED)
    assert compare(quick, out) == 0


def children(pid):
    """(pid, name) of the processes that ``pid`` has started, those of them included."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = path.read_text()
        except OSError:  # it has ended
            continue
        name, rest = text[text.index("(") + 1 : text.rindex(")")], text[text.rindex(")") + 2 :].split()
        if int(rest[1]) == pid:
            found += [(int(path.parent.name), name), *children(int(path.parent.name))]
    return found


def test_without_ray(tmp_path, monkeypatch, capsys):
    """One job needs none; more say how to get it, and without --jobs it is one."""
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(4), raising=False)
    config = written(tmp_path, SHORT + "  random:")
    for options, name in ((["--jobs", "2"], "jobs"), (["--address", "auto"], "address")):
        assert cli.main(["compare", str(config), "--out", str(tmp_path / "out"), "--device", "cpu", *options]) == 2
        assert one_line(capsys.readouterr().err) == f"bip-fast compare: --{name} needs Ray: {cluster.INSTALL}\n"
    assert cli.main(["compare", str(config), "--out", str(tmp_path / "out"), "--device", "cpu"]) == 0
    assert f"one run at a time; 4 at a time need Ray: {cluster.INSTALL}" in capsys.readouterr().err


# --- clusters ------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def on_nodes():
    """Two nodes on this machine, each with one CPU. A function that runs `bip-fast compare` with some options on them."""
    environ = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef" * 4}
    port = str(next(port for port in range(6400, 9900) if is_free(port)))  # Ray's workers use those from 10002 on
    folder = tempfile.mkdtemp()  # short: names of sockets may have 107 bytes

    def run(*options, cwd):
        root = str(Path(bip_fast.__file__).parents[1])
        command = [sys.executable, "-m", "bip_fast", "compare", *options, "--device", "cpu", "--address", f"127.0.0.1:{port}"]
        own = {**environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
        return subprocess.run(command, env=own, cwd=cwd, capture_output=True, text=True, timeout=120)

    try:
        head = ["--head", "--port", port, "--include-dashboard", "false", "--temp-dir", folder]
        for where in (head, ["--address", f"127.0.0.1:{port}"]):
            own = ["--node-ip-address", "127.0.0.1", "--num-cpus", "1", "--object-store-memory", str(100 * 2**20)]
            ray = [str(Path(sys.executable).with_name("ray")), "start", *where, *own]
            started = subprocess.run(ray, env=environ, capture_output=True, text=True, timeout=90)
            assert started.returncode == 0, started.stdout + started.stderr
        yield run
    finally:
        end_processes(folder)
        shutil.rmtree(folder, ignore_errors=True)


def is_free(port):
    with socket.socket() as trial:
        return trial.connect_ex(("127.0.0.1", port)) != 0


def end_processes(folder):
    """Of the Ray whose files are in ``folder``, and no other; the others of a node end with its raylet."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError):  # it has ended
                if folder.encode() in path.read_bytes():
                    os.kill(int(path.parent.name), how)
        time.sleep(3)


def test_two_nodes_run_a_grid_with_the_same_bits(on_nodes, finished, tmp_path):
    written(tmp_path, ONE_SEED)
    done = on_nodes("tiny.yaml", "--out", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "| imp |" in done.stdout
    assert same_networks(tmp_path / "out", finished) == 8
    assert not list((tmp_path / "out").glob(".shared-*"))


def test_a_run_too_large_for_every_node(on_nodes, tmp_path):
    written(tmp_path, SHORT + "  random: {threads: 64}")
    done = on_nodes("tiny.yaml", "--out", "out", cwd=tmp_path)
    assert done.returncode == 2
    assert "no node has the 64 CPUs" in done.stderr


def test_nothing_answers(tmp_path, capsys):
    config = written(tmp_path, SHORT + "  random:")
    assert cli.main(["compare", str(config), "--out", str(tmp_path / "out"), "--device", "cpu", "--address", "127.0.0.1:1"]) == 2
    assert "nothing answers at --address 127.0.0.1:1: Connection refused" in one_line(capsys.readouterr().err)


def test_jobs_and_address(tmp_path, capsys):
    assert cli.main(["compare", str(written(tmp_path)), "--jobs", "2", "--address", "127.0.0.1:1"]) == 2
    assert "give one of them" in one_line(capsys.readouterr().err)


class Node:
    """A cluster of one node whose looks are what ``there`` says."""

    def __init__(self, there):
        self.there = there

    def nodes(self):
        node = {"NodeManagerAddress": "10.0.0.7", "NodeManagerHostname": "far", "NodeID": "0" * 56, "Alive": True}
        return [{**node, "Resources": {"CPU": 4.0}}]

    def remote(self, **_):
        return lambda function: self

    def options(self, **_):
        return type("Call", (), {"remote": lambda _, folders: folders})()

    def get(self, folders, timeout):
        if isinstance(self.there, Exception):
            raise self.there
        return {**cluster.look(folders), **self.there, **({"missing": folders[self.there["lacks"]]} if "lacks" in self.there else {})}


@pytest.mark.parametrize(
    ("there", "expected"),
    [
        ({"lacks": 0}, "does not see the folder {out}: all nodes must share"),
        ({"lacks": 2}, "does not see the folder {data}: all nodes must share"),
        ({"torch": "1.0"}, "has torch 1.0, and this machine"),
        ({"bip_fast": "0.0.1"}, "has bip_fast 0.0.1, and this machine"),
        (ModuleNotFoundError("No module named 'bip_fast'"), "cannot run bip_fast: "),
    ],
)
def test_what_a_node_lacks_is_named(tmp_path, there, expected):
    out, data = tmp_path / "out", tmp_path / "data"
    out.mkdir()
    data.mkdir()
    comparison = Comparison(grid.read(written(tmp_path, SHORT + "  random:")), out, data, "cpu", Progress())
    with pytest.raises(UserError, match=r"^node 10\.0\.0\.7 \(far\) ") as caught:
        cluster._check_nodes(Node(there), comparison)
    assert expected.format(out=out, data=data) in str(caught.value)
    assert not list(out.iterdir()), "nothing of the look is left"


class Ray:
    """Of two GPUs; remembers what it was asked for."""

    def __init__(self):
        self.asked = {}

    def remote(self, **options):
        def taken(actor):
            self.asked[actor] = options
            return type("Handle", (), {"remote": staticmethod(lambda: None)})

        return taken

    cluster_resources = staticmethod(lambda: {"GPU": 2.0})
    get_runtime_context = staticmethod(lambda: type("Context", (), {"get_node_id": staticmethod(lambda: "ab" * 28)}))


def test_the_mailbox_is_on_this_node(tmp_path):
    """Elsewhere the loss of another node would end the comparison."""
    ray = Ray()
    cluster._Run(Comparison(grid.read(written(tmp_path, SHORT + "  random:")), tmp_path, None, "cpu", Progress()), ray, "cpu", 2)
    where = ray.asked[cluster.Mailbox]["scheduling_strategy"]
    assert (where.node_id, where.soft) == ("ab" * 28, False)


def test_the_share_of_a_gpu_reaches_ray(tmp_path):
    """By the setting of the file, or as many runs as there are jobs; none on a CPU."""

    def asked(text, device, jobs):
        comparison = Comparison(grid.read(written(tmp_path, text)), tmp_path, None, device, Progress())
        (cell,) = comparison.grid.cells.values()
        return cluster._Run(comparison, Ray(), device, jobs).options(cell)

    text = SHORT + "  random: {threads: 3}"
    assert asked("gpus: 0.25" + text, "cuda", 8)["num_gpus"] == 0.25
    assert asked(text, "cuda", 8)["num_gpus"] == 0.25
    assert asked(text, "cuda", 1)["num_gpus"] == 1.0
    assert asked(text, "cuda", None)["num_gpus"] == 1.0
    assert asked("gpus: 0.25" + text, "cpu", 2)["num_gpus"] == 0
    assert asked(text, "cpu", 2)["num_cpus"] == 3


@pytest.mark.parametrize("gpus", ["0", "-1", "1.5", "much", "true"])
def test_a_share_of_a_gpu_that_is_none(tmp_path, gpus):
    with pytest.raises(UserError, match=r"gpus must be a share of a GPU, such as 0\.5, or a whole number of GPUs, got"):
        grid.read(written(tmp_path, f"gpus: {gpus}" + SHORT + "  random:"))


def test_the_share_of_a_gpu_is_in_no_address(tmp_path):
    with_gpus, without = (grid.read(written(tmp_path, text + SHORT + "  random:")).cells.keys() for text in ("gpus: 0.5", ""))
    assert with_gpus == without

"""`bip-fast compare`: what a file stands for, runs over processes, stop and go on, failures, tables and pictures."""

import csv
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from cli_runs import one_line
from test_data import write_fashion_mnist

from bip_fast import cli
from bip_fast.experiments import ExperimentError, figures, grid, progress, results
from bip_fast.experiments.compare import Comparison
from bip_fast.experiments.methods import STEPS, rounds, steps_of
from bip_fast.experiments.settings import Settings

if missing := cli.missing_extras():
    pytest.skip(f"needs {', '.join(missing)}: {cli.INSTALL}", allow_module_level=True)

TINY = """
data: digits
model: resnet20
width: 2
batch_size: 200
pretrain_epochs: 2
epochs: 2
sparsity: [0.8, 0.5]
seed: [0, 1]
methods:
  dense: {epochs: 0}
  BiP: {method: bip, levels: joint}
  imp: {rewind: 1, per_round: 0.5}
  random:
"""


SHORT = """
data: digits
model: resnet20
width: 2
train_images: 200
batch_size: 200
pretrain_epochs: 1
epochs: 1
methods:
"""


def written(folder, text=TINY, name="tiny.yaml"):
    path = folder / name
    path.write_text(text)
    return path


def compare(config, out, *options):
    return cli.main(["compare", str(config), "--out", str(out), "--device", "cpu", "--jobs", "2", *options])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole comparison; tests read it and leave it as it is."""
    folder = tmp_path_factory.mktemp("compare")
    assert compare(written(folder), folder / "out") == 0
    return folder / "out"


def rows_of(path):
    with path.open() as file:
        return list(csv.DictReader(file))


# --- what a file stands for ------------------------------------------------------------------------------------------------------------


def test_all_combinations_and_what_they_start_from(tmp_path):
    found = grid.read(written(tmp_path))
    rows = [(cell.label, cell.settings.sparsity, cell.settings.seed) for cell in found.rows]
    pruned = [(label, s, seed) for label in ("BiP", "imp", "random") for seed in (0, 1) for s in (0.5, 0.8)]
    assert sorted(rows) == sorted([("dense", 0.0, 0), ("dense", 0.0, 1), *pruned])
    assert len(found.cells) == 16, "the dense row is the dense run that the others start from; a round of imp on the way for each seed"
    for cell in found.rows:
        parent = cell.parent.settings if cell.parent else None
        assert (parent is None) == (cell.label in ("dense", "random"))
        if cell.label == "BiP":
            assert (parent.method, parent.seed) == ("dense", cell.settings.seed)
        if cell.label == "imp":
            line = [(ancestor.settings.method, ancestor.settings.sparsity) for ancestor in cell.ancestors()]
            assert line == [("imp", s) for s in (0.75, 0.5) if s < cell.settings.sparsity] + [("dense", 0.0)]
            assert cell.dense.settings.method == "dense"
            assert found.snapshots[cell.dense.address] == {1}
    assert [cell.epochs for cell in found.rows if cell.label == "imp"] == [1, 1, 1, 1], "a round of one epoch each"


def test_a_network_of_iterative_pruning_depends_on_no_other_sparsity_of_the_file(tmp_path):
    text = "seed: 0\nmethods: {imp: {rewind: 1, pretrain_epochs: 10, epochs: 10, sparsity: %s}}"
    both = {cell.settings.sparsity: cell for cell in grid.read(written(tmp_path, text % "[0.9, 0.95, 0.98]")).rows}
    for sparsity, count in ((0.9, 11), (0.95, 14), (0.98, 18)):
        (alone,) = grid.read(written(tmp_path, text % sparsity)).rows
        assert alone.address == both[sparsity].address
        line = [alone, *alone.ancestors()]
        sparsities = [cell.settings.sparsity for cell in reversed(line[:-1])]
        assert sparsities == rounds(0.0, sparsity, 0.2)
        assert (len(sparsities), sum(cell.epochs for cell in line[:-1])) == (count, 9 * count)
    on_the_way = grid.read(written(tmp_path, text % "[0.2, 0.36, 0.488, 0.5904, 0.67232, 0.737856, 0.790285, 0.832228]"))
    assert len(on_the_way.cells) == 9, "a sparsity that is a round is a round for the others too"


def test_an_address_is_what_decides_the_result(tmp_path):
    first = {cell.address for cell in grid.read(written(tmp_path)).rows}
    same = TINY.replace("BiP:", "another label:").replace("[0.8, 0.5]", "[0.5, 0.8]")
    assert {cell.address for cell in grid.read(written(tmp_path, same)).rows} == first
    whole = TINY.replace("[0.8, 0.5]", "[0.8, 0.5]\nmomentum: 0")
    assert [*grid.read(written(tmp_path, whole)).cells] == [*grid.read(written(tmp_path, whole.replace("tum: 0", "tum: 0.0"))).cells]
    default = TINY.replace("width: 2", f"width: 2\nmomentum: {Settings.momentum}")
    assert {cell.address for cell in grid.read(written(tmp_path, default)).rows} == first
    for change in (
        "pretrain_epochs: 2|pretrain_epochs: 3",
        "width: 2|width: 3",
        "data: digits|data: digits\nstride: 2",
        "seed:|threads: 2\nseed:",
    ):
        other = {cell.address for cell in grid.read(written(tmp_path, TINY.replace(*change.split("|")))).rows}
        assert not other & first, change
    defaults = dict(Settings.__dataclass_fields__)
    defaults["momentum"].default, before = 0.5, defaults["momentum"].default
    try:
        assert {cell.address for cell in grid.read(written(tmp_path, default)).rows} == first, (
            "a default that changes changes no given value"
        )
    finally:
        defaults["momentum"].default = before
    only_bip = {cell.address for cell in grid.read(written(tmp_path, TINY.replace("levels: joint", "levels: joint, gamma: 2.0"))).rows}
    assert len(only_bip - first) == 4


def test_other_files_of_the_same_name_are_another_run(tmp_path):
    text = written(tmp_path, "data: fashion-mnist\nmethods: {bip: }")
    addresses = set()
    for i, count in enumerate((20, 20, 30)):
        folder = tmp_path / str(i)
        write_fashion_mnist(folder, train=count, test=10)
        addresses.add(frozenset(grid.read(text, folder).cells))
        (folder / "notes.txt").write_text("none of its files")
        addresses.add(frozenset(grid.read(text, folder).cells))
    assert len(addresses) == 2


def test_a_folder_that_began_with_other_settings_starts_afresh(finished, tmp_path, capsys):
    text = TINY.replace("seed: [0, 1]", "seed: 0").split("  imp")[0]
    out = tmp_path / "out"
    cell = next(cell for cell in grid.read(written(tmp_path, text)).rows if cell.label == "dense")
    stored = {**cell.settings.as_dict(), "momentum": 0.5}
    (out / cell.folder).mkdir(parents=True)
    (out / cell.folder / "config.json").write_text(json.dumps(stored))
    torch.save({"stage": "none"}, out / cell.folder / "checkpoint.pt")
    assert compare(written(tmp_path, text), out) == 0
    assert f"{cell.folder}: began with other settings; it starts afresh" in capsys.readouterr().err
    assert json.loads((out / cell.folder / "config.json").read_text())["momentum"] == 0.9
    assert (out / cell.folder / "model.safetensors").read_bytes() == (finished / cell.folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("damage", [b"half of a file", {"stage": "none"}])
def test_a_run_with_a_damaged_or_old_checkpoint_starts_afresh(finished, tmp_path, capsys, damage):
    text = TINY.replace("seed: [0, 1]", "seed: 0").split("  BiP")[0]
    out = tmp_path / "out"
    (cell,) = grid.read(written(tmp_path, text)).cells.values()
    folder = out / cell.folder
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(cell.settings.as_dict()))
    if isinstance(damage, bytes):
        (folder / "checkpoint.pt").write_bytes(damage)
    else:
        torch.save(damage, folder / "checkpoint.pt")
    assert compare(written(tmp_path, text), out) == 0
    shown = capsys.readouterr().err
    assert f"{cell.folder}: checkpoint.pt " in shown
    assert "; it starts afresh\n" in shown
    assert "--overwrite" not in shown
    assert (folder / "model.safetensors").read_bytes() == (finished / cell.folder / "model.safetensors").read_bytes()


def test_a_model_of_the_users_own_counts_with_its_code(tmp_path):
    own = tmp_path / "own.py"
    text = TINY.replace("model: resnet20", f"model: {own}:net").replace("width: 2\n", "")
    own.write_text("a = 1")
    found = grid.read(written(tmp_path, text))
    first = [cell.address for cell in found.rows]
    own.write_text("a = 2")
    assert [cell.address for cell in found.rows] == first, "as the code was when the comparison began"
    assert found.cells.keys() == {cell.address for cell in found.cells.values()}
    assert not set(first) & {cell.address for cell in grid.read(written(tmp_path, text)).rows}


def test_lists_inside_of_a_method_are_swept(tmp_path):
    text = TINY.replace("levels: joint", "levels: [joint, alternating], gamma: [0.5, 1.0, 2.0]")
    rows = [cell for cell in grid.read(written(tmp_path, text)).rows if cell.label == "BiP"]
    assert len(rows) == 2 * 3 * 2 * 2
    assert {cell.swept for cell in rows} == {(("levels", a), ("gamma", b)) for a in ("joint", "alternating") for b in (0.5, 1.0, 2.0)}


def test_a_list_of_methods_prunes_all_but_dense(tmp_path):
    text = TINY.replace("BiP: {method: bip, levels: joint}", "both: {method: [dense, bip]}")
    rows = [(cell.settings.method, cell.settings.sparsity) for cell in grid.read(written(tmp_path, text)).rows if cell.label == "both"]
    assert sorted(rows) == sorted(2 * [("dense", 0.0), ("bip", 0.5), ("bip", 0.8)])


def test_labels_of_the_same_settings_are_rows_of_one_run(tmp_path):
    text = TINY.replace("  random:", "  random:\n  again: {method: random}\n  unpruned: {method: dense, epochs: 0}")
    found = grid.read(written(tmp_path, text))
    assert found.cells.keys() == grid.read(written(tmp_path)).cells.keys()
    by_label = {label: [cell.address for cell in found.rows if cell.label == label] for label in ("random", "again", "dense", "unpruned")}
    assert by_label["random"] == by_label["again"]
    assert len(by_label["random"]) == 4
    assert by_label["dense"] == by_label["unpruned"]


def test_a_dense_network_is_a_row_for_each_setting_that_decides_it(tmp_path):
    text = TINY.replace("pretrain_epochs: 2", "pretrain_epochs: [2, 3]\ngamma: [1.0, 2.0]")
    rows = [(cell.swept, cell.settings.seed) for cell in grid.read(written(tmp_path, text)).rows if cell.label == "dense"]
    assert sorted(rows) == [((("pretrain_epochs", n),), seed) for n in (2, 3) for seed in (0, 1)]


def test_a_pattern_with_one_sparsity_needs_none(tmp_path):
    text = 'pattern: "2:4"\nmethods: {dense: {epochs: 0}, bip: , "dense, longer": {method: dense, epochs: 2}}'
    rows = {cell.label: (cell.settings.sparsity, cell.settings.pattern) for cell in grid.read(written(tmp_path, text)).rows}
    assert rows == {"dense": (0.0, "unstructured"), "bip": (0.5, "2:4"), "dense, longer": (0.0, "unstructured")}


BAD = {
    f"lr: 1{400 * '0'}\nmethods: {{bip: }}": "lr must be 0 or more, got inf",
    "methods: {gmp: {rewind: 3}}": "methods: gmp: method gmp makes no use of rewind: leave it out",
    "sparsity: [0.5, a]\nmethods: {bip: }": "sparsity must be float or int, got 'a'",
    "sparsity: [null, 0.5]\nmethods: {bip: }": "sparsity must be float or int, got None",
    "data: [[digits]]\nmethods: {bip: }": "imagenet, got ['digits']",
    "data: {a: b}\nmethods: {bip: }": "got {'a': 'b'}",
    "lr: {a: b}\nmethods: {bip: }": "lr must be float or int, got {'a': 'b'}",
    "methods: {x: {method: {a: 1}}}": "method must be one of bip",
    "methods: {x: {method: [[bip]]}}": "got ['bip']",
    "methods: {bip: {model: [[resnet20]]}}": "model must be str, got ['resnet20']",
    "seed: 2020-13-45\nmethods: {bip: }": "is not YAML: month must be in 1..12",
    "seed: !!int abc\nmethods: {bip: }": "is not YAML: invalid literal for int()",
    "seed: !!timestamp abc\nmethods: {bip: }": "is not YAML",
    f"seed: {3000 * '['}": "is not YAML: maximum recursion depth exceeded",
    "[methods]: {bip: }": "is not YAML",
    "methods: {bip: {1: 2}}": "unknown setting 1",
    "methods: {bip: {rewind: [[1]]}}": "rewind must be str or NoneType, got [1]",
    "pattern: 2:4\nmethods: {bip: }": "got 124: YAML takes it for a number, quote it",
    "seed: 0\nmethods: {bip: }\nseed: 1": "tiny.yaml, line 3: 'seed' is there twice",
    "methods:\n  bip:\n  random:\n  bip: {lr: 1.0}": "tiny.yaml, line 4: 'bip' is there twice",
    "methods: {1: {method: bip}, '1': {method: random}}": "line 1: '1' is there twice",
    "methods: {bip: {lr: 1.0, epochs: 2, lr: 2.0}}": "line 1: 'lr' is there twice",
    "seed: [0, 1, 0]\nmethods: {bip: }": "methods: bip: seed lists 0 twice",
    "lr: [1, 1.0]\nmethods: {bip: }": "methods: bip: lr lists 1.0 twice",
    "methods: {}": "must have settings and `methods:`",
    "just text": "must have settings and `methods:`",
    "a: [": "is not YAML",
    "methods: {bip: 3}": "methods: bip: expected settings, got 3",
    "methods: {bip: {speed: 3}}": "methods: bip: unknown setting 'speed'; there are data,",
    "methods: {bip: {checkpoint: x}}": "unknown setting 'checkpoint'",
    "methods: {magic: }": "methods: magic: method must be one of bip",
    "methods: {bip: {lr: fast}}": "methods: bip: lr must be float",
    "methods: {bip: {seed: []}}": "seed must have a value, got an empty list",
    "sparsity: 95\nmethods: {bip: }": "sparsity must be in [0, 1), got 95 (write 0.95 for 95 %)",
    "data: cifar10\nmethods: {bip: }": "data cifar10 needs --data-dir",
}


@pytest.mark.parametrize("text", BAD)
def test_wrong_files_are_one_line(text, tmp_path, capsys):
    assert compare(written(tmp_path, text), tmp_path / "out") == 2
    assert BAD[text] in one_line(capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_not_there(tmp_path, capsys):
    assert compare(tmp_path / "no.yaml", tmp_path / "out") == 2
    assert "cannot read" in one_line(capsys.readouterr().err)


def test_the_files_of_configs_can_be_read():
    files = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
    assert files
    for path in files:
        assert grid.read(path).rows, path


# --- runs ------------------------------------------------------------------------------------------------------------------------------


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
    for folder, damage in zip(folders, DAMAGE.values(), strict=True):
        damage(folder)
    capsys.readouterr()
    assert compare(config, out, "--list") == 0
    assert capsys.readouterr().out.count("to do") == len(DAMAGE) + 1
    assert compare(config, out) == 0
    shown = capsys.readouterr().err
    for folder, what in zip(folders, DAMAGE, strict=True):
        assert len([line for line in shown.splitlines() if line.startswith(folder.name) and what in line and "run again" in line]) == 1
    assert [(folder / "model.safetensors").read_bytes() for folder in folders] == before
    assert len(rows_of(out / "runs.csv")) == len(DAMAGE)


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
    for jobs, settings, threads in (("1", "", 1), ("2", "threads: 2", 2)):
        assert compare(written(tmp_path, SHORT + f"  random: {{{settings}}}"), tmp_path / jobs, "--jobs", jobs) == 0
        (row,) = rows_of(tmp_path / jobs / "runs.csv")
        assert row["device"] == f"CPU, {threads} threads"


BUSY = """
import multiprocessing, os, signal, threading, time
from bip_fast.experiments.worker import end_with_parent
def busy():
    signal.signal(signal.SIGTERM, lambda *_: print("asked", flush=True))
    threading.Thread(target=end_with_parent, args=(0.2,), daemon=True).start()
    print("began", flush=True)
    while True:
        time.sleep(60)
if __name__ == "__main__":
    multiprocessing.get_context("spawn").Process(target=busy).start()
    time.sleep(600)
"""


def test_a_process_that_is_busy_does_not_outlive_its_parent(tmp_path):
    with subprocess.Popen([sys.executable, written(tmp_path, BUSY, "busy.py")], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "began\n"
        process.kill()
        assert process.communicate(timeout=60) == ("asked\n", None), "the end of the output is that of the process"


def start_process(config, out):
    command = [sys.executable, "-m", "bip_fast.cli", "compare", str(config), "--out", str(out), "--device", "cpu", "--jobs", "2"]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)


def test_without_stderr(tmp_path):
    """`2>&-`"""
    config = written(tmp_path, SHORT + "  random:")
    command = [sys.executable, "-m", "bip_fast.cli", "compare", str(config), "--out", str(tmp_path / "out"), "--device", "cpu"]
    done = subprocess.run(["sh", "-c", 'exec "$@" 2>&-', "sh", *command], stdout=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == 0
    assert "| random | " in done.stdout


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_stopped_or_killed_it_goes_on_with_the_same_bits(finished, tmp_path, how):
    text = TINY.replace("seed: [0, 1]", "seed: 0")
    out = tmp_path / "out"
    process = start_process(written(tmp_path, text), out)
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
    end = time.monotonic() + 30
    while True:  # after a kill, the processes of the first still stop
        if compare(written(tmp_path, text), out) == 0:
            break
        assert time.monotonic() < end
        time.sleep(1)
    for name, stamp in before.items():
        assert (out / name / "report.json").stat().st_mtime_ns == stamp
    folders = [path.parent.name for path in out.glob("*/report.json")]
    assert len(folders) == 8
    for name in folders:
        assert (out / name / "model.safetensors").read_bytes() == (finished / name / "model.safetensors").read_bytes()


def lose_processes(monkeypatch, how, times):
    """End the process of the first run that has a checkpoint, so many times; returns what is left to do."""
    left, listen = [how] * times, Comparison._listen

    def watched(self):
        slot = next((slot for slot in self._slots if slot.cell and (self.folder(slot.cell) / "checkpoint.pt").exists()), None)
        if left and slot is not None:
            os.kill(slot.process.pid, left.pop())
            slot.process.join(60)
        listen(self)

    monkeypatch.setattr(Comparison, "_listen", watched)
    return left


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_process_that_is_lost_is_replaced(finished, tmp_path, monkeypatch, capsys, how):
    text = TINY.replace("seed: [0, 1]", "seed: 0").replace("  imp: {rewind: 1, per_round: 0.5}\n", "")
    left = lose_processes(monkeypatch, how, 1)
    assert compare(written(tmp_path, text), tmp_path / "out") == 0
    assert not left
    assert (
        f"its process ended with exit code {0 if how == signal.SIGTERM else -how}; another one goes on with it" in capsys.readouterr().err
    )
    folders = [path.parent.name for path in (tmp_path / "out").glob("*/report.json")]
    assert len(folders) == 5
    for name in folders:
        assert (tmp_path / "out" / name / "model.safetensors").read_bytes() == (finished / name / "model.safetensors").read_bytes()


def test_a_run_that_loses_every_process_has_failed(tmp_path, monkeypatch, capsys):
    text = TINY.replace("seed: [0, 1]", "seed: 0").replace("pretrain_epochs: 2", "pretrain_epochs: 40")
    left = lose_processes(monkeypatch, signal.SIGKILL, 2)
    assert compare(written(tmp_path, text.split("  imp")[0]), tmp_path / "out", "--jobs", "1") == 1
    assert not left
    error = capsys.readouterr().err
    assert "its process ended with exit code -9, 2 times; the next start continues it" in error
    assert error.count("it starts from digits-") == 4, "two rows, said while it goes and at the end"


def test_a_run_that_nothing_leads_to_is_an_error_and_no_endless_wait(tmp_path, monkeypatch):
    monkeypatch.setattr(Comparison, "_ready", lambda self: None)
    with pytest.raises(RuntimeError, match="runs that nothing leads to"):
        compare(written(tmp_path), tmp_path / "out")


def test_a_run_that_fails_leaves_the_others_alone(tmp_path, capsys):
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
    assert compare(written(tmp_path, text), tmp_path / "out") == 1
    captured = capsys.readouterr()
    assert "RuntimeError: not today" in captured.err
    assert "it starts from digits-" in captured.err, "what stands on it is not tried"
    rows = rows_of(tmp_path / "out" / "runs.csv")
    assert sorted(row["label"] for row in rows) == ["bip", "random"]
    assert all(row["model"].endswith(":net") for row in rows)
    assert str(tmp_path) not in "".join(path.name for path in (tmp_path / "out").iterdir())


def test_two_at_once_is_an_error(finished, tmp_path, capsys):
    from bip_fast.experiments.run import RunFolder

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


# --- tables, pictures, progress --------------------------------------------------------------------------------------------------------


def row(label="BiP", sparsity=0.9, seed=0, accuracy=0.8, **more):
    base = {"data": "digits", "model": "resnet20", "width": None, "label": label, "row": label, "sparsity": sparsity, "seed": seed}
    base |= {"method": "dense" if label == "dense" else "bip", "pattern": "unstructured"}
    figures_ = {"accuracy": accuracy, "dense_accuracy": 0.9, "sparsity_exact": sparsity, "epochs_total": 4.0, "seconds_total": 90.0}
    return {**base, **figures_, "joules_total": None, **more}


def test_means_and_deviations():
    rows = [row(accuracy=0.8), row(seed=1, accuracy=0.9), row("IMP", accuracy=0.7, epochs_total=40.0)]
    first, second = results.summary(rows)
    assert (first["seeds"], first["accuracy"], first["accuracy_std"]) == (2, pytest.approx(0.85), pytest.approx(0.0707, abs=1e-4))
    assert (second["seeds"], second["accuracy_std"]) == (1, None)
    text = results.table([*rows, row("dense", 0.0, accuracy=0.95)])
    assert "| BiP | 85.00 ± 7.07 | 4 | 1.5 |" in text
    assert "| IMP | 70.00 | 40 | 1.5 |" in text
    assert "| dense | 95.00 | 4 | 1.5 |" in text


def test_only_dense_networks_stand_under_other_sparsities():
    text = results.table([row("dense", 0.0, accuracy=0.95), row(sparsity=0.0, accuracy=0.94), row(), row("IMP", 0.0, accuracy=0.93)])
    assert "| digits, resnet20 | 0 % | 90 % | epochs |" in text
    for line in ("| dense | 95.00 | 95.00 |", "| BiP | 94.00 | 80.00 |", "| IMP | 93.00 |  |"):
        assert line in text


def test_a_label_does_not_end_its_cell():
    assert "| a\\|b | 80.00 | 4 | 1.5 |" in results.table([row("a|b")])


@pytest.mark.parametrize(
    ("patterns", "head", "axis"),
    [
        (["unstructured", "2:4"], "| 50 % | 90 % |", "zeros among all Conv and Linear weights, %"),
        (["filter"], "| 50 % of the filters | 90 % of the filters |", "share of the filters that is pruned, %"),
        (["channel", "block:4x4"], "| 50 % of the input channels or blocks |", "share of the input channels or blocks that is pruned, %"),
    ],
)
def test_tables_and_pictures_say_what_a_sparsity_is_of(patterns, head, axis):
    from matplotlib.figure import Figure

    rows = [row(pattern, s, pattern=pattern) for pattern in patterns for s in (0.5, 0.9)] + [row("dense", 0.0)]
    assert head in results.table(rows)
    for plot in (figures._accuracy, figures._cost):
        axes = Figure().subplots()
        plot(axes, results.summary(rows), "")
        assert axes.get_xlabel().startswith(axis)


def test_pictures(finished, tmp_path):
    names = {path.name for path in finished.glob("*.png")}
    assert names == {"accuracy-digits-resnet20-2.png", "cost-digits-resnet20-2.png"}
    swept = [
        row(sparsity=s, setting_rewind=e, row=f"BiP, rewind {e}", accuracy=0.8 + i / 50)
        for s in (0.5, 0.9)
        for i, e in enumerate(["init", "3", "10"])
    ]
    made = figures.draw(swept, tmp_path)
    assert sorted(path.name for path in made) == ["accuracy-digits-resnet20.png", "cost-digits-resnet20.png", "rewind-digits-resnet20.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in made)
    assert figures._order("init") < figures._order("3") < figures._order("10") < figures._order("lr")


def test_results_become_a_table_of_the_readme(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    from bench import compare as bench_compare
    from bench import readme

    assert bench_compare.main([str(finished), "--results", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    folder = next(tmp_path.iterdir())
    assert {path.name for path in folder.iterdir()} == {"out.json"} | {f"out-{path.name}" for path in finished.glob("*.png")}
    rows = json.loads((folder / "out.json").read_text())["rows"]
    assert [row["accuracy"] for row in rows] == [float(row["accuracy"]) for row in rows_of(finished / "runs.csv")]
    (folder / "quick.json").write_bytes((folder / "out.json").read_bytes())
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    text = readme.filled(f"<!-- results: quick {folder.name} -->\nold\n<!-- end -->")
    assert results.table(rows) in printed
    assert results.table(rows) in text
    assert "| BiP | " in text
    assert "`gmp`" in readme.filled("<!-- results: methods none -->\n<!-- end -->")


def test_a_search_becomes_its_table(finished, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    from bench import compare as bench_compare
    from bench import readme

    search = tmp_path / "search"
    search.mkdir()
    (search / "runs.csv").write_bytes((finished / "runs.csv").read_bytes())
    assert bench_compare.main([str(search), "--results", str(tmp_path / "results")]) == 0
    (folder,) = (tmp_path / "results").iterdir()
    monkeypatch.setattr(readme, "RESULTS", tmp_path / "results")
    text = readme.filled(f"<!-- results: search {folder.name} -->\n<!-- end -->")
    assert "| method | levels | lr | mask_lr | mask_momentum | gamma | score_start | ramp | freeze | 0 % | 50 % | 80 % |" in text
    assert "| bip | joint | 0.2 | 1.6 | 0 | off | square | 0.5 | 1 |  | " in text
    assert "| imp |  |  |  |  |  |  |  |  |  | " in text


def test_steps_are_written_for_the_methods_that_take_them():
    for method, expected in {"bip-paper": "alternating", "bip": "joint", "omp": None}.items():
        assert steps_of(Settings.of({"method": method}))["levels"] == expected
    assert {name: value for name, value in steps_of(Settings.of({"method": "gmp"})).items() if value is not None} == {
        "lr": 0.05,
        "ramp": 0.5,
    }


def test_every_choice_of_the_committed_search_is_in_its_file():
    root = Path(__file__).parents[1]
    (committed,) = (root / "bench" / "results").glob("*/search.json")
    there = [
        (cell.settings.sparsity, cell.settings.method, steps_of(cell.settings)) for cell in grid.read(root / "configs/search.yaml").rows
    ]
    for row in json.loads(committed.read_text())["rows"]:
        names = {"bip", "bip-paper"} if row["method"] == "bip" else {row["method"]}
        wanted = {name: row[name] for name in STEPS if row.get(name) is not None}
        found = [own for sparsity, method, own in there if sparsity == row["sparsity"] and method in names]
        assert any(wanted.items() <= own.items() for own in found), row


def test_time_left_follows_what_was_measured(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    cells = [grid.Cell("BiP", Settings.of({"epochs": 10, "seed": seed, "checkpoint": "x"})) for seed in range(4)]
    shown = progress.Progress()
    shown.begin(cells, {cells[3].address}, jobs=2)
    assert shown.seconds_left() is None
    for cell in cells[:2]:
        shown.update(cell, 0.0, "", fresh=True)
    now[0] += 50
    for cell in cells[:2]:
        shown.update(cell, 0.5, "epoch 5/10")
    assert shown.seconds_left() == pytest.approx((5 * 10 + 5 * 10 + 10 * 10) / 2), "10 seconds an epoch, two at a time"
    now[0] += 50
    shown.finish(cells[0])
    shown.fail(cells[1], "broken")
    assert shown.seconds_left() == pytest.approx(100)
    assert shown.summary().startswith("2 of 4 runs, 1 failed, ")


def test_unknown_settings_name_what_there_is(tmp_path):
    with pytest.raises(ExperimentError, match="unknown setting 'epoch'; there are data, train_images"):
        grid.read(written(tmp_path, "epoch: 3\nmethods: {bip: }"))

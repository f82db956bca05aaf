"""`bip-fast prune` and `compare` under torchrun: what one process computes, stopped and gone on with, and errors that end all ranks."""

import json
from pathlib import Path

import pytest
import torch
from cli_runs import load_weights
from compare_runs import rows_of
from ranks import torchrun
from together import GRID, options

from bip_fast.commands import cli
from bip_fast.commands.environment import INSTALL, missing_extras
from bip_fast.experiments.runs import display

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(missing_extras()), reason=f"needs {INSTALL}")]
RANKS = 3  # of which some sums depend on the order, and which share batches of 200 unevenly


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """The folder of a job that ran all commands of `together`."""
    folder = tmp_path_factory.mktemp("together")
    done = torchrun(RANKS, Path(__file__).with_name("together.py"), folder)
    (folder / "told").write_text(done.stderr)
    assert (folder / "ended-0.json").exists(), done.stderr[-3000:]
    assert done.returncode == 1  # of the last command
    assert done.stderr.count("training on 3 processes") == 1
    return folder


@pytest.fixture(autouse=True)
def silent(monkeypatch):
    monkeypatch.setattr(display, "make", display.Display)


def report(folder):
    return json.loads((folder / "report.json").read_text())


def test_every_rank_ends_alike(job):
    first, *others = (json.loads((job / f"ended-{rank}.json").read_text()) for rank in range(RANKS))
    for found in (first, *others):
        assert found.pop("elsewhere").endswith("must be a folder that all processes see, but only some find checkpoint.pt")
    assert [{**other, "compare again": 1} for other in others] == [first] * (RANKS - 1)  # rank 0 alone knows of the table
    assert first["jobs"].startswith("--jobs is for several runs at a time, and torchrun starts processes that share each run")
    assert first.pop("stale") == "all processes must go on from the same batch, but some have read another checkpoint"
    assert first.pop("compare again") == 1  # a run fails alike on all ranks
    assert list(first.values())[:-1] == [0, 0, 130, 0, 130, 130]


def test_it_is_the_run_of_one_process_up_to_rounding(job, tmp_path):
    assert cli.main(["prune", *options(job, "plain", tmp_path / "one")]) == 0
    one, several = report(tmp_path / "one"), report(job / "plain")
    assert (one["processes"], several["processes"]) == ([1], [RANKS])
    for stage, rows in one["history"].items():
        for a, b in zip(rows, several["history"][stage], strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
            assert a["accuracy"] == pytest.approx(b["accuracy"], abs=2e-3)
    assert one["pruned"]["loss"] == pytest.approx(several["pruned"]["loss"], rel=1e-4)
    weights, others = load_weights(tmp_path / "one" / "model.safetensors"), load_weights(job / "plain" / "model.safetensors")
    for name, x in weights.items():
        assert torch.allclose(x, others[name], atol=1e-5), name


def test_a_run_that_was_stopped_has_the_bits_of_one_that_was_not(job):
    """Batch-norm, dropout on every rank, and the order in which ranks add up."""
    for name in ("dense.safetensors", "model.safetensors"):
        assert (job / "stopped" / name).read_bytes() == (job / "whole" / name).read_bytes(), name
    whole, stopped = (report(job / name)["history"] for name in ("whole", "stopped"))
    for stage, rows in whole.items():
        assert [{**row, "seconds": 0} for row in rows] == [{**row, "seconds": 0} for row in stopped[stage]]


def test_all_ranks_stop_after_the_same_batch_and_one_process_goes_on(job):
    state = torch.load(job / "left" / "checkpoint.pt", weights_only=True)
    assert (state["stage"], state["cursor"]["step"], len(state["rng"])) == ("prune", 2, RANKS)
    assert len(state["rng"].unique(dim=0)) == RANKS
    assert cli.main(["prune", "--resume", str(job / "left")]) == 0
    assert report(job / "left")["processes"] == [RANKS, 1]
    assert report(job / "left")["pruned"]["accuracy"] == pytest.approx(report(job / "whole")["pruned"]["accuracy"], abs=0.1)


def test_a_comparison(job, tmp_path):
    assert len([*(job / "grid").glob("*snip*/checkpoint.pt.damaged")]) == 1  # it was stopped, and rank 1 could not go on
    rows = rows_of(job / "grid" / "runs.csv")
    assert [row["processes"] for row in rows] == [str(RANKS)] * 2
    (tmp_path / "grid.yaml").write_text(GRID.format(model=f"{job / 'own.py'}:plain"))
    assert cli.main(["compare", str(tmp_path / "grid.yaml"), "--out", str(tmp_path / "one"), "--jobs", "1"]) == 1
    for row, other in zip(rows, rows_of(tmp_path / "one" / "runs.csv"), strict=True):
        assert float(row["loss"]) == pytest.approx(float(other["loss"]), rel=1e-3)
        assert row["kept"] == other["kept"]


def test_an_error_on_one_rank_ends_all_and_is_told_once(job):
    told = (job / "told").read_text()
    assert told.count("ValueError: what rank 1 says") == 1, told
    assert "Connection" not in told  # which is what the others meet
    assert (job / "fails" / "config.json").exists()
    assert not (job / "fails" / "report.json").exists()


def test_a_job_that_torchrun_starts_again_knows_nothing_of_before(tmp_path):
    """Both ranks fail, once alike and once after different collectives."""
    done = torchrun(2, "--max-restarts", "1", Path(__file__).with_name("restarted.py"), tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        f"{attempt}-{rank}": "True False" for attempt in (0, 1) for rank in (0, 1)
    }, done.stderr[-3000:]
    for attempt in (0, 1):
        assert done.stderr.count(f"ValueError: what attempt {attempt} says") == 1, done.stderr

"""Event files of `bip-fast prune --log tensorboard`: what they hold, also of a run that was stopped and went on."""

import json
import sys

import pytest
from cli_runs import Interrupting, one_line, prune

from bip_fast.commands import cli
from bip_fast.experiments.runs import display

LOG = ("--log", "tensorboard")


def points(folder):
    """(step, value) of every tag."""
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard")
    found = event_accumulator.EventAccumulator(str(folder), purge_orphaned_data=True).Reload()
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


@pytest.mark.slow
def test_a_resumed_run_has_every_epoch_once(finished_run, tmp_path, monkeypatch, capsys):
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    out = tmp_path / "run"
    monkeypatch.setattr(display, "make", lambda: Interrupting(17))  # in the second of three epochs of pruning
    assert prune(out, *LOG) == 130
    assert f"continue with: bip-fast prune --resume {out} --log tensorboard" in one_line(capsys.readouterr().err)
    monkeypatch.setattr(display, "make", display.Display)
    assert cli.main(["prune", "--resume", str(out), *LOG]) == 0
    assert (out / "model.safetensors").read_bytes() == (finished_run / "model.safetensors").read_bytes()
    found, report = points(out), json.loads((out / "report.json").read_text())
    rows = [row for stage in ("pretrain", "prune") for row in report["history"][stage]]
    ends = [5, 10, 15, 20, 25]  # 5 batches an epoch
    for name in ("loss", "accuracy", "lr", "mask_changes"):
        assert found[f"train/{name}"] == [(step, pytest.approx(row[name], rel=1e-6)) for step, row in zip(ends, rows, strict=True)]
    assert found["train/sparsity"][-1] == (25, pytest.approx(report["sparsity"]))
    assert [step for step, _ in found["pruning/kept"]] == ends[2:]
    for (step, kept), (_, sparsity) in zip(found["pruning/kept"], found["train/sparsity"][2:], strict=True):
        assert kept == pytest.approx(report["total"] * (1 - sparsity), abs=1e-2), step
    assert found["pruning/kept"][-1] == (25, report["kept"])
    assert found["test/accuracy"] == [(10, pytest.approx(report["dense"]["accuracy"])), (25, pytest.approx(report["pruned"]["accuracy"]))]
    assert prune(out, "--overwrite") == 0
    assert not list(out.glob("events.*"))


def test_without_tensorboard_nothing_starts(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert prune(tmp_path / "run", *LOG) == 2
    assert one_line(capsys.readouterr().err).endswith("--log tensorboard needs tensorboard: pip install tensorboard\n")
    assert not (tmp_path / "run").exists()

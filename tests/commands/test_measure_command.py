"""The command `bip-fast measure`: a run, a file of weights, and bad input."""

import json
from pathlib import Path

import pytest
import torch
from cli_runs import OWN, one_line, prune
from torch import nn

from bip_fast.commands import cli, environment
from bip_fast.experiments.data import parts, sources
from bip_fast.experiments.models.names import build

pytest.importorskip("safetensors", reason="file sizes need safetensors")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of a tiny network on digits; tests read it and leave it as it is."""
    if missing := environment.missing_extras():
        pytest.skip(f"needs {', '.join(missing)}: {environment.INSTALL}")
    out = tmp_path_factory.mktemp("runs") / "whole"
    torch.set_num_threads(1)
    assert prune(out) == 0
    return out


QUICKLY = ["--batch-sizes", "2", "--seconds", "0.01"]


def test_a_run_folder_is_measured_with_its_own_figures(run, capsys):
    before = {path.name: path.stat().st_mtime_ns for path in run.iterdir()}
    assert cli.main(["measure", str(run), "--json", *QUICKLY]) == 0
    captured = capsys.readouterr()
    told, report = json.loads(captured.out), json.loads((run / "report.json").read_text())
    dense, masked = told["variants"][:2]
    assert dense["accuracy"] == pytest.approx(report["dense"]["accuracy"], abs=2 / 599)
    assert masked["accuracy"] == pytest.approx(report["pruned"]["accuracy"], abs=2 / 599)
    assert dense["parameters"] - masked["nonzeros"] >= report["total"] - report["kept"]
    assert masked["file_bytes"] == (run / "model.safetensors").stat().st_size
    assert list(masked["milliseconds"]) == ["2"]
    assert told["note"] == "accuracy on 599 test images"
    assert captured.err == ""
    assert {path.name: path.stat().st_mtime_ns for path in run.iterdir()} == before


def test_the_table_of_a_file_in_a_run_is_printed(run, capsys):
    assert cli.main(["measure", str(run / "model.safetensors"), "--batch-sizes", "1,3", "--seconds", "0.01"]) == 0
    captured = capsys.readouterr()
    assert "batch 1" in captured.out
    assert "batch 3" in captured.out
    assert "masked  " in captured.out
    assert "Not measured: 2:4 needs an NVIDIA GPU" in captured.out or torch.cuda.is_available()
    assert captured.err == "note: accuracy on 599 test images\n"


def test_a_file_of_any_model_is_measured(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = build("resnet20", 3, 100, width=2)
    torch.save(model.state_dict(), "model.pt")
    options = ["--model", "resnet20", "--width", "2", "--data", "cifar100", "--dense", "model.pt"]
    assert cli.main(["measure", "model.pt", *options, *QUICKLY]) == 0
    captured = capsys.readouterr()
    assert "its weights have no zeros and the arithmetic is the same" in captured.out
    assert one_line(captured.err) == "note: no accuracy: --data-dir names the folder with the files of cifar100\n"


def test_a_run_that_holds_out_images_is_never_measured_on_test_images(run, tmp_path, capsys):
    import shutil

    shutil.copytree(run, tmp_path / "run")
    config = tmp_path / "run" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "validate": True}))
    assert cli.main(["measure", str(tmp_path / "run"), "--json", *QUICKLY]) == 0
    held = len(parts.hold_out(sources.load("digits")).test_labels)
    assert json.loads(capsys.readouterr().out)["note"] == f"accuracy on {held} validation images"


RETURNS = """
from torch import nn
class Net(nn.Sequential):
    def forward(self, x):
        return self.answer(super().forward(x))
def of(answer):
    def make(channels, classes):
        net = Net(nn.Flatten(), nn.Linear(64, classes))
        net.answer = answer
        return net
    return make
def fail(y):
    raise AssertionError("64 inputs\\nare too many")
pair, named, asserts = of(lambda y: (y, y)), of(lambda y: {"logits": y}), of(fail)
looks_up, indexes = of(lambda y: {}["y"]), of(lambda y: [][1])
"""

BAD = {
    "nowhere": "there is no nowhere",
    ".": "there is no run in .",
    "text.pt --model resnet20": "cannot read text.pt as weights",
    "other.pt --model resnet20": "other.pt does not fit the model: conv1.weight is missing",
    "other.pt": "other.pt is in no run folder, so --model must say",
    "other.pt --model resnet7": "--model must be one of resnet20",
    "other.pt --model resnet20 --data mnist": "--data must be one of digits",
    "fits.pt --model own.py:large": "does not fit the model",
    "large.pt --model own.py:large": "cannot measure large.pt: mat1 and mat2",
    "fits.pt --model returns.py:pair": "cannot measure fits.pt: data needs a model that returns one tensor of logits, got tuple",
    "fits.pt --model returns.py:named": "cannot measure fits.pt: data needs a model that returns one tensor of logits, got dict",
    "fits.pt --model returns.py:asserts": "cannot measure fits.pt: AssertionError: 64 inputs",
    "fits.pt --model returns.py:looks_up": "cannot measure fits.pt: KeyError: 'y'",
    "fits.pt --model returns.py:indexes": "cannot measure fits.pt: IndexError: list index out of range",
    "fits.pt --model own.py:fits --batch-sizes 99999999999999999": "cannot measure fits.pt: not enough memory",
    "fits.pt --model own.py:fits --data cifar10 --data-dir nowhere": "--data-dir must be a folder, got nowhere",
    "fits.pt --model own.py:fits --data cifar10 --data-dir .": "data_batch_1 is missing",
    "fits.pt --model own.py:fits --dense nowhere.pt": "there is no file nowhere.pt",
    "fits.pt --model own.py:fits --batch-sizes 1,0": "argument --batch-sizes: must be whole numbers of at least 1",
    "fits.pt --model own.py:fits --batch-sizes=": "argument --batch-sizes: must be whole numbers",
    "fits.pt --model own.py:fits --seconds nan": "argument --seconds: must be a number of more than 0, got 'nan'",
    "fits.pt --model own.py:fits --runtime tensorrt": "argument --runtime: invalid choice: 'tensorrt'",
    "fits.pt --model own.py:fits --device tpu": "--device must be auto, cpu, cuda or cuda:N, got 'tpu'",
    "unfinished": "unfinished has no model.safetensors: the run is not finished",
    "unfinished --model resnet20": "unfinished is a run, which knows its model and data; leave --model out",
    "damaged": "config.json is damaged",
    "younger": "config.json is damaged, or of another version: ",
    "": "the following arguments are required: RUN",
}


@pytest.mark.parametrize("options", BAD)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, options):
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(OWN + "def fits(channels, classes):\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, classes))\n")
    Path("returns.py").write_text(RETURNS)
    Path("text.pt").write_text("not weights")
    torch.save({"a": torch.ones(2)}, "other.pt")
    torch.save(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).state_dict(), "fits.pt")
    torch.save(nn.Sequential(nn.Flatten(), nn.Linear(784, 10)).state_dict(), "large.pt")
    for name, text in {"unfinished": "{}", "damaged": "{", "younger": '{"invented": 1}'}.items():
        Path(name).mkdir()
        Path(name, "config.json").write_text(text)
    Path("younger", "model.safetensors").write_text("")
    Path("damaged", "model.safetensors").write_text("")
    assert cli.main(["measure", *options.split(), *([] if "--seconds" in options else ["--seconds", "0.01"])]) == 2
    captured = capsys.readouterr()
    assert BAD[options] in one_line(captured.err)
    assert captured.out == ""

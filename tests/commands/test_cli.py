"""The command line as a person meets it: whole runs of a tiny network, errors in one line, report, doctor."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from cli_runs import FILES, OWN, load_weights, one_line, prune

import bip_fast
from bip_fast.commands import cli, environment
from bip_fast.engine import report
from bip_fast.errors import UserError
from bip_fast.experiments import ranks
from bip_fast.experiments.data import sources
from bip_fast.experiments.models import resnet
from bip_fast.experiments.models.names import build
from bip_fast.experiments.runs import display
from bip_fast.experiments.runs.folder import RunFolder
from bip_fast.experiments.runs.training import evaluate
from bip_fast.experiments.settings import Settings


def test_a_run_leaves_exactly_the_promised_files(finished_run):
    assert {path.name for path in finished_run.iterdir()} == FILES
    assert (finished_run / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_model_is_plain_pruned_and_as_good_as_reported(finished_run):
    result = json.loads((finished_run / "report.json").read_text())
    model = build("resnet20", 1, 10, width=2)
    model.load_state_dict(load_weights(finished_run / "model.safetensors"), strict=True)
    table = report.report(model)
    assert table.total == sum(x.numel() for _, x in report.weights(model))
    assert table.kept == table.total - round(0.8 * table.total)
    assert result["layers"] == table.as_dict()["layers"]
    digits = sources.load("digits")
    assert evaluate(model, digits).accuracy == pytest.approx(result["pruned"]["accuracy"], abs=2 / 599)
    model.load_state_dict(load_weights(finished_run / "dense.safetensors"), strict=True)
    assert evaluate(model, digits).accuracy == pytest.approx(result["dense"]["accuracy"], abs=2 / 599)
    assert report.report(model).sparsity == 0
    assert [len(result["history"][stage]) for stage in ("pretrain", "prune")] == [2, 3]
    assert result["image_passes"] == {"pretrain": 2 * 1000, "prune": 3 * 1000}  # five full batches of 200 an epoch
    assert result["images"] == {"train": 1198, "test": 599}


def test_the_result_is_printed(finished_run, capsys):
    assert prune(finished_run, "--resume") == 0  # finished: shows it again
    printed = capsys.readouterr().out
    result = json.loads((finished_run / "report.json").read_text())
    assert f"dense {100 * result['dense']['accuracy']:.2f} %" in printed
    assert f"pruned {100 * result['pruned']['accuracy']:.2f} %" in printed
    assert "stages.2.2.conv2.weight  8x8x3x3" in printed
    assert str(finished_run) in printed


def test_progress_on_a_pipe_is_plain_lines(tmp_path, capsys, monkeypatch):
    lines = display.Lines(interval=0)
    monkeypatch.setattr(display, "Lines", lambda: lines)
    assert prune(tmp_path / "run") == 0
    shown = capsys.readouterr().err.splitlines()
    assert len([line for line in shown if line.startswith("dense training: epoch ")]) == 10
    last = [line for line in shown if line.startswith("pruning: epoch ")][-1]
    for part in ("epoch 3/3", "loss ", "accuracy ", "sparsity 80.0", "0:00 left"):
        assert part in last
    assert not [line for line in shown if "\x1b" in line]


def test_progress_on_a_terminal_is_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    bar = display.make()
    with bar:
        bar.begin(100, 40)
        bar.update("prune", "2/3", 50, 0.25, 0.875, 0.95)
        bar.say("dense: 98.00 %")
    shown = capsys.readouterr().err
    for part in ("pruning 2/3", "50%", "loss 0.250", "accuracy 87.5 %", "sparsity 95.00 %", "dense: 98.00 %"):
        assert part in shown


def test_a_run_is_never_overwritten_unasked(finished_run, capsys):
    before = {path.name: path.stat().st_mtime_ns for path in finished_run.iterdir()}
    assert prune(finished_run) == 2
    assert "holds a finished run; --overwrite" in one_line(capsys.readouterr().err)
    assert {path.name: path.stat().st_mtime_ns for path in finished_run.iterdir()} == before


def test_overwrite_gives_the_same_bits_again(finished_run, tmp_path, capsys):
    out = tmp_path / "again"
    assert prune(out, "--epochs", "1") == 0
    (out / ".123-checkpoint.pt").write_bytes(b"left by a killed run")
    (out / "notes.txt").write_text("mine")
    assert prune(out, "--overwrite") == 0
    assert {path.name for path in out.iterdir()} == FILES | {"notes.txt"}
    assert (out / "model.safetensors").read_bytes() == (finished_run / "model.safetensors").read_bytes()


def test_levels_seed_and_freeze_change_the_result(finished_run, tmp_path):
    whole = load_weights(finished_run / "model.safetensors")
    for i, options in enumerate((["--levels", "alternating"], ["--seed", "1"], ["--freeze", "0"])):
        assert prune(tmp_path / str(i), *options) == 0
        other = load_weights(tmp_path / str(i) / "model.safetensors")
        assert report.report(other).kept == report.report(whole).kept
        assert any(not torch.equal(whole[name], other[name]) for name in whole)


def test_amp_trains_under_autocast_and_measures_in_float32(finished_run, tmp_path, monkeypatch):
    seen = set()
    monkeypatch.setattr(resnet.BasicBlock, "forward", watched(resnet.BasicBlock.forward, seen))
    assert prune(tmp_path / "run", "--amp") == 0
    assert seen == {(True, True), (False, False)}
    whole, amp = (json.loads((folder / "report.json").read_text()) for folder in (finished_run, tmp_path / "run"))
    assert (amp["settings"]["amp"], whole["settings"]["amp"]) == (True, False)
    assert all(x.dtype == torch.float32 for x in load_weights(tmp_path / "run" / "model.safetensors").values() if x.is_floating_point())
    assert amp["kept"] == whole["kept"]


def watched(forward, seen):
    """Notes (in training, under bfloat16 autocast) of every call on a whole batch."""

    def call(self, x):
        if len(x) > 2:  # not the trial in front of a run
            seen.add((self.training, torch.is_autocast_enabled("cpu")))
        return forward(self, x)

    return call


def test_frozen_masks_are_magnitude_pruning(tmp_path):
    assert prune(tmp_path / "run", "--freeze", "0") == 0
    dense, pruned = (load_weights(tmp_path / "run" / f"{name}.safetensors") for name in ("dense", "model"))
    names = [row.name for row in report.report(pruned)]
    mask = bip_fast.reference.topk_mask(torch.cat([dense[name].abs().flatten() for name in names]).clamp(max=1), report.report(pruned).kept)
    kept = torch.cat([pruned[name].flatten() != 0 for name in names])
    assert (mask != kept).float().mean() < 1e-3  # not equal: ties, and the memory order of channels-last weights


def test_checkpoint_skips_dense_training(finished_run, tmp_path):
    assert prune(tmp_path / "run", "--checkpoint", str(finished_run / "dense.safetensors")) == 0
    first, second = (json.loads((folder / "report.json").read_text()) for folder in (finished_run, tmp_path / "run"))
    assert second["dense"] == first["dense"]
    assert second["image_passes"]["pretrain"] == 0
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == (finished_run / "model.safetensors").read_bytes()


def test_checkpoint_of_torch_and_of_data_parallel(finished_run, tmp_path):
    state = {f"module.{name}": x for name, x in load_weights(finished_run / "dense.safetensors").items()}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "dense.pt")
    assert prune(tmp_path / "run", "--checkpoint", str(tmp_path / "dense.pt")) == 0
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == (finished_run / "model.safetensors").read_bytes()


def test_validate_never_measures_on_test_images(tmp_path):
    assert prune(tmp_path / "run", "--validate") == 0
    result = json.loads((tmp_path / "run" / "report.json").read_text())
    assert result["evaluated_on"] == "validation"
    assert result["images"]["train"] + result["images"]["validation"] == 1198


def test_own_model(tmp_path, finished_run):
    (tmp_path / "own.py").write_text(
        "from torch import nn\n"
        "def small(channels, classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64 * channels, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, classes))\n"
    )
    common = ["--model", f"{tmp_path / 'own.py'}:small", "--batch-size", "200", "--pretrain-epochs", "1", "--epochs", "1"]
    assert cli.main(["prune", *common, "--out", str(tmp_path / "run")]) == 0
    assert [row.name for row in report.report(load_weights(tmp_path / "run" / "model.safetensors"))] == ["1.weight", "4.weight"]


BAD = {
    "--sparsity 1.2": "--sparsity must be in [0, 1), got 1.2",
    "--sparsity 95": "got 95 (write 0.95 for 95 %)",
    "--sparsity nan": "--sparsity must be in [0, 1)",
    "--sparsity lots": "argument --sparsity: invalid float value: 'lots'",
    "--epochs 0": "--epochs must be at least 1, got 0",
    "--pretrain-epochs -1": "--pretrain-epochs must be at least 0, got -1",
    "--batch-size 1": "--batch-size must be at least 2",
    "--lr -1": "--lr must be 0 or more",
    "--mask-lr inf": "--mask-lr must be 0 or more",
    "--gamma 0": "--gamma must be more than 0, got 0",
    "--momentum 1": "--momentum must be in [0, 1), got 1",
    "--freeze 2": "--freeze must be in [0, 1], got 2",
    "--seed -1": "--seed must be at least 0, got -1",
    "--seed 9223372036854775808": "--seed must be less than 2**63",
    "--width 100000000000": "cannot build --model resnet20",
    "--checkpoint=": "--checkpoint must be the name of a file",
    "--out=": "--out must name a folder of its own",
    "--out mine": "mine has model.safetensors, but no run",
    "--model own.py:frozen": "own.py:frozen cannot be trained and pruned",
    "--model own.py:normed": "own.py:normed cannot be trained and pruned: ValueError: nothing to prune: a parametrization",
    "--model own.py:double": "failed on images of shape (2, 1, 8, 8): RuntimeError",
    "--method gmp --rewind 3": "--method gmp makes no use of --rewind: leave it out",
    "--method omp --per-round 0.3": "--method omp makes no use of --per-round",
    "--method snip --levels joint": "--method snip makes no use of --levels",
    "--method snip --lr 0.1": "--method snip makes no use of --lr",
    "--method omp --weight-decay 0.1 --pretrain-weight-decay 0.2": "--method omp makes no use of --weight-decay",
    "--method omp --lr 0.1": "--method omp makes no use of --lr",
    "--method omp-finetune --lr 0.1 --rewind lr": "--method omp-finetune makes no use of --lr",
    "--method dense --pattern 2:4": "--pattern must be unstructured with --method dense, which prunes nothing, got 2:4",
    "--method dense --sparsity 0.9": "--sparsity must be 0 with --method dense, which prunes nothing, got 0.9",
    "--rewind 01": "--rewind must be init, lr or a number of epochs, got '01'",
    "--levels both": "--levels must be one of alternating, joint, got 'both'",
    "--data mnist": "cifar10, cifar100, tiny-imagenet, imagenet, sst2, wikitext2, tsv:FILE or text:FILE, got 'mnist'",
    "--data cifar10": "--data cifar10 needs --data-dir",
    "--data cifar10 --data-dir nowhere": "--data-dir must be a folder, got nowhere",
    "--data cifar10 --data-dir .": "data_batch_1 is missing",
    "--data fashion-mnist --data-dir .": "train-images-idx3-ubyte.gz is missing",
    "--model resnet7": "--model must be one of resnet20",
    "--device tpu": "--device must be auto, cpu, cuda or cuda:N, got 'tpu'",
    "--device cuda:99": "--device cuda:99",
    "--device cpu:3": "--device must be auto, cpu, cuda or cuda:N, got 'cpu:3'",
    "--checkpoint nowhere.pt": "there is no file nowhere.pt",
    "--checkpoint text.pt": "text.pt as weights",
    "--checkpoint text.safetensors": "text.safetensors as weights",
    "--checkpoint list.pt": "list.pt does not hold a state dict",
    "--checkpoint other.pt": "other.pt does not fit the model: conv1.weight is missing",
    "--checkpoint wide.pt": "conv1.weight: expected shape (16, 1, 3, 3), got (4, 1, 3, 3)",
    "--resume nowhere": "nothing to resume: there is no run in nowhere",
    "--resume": "nothing to resume: there is no run in runs/digits-resnet20-95-seed0",
    "--resume --overwrite": "give one of them",
    "--resume nowhere --out here": "give one of them",
    "--model own.py:norm": "has no weights to prune: no matrix of a convolution, Linear layer, attention, recurrent layer or experts",
    "--model own.py:narrow": "must give logits of shape (2, 10) for images of shape (2, 1, 8, 8), got (2, 3)",
    "--model own.py:large": "failed on images of shape (2, 1, 8, 8): RuntimeError",
    "--out text.pt": "cannot write to --out text.pt",
    "--out text.pt/deeper": "cannot write to --out text.pt/deeper",
    "--epoch-count 3": "unrecognized arguments: --epoch-count 3",
}


@pytest.mark.parametrize("options", BAD)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, options):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # own.py is imported
    Path("text.pt").write_text("not weights")
    Path("text.safetensors").write_text("not weights")
    Path("own.py").write_text(OWN)
    Path("mine").mkdir()
    Path("mine/model.safetensors").write_text("somebody else's")
    torch.save([1, 2], "list.pt")
    torch.save({"a": torch.ones(2)}, "other.pt")
    torch.save(build("resnet20", 1, 10, width=4).state_dict(), "wide.pt")
    before = set(Path().iterdir())
    assert cli.main(["prune", *options.split()]) == 2
    captured = capsys.readouterr()
    assert BAD[options] in one_line(captured.err)
    assert captured.out == ""
    assert set(Path().iterdir()) == before
    assert Path("mine/model.safetensors").read_text() == "somebody else's"


def test_a_run_does_not_replace_the_weights_it_starts_from(finished_run, tmp_path, capsys):
    shutil.copytree(finished_run, tmp_path / "run")
    before = (tmp_path / "run" / "model.safetensors").read_bytes()
    assert prune(tmp_path / "run", "--overwrite", "--checkpoint", str(tmp_path / "run" / "model.safetensors")) == 2
    assert "would be overwritten" in one_line(capsys.readouterr().err)
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before


def test_a_run_that_diverges_says_so(tmp_path, capsys):
    assert prune(tmp_path / "run", "--pretrain-lr", "1e30") == 2
    assert "the training loss is nan in epoch" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run" / "report.json").exists()


def test_a_run_whose_last_step_diverges_says_so(tmp_path, capsys):
    """The loss of a batch is taken before its step."""
    options = ["--batch-size", "2000", "--epochs", "1", "--lr", "1e30"]
    assert prune(tmp_path / "run", *options) == 2
    assert "the test loss is nan; smaller --lr" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run" / "report.json").exists()


def test_a_folder_in_use_is_refused(tmp_path, capsys):
    """As long as one run has it, also with --overwrite and --resume."""
    holder = RunFolder(tmp_path)
    holder.lock()
    (tmp_path / "config.json").write_text(json.dumps(Settings().as_dict()))
    for options in (["--out", str(tmp_path), "--overwrite"], ["--resume", str(tmp_path)]):
        assert cli.main(["prune", *options]) == 2
        assert "is in use by another run" in one_line(capsys.readouterr().err)
    holder.release()
    assert prune(tmp_path, "--overwrite", "--pretrain-epochs", "0", "--epochs", "1") == 0


def test_report_prints_the_table_of_a_file_and_of_a_run(finished_run, tmp_path, capsys):
    state = load_weights(finished_run / "model.safetensors")
    torch.save(state, tmp_path / "model.pt")
    for path in (finished_run, finished_run / "model.safetensors", tmp_path / "model.pt"):
        assert cli.main(["report", str(path)]) == 0
        assert capsys.readouterr().out == f"{report.report(state)}\n"
    assert cli.main(["report", "--json", str(finished_run)]) == 0
    assert json.loads(capsys.readouterr().out) == report.report(state).as_dict()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.pt", "there is no file"),
        (".", "there is no file"),
        ("flat.pt", "no weights of two"),
        ("numbers.pt", "does not hold a state dict"),
        ("sparse.pt", "cannot count zeros"),
        ("meta.pt", "cannot count zeros"),
    ],
)
def test_report_of_nothing_is_one_line(tmp_path, monkeypatch, capsys, name, message):
    monkeypatch.chdir(tmp_path)
    torch.save({"bias": torch.ones(3)}, "flat.pt")
    torch.save({1: torch.ones(3, 3)}, "numbers.pt")
    torch.save({"a": torch.eye(3).to_sparse()}, "sparse.pt")
    torch.save({"a": torch.ones(3, 3, device="meta")}, "meta.pt")
    assert cli.main(["report", name]) == 2
    assert message in one_line(capsys.readouterr().err)


def test_each_process_of_torchrun_needs_a_gpu_that_it_sees(monkeypatch):
    """With --virtual-local-rank each sees only its own, as number 0."""
    monkeypatch.setattr(ranks, "_stores", [None])
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert environment._of_rank(torch.device("cuda")) == torch.device("cuda")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(UserError, match="--nproc-per-node must be at most 1, the GPUs here, got 2"):
        environment._of_rank(torch.device("cuda"))

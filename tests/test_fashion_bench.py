"""The comparison on Fashion-MNIST, on a handful of random images: equal passes, resumable cells, JSON, picture and table."""

import json
from pathlib import Path

import pytest
import torch
from test_data import write_fashion_mnist

from bip_fast import cli

if missing := cli.missing_extras():
    pytest.skip(f"needs {', '.join(missing)}: {cli.INSTALL}", allow_module_level=True)


@pytest.fixture
def comparison(tmp_path, monkeypatch):
    """The module with one epoch a stage; calling it runs the comparison on 120 training images."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1])
    from bench import fashion_mnist

    write_fashion_mnist(tmp_path / "data", train=720, test=20)
    for name, value in {"pretrain_epochs": 1, "epochs": 2, "batch_size": 60}.items():
        monkeypatch.setitem(fashion_mnist.BASE, name, value)
    torch.set_num_threads(1)

    def run(*options):
        common = ["--data-dir", str(tmp_path / "data"), "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
        return fashion_mnist.main([*common, *options])

    run.module = fashion_mnist
    return run


def test_every_method_gets_the_same_passes_and_exact_sparsity(comparison, tmp_path, capsys):
    assert comparison("--sparsities", "0.9", "0.98", "--seeds", "3") == 0
    results = json.loads((tmp_path / "out" / "fashion-mnist.json").read_text())
    rows = {(row["method"], row["sparsity"]): row for row in results["rows"]}
    assert len(rows) == 7
    assert {row["image_passes"] for row in rows.values()} == {2 * 120}
    for (_, sparsity), row in rows.items():
        assert row["kept"] == row["total"] - round(sparsity * row["total"])
    assert (tmp_path / "out" / "fashion-mnist.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "| method | 90 % zeros | 98 % zeros |" in printed
    assert f"| BiP joint | {100 * rows['BiP joint', 0.9]['accuracy']:.2f} " in printed


def test_finished_cells_are_not_repeated(comparison, monkeypatch, tmp_path):
    assert comparison("--sparsities", "0.9", "--seeds", "3") == 0
    first = json.loads((tmp_path / "out" / "fashion-mnist.json").read_text())["rows"]
    trained = []
    train = comparison.module.train
    monkeypatch.setattr(comparison.module, "train", lambda *given: trained.append(1) or train(*given))
    assert comparison("--sparsities", "0.9", "--seeds", "3") == 0
    assert not trained
    assert json.loads((tmp_path / "out" / "fashion-mnist.json").read_text())["rows"] == first
    monkeypatch.setitem(comparison.module.BASE, "batch_size", 40)
    assert comparison("--sparsities", "0.9", "--seeds", "3") == 0
    assert len(trained) == 5  # other settings: the start and the four methods


def test_validation_images_are_not_test_images(comparison, tmp_path):
    test, held = (comparison.module.images(tmp_path / "data", validate) for validate in (False, True))
    assert torch.equal(test.train_images, held.train_images)
    assert (len(test.train_labels), len(test.test_labels), len(held.test_labels)) == (120, 20, 120)
    seen = {bytes(x.flatten().tolist()) for x in (*test.test_images, *test.train_images)}
    assert not seen & {bytes(x.flatten().tolist()) for x in held.test_images}
    assert test.train_images.shape[1:] == (1, 14, 14)

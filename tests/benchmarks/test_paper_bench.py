"""`bench/studies/paper.py`: the reference on a real network is what `FastBiP` does, and each variant is what its name says."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from bip_fast import FastBiP
from bip_fast.engine.layers import weights
from bip_fast.experiments.data import parts, sources
from bip_fast.experiments.data.batches import Position
from bip_fast.experiments.runs.resolve import resolve

pytest.importorskip("sklearn", reason="needs scikit-learn: pip install 'bip_fast[cli]'")


@pytest.fixture
def paper(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    from bench.studies import paper

    return paper


@pytest.fixture(scope="module")
def digits():
    return parts.subset(sources.load("digits"), 300)


SETTINGS = resolve({"method": "bip-paper", "width": 2, "batch_size": 100, "epochs": 2, "lr": 0.05, "mask_lr": 1.0, "sparsity": 0.8})


@pytest.mark.parametrize(
    ("label", "levels"),
    [("the paper: implicit term -m g^2 / gamma, two batches", "alternating"), ("one batch and one backward (joint)", "joint")],
)
def test_the_reference_takes_the_steps_of_fastbip(paper, digits, label, levels):
    variant, batches = paper.VARIANTS[label]
    ours, theirs = paper.network(SETTINGS, digits), paper.network(SETTINGS, digits)
    found = paper.run(ours, SETTINGS, digits, variant, batches)
    opt = FastBiP(theirs, sparsity=0.8, levels=levels, weight_decay=SETTINGS.weight_decay)
    for done in range(6):
        factor = 0.5 * (1 + math.cos(math.pi * done / 6))
        for group in opt.param_groups:
            group["lr"], group["mask_lr"] = 0.05 * factor, 1.0 * factor
        images, labels = digits.epoch(100, Position(0, "prune", done // 3)).batch(done % 3)
        theirs.zero_grad()
        F.cross_entropy(theirs(images), labels).backward()
        opt.step()
    for (name, a), (_, b) in zip(weights(ours), weights(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=name)  # vectors take torch's SGD, which rounds otherwise
        assert torch.equal(a != 0, b != 0)
    assert 0 < found["moved"] < 1


@pytest.mark.parametrize(("batches", "phases", "taken"), [("two", "lulu", 4), ("same", "lulu", 2), ("joint", "jjjj", 4)])
def test_what_the_levels_see(paper, batches, phases, taken):
    steps = [step for step, _ in zip(paper.phases(batches), range(4))]  # noqa: B905
    assert "".join(phase[0] for phase, _ in steps) == phases
    assert sum(new for _, new in steps) == taken


def test_variants_differ(paper, digits):
    ends = {}
    for label, (variant, batches) in paper.VARIANTS.items():
        model = paper.network(SETTINGS, digits)
        paper.run(model, SETTINGS, digits, variant, batches)
        ends[label] = torch.cat([x.detach().flatten() for _, x in weights(model)])
        assert int((ends[label] != 0).sum()) == ends[label].numel() - round(0.8 * ends[label].numel())
    labels = list(ends)
    for i, a in enumerate(labels):
        for b in labels[i + 1 :]:  # 1e-4 (theta g)^2 is so little that it may change no mask in a few steps
            assert {a, b} == {labels[1], labels[2]} or not torch.equal(ends[a], ends[b]), (a, b)


def test_the_table_has_means_and_every_seed(paper):
    rows = [
        {"data": "digits", "seed": seed, "sparsity": 0.95, "variant": label, "accuracy": 0.8 + seed / 100, "moved": 0.25}
        for label in paper.VARIANTS
        for seed in (0, 1)
    ]
    lines = paper.table({"rows": rows}).splitlines()
    assert len(lines) == 2 + len(paper.VARIANTS)
    assert lines[-1] == "| joint, no implicit term | 80.50 (80.00 / 81.00) | 25.0 % |"

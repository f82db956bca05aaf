"""`FastBiP.metrics`: plain numbers that agree with the report and with the masks, at any moment of a run."""

import copy
import json

import pytest
import torch
from helpers import fill_gradients
from torch import nn

from bip_fast import FastBiP

PATTERNS = {
    "unstructured": {"sparsity": 0.7},
    "erk": {"sparsity": 0.7, "scope": "erk"},
    "filter": {"sparsity": 0.5, "pattern": "filter", "coupled": [["0.weight", "1.weight"]]},
    "blocks with edges": {"sparsity": 0.5, "pattern": "block:3x5", "scope": "layer"},
    "2:4": {"pattern": "2:4"},
    "mixed": {"sparsity": 0.5, "overrides": {"1": {"pattern": "2:4"}, "2": 0.9}},
    "growing": {"sparsity": 0.9, "preset": "joint", "steps": 8},
}


def network(device):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 17, 3), nn.LSTM(17, 5), nn.Linear(5, 4)).to(device)


def steps(model, opt, count):
    for i in range(count):
        fill_gradients(model.parameters(), i)
        opt.step()


@pytest.mark.parametrize("options", PATTERNS.values(), ids=PATTERNS)
def test_they_agree_with_the_report(backend, options):
    model = network(backend.device)
    opt = FastBiP(model, lr=0.01, **options)
    steps(model, opt, 6)
    found, report = opt.metrics(layers=True), opt.report()
    assert found["kept"] == report.kept == sum(int(opt.mask_of(p).sum()) for p in opt.pruned_params)
    assert found["sparsity"] == report.sparsity
    assert {name: found[f"layer_sparsity/{name}"] for name in (row.name for row in report)} == {row.name: row.sparsity for row in report}
    for name in ("flips", "candidates", "fallbacks"):
        assert found.get(name, 0) == sum(getattr(row, name) for row in report.selections)
    several = len(report.selections) > 1
    assert [name for name in found if "group_threshold/" in name] == [f"group_threshold/{row.name}" for row in report.selections] * several
    assert {type(value) for value in found.values()} <= {int, float}
    json.dumps(found, allow_nan=False)
    assert opt.metrics() == {name: value for name, value in found.items() if "/" not in name}
    opt.finalize()
    assert opt.metrics(layers=True) == found


def test_the_threshold_divides_the_scores(backend):
    model = network(backend.device)
    opt = FastBiP(model, sparsity=0.7)
    steps(model, opt, 4)
    threshold = opt.metrics()["threshold"]
    for p in opt.pruned_params:
        mask, scores = opt.mask_of(p), opt.scores_of(p)
        assert (scores[mask] >= threshold).all()
        assert (scores[~mask] <= threshold).all()


def test_where_all_are_kept_the_threshold_is_a_number(backend):
    opt = FastBiP(network(backend.device), sparsity=0.0)
    found, total = opt.metrics(), opt.report().total
    assert (found["sparsity"], found["kept"], found["flips"], found["threshold"]) == (0, total, total, 0)


def test_skipped_entries_and_a_load(backend):
    model = network(backend.device)
    opt = FastBiP(model, sparsity=0.5)
    fill_gradients(model.parameters(), 0)
    model[0].weight.grad[0, 0, 0, :2] = torch.nan
    opt.step()
    before = opt.metrics()
    assert before["nonfinite"] == 2
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    after = opt.metrics()
    assert (after["kept"], after["nonfinite"], after["selections"]) == (before["kept"], 2, 0)
    assert "threshold" not in after

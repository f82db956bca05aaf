"""`coupled_filters`: which filters go together, and which the model returns."""

import pytest
import torch
from helpers import fill_gradients
from torch import nn

from bip_fast import FastBiP
from bip_fast.engine.param_groups import OUTPUTS

pytest.importorskip("torch_pruning", reason="needs the package torch-pruning: pip install 'bip-fast[test]'")

from bip_fast.export import coupled_filters

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class Heads(nn.Module):
    """Two heads, the first of which is registered before all else, and features that are returned and read."""

    def __init__(self):
        super().__init__()
        self.boxes = nn.Linear(8, 4)
        self.stem = nn.Conv2d(3, 8, 3)
        self.classes = nn.Linear(8, 5)
        self.features = nn.Conv2d(8, 8, 1)
        self.norm = nn.BatchNorm2d(8)
        self.body = nn.Conv2d(8, 8, 3, bias=False)

    def forward(self, x):
        features = self.norm(self.features(torch.relu(self.stem(x))))
        x = torch.relu_(self.body(torch.relu(features))).mean((2, 3))
        return {"boxes": self.boxes(x[:, None])[:, 0].sigmoid(), "rest": (self.classes(x), [features])}


def reasons(opt):
    return {row.name: row.reason for row in opt.report().decisions}


def test_what_the_model_returns_is_marked():
    lists = {names[0]: names for names in coupled_filters(Heads(), X)}
    assert lists == {
        "stem.weight": ["stem.weight", "stem.bias"],
        "features.weight": ["features.weight", "features.bias", "norm.weight", "norm.bias", OUTPUTS],
        "body.weight": ["body.weight"],
        "boxes.weight": ["boxes.weight", "boxes.bias", OUTPUTS],
        "classes.weight": ["classes.weight", "classes.bias", OUTPUTS],
    }


def test_no_output_is_ever_pruned():
    model = Heads()
    opt = FastBiP(model, sparsity=0.5, pattern="filter", scope="layer", levels="joint", lr=0.1, coupled=coupled_filters(model, X))
    returned = "its filters are outputs of the model"
    assert reasons(opt) == {
        "boxes.weight": returned,
        "stem.weight": None,
        "classes.weight": returned,
        "features.weight": returned,
        "body.weight": None,  # registered last
    }
    for i in range(3):
        fill_gradients(model.parameters(), i)
        opt.step()
    for name in ("boxes", "classes", "features", "norm"):
        assert all(bool((p != 0).all()) for p in model.get_submodule(name).parameters())
    assert int(opt.mask_of(model.body.weight)[:, 0, 0, 0].sum()) == 4


def test_without_a_graph_the_last_layer_is_taken_for_the_output():
    opt = FastBiP(Heads(), sparsity=0.5, pattern="filter", exclude=["boxes", "classes"])
    assert reasons(opt)["body.weight"] == "it is the last layer of the model"
    assert reasons(opt)["stem.weight"] is None


def test_lists_for_other_patterns_of_the_same_model():
    """What is returned keeps its filters; single weights of it can go."""
    model = Heads()
    opt = FastBiP(
        model, sparsity=0.5, pattern="filter", coupled=coupled_filters(model, X), overrides={"boxes": {"pattern": "unstructured"}}
    )
    assert reasons(opt)["boxes.weight"] is None
    assert reasons(opt)["classes.weight"] is not None


def test_hidden_weights_make_no_lists():
    model = nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3)), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 2, 1)
    )
    lists = coupled_filters(model, X)
    assert all(any(name.endswith(".weight") for name in names) for names in lists)
    assert ["4.weight", "4.bias", OUTPUTS] in lists

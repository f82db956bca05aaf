"""Patterns, overrides and couplings as a user gives them, and the reasons for what stays dense."""

import pytest
import torch
from helpers import fill_gradients
from torch import nn

from bip_fast import FastBiP
from bip_fast.engine.layers import Layer
from bip_fast.engine.patterns import NofM, Refused, parse


@pytest.mark.parametrize("pattern", ["filters", "4:2", "2:2", "0:4", "2:5", "2:64", "block:0x4", "block:4", "", None, 24])
def test_unknown_patterns(pattern):
    with pytest.raises(ValueError, match=r"pattern must be .*got"):
        FastBiP(nn.Linear(8, 8), sparsity=0.5, pattern=pattern)


def test_the_sparsity_of_n_of_m(backend):
    assert FastBiP(nn.Linear(8, 8).to(backend.device), sparsity=0.5, pattern="2:4").report().sparsity == 0.5
    with pytest.raises(ValueError, match=r"sparsity must be 0.5 or left out with pattern '2:4', got 0.9"):
        FastBiP(nn.Linear(8, 8), sparsity=0.9, pattern="2:4")
    opt = FastBiP(nn.Linear(8, 8).to(backend.device), pattern="1:4")
    opt.param_groups[0]["pattern"] = "2:4"
    with pytest.raises(ValueError, match="pattern of a parameter group cannot change"):
        opt.step()


def test_what_a_pattern_does_not_fit_stays_dense_with_the_reason(backend):
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 8, 2), nn.Linear(8, 6), nn.Linear(6, 8), nn.Linear(8, 2), nn.Linear(4, 4)
    )
    model[4].weight.requires_grad_(False)
    opt = FastBiP(model.to(backend.device), pattern="2:4", exclude=["2"])
    decisions = {row.name: row for row in opt.report().decisions}
    assert decisions["0.weight"].pattern is None
    assert "27 inputs per output are not a multiple of 4" in decisions["0.weight"].reason
    assert "transposed" in decisions["1.weight"].reason
    assert decisions["2.weight"].reason == "it is excluded"
    assert decisions["3.weight"].reason == "its 6 inputs per output are not a multiple of 4"
    assert decisions["4.weight"].reason == "it is frozen"
    assert "dense: 2.weight (it is excluded)" in str(opt.report())
    assert len(opt.report().as_dict()["decisions"]) == 6


def test_the_ends_of_a_model_are_nobody_s(backend):
    def model():
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 4)).to(backend.device)

    reasons = {row.name: row.reason for row in FastBiP(model(), sparsity=0.5, pattern="filter").report().decisions if row.reason}
    assert reasons == {"2.weight": "it is the last layer of the model"}
    reasons = {row.name: row.reason for row in FastBiP(model(), sparsity=0.5, pattern="channel").report().decisions if row.reason}
    assert reasons == {"0.weight": "it is the first layer of the model"}
    with pytest.raises(ValueError, match=r"nothing to prune.*last layer of the model"):
        FastBiP(nn.Linear(4, 4), sparsity=0.5, pattern="filter")


def test_overrides(backend):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3), nn.Linear(16, 8), nn.Linear(8, 4)).to(backend.device)
    opt = FastBiP(model, sparsity=0.9, overrides={"*": 0.5, "2": {"pattern": "2:4"}, "1.weight": {"density": 0.25}})
    sparsity = {row.name: row.sparsity for row in opt.report()}
    assert sparsity["2.weight"] == 0.5
    assert sparsity["1.weight"] == 0.75
    assert len(opt.param_groups) == 4  # the others, 1, 2, and what is dense
    fill_gradients(model.parameters(), 0)
    opt.step()
    for wrong, message in [
        ({"nope": 0.5}, "matches none"),
        ({"1": 1.5}, "sparsity must be"),
        ({"1": {"prune": False}}, "overrides"),
        ({1: 0.5}, "names"),
    ]:
        with pytest.raises((ValueError, TypeError), match=message):
            FastBiP(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), sparsity=0.5, overrides=wrong)


@pytest.mark.parametrize(
    ("coupled", "message"),
    [
        ([["nope.weight"]], "nope.weight"),
        ([["0.weight", "1.weight"], ["1.weight"]], "once"),
        ([["0.weight", "2.weight"]], "the same number of filters"),
        ([["0.weight", "3.bias"]], "entries"),
        (["0.weight"], "coupled must hold lists of names, got '0.weight'"),
        ([3], "coupled must hold lists of names, got 3"),
        (3, "coupled must be a list of lists of names, got 3"),
        (None, "coupled must be a list of lists of names, got None"),
        ("0.weight", "coupled must be a list of lists of names, got '0.weight'"),
        ([["0.bias"]], "coupled must have a weight in every list, got .*0.bias"),
        ([[]], "a weight in every list"),
    ],
)
def test_wrong_couplings(coupled, message):
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 6), nn.Linear(6, 4))
    with pytest.raises((ValueError, TypeError), match=message):
        FastBiP(model, sparsity=0.5, pattern="filter", coupled=coupled)


@pytest.mark.parametrize(
    "options", [{"sparsity": 0.5}, {"sparsity": 0.5, "pattern": "channel"}, {"pattern": "2:4"}, {"sparsity": 0.5, "pattern": "block:2x2"}]
)
def test_couplings_without_effect_are_refused(options):
    """Whatever is to be dropped together must be filters; what stays dense has its own reason."""

    def model():
        return nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4))

    pattern = options.get("pattern", "unstructured")
    with pytest.raises(ValueError, match=rf'coupled must hold weights of pattern "filter", got 1\.weight of pattern .{pattern}.'):
        FastBiP(model(), coupled=[["1.weight", "2.weight"]], **options)
    with pytest.raises(ValueError, match=r'must hold weights of pattern "filter", got 0\.weight'):
        FastBiP(model(), sparsity=0.5, pattern="filter", overrides={"0": {"pattern": "unstructured"}}, coupled=[["0.weight", "0.bias"]])
    FastBiP(model(), coupled=[["1.weight", "2.weight"]], exclude=["1", "2"], **options)


def test_lists_of_other_patterns_beside_those_of_filters_couple_nothing():
    """As where `coupled_filters` lists every layer, and one goes by another pattern."""
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4))
    coupled = [["0.weight"], ["1.weight", "2.weight"]]
    opt = FastBiP(model, sparsity=0.5, pattern="filter", overrides={"0": {"pattern": "unstructured"}}, coupled=coupled)
    patterns = {row.name: row.pattern for row in opt.report().decisions}
    assert patterns["0.weight"] == "unstructured"
    assert patterns["1.weight"] == "filter"


def test_frozen_vectors_are_not_masked_and_listed(backend):
    def made():
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3)).to(backend.device)
        model[0].bias.requires_grad_(False)
        model[1].weight.requires_grad_(False)
        return model

    coupled = [["0.weight", "1.weight", "1.bias"]]
    for what in (lambda model: model, lambda model: list(model.named_parameters())):
        model = made()
        opt = FastBiP(what(model), sparsity=0.5, pattern="filter", coupled=coupled, exclude=["2.weight"])
        reasons = {row.name: row.reason for row in opt.report().decisions}
        listed = {"1.weight", "0.bias"} if what(model) is model else {"1.weight"}  # a list does not know whose bias it is
        assert {name for name, reason in reasons.items() if reason == "it is frozen, and outlives the filters it belongs to"} == listed
        assert bool((model[0].bias != 0).all())
        assert bool((model[1].weight == 1).all())
        assert int((opt.mask_of(model[1].bias)).sum()) == 4
    assert FastBiP(made(), sparsity=0.5).report().decisions[-1].name == "2.weight", "without filters nobody asks"


def test_a_bias_that_is_computed_goes_its_own_way():
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))
    nn.utils.parametrize.register_parametrization(model[0], "bias", nn.Tanh())
    opt = FastBiP(model, sparsity=0.5, pattern="filter")
    assert bool((model[0].bias != 0).all())
    assert {row.name: row.reason for row in opt.report().decisions}["0.weight"] is None


def test_filters_coupled_with_a_dense_layer_stay(backend):
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 6), nn.Linear(6, 4)).to(backend.device)
    opt = FastBiP(model, sparsity=0.5, pattern="filter", coupled=[["0.weight", "1.weight"]], exclude=["1"])
    reasons = {row.name: row.reason for row in opt.report().decisions}
    assert reasons["0.weight"] == "its filters are coupled with those of 1.weight, which stays dense: it is excluded"
    assert reasons["2.weight"] is None
    model[1].weight.requires_grad_(False)
    opt = FastBiP(model, sparsity=0.5, pattern="filter", coupled=[["0.weight", "1.weight"]])
    reasons = {row.name: row.reason for row in opt.report().decisions}
    assert reasons["0.weight"] == "its filters are coupled with those of a layer that is frozen"


def test_refusals_of_memory_layouts():
    with pytest.raises(Refused, match="outermost"):
        parse("2:4").divide((8, 4), (1, 8), Layer())
    with pytest.raises(Refused, match="no entries"):
        parse("filter").divide((0, 4), (4, 1), Layer())
    assert parse("2:4").divide((8, 4), (4, 1), Layer()) == NofM(2, 4)


def test_overrides_win_over_what_a_group_says_another_way():
    weights = [(name, nn.Parameter(torch.randn(10, 10))) for name in ("a", "b")]
    group = {"params": weights, "density": 0.25, "mask_lr": 0.5}
    opt = FastBiP([group], overrides={"a": {"sparsity": 0.3, "mask_lr_per_lr": 3.0}})
    found = [(group["sparsity"], group["mask_lr"], group["mask_lr_per_lr"]) for group in opt.param_groups]
    assert found == [(0.75, 0.5, None), (0.3, None, 3.0)]


def test_misspelt_options_of_overrides_are_named():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with pytest.raises(ValueError, match=r"overrides must give options of a parameter group, got 'sparsty' for '0'"):
        FastBiP(model, sparsity=0.5, overrides={"0": {"sparsty": 0.9}})
    opt = FastBiP(model, sparsity=0.5, overrides={"0": {"density": 0.25, "scope": "layer", "lr": 0.3}})
    assert int(opt.mask_of(model[0].weight).sum()) == 16

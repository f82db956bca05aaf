"""The table of layers: what is pruned of a Module and what is not, layers of one's own, names behind wrappers, and what exports leave."""

from __future__ import annotations

import copy

import pytest
import torch
from own_layers import Below, Experts, Turned, register
from ranks import alone
from torch import nn

import bip_fast
from bip_fast import FastBiP
from bip_fast.engine import layers
from bip_fast.engine.layers import conv_and_linear, plain_name, weights


@pytest.fixture
def table(monkeypatch):
    """The table of layers with `own_layers`."""
    register(monkeypatch)


# --- what comes after ---------------------------------------------------------------------------------------------------------------


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.turned, self.mid = nn.Linear(4, 8), Turned(8, 12), nn.Linear(12, 8)
        self.encoder, self.steps, self.last = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.GRU(8, 8), Turned(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(x)) @ self.turned.weight + self.turned.bias
        return self.steps(self.encoder(self.mid(x)))[0] @ self.last.weight + self.last.bias


def test_exports_say_what_they_leave(table):
    pytest.importorskip("torch_pruning", reason="needs the package torch-pruning: pip install 'bip-fast[test]'")
    from bip_fast.export import coupled_filters, shrink
    from bip_fast.export.semi_structured import ONLY_LINEAR, to_semi_structured

    torch.manual_seed(0)
    model, x = Chain(), torch.randn(5, 2, 4)
    coupled = coupled_filters(model, x)
    assert [names for names in coupled if "<outputs>" in names] == [["last.weight", "last.bias", "<outputs>"]]
    opt = FastBiP(model, sparsity=0.5, pattern="filter", scope="layer", coupled=coupled)
    assert "last.weight" not in [row.name for row in opt.report()]
    opt.finalize()
    model.eval()
    small = shrink(model, x)
    torch.testing.assert_close(small.model(x), model(x))
    assert [row.name for row in small.removed] == ["encoder.linear1"]
    reasons = {row.name: (row.channels, row.reason) for row in small.kept}
    assert reasons["turned.weight"] == (6, "shrink does not cut Turned")
    assert reasons["encoder.self_attn.in_proj_weight"] == (12, "shrink does not cut MultiheadAttention")
    assert reasons["steps.weight_hh_l0"] == (12, "shrink does not cut GRU")
    rows = {row.name: row.reason for row in to_semi_structured(model).layers}
    assert [rows[name] for name in ("turned.weight", "encoder.self_attn.in_proj_weight", "steps.weight_ih_l0")] == [ONLY_LINEAR] * 3


def test_masks_of_a_model_are_those_of_its_optimizer(table):
    """Also vectors that go with filters, which a later fine-tuning must keep at zero."""
    from bip_fast.export.masks import apply_masks, masks_of

    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.MultiheadAttention(12, 2), "b": Below(5, 8), "t": Turned(8, 6), "last": nn.Linear(4, 4)})
    twin = torch.compile(copy.deepcopy(model))
    with torch.no_grad():
        model["a"].in_proj_bias.fill_(1)
    opt = FastBiP(model, sparsity=0.5, pattern="filter", scope="layer")
    given, expected = masks_of(model), masks_of(opt)
    assert {"a.in_proj_bias", "b.shift", "t.bias"} < given.keys()
    assert given.keys() == expected.keys()
    assert all(torch.equal(given[name], expected[name]) for name in given)
    apply_masks(twin, expected)  # by the names without wrappers
    assert all(bool((p == 0).any()) for name, p in twin.named_parameters() if plain_name(twin, name) in expected)
    assert masks_of(twin).keys() <= expected.keys()


# --- the table -----------------------------------------------------------------------------------------------------------------------


def dense_reasons(model: nn.Module) -> dict[str, str]:
    report = FastBiP(model, sparsity=0.5).report()
    assert [row.name for row in report] == [name for name, _ in weights(model)]
    return {row.name: row.reason for row in report.decisions if row.reason}


def test_embeddings_stay_dense_whoever_shares_them():
    model = nn.ModuleDict({"words": nn.Embedding(9, 4), "bag": nn.EmbeddingBag(9, 4), "mid": nn.Linear(4, 4), "out": nn.Linear(4, 9)})
    assert dense_reasons(model) == {"words.weight": "it is an embedding", "bag.weight": "it is an embedding"}
    opt = FastBiP(model, sparsity=0.5, exclude=["words", "out"])  # to exclude what stays dense anyway does no harm
    assert {row.name: row.reason for row in opt.report().decisions if row.reason}["words.weight"] == "it is an embedding"
    model["out"].weight = model["words"].weight
    for whole in (model, torch.compile(model), nn.DataParallel(model)):
        assert dense_reasons(whole)["words.weight"] == "it is an embedding, which out shares"


def test_what_chooses_among_experts_stays_dense(table):
    block = nn.ModuleDict({"gate": nn.Linear(4, 3), "shared_gate": nn.Sequential(nn.Linear(4, 1)), "gate_proj": nn.Linear(4, 4)})
    block["experts"] = nn.ModuleList([nn.Linear(4, 4)])
    stacked = nn.ModuleDict({"router": nn.Linear(4, 3), "other": Experts(3, 4, 4)})
    model = nn.ModuleDict({"block": block, "stacked": stacked, "gate": nn.Linear(4, 4)})
    reason = "it chooses among experts"
    assert dense_reasons(model) == dict.fromkeys(("block.gate.weight", "block.shared_gate.0.weight", "stacked.router.weight"), reason)


def test_the_ends_of_a_model():
    """Behind an embedding no layer reads the inputs of the model, and where one makes the outputs, no layer does."""
    model = nn.ModuleDict({"words": nn.Embedding(9, 4), "a": nn.LSTM(4, 4), "out": nn.Linear(4, 9)})
    assert {row.name for row in FastBiP(model, sparsity=0.5, pattern="channel").report()} == {
        "a.weight_ih_l0", "a.weight_hh_l0", "out.weight",
    }  # fmt: skip
    model["out"].weight = model["words"].weight
    rows = FastBiP(model, sparsity=0.5, pattern="filter").report()
    assert {row.name for row in rows} == {"a.weight_ih_l0", "a.weight_hh_l0"}
    del model["out"]
    with pytest.raises(ValueError, match="it is the last layer of the model"):
        FastBiP(model, sparsity=0.5, pattern="filter")


def test_a_registered_layer(table):
    class Own(nn.Linear):
        pass

    model = nn.ModuleDict({"own": Own(4, 4), "inner": nn.Sequential(Own(4, 4), nn.LSTM(4, 4)), "last": nn.Linear(4, 4)})
    bip_fast.register_layer(Own, dense="ours")
    assert dense_reasons(model) == {"own.weight": "ours", "inner.0.weight": "ours"}
    bip_fast.register_layer(Own)  # the later counts
    bip_fast.register_layer("torch.nn.modules.container.Seq*", "*", dense="all inside")
    inside = ("inner.0.weight", "inner.1.weight_ih_l0", "inner.1.weight_hh_l0")
    assert dense_reasons(model) == dict.fromkeys(inside, "all inside")
    bip_fast.register_layer(Own, matrices="nowhere")
    with pytest.raises(ValueError, match="matrices must be an attribute of Own that is a number, got 'nowhere': None"):
        FastBiP(model, sparsity=0.5)
    bip_fast.register_layer(Own, transposed="weight")
    with pytest.raises(ValueError, match="transposed must be an attribute of Own that is True or False, got 'weight': a Parameter"):
        FastBiP(model, sparsity=0.5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"module": 3}, TypeError, "module must be a class of modules or a full name, got 3"),
        ({"module": ""}, TypeError, "module must be a class of modules or a full name, got ''"),
        ({"module": torch.Tensor}, TypeError, "module must be a class of modules"),
        ({"parameter": ""}, TypeError, "parameter must be a string that is not empty, got ''"),
        ({"bias": 1}, TypeError, "bias must be a string"),
        ({"dense": True}, TypeError, "dense must be a string"),
        ({"matrices": 2.0}, TypeError, "matrices must be a number or the name of an attribute, got 2.0"),
        ({"matrices": 0}, ValueError, "matrices must be at least 1, got 0"),
        ({"experts": 3}, TypeError, "experts must be True or False"),
        ({"matrices": 2, "experts": True}, ValueError, "matrices must be left out with experts=True"),
        ({"dense": "why", "bias": "bias"}, ValueError, "dense must come alone"),
    ],
)
def test_arguments_that_do_not_go(arguments, error, message, table):
    before = list(layers.PRUNABLE)
    with pytest.raises(error, match=message):
        bip_fast.register_layer(**({"module": nn.Linear} | arguments))
    assert before == layers.PRUNABLE


# --- names ---------------------------------------------------------------------------------------------------------------------------


def wrapped(kind: str, tmp_path) -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 4))
    if kind == "compiled inside":
        model[1] = torch.compile(model[1])
    if "data parallel" in kind:
        return nn.DataParallel(torch.compile(model) if "compiled" in kind else model)
    return torch.compile(model) if kind == "compiled" else model


@pytest.mark.parametrize("kind", ["plain", "compiled", "compiled inside", "data parallel", "compiled data parallel"])
def test_names_are_those_without_wrappers(kind, tmp_path):
    model = wrapped(kind, tmp_path)
    assert [plain_name(model, name) for name, _ in conv_and_linear(model)] == ["0", "1.0", "2"]
    raw = [name for name, p in model.named_parameters() if p.dim() > 1]
    opt = FastBiP(model, sparsity=0.5, exclude=["0", raw[2]], overrides={"1.*": 0.25})
    report = opt.report()
    assert sorted(row.name for row in report.decisions) == ["0.weight", "1.0.weight", "2.weight"]
    assert [(row.name, row.kept) for row in report] == [("1.0.weight", 12)]
    assert [name for name, _ in weights(model)] == ["0.weight", "1.0.weight", "2.weight"]
    other = FastBiP(wrapped(kind, tmp_path), sparsity=0.5, scope="layer", overrides={raw[0]: 0.25})
    assert {row.name: row.kept for row in other.report()} == {"0.weight": 12, "1.0.weight": 8, "2.weight": 8}


def names_under_ddp():
    model = nn.parallel.DistributedDataParallel(nn.ModuleDict({"module": nn.Linear(4, 4)}))
    return [row.name for row in FastBiP(model, sparsity=0.5).report()]


def test_names_behind_distributed_data_parallel(tmp_path):
    assert alone(tmp_path, names_under_ddp) == ["module.weight"]


def test_a_list_of_parameters_knows_no_layers():
    model = nn.ModuleDict({"words": nn.Embedding(4, 4), "a": nn.MultiheadAttention(8, 2)})
    opt = FastBiP(model.named_parameters(), sparsity=0.5, scope="layer")
    assert [row.name for row in opt.report()] == ["words.weight", "a.in_proj_weight", "a.out_proj.weight"]
    assert len(opt.report().selections) == 3

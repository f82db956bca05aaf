"""Parameters that hold several matrices: the same bits as if each matrix were a layer of its own, which other tests compare with the
reference; budgets, state, and the table that says what is pruned of a Module."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import assert_bits
from torch import nn

import bip_fast
from bip_fast import FastBiP
from bip_fast.engine import layers
from bip_fast.engine.layers import conv_and_linear, plain_name, weights

PATTERNS = ["unstructured", "filter", "channel", "block:4x4", "block:5x3", "2:4"]
MOVING = {"sparsity": 0.6, "lr": 0.05, "mask_lr": 0.7, "gamma": 0.7, "weight_decay": 0.013, "levels": "joint", "mask_momentum": 0.4}


class Experts(nn.Module):
    def __init__(self, count: int, outputs: int, inputs: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(count, outputs, inputs))


class Below(nn.Module):
    """Two matrices in one parameter of two dimensions, and a vector with an entry for each of its rows."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.parts = 2
        self.both, self.shift = nn.Parameter(torch.randn(2 * outputs, inputs)), nn.Parameter(torch.randn(2 * outputs))


class Turned(nn.Module):
    """Stored as inputs by outputs."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.randn(outputs))


@pytest.fixture
def table(monkeypatch):
    """The table of layers, of which the test may change a copy; with the modules above."""
    monkeypatch.setattr(layers, "PRUNABLE", list(layers.PRUNABLE))
    bip_fast.register_layer(Experts, "up", experts=True)
    bip_fast.register_layer(f"{__name__}.Below", "both", matrices="parts", bias="shift")
    bip_fast.register_layer(Turned, transposed=True, bias="bias")


# Sizes whose matrices fill whole stretches of the flat arrays (256 of 128 entries), and others between which there is room.
STACKS = {
    "attention": lambda: nn.MultiheadAttention(16, 2, bias=False),
    "attention, odd": lambda: nn.MultiheadAttention(12, 2, bias=False),
    "lstm": lambda: nn.LSTM(8, 20, bias=False, proj_size=4),
    "gru": lambda: nn.GRU(12, 12, bias=False),
    "rnn": lambda: nn.RNN(8, 12, 2, bias=False),
    "lstm cell": lambda: nn.LSTMCell(8, 12, bias=False),
    "experts": lambda: Experts(3, 16, 8),
    "experts, odd": lambda: Experts(5, 7, 12),
    "one expert": lambda: Experts(1, 7, 12),
}


def sliced(name: str, x: torch.Tensor) -> list[torch.Tensor]:
    """The matrices of a parameter of `STACKS`, written down here a second time."""
    count = {"in_proj_weight": 3, "up": len(x)}.get(name.split(".")[-1], 1)
    if "weight_ih" in name or "weight_hh" in name:
        count = {"lstm": 4, "gru": 3}.get(name.split(".")[0], 1)
    return [part.squeeze(0) if x.dim() == 3 else part for part in x.chunk(count)]


class Pair:
    """A model with a stack between two layers, another with a Linear layer for each matrix, and an optimizer for each."""

    def __init__(self, kind: str, device: torch.device, dtype: torch.dtype = torch.float32, **options) -> None:
        torch.manual_seed(0)
        stack, key = STACKS[kind](), kind.split(",")[0].split()[0]
        self.whole = nn.ModuleDict({"first": nn.Linear(8, 12), key: stack, "last": nn.Linear(12, 8)}).to(device, dtype)
        self.pieces = {name: sliced(name, p.detach()) for name, p in self.whole.named_parameters() if name.startswith(key)}
        apart = [nn.Linear(x.shape[1], x.shape[0], bias=False).to(device, dtype) for own in self.pieces.values() for x in own]
        with torch.no_grad():
            for layer, x in zip(apart, (x for own in self.pieces.values() for x in own), strict=True):
                layer.weight.copy_(x)
        ends = copy.deepcopy(self.whole)
        self.apart = nn.ModuleList([ends["first"], *apart, ends["last"]])
        self.layers = apart
        self.options = options
        self.opt, self.other = (FastBiP(model, **options) for model in (self.whole, self.apart))
        self.check("start")

    def step(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        named = dict(self.whole.named_parameters())
        for p in self.whole.parameters():
            p.grad = torch.randn(p.shape, generator=generator).to(p)
        number = iter(self.layers)
        for name in self.pieces:
            for g in sliced(name, named[name].grad):
                next(number).weight.grad = g.clone()
        for end in ("first", "last"):
            for p, twin in zip(self.whole[end].parameters(), self.apart[0 if end == "first" else -1].parameters(), strict=True):
                twin.grad = p.grad.clone()
        self.opt.step()
        self.other.step()
        self.check(f"step {seed}")

    def check(self, what: str) -> None:
        named, number = dict(self.whole.named_parameters()), iter(self.layers)
        pruned = set(self.opt.pruned_params)
        for name in self.pieces:
            p = named[name]
            views = [p, *(view(p) for view in (self.opt.mask_of, self.opt.weight_of, self.opt.scores_of) if p in pruned)]
            for own in zip(*(sliced(name, x.detach()) for x in views), strict=True):
                w = next(number).weight
                others = [w, *(view(w) for view in (self.other.mask_of, self.other.weight_of, self.other.scores_of) if p in pruned)]
                for x, y in zip(own, others, strict=True):
                    assert_bits(x.contiguous(), y, f"{name} at {what}")
        assert self.opt.report().kept == self.other.report().kept


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("kind", STACKS)
def test_a_stack_is_its_matrices(kind, pattern, backend, table):
    for scope, optimizer in [("global", "sgd"), ("layer", "adamw"), ("erk", "sgd")]:
        options = MOVING | {"pattern": pattern, "scope": scope, "optimizer": optimizer, "min_kept": 2}
        if optimizer == "adamw":
            if backend.name != "cpu":
                continue
            options["lr"] = 0.01
        if pattern == "2:4":
            del options["sparsity"]
        pair = Pair(kind, backend.device, **options)
        for seed in range(3):
            pair.step(seed)


def test_16_bit_parameters(backend, table):
    for kind in ("attention, odd", "experts, odd"):
        pair = Pair(kind, backend.device, torch.bfloat16, **MOVING, scope="layer")
        for seed in range(2):
            pair.step(seed)


def test_budgets_are_of_matrices(backend):
    """Values that grow from matrix to matrix: one budget for all would empty the first."""
    model = nn.ModuleDict({"a": nn.MultiheadAttention(12, 2, bias=False)}).to(backend.device)
    with torch.no_grad():
        model["a"].in_proj_weight.copy_(torch.arange(1.0, 433).view(36, 12) / 500)
    for scope, kept in [("global", [0, 72, 144]), ("layer", [72, 72, 72])]:
        twin = copy.deepcopy(model)
        opt = FastBiP(twin, sparsity=0.5, scope=scope, exclude="a.out_proj")
        assert [int(x.sum()) for x in opt.mask_of(twin["a"].in_proj_weight).chunk(3)] == kept
        assert [row.name for row in opt.report().selections][:1] == [f"a.in_proj_weight[0]{' and 2 more' * (scope == 'global')}"]
    opt = FastBiP(model, sparsity=0.9, pattern="filter", min_kept=2, exclude="a.out_proj")
    rows = opt.mask_of(model["a"].in_proj_weight).all(1)
    assert [int(x.sum()) for x in rows.chunk(3)] == [2, 2, 2]
    (row,) = opt.report().rows
    assert (row.units, row.kept, row.total) == ((6, 36), 72, 432)


@pytest.mark.parametrize("pattern", ["unstructured", "filter", "2:4"])
@pytest.mark.parametrize("kind", ["attention", "attention, odd", "experts, odd", "lstm"])
def test_state_goes_on_bit_for_bit(kind, pattern, table):
    options = MOVING | {"pattern": pattern, "scope": "layer", "optimizer": "adamw", "lr": 0.01}
    options = {key: value for key, value in options.items() if pattern != "2:4" or key != "sparsity"}
    pair = Pair(kind, torch.device("cpu"), **options)
    pair.step(0)
    pair.step(1)
    saved = copy.deepcopy((pair.whole.state_dict(), pair.opt.state_dict()))
    for number, p in enumerate(p for group in pair.opt.param_groups for p in group["params"]):
        own = saved[1]["state"][number]
        assert all(own[name].shape == p.shape for name in ("theta", "momentum", "square") if name in own)
    twin, opt = copy.deepcopy((pair.whole, pair.opt))
    again = copy.deepcopy(pair.whole)
    fresh = FastBiP(again, **options)
    again.load_state_dict(saved[0])
    fresh.load_state_dict(saved[1])
    pair.step(2)
    for model, optimizer in ((twin, opt), (again, fresh)):
        for p, x in zip(model.parameters(), pair.whole.parameters(), strict=True):
            p.grad = x.grad.clone()
        optimizer.step()
        for p, x in zip(model.parameters(), pair.whole.parameters(), strict=True):
            assert_bits(p.detach(), x.detach())


@pytest.mark.parametrize("pattern", ["unstructured", "filter"])
def test_scores_from_elsewhere(pattern, backend, table):
    pair = Pair("experts, odd", backend.device, **MOVING, pattern=pattern)
    p = pair.whole["experts"].up
    scores = torch.rand(p.shape, generator=torch.Generator().manual_seed(1)).to(p)
    pair.opt.set_scores({p: scores})
    pair.other.set_scores({layer.weight: x for layer, x in zip(pair.layers, scores, strict=True)})
    pair.check("new scores")
    pair.step(0)


# --- what goes with filters, and the orientation -------------------------------------------------------------------------------------


def test_biases_go_with_filters_of_their_matrix(backend, table):
    model = nn.ModuleDict({"a": nn.MultiheadAttention(12, 2), "b": Below(5, 8), "t": Turned(8, 6), "last": nn.Linear(4, 4)})
    model.to(backend.device)
    with torch.no_grad():
        model["a"].in_proj_bias.fill_(1)
    opt = FastBiP(model, sparsity=0.5, pattern="filter", scope="layer")
    for weight, bias in [(model["a"].in_proj_weight, model["a"].in_proj_bias), (model["b"].both, model["b"].shift)]:
        assert torch.equal(opt.mask_of(weight).all(1), opt.mask_of(bias))
        assert torch.equal(opt.mask_of(weight).any(1), opt.mask_of(bias))
        assert 0 < int((bias == 0).sum()) < bias.numel()
    columns = opt.mask_of(model["t"].weight)
    assert torch.equal(columns.all(0), columns.any(0))
    assert torch.equal(columns.all(0), opt.mask_of(model["t"].bias))
    assert int(columns.all(0).sum()) == 3
    counts = {row.name: row.units for row in opt.report()}
    assert counts == {"a.in_proj_weight": (18, 36), "a.out_proj.weight": (6, 12), "b.both": (6, 10), "t.weight": (3, 6)}


@pytest.mark.parametrize("pattern", ["unstructured", "filter", "channel", "block:2x4", "block:4x3"])
def test_a_turned_weight_is_pruned_as_a_linear_one(pattern, table):
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Embedding(2, 2), layer, nn.Linear(2, 2)) for layer in (Turned(8, 6), nn.Linear(8, 6))]
    with torch.no_grad():
        models[1][1].weight.copy_(models[0][1].weight.T)
        models[1][1].bias.copy_(models[0][1].bias)
    turned, linear = (FastBiP(model, sparsity=0.5, pattern=pattern, exclude="2") for model in models)
    given, expected = turned.mask_of(models[0][1].weight), linear.mask_of(models[1][1].weight)
    assert torch.equal(given.T, expected)
    assert not expected.all()


def test_reasons_against_a_pattern(table):
    model = nn.ModuleDict({"words": nn.Embedding(4, 4), "t": Turned(8, 4), "a": nn.MultiheadAttention(6, 2), "last": nn.Linear(4, 4)})
    reasons = {row.name: row.reason for row in FastBiP(model, pattern="2:4").report().decisions}
    assert reasons == {
        "words.weight": "it is an embedding",
        "t.weight": "2:4 runs along the inputs, which are not neighbours in memory in a transposed weight",
        "a.in_proj_weight": "its 6 inputs per output are not a multiple of 4",
        "a.out_proj.weight": "its 6 inputs per output are not a multiple of 4",
        "last.weight": None,
    }
    bip_fast.register_layer(Turned, matrices=3)
    reasons = {row.name: row.reason for row in FastBiP(model, sparsity=0.5).report().decisions}
    assert reasons["t.weight"] == "its first dimension of 8 does not divide into 3 matrices"
    model["a"].in_proj_weight = nn.Parameter(torch.randn(6, 18).T)
    reasons = {row.name: row.reason for row in FastBiP(model, sparsity=0.5).report().decisions}
    assert reasons["a.in_proj_weight"] == "its matrices do not lie behind each other in memory"


def test_coupled_stacks_must_be_alike(table):
    model = nn.ModuleDict({"a": Below(4, 6), "b": Below(4, 8), "c": nn.Linear(6, 8), "last": nn.Linear(4, 4)})
    opt = FastBiP(model, sparsity=0.5, pattern="filter", coupled=[["a.both", "b.both", "a.shift", "b.shift"]])
    masks = [opt.mask_of(p).flatten(1).all(1) for p in (model["a"].both, model["b"].both)] + [opt.mask_of(model["b"].shift)]
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(masks[0], masks[2])
    with pytest.raises(ValueError, match=r"as many filters, got a.both with 2 times 4 and c.weight with 8"):
        FastBiP(copy.deepcopy(model), sparsity=0.5, pattern="filter", coupled=[["a.both", "c.weight"]])


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
    from bip_fast.export.coupling import coupled_filters
    from bip_fast.export.semi_structured import ONLY_LINEAR, to_semi_structured
    from bip_fast.export.shrink import shrink

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
    assert dense_reasons(model)["words.weight"] == "it is an embedding, which out shares"


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


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"module": 3}, TypeError, "module must be a class of modules or a full name, got 3"),
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


def test_names_behind_distributed_data_parallel(tmp_path):
    import torch.distributed as dist

    if not dist.is_available() or dist.is_initialized():
        pytest.skip("needs a torch with distributed, and no process group yet")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(nn.ModuleDict({"module": nn.Linear(4, 4)}))
        assert [row.name for row in FastBiP(model, sparsity=0.5).report()] == ["module.weight"]
    finally:
        dist.destroy_process_group()


def test_a_list_of_parameters_knows_no_layers():
    model = nn.ModuleDict({"words": nn.Embedding(4, 4), "a": nn.MultiheadAttention(8, 2)})
    opt = FastBiP(model.named_parameters(), sparsity=0.5, scope="layer")
    assert [row.name for row in opt.report()] == ["words.weight", "a.in_proj_weight", "a.out_proj.weight"]
    assert len(opt.report().selections) == 3

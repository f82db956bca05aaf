"""Parameters that hold several matrices: the same bits as if each matrix were a layer of its own, which other tests compare with the
reference; their budgets, state and orientation."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from helpers import assert_bits, fill_gradients
from own_layers import Below, Experts, Turned, register
from torch import nn

import bip_fast
from bip_fast import FastBiP

PATTERNS = ["unstructured", "filter", "channel", "block:4x4", "block:5x3", "2:4"]
MOVING = {"sparsity": 0.6, "lr": 0.05, "mask_lr": 0.7, "gamma": 0.7, "weight_decay": 0.013, "levels": "joint", "mask_momentum": 0.4}


@pytest.fixture
def table(monkeypatch):
    """The table of layers with `own_layers`."""
    register(monkeypatch)


# Sizes whose matrices fill whole stretches of the flat arrays (256 of 128 entries), and others between which there is room.
STACKS = {
    "attention": lambda: nn.MultiheadAttention(16, 2, bias=False),
    "attention, odd": lambda: nn.MultiheadAttention(12, 2, bias=False),
    "attention, with biases": lambda: nn.MultiheadAttention(12, 2),
    "lstm": lambda: nn.LSTM(8, 20, bias=False, proj_size=4),
    "gru": lambda: nn.GRU(12, 12, bias=False),
    "rnn": lambda: nn.RNN(8, 12, 2, bias=False),
    "lstm cell": lambda: nn.LSTMCell(8, 12, bias=False),
    "experts": lambda: Experts(3, 16, 8),
    "experts, odd": lambda: Experts(5, 7, 12),
    "experts, large and odd": lambda: Experts(2, 37, 33),  # whole tiles whose parameter is not aligned for vectors
    "one expert": lambda: Experts(1, 7, 12),
}


def sliced(name: str, x: torch.Tensor) -> list[torch.Tensor]:
    """The matrices of a parameter of `STACKS`, or the stretches of its bias, written down here a second time."""
    count = {"in_proj_weight": 3, "in_proj_bias": 3, "up": len(x)}.get(name.split(".")[-1], 1)
    if "weight_ih" in name or "weight_hh" in name:
        count = {"lstm": 4, "gru": 3}.get(name.split(".")[0], 1)
    return [part.squeeze(0) if x.dim() == 3 else part for part in x.chunk(count)]


def seen(opt: FastBiP, p: torch.Tensor) -> list[torch.Tensor]:
    """All that an optimizer shows of a parameter."""
    try:
        return [p.detach(), opt.mask_of(p), opt.weight_of(p), opt.scores_of(p)]
    except ValueError:  # it is dense
        return [p.detach()]


class Pair:
    """A model with a stack between two layers, another with a Linear layer for each matrix, and an optimizer for each."""

    def __init__(self, kind: str, device: torch.device, dtype: torch.dtype = torch.float32, **options) -> None:
        torch.manual_seed(0)
        stack, key = STACKS[kind](), kind.split(",")[0].split()[0]
        self.whole = nn.ModuleDict({"first": nn.Linear(8, 12), key: stack, "last": nn.Linear(12, 8)})
        named = dict(self.whole.named_parameters())
        self.layers, twins = [], {}
        for name, p in named.items():
            if p.dim() < 2:
                continue
            bias = name.replace("weight", "bias") if "weight" in name else ""
            own = [nn.Linear(x.shape[1], x.shape[0], bias=bias in named) for x in sliced(name, p)]
            twins |= {bias: [layer.bias for layer in own], name: [layer.weight for layer in own]}
            self.layers += own
        self.twins = {name: twins[name] for name in named}
        with torch.no_grad():
            self._each(lambda twin, x: twin.copy_(x), named)
        self.whole.to(device, dtype)
        self.apart = nn.ModuleList(self.layers).to(device, dtype)
        self.opt, self.other = (FastBiP(model, **options) for model in (self.whole, self.apart))
        self.check("start")

    def _each(self, do: Callable[[torch.Tensor, torch.Tensor], object], whole: dict[str, torch.Tensor]) -> None:
        """``do`` something with every twin and its slice of a tensor by name."""
        for name, own in self.twins.items():
            for twin, x in zip(own, sliced(name, whole[name]), strict=True):
                do(twin, x)

    def step(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for p in self.whole.parameters():
            p.grad = torch.randn(p.shape, generator=generator).to(p)
        gradients = {name: p.grad for name, p in self.whole.named_parameters()}
        self._each(lambda twin, g: setattr(twin, "grad", g.clone()), gradients)
        self.opt.step()
        self.other.step()
        self.check(f"step {seed}")

    def check(self, what: str) -> None:
        for name, p in self.whole.named_parameters():
            given = zip(*(sliced(name, x) for x in seen(self.opt, p)), strict=True)
            for own, twin in zip(given, self.twins[name], strict=True):
                for x, y in zip(own, seen(self.other, twin), strict=True):
                    assert_bits(x.contiguous(), y, f"{name} at {what}")
        assert self.opt.report().kept == self.other.report().kept


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("kind", STACKS)
def test_a_stack_is_its_matrices(kind, pattern, backend, table):
    for scope, rule in [("global", {}), ("layer", {"optimizer": "adamw", "lr": 0.01}), ("erk", {})]:
        options = MOVING | {"pattern": pattern, "scope": scope, "min_kept": 2} | rule
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
        assert own["exp_avg"].shape == own["exp_avg_sq"].shape == own.get("theta", p).shape == p.shape
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
    pair.other.set_scores({layer.weight: x for layer, x in zip(pair.layers[1:-1], scores, strict=True)})
    pair.check("new scores")
    pair.step(0)


@pytest.mark.parametrize("kind", ["attention", "attention, odd", "experts", "experts, odd"])
def test_an_optimizer_of_the_users(kind, backend, table):
    """It sees theta in the shape of the parameter, also where the flat arrays have room between matrices. Without pruning the result is
    that of the bare optimizer; with it, a run goes on from its saved state."""

    def below(groups):
        made = torch.optim.Adam(groups, lr=0.01, weight_decay=0.1)
        assert {tuple(p.shape) for group in made.param_groups for p in group["params"]} == shapes
        return made

    torch.manual_seed(0)
    model = nn.ModuleDict({"first": nn.Linear(8, 12), "a": STACKS[kind](), "last": nn.Linear(12, 8)}).to(backend.device)
    shapes = {tuple(p.shape) for p in model.parameters()}
    bare, pruned = copy.deepcopy(model), copy.deepcopy(model)
    opt, other = FastBiP(model, sparsity=0.0, optimizer=below), torch.optim.Adam(bare.parameters(), lr=0.01, weight_decay=0.1)
    masked = FastBiP(pruned, sparsity=0.5, optimizer=below, levels="joint", mask_lr=0.5)

    def step(seed: int, *runs) -> None:
        for network, optimizer in runs:
            fill_gradients(network.parameters(), seed)
            optimizer.step()

    for seed in range(3):
        with opt.lower():
            step(seed, (model, opt), (bare, other), (pruned, masked))
    for p, q in zip(model.parameters(), bare.parameters(), strict=True):
        assert_bits(p.detach(), q.detach())
    again = copy.deepcopy(model)
    fresh = FastBiP(again, sparsity=0.5, optimizer=below, levels="joint", mask_lr=0.5)
    fresh.load_state_dict(copy.deepcopy(masked.state_dict()))
    step(3, (pruned, masked), (again, fresh))
    for p, q in zip(pruned.parameters(), again.parameters(), strict=True):
        assert_bits(p.detach(), q.detach())
    for p in masked.pruned_params:
        assert torch.equal(p, torch.where(masked.mask_of(p), masked.weight_of(p), 0.0))


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
    with pytest.raises(ValueError, match=r"the same number of filters, got a.both with 2 times 4 and c.weight with 8"):
        FastBiP(copy.deepcopy(model), sparsity=0.5, pattern="filter", coupled=[["a.both", "c.weight"]])

"""When the optimizer takes hold of its parameters: final at once, later, or in the place of others."""

import copy
import io
import pickle

import pytest
import torch
from helpers import assert_bits, assert_same_snapshot, fill_gradients, make_model, whole_state
from lockstep import MOVING
from torch import nn

from bip_fast import FastBiP
from bip_fast.binding import Origin

FUNCTION = {"optimizer": lambda groups: torch.optim.Adam(groups, lr=0.01), "sparsity": 0.8}
CASES = {"sgd": MOVING, "adamw": {"optimizer": "adamw", "sparsity": 0.8}, "function": FUNCTION, "filter": MOVING | {"pattern": "filter"}}


def model_of(device="cpu", seed=0):
    torch.manual_seed(seed)
    with torch.device(device):
        return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 12), nn.Linear(12, 4))


@pytest.fixture
def several_ranks(monkeypatch):
    """As in a job of two, of which this is one; nothing communicates, as nothing is replicated or sharded."""
    monkeypatch.setattr("bip_fast.binding.world_size", lambda: 2)


def advance(model, opt, steps=5, seed=0):
    for i in range(steps):
        fill_gradients(model.parameters(), seed + i)
        opt.step()


def swapped(model):
    """Every parameter of the model replaced by a new one with the same value; the new ones by the old."""
    new = {}
    for module in model.modules():
        for name, p in list(module._parameters.items()):
            if p is not None:
                new[p] = module._parameters[name] = nn.Parameter(p.detach().clone())
    return new


@pytest.mark.parametrize("swap", [False, True], ids=["replaced", "swapped in place"])
@pytest.mark.parametrize("case", CASES)
def test_a_model_that_was_made_on_meta(case, swap):
    weights = model_of().state_dict()
    model = model_of("meta")
    opt = FastBiP(model, **CASES[case])
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 2, gamma=0.5)
    assert opt.param_groups[0]["initial_lr"] == opt.param_groups[0]["lr"]
    with pytest.raises(RuntimeError, match=r"0\.weight is on the meta device"):
        opt.step()
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        model.to_empty(device="cpu")
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
    model.load_state_dict(weights)
    twin = model_of()
    other = FastBiP(twin, **CASES[case])
    its_scheduler = torch.optim.lr_scheduler.StepLR(other, 2, gamma=0.5)
    for i in range(5):
        for m, o, s in ((model, opt, scheduler), (twin, other, its_scheduler)):
            advance(m, o, 1, i)
            s.step()
    assert all(any(p is q for group in opt.param_groups for q in group["params"]) for p in model.parameters())
    assert_same_snapshot(whole_state(opt), whole_state(other))


def test_parameters_of_a_list_on_meta_are_named():
    model = model_of("meta")
    opt = FastBiP(model.named_parameters(), sparsity=0.5)
    model.to_empty(device="cpu")
    with pytest.raises(RuntimeError, match=r"0\.weight is on the meta device .* give it the Module"):
        opt.bind()


def test_errors_come_at_once_on_meta():
    with pytest.raises(ValueError, match="nothing to prune"):
        FastBiP([nn.Parameter(torch.zeros(3, device="meta"))], sparsity=0.5)
    with pytest.raises(ValueError, match="give one of sparsity and density"):
        FastBiP(model_of("meta"))
    with pytest.raises(ValueError, match="which matches none"):
        FastBiP(model_of("meta"), sparsity=0.5, exclude="nobody")


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_written_before_binding(several_ranks, case):
    model = model_of()
    before = copy.deepcopy(model.state_dict())
    opt = FastBiP(model, **CASES[case])
    state = opt.state_dict()
    assert state["state"] == {}
    opt.load_state_dict(copy.deepcopy(state))
    for name, x in model.state_dict().items():
        assert_bits(x, before[name], name)
    opt.bind()
    other_model = model_of()
    other = FastBiP.__new__(FastBiP)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bip_fast.binding.world_size", lambda: 1)
        other.__init__(other_model, **CASES[case])
    assert_same_snapshot(whole_state(opt), whole_state(other))


@pytest.mark.parametrize("look", [lambda o: o.report(), lambda o: o.pruned_params, lambda o: o.num_nonfinite, lambda o: o.state])
def test_who_looks_binds(several_ranks, look):
    model = model_of()
    opt = FastBiP(model, **MOVING)
    assert not any((p == 0).any() for p in model.parameters())
    assert look(opt) is not None
    assert (model[0].weight == 0).any()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("late", [False, True])
def test_the_way_of_accelerate(monkeypatch, late, case):
    """Placeholders of one entry in the groups while the model is sharded, then the new parameters; before that the state goes through
    `state_dict` and `load_state_dict`."""
    if late:
        monkeypatch.setattr("bip_fast.binding.world_size", lambda: 2)
    model, twin = model_of(), model_of()
    opt, whole = FastBiP(model, **CASES[case], exclude="3"), FastBiP(twin, **CASES[case], exclude="3")
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    old = [list(group["params"]) for group in opt.param_groups]
    for group in opt.param_groups:
        for i, p in enumerate(group["params"]):
            group["params"][i] = torch.empty(1, dtype=p.dtype)
    new = swapped(model)
    for group, params in zip(opt.param_groups, old, strict=True):
        group["params"] = [new[p] for p in params]
    for owner, optimizer in ((model, opt), (twin, whole)):
        advance(owner, optimizer)
    assert_same_snapshot(whole_state(opt), whole_state(whole))
    assert opt.report().rows == whole.report().rows
    assert not any(name.startswith("3") for name, *_ in opt.report().rows)


@pytest.mark.parametrize("case", CASES)
def test_a_module_whose_parameters_were_replaced(case):
    """Nobody told the groups: a step in which no parameter has a gradient asks the Module."""
    model, twin = model_of(), model_of()
    opt, whole = FastBiP(model, **CASES[case]), FastBiP(twin, **CASES[case])
    swapped(model)
    for owner, optimizer in ((model, opt), (twin, whole)):
        advance(owner, optimizer)
    assert_same_snapshot(whole_state(opt), whole_state(whole))


def test_a_loaded_state_goes_along():
    model, twin = model_of(), model_of()
    first, opt = FastBiP(twin, **FUNCTION), FastBiP(model, **FUNCTION)
    advance(twin, first, 4)
    model.load_state_dict(twin.state_dict())
    opt.load_state_dict(copy.deepcopy(first.state_dict()))
    new = swapped(model)
    for group in opt.param_groups:
        group["params"] = [new[p] for p in group["params"]]
    for owner, optimizer in ((model, opt), (twin, first)):
        advance(owner, optimizer, 4, 50)
    assert_same_snapshot(whole_state(opt), whole_state(first))


def test_not_after_a_step():
    model = model_of()
    opt = FastBiP(model, **MOVING)
    advance(model, opt, 1)
    new = swapped(model)
    opt.zero_grad()
    with pytest.raises(RuntimeError, match=r"0\.weight was replaced by another parameter after a step was taken"):
        opt.step()
    for group in opt.param_groups:
        group["params"] = [new[p] for p in group["params"]]
    fill_gradients(model.parameters(), 0)
    with pytest.raises(RuntimeError, match=r"0\.weight was replaced by another parameter after a step was taken"):
        opt.step()


@pytest.mark.parametrize("late", [False, True])
def test_other_numbers_and_shapes(monkeypatch, late):
    if late:
        monkeypatch.setattr("bip_fast.binding.world_size", lambda: 2)
    model = model_of()
    opt = FastBiP(model, **MOVING)
    params = opt.param_groups[0]["params"]
    opt.param_groups[0]["params"] = params[:-1]
    with pytest.raises(RuntimeError, match=r"as many parameters as before, \[3, 3\], got \[2, 3\].*0\.weight"):
        opt.step()
    opt.param_groups[0]["params"] = [torch.empty(1), *params[1:]]
    with pytest.raises(RuntimeError, match=r"0\.weight must be replaced by a parameter of its shape \(24, 16\), got \(1,\)"):
        opt.report()
    opt.param_groups[0]["params"] = params
    advance(model, opt, 2)


def test_a_first_step_without_gradients_is_no_step(several_ranks):
    model = model_of()
    opt = FastBiP(list(model.parameters()), **MOVING)
    swapped(model)
    fill_gradients(model.parameters(), 0)
    with pytest.raises(RuntimeError, match="no parameter has a gradient in the first step"):
        opt.step()


def test_a_group_is_added_before_binding(several_ranks):
    model, more = model_of(), nn.Linear(16, 8)
    opt = FastBiP(model, **FUNCTION)
    opt.add_param_group({"params": list(more.parameters()), "lr": 0.5})
    assert not (more.weight == 0).any()
    fill_gradients([*model.parameters(), *more.parameters()], 0)
    opt.step()
    assert (more.weight == 0).any()


def test_what_is_final():
    model = model_of()
    groups = [{"params": list(model.parameters())}]
    assert Origin(model).final(groups)
    assert not Origin(model).final([{"params": list(model_of("meta").parameters())}])


@pytest.mark.parametrize("case", ["sgd", "function"])
def test_a_pickle_carries_each_tensor_once(case):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(12)))
    opt = FastBiP(model, **CASES[case])
    advance(model, opt, 3)
    size = sum(p.numel() for p in model.parameters())
    pickled = pickle.dumps((model, opt))
    assert len(pickled) < 4 * size * (1 + 2 + 2) + 60_000  # z; theta and scores; the moments
    twin, other = pickle.loads(pickled)
    for owner, optimizer in ((model, opt), (twin, other)):
        advance(owner, optimizer, 4, 50)
    assert_same_snapshot(whole_state(other), whole_state(opt))
    buffer = io.BytesIO()
    torch.save(other.state_dict(), buffer)


def test_modes_of_a_schedule_free_optimizer():
    schedulefree = pytest.importorskip("schedulefree", reason="needs the package schedulefree: pip install 'bip-fast[test]'")
    model = make_model()
    opt = FastBiP(model, sparsity=0.5, optimizer=lambda groups: schedulefree.AdamWScheduleFree(groups, lr=0.05), levels="joint")
    opt.train()
    advance(model, opt, 4)
    training = whole_state(opt)
    opt.eval()
    assert not torch.equal(whole_state(opt)["0 theta"], training["0 theta"])
    for p in opt.pruned_params:
        assert_bits(p.detach(), torch.where(opt.mask_of(p), opt.weight_of(p), 0.0))
    opt.train()
    advance(model, opt, 1, 9)
    opt.inner_optimizers[0].eval()  # behind our back: a saved or finished model is right all the same
    opt.state_dict()
    for p in opt.pruned_params:
        assert_bits(p.detach(), torch.where(opt.mask_of(p), opt.weight_of(p), 0.0))
    opt.inner_optimizers[0].train()
    thetas = [(p, torch.where(opt.mask_of(p), opt.weight_of(p), 0.0)) for p in opt.pruned_params]
    opt.finalize()
    for p, expected in thetas:
        assert_bits(p.detach(), expected)


def test_lion_of_a_package():
    lion = pytest.importorskip("lion_pytorch", reason="needs the package lion-pytorch: pip install 'bip-fast[test]'")
    model, fresh = model_of(), model_of()
    opt, other = (FastBiP(m, sparsity=0.5, optimizer=lambda groups: lion.Lion(groups, lr=1e-3)) for m in (model, fresh))
    advance(model, opt, 4)
    fresh.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    for owner, optimizer in ((model, opt), (fresh, other)):
        advance(owner, optimizer, 3, 20)
    assert_same_snapshot(whole_state(opt), whole_state(other))

"""The training loop around `FastBiP`: schedulers, accumulation, closures, hooks, parameter groups. Everything a `torch.optim` user has."""

import pytest
import torch
from helpers import TOLERANCE, assert_same_snapshot, batch, fill_gradients, make_model, make_params, snapshot, train_step
from lockstep import MOVING, Lockstep, run_of
from torch import nn
from torch.optim import lr_scheduler

from bip_fast import FastBiP

SCHEDULERS = {
    "cosine": lambda opt: lr_scheduler.CosineAnnealingLR(opt, T_max=12),
    "one cycle": lambda opt: lr_scheduler.OneCycleLR(opt, max_lr=0.2, total_steps=12),
    "steps": lambda opt: lr_scheduler.MultiStepLR(opt, [3, 6], gamma=0.1),
    "warm-up": lambda opt: lr_scheduler.LambdaLR(opt, lambda i: min(1.0, (i + 1) / 5)),
}


# --- hyper-parameters that change -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", ["alternating", "joint"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(backend, name, levels):
    """The kernels follow the rate of the group, and so the reference that reads it there; OneCycle moves the momentum too."""
    run = run_of(make_model(device=backend.device), levels=levels)
    scheduler = SCHEDULERS[name](run.opt)
    rates = set()
    for i in range(11):
        run.random_steps(1, seed=i)
        scheduler.step()
        rates.add(run.opt.param_groups[0]["lr"])
    assert len(rates) >= 3
    assert run.opt.param_groups[0]["mask_lr"] == MOVING["mask_lr"], "a scheduler of lr leaves mask_lr alone"


@pytest.mark.parametrize("key", ["lr", "mask_lr", "gamma", "momentum", "mask_momentum", "weight_decay", "nesterov"])
def test_every_hyper_parameter_can_change_by_hand(backend, key):
    values = {"nesterov": [True, False, True], "gamma": [0.3, 5.0, 1e3], "mask_momentum": [0.5, 0.0, 0.9]}.get(key, [0.3, 0.0, 0.07])
    params = make_params([200, 300], device=backend.device)
    run = Lockstep(params, lambda: FastBiP(params, **MOVING))
    for i, value in enumerate(values):
        run.opt.param_groups[0][key] = value
        run.random_steps(4, seed=i)


def test_mask_lr_of_zero_freezes_the_scores(backend):
    params = make_params([500], device=backend.device)
    run = Lockstep(params, lambda: FastBiP(params, **(MOVING | {"mask_lr": 0.0})))
    before = run.opt.scores_of(params[0])
    run.random_steps(6)
    assert torch.equal(before, run.opt.scores_of(params[0]))


# --- gradients ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["lower", "upper", "joint"])
def test_gradients_accumulate_over_backwards(backend, phase):
    """Backward on two halves, then one step: the step of the sum of their gradients."""
    model = make_model(device=backend.device)
    run = run_of(model)
    x, y = batch(0, backend.device)
    losses = [lambda half=half: nn.functional.cross_entropy(model(x[half]), y[half]) for half in (slice(0, 4), slice(4, 8))]
    alone = [torch.autograd.grad(loss(), list(model.parameters())) for loss in losses]
    for loss in losses:
        loss().backward()
    for p, first, second in zip(model.parameters(), *alone, strict=True):
        torch.testing.assert_close(p.grad, first + second, **TOLERANCE["float32 gradient"])
    run.step(phase)


def test_zero_grad_forms(backend):
    """Gradients set to None or to zero, both."""
    for set_to_none in (True, False):
        run = run_of(make_model(device=backend.device))
        for i in range(4):
            run.random_steps(1, seed=i)
            run.opt.zero_grad(set_to_none=set_to_none)
            run.step()


def test_gradients_are_only_read(backend):
    model = make_model(device=backend.device)
    opt = FastBiP(model, sparsity=0.5)
    fill_gradients(model.parameters(), 0)
    before = [p.grad.clone() for p in model.parameters()]
    for _ in range(4):
        opt.step()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))


def test_clipping_between_backward_and_step(backend):
    run = run_of(make_model(device=backend.device))
    for i in range(6):
        fill_gradients(run.states, i)
        nn.utils.clip_grad_norm_(list(run.states), 0.5)
        run.step()


def test_autograd_goes_on_after_a_step(backend):
    """Parameters stay leaves that require grad, and a backward through a graph from before the step is refused as by any optimizer."""
    model = make_model(device=backend.device)
    opt = FastBiP(model, sparsity=0.5)
    x, y = batch(0, backend.device)
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward(retain_graph=True)
    opt.step()
    assert all(p.is_leaf and p.requires_grad for p in model.parameters())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# --- closures and hooks --------------------------------------------------------------------------------------------------------------


def test_closure(backend):
    """`step(closure)` evaluates it with gradients enabled, once, and returns its loss."""
    model, same = make_model(device=backend.device), make_model(device=backend.device)
    opt, plain = FastBiP(model, **MOVING), FastBiP(same, **MOVING)
    x, y = batch(0, backend.device)
    calls = []

    def closure():
        opt.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        calls.append(float(loss.detach()))
        return loss

    for i in range(4):
        with torch.no_grad():
            given = opt.step(closure)
        assert float(given.detach()) == calls[i]
        assert len(calls) == i + 1
        train_step(same, plain, 0, backend.device)
    assert_same_snapshot(snapshot(opt), snapshot(plain))


def test_step_returns_none_without_closure(backend):
    opt = FastBiP(make_params([40], device=backend.device), sparsity=0.5)
    assert opt.step() is None


def test_step_hooks(backend):
    opt = FastBiP(make_params([40], device=backend.device), sparsity=0.5)
    seen = []
    opt.register_step_pre_hook(lambda optimizer, args, kwargs: seen.append(("before", optimizer.phase)))
    opt.register_step_post_hook(lambda optimizer, args, kwargs: seen.append(("after", optimizer.phase)))
    opt.step()
    opt.step()
    assert seen == [("before", "lower"), ("after", "upper"), ("before", "upper"), ("after", "lower")]


def test_state_dict_hooks(backend):
    opt = FastBiP(make_params([40], device=backend.device), sparsity=0.5)
    seen = []
    opt.register_state_dict_pre_hook(lambda optimizer: seen.append("save"))
    opt.register_load_state_dict_post_hook(lambda optimizer: seen.append("load"))
    opt.load_state_dict(opt.state_dict())
    assert seen == ["save", "load"]


# --- parameter groups ---------------------------------------------------------------------------------------------------------------


def test_groups_with_their_own_hyper_parameters(backend):
    params = make_params([300, 400, 500, 33], device=backend.device)
    groups = [
        {"params": params[:1], "lr": 0.2, "momentum": 0.5, "weight_decay": 0.0},
        {"params": params[1:3], "mask_lr": 1.3, "gamma": 0.25, "nesterov": True},
        {"params": params[3:], "mask_momentum": 0.8},
    ]
    run = Lockstep(params, lambda: FastBiP(groups, **MOVING))
    run.random_steps(10)
    run.random_steps(4, seed=1, phase="joint")


def test_groups_compete_where_their_sparsity_is_the_same(backend):
    """Global scope: one selection per sparsity, over the groups that have it, in order."""
    params = make_params([300, 400, 500], device=backend.device)
    groups = [{"params": [params[0]]}, {"params": [params[1]], "sparsity": 0.25}, {"params": [params[2]]}]
    run = Lockstep(params, lambda: FastBiP(groups, **MOVING))
    run.random_steps(8)
    assert int(run.opt.mask_of(params[1]).sum()) == 300
    assert sum(int(run.opt.mask_of(p).sum()) for p in (params[0], params[2])) == 160


def test_groups_of_both_scopes(backend):
    params = make_params([300, 400, 500, 600], device=backend.device)
    groups = [{"params": params[:2], "scope": "layer"}, {"params": params[2:]}]
    run = Lockstep(params, lambda: FastBiP(groups, **MOVING))
    run.random_steps(8)
    assert [int(run.opt.mask_of(p).sum()) for p in params[:2]] == [60, 80]


def test_a_group_may_say_density(backend):
    params = make_params([100, 200], device=backend.device)
    opt = FastBiP([{"params": [params[0]], "density": 0.5}, {"params": [params[1]]}], sparsity=0.9)
    assert [int(opt.mask_of(p).sum()) for p in params] == [50, 20]


def test_a_group_that_is_not_pruned(backend):
    params = make_params([300, 400], device=backend.device)
    groups = [{"params": [params[0]]}, {"params": [params[1]], "prune": False}]
    run = Lockstep(params, lambda: FastBiP(groups, **MOVING), pruned=params[:1])
    run.random_steps(6)
    with pytest.raises(ValueError, match="prune"):
        run.opt.mask_of(params[1])


def test_add_param_group(backend):
    """New weights join the selection with scores of their own; old ones keep theirs."""
    params, new = make_params([300, 400], device=backend.device), make_params([500], 1, device=backend.device)
    run = Lockstep(params, lambda: FastBiP(params, **MOVING))
    run.random_steps(5)
    run.add_param_group({"params": new, "lr": 0.01})
    run.random_steps(9, seed=1)
    assert run.opt.param_groups[1]["mask_lr"] == MOVING["mask_lr"]


def test_add_a_dense_param_group(backend):
    params, new = make_params([300, 400], device=backend.device), make_params([50], 1, device=backend.device, pruned=False)
    run = Lockstep(params, lambda: FastBiP(params, **MOVING))
    run.random_steps(3)
    run.add_param_group({"params": new})
    run.random_steps(6, seed=1)

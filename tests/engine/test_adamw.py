"""AdamW below: the trajectories of `torch.optim.AdamW` where nothing is pruned, and the state it keeps."""

import copy

import pytest
import torch
from helpers import fill_gradients, make_params
from torch import nn

from bip_fast import FastBiP, reference
from bip_fast.reference import Hyper

STEPS = 50
OPTIONS = {"lr": 3e-3, "betas": (0.87, 0.98), "eps": 1e-7, "weight_decay": 0.1}
# Both do the same steps with other roundings: of lr/(1 - beta1^t), of the square root, of the order of two products. That is some ulps of a
# step, whose size is lr, in each of 50 steps; an ulp is 1e-16 in float64 and 6e-8 in float32.
TOLERANCE = {torch.float64: {"rtol": 0, "atol": 50 * 3e-3 * 1e-14}, torch.float32: {"rtol": 0, "atol": 50 * 3e-3 * 2e-6}}


def twins(sizes=(40, 1100), dtype=torch.float32):
    params = make_params(list(sizes), dtype=dtype) + make_params([33], 1, pruned=False, dtype=dtype)
    return params, [nn.Parameter(p.detach().clone()) for p in params]


def test_the_reference_is_adamw_in_float64():
    theta = torch.randn(500, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    bare = nn.Parameter(theta.clone())
    optimizer = torch.optim.AdamW([bare], **OPTIONS)
    state, h = reference.start(theta, 500), Hyper(**OPTIONS)
    for i in range(STEPS):
        bare.grad = torch.randn(500, dtype=torch.float64, generator=torch.Generator().manual_seed(1 + i))
        state = reference.lower(state, bare.grad.clone(), h, "adamw")
        optimizer.step()
        torch.testing.assert_close(state.theta, bare.detach(), **TOLERANCE[torch.float64])
    own = optimizer.state[bare]
    torch.testing.assert_close(state.v, own["exp_avg"], rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(state.b, own["exp_avg_sq"], rtol=1e-12, atol=1e-15)
    assert state.t == STEPS


@pytest.mark.parametrize("levels", ["alternating", "joint"])
def test_without_zeros_it_is_adamw(levels):
    """With a schedule and clipping, over all lower or joint steps; upper steps leave the weights alone."""
    params, bare = twins()
    ours = FastBiP(params, sparsity=0.0, optimizer="adamw", levels=levels, **OPTIONS)
    theirs = torch.optim.AdamW(bare, **OPTIONS)
    schedules = [torch.optim.lr_scheduler.OneCycleLR(o, 5e-3, total_steps=STEPS) for o in (ours, theirs)]  # moves betas too
    for i in range(STEPS):
        fill_gradients(params, i)
        for p, q in zip(params, bare, strict=True):
            q.grad = p.grad.clone()
        for group in (params, bare):
            nn.utils.clip_grad_norm_(group, 1.0)
        for phase in ("lower", "upper") if levels == "alternating" else ("joint",):
            assert ours.phase == phase
            ours.step()
        theirs.step()
        for schedule in schedules:
            schedule.step()
        for p, q in zip(params, bare, strict=True):
            torch.testing.assert_close(p, q, **TOLERANCE[torch.float32])
    assert ours.param_groups[0]["betas"] == theirs.param_groups[0]["betas"]
    assert int(ours.state[params[0]]["step"]) == STEPS


def test_a_parameter_without_gradients_takes_no_step():
    """As in torch, t is of each parameter: one whose gradients begin later begins its corrections then."""
    params, bare = twins()
    ours = FastBiP(params, sparsity=0.0, optimizer="adamw", levels="joint", **OPTIONS)
    theirs = torch.optim.AdamW(bare, **OPTIONS)
    for i in range(12):
        fill_gradients(params, i)
        if i < 7:
            params[1].grad = None
        for p, q in zip(params, bare, strict=True):
            q.grad = None if p.grad is None else p.grad.clone()
        ours.step()
        theirs.step()
    assert [int(ours.state[p]["step"]) for p in params] == [12, 5, 12]
    for p, q in zip(params, bare, strict=True):
        torch.testing.assert_close(p, q, **TOLERANCE[torch.float32])


def test_a_grad_scaler_and_its_skipped_steps():
    params, bare = twins()
    ours = FastBiP(params, sparsity=0.0, optimizer="adamw", levels="joint", **OPTIONS)
    theirs = torch.optim.AdamW(bare, **OPTIONS)
    scalers = [torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=4) for _ in range(2)]
    for i in range(12):
        fill_gradients(params, i)
        for p, q in zip(params, bare, strict=True):
            q.grad = p.grad.clone() * scalers[1].get_scale()
            p.grad *= scalers[0].get_scale()
        if i % 5 == 3:
            params[0].grad[0, 7] = bare[0].grad[0, 7] = torch.inf
        for scaler, optimizer in zip(scalers, (ours, theirs), strict=True):
            scaler.scale(torch.zeros((), requires_grad=True))
            scaler.step(optimizer)
            scaler.update()
    assert int(ours.state[params[0]]["step"]) == int(theirs.state[bare[0]]["step"]) == 10
    for p, q in zip(params, bare, strict=True):
        torch.testing.assert_close(p, q, **TOLERANCE[torch.float32])


def test_states_of_another_rule_are_refused(backend):
    """Nothing has changed then."""
    params = make_params([300], device=backend.device)
    sgd = FastBiP(params, sparsity=0.5)
    saved = copy.deepcopy(sgd.state_dict())
    twin = [nn.Parameter(p.detach().clone()) for p in params]
    adamw = FastBiP(twin, sparsity=0.5, optimizer="adamw")
    before = copy.deepcopy(adamw.state_dict()["state"])
    with pytest.raises(ValueError, match="state_dict must be of optimizer='adamw', got one of 'sgd'"):
        adamw.load_state_dict(saved)
    after = adamw.state_dict()["state"]
    for i, state in before.items():
        assert state.pop("bip") == after[i].pop("bip")
        assert all(torch.equal(x, after[i][name]) for name, x in state.items())


@pytest.mark.parametrize("step", [-1, 2.0])
def test_a_count_of_steps_must_be_one(step):
    params = make_params([300])
    opt = FastBiP(params, sparsity=0.5, optimizer="adamw")
    saved = copy.deepcopy(opt.state_dict())
    saved["state"][0]["step"] = torch.tensor(step)
    with pytest.raises(ValueError, match="state_dict must hold"):
        opt.load_state_dict(saved)


def test_resuming_and_copying_go_on_bit_for_bit(backend):
    params = make_params([300, 1025], device=backend.device)
    opt = FastBiP(params, sparsity=0.7, optimizer="adamw", lr=0.01, mask_lr=0.3)
    for i in range(5):
        fill_gradients(params, i)
        opt.step()
    saved = copy.deepcopy(opt.state_dict())
    copied, copied_opt = copy.deepcopy((params, opt))
    loaded = [nn.Parameter(torch.zeros_like(p) + 0.5) for p in params]
    loaded_opt = FastBiP(loaded, sparsity=0.7, optimizer="adamw", lr=0.5)
    loaded_opt.load_state_dict(saved)
    for i in range(5, 11):
        for own, optimizer in ((params, opt), (copied, copied_opt), (loaded, loaded_opt)):
            fill_gradients(own, i)
            optimizer.step()
    for others in (copied, loaded):
        assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))
    assert set(opt.state[params[0]]) == {"exp_avg", "exp_avg_sq", "step", "theta", "mask", "scores", "bip"}


def test_a_group_that_comes_later_begins_its_own_count():
    params = make_params([300, 200])
    opt = FastBiP(params[:1], sparsity=0.5, optimizer="adamw", levels="joint")
    for i in range(3):
        fill_gradients(params, i)
        opt.step()
    opt.add_param_group({"params": params[1:], "betas": (0.5, 0.6)})
    fill_gradients(params, 9)
    opt.step()
    assert [int(opt.state[p]["step"]) for p in params] == [4, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"momentum": 0.9}, "momentum is not an option of optimizer='adamw', which has lr, betas, eps, weight_decay; got 0.9"),
        ({"nesterov": True}, "nesterov is not an option of optimizer='adamw'"),
        ({"betas": (0.9, 1.0)}, r"betas must be two numbers in \[0, 1\), got \(0.9, 1.0\)"),
        ({"betas": 0.9}, r"betas must be two numbers in \[0, 1\), got 0.9"),
        ({"betas": (0.9,)}, "betas must be two numbers"),
        ({"eps": -1.0}, "eps must be a finite float32 number greater than 0, got -1.0"),
        ({"eps": 0.0}, "eps must be a finite float32 number greater than 0, got 0.0"),
        ({"eps": 1e-50}, "eps must be a finite float32 number greater than 0, got 1e-50"),  # 0 in float32
        ({"eps": 1e39}, "eps must be a finite float32 number greater than 0"),
        ({"optimizer": "adam"}, "optimizer must be 'sgd', 'adamw' or a function"),
        ({"optimizer": "sgd", "betas": (0.9, 0.99)}, "betas is not an option of optimizer='sgd'"),
        ({"optimizer": "sgd", "eps": 1e-8}, "eps is not an option of optimizer='sgd'"),
    ],
)
def test_options_that_do_not_go(options, message):
    with pytest.raises(ValueError, match=message):
        FastBiP(make_params([40]), sparsity=0.5, **{"optimizer": "adamw"} | options)


def test_groups_have_the_options_of_their_rule_alone():
    sgd, adamw = FastBiP(make_params([40]), sparsity=0.5), FastBiP(make_params([40]), sparsity=0.5, optimizer="adamw")
    assert "betas" not in sgd.param_groups[0]
    assert "momentum" not in adamw.param_groups[0]
    with pytest.raises(ValueError, match="momentum is not an option of optimizer='adamw'"):
        FastBiP([{"params": make_params([40]), "momentum": 0.5}], sparsity=0.5, optimizer="adamw")

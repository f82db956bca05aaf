"""Sparsity schedules: the curve, the masks in lock-step with the reference, one plan for the whole way, and resume in the middle."""

import copy

import pytest
import torch
from helpers import fill_gradients, make_model, make_params, snapshot
from lockstep import Lockstep, run_of
from torch import nn

from bip_fast import FastBiP, SparsitySchedule, reference


def sparsities(opt):
    return [group["sparsity"] for group in opt.param_groups]


def test_the_cubic_curve_by_hand():
    opt = FastBiP(make_params([100]), sparsity=0.8)
    schedule = SparsitySchedule(opt, start=0.4, steps=4, begin=1)
    seen = []
    for _ in range(8):
        seen.append(sparsities(opt)[0])
        schedule.step()
    # 0.8 - 0.4 * (1, 1, 27/64, 8/64, 1/64, 0, ...)
    assert seen == pytest.approx([0.4, 0.4, 0.63125, 0.75, 0.79375, 0.8, 0.8, 0.8])


def test_linear_and_several_groups():
    a, b, c = ([p] for p in make_params([60, 70, 80]))
    opt = FastBiP([{"params": a, "sparsity": 0.9}, {"params": b, "sparsity": 0.5}, {"params": c, "prune": False, "sparsity": None}])
    schedule = SparsitySchedule(opt, "linear", steps=2)
    assert sparsities(opt) == [0.0, 0.0, None]
    schedule.step()
    assert sparsities(opt) == [0.45, 0.25, None]
    schedule.step()
    assert sparsities(opt) == [0.9, 0.5, None]


@pytest.mark.parametrize("scope", ["global", "layer", "erk"])
@pytest.mark.parametrize("levels", ["alternating", "joint"])
def test_masks_follow_on_one_plan(backend, scope, levels):
    run = run_of(make_model(device=backend.device), scope=scope, sparsity=0.9, levels=levels)
    schedule = SparsitySchedule(run.opt, start=0.2, steps=12)
    plan = run.opt._engine.plan
    for i in range(16):
        run.random_steps(1, seed=i)
        schedule.step()
    assert run.opt._engine.plan is plan
    assert run.opt.report().kept == run.opt.report().total - round(0.9 * run.opt.report().total) or scope == "layer"
    assert run.opt.report().selections[0].steps > 5


def test_groups_with_different_ends_part_once(backend):
    """They compete at the common start, and not behind it: one new plan there, and no other."""
    params = make_params([600, 700], device=backend.device)
    groups = [{"params": params[:1], "sparsity": 0.9}, {"params": params[1:], "sparsity": 0.5}]
    run = Lockstep(params, lambda: FastBiP(groups, levels="joint"))
    schedule = SparsitySchedule(run.opt, start=0.3, steps=5, begin=2)
    plans = []
    for i in range(9):
        run.random_steps(1, seed=i)
        plans.append(run.opt._engine.plan)
        schedule.step()
    # made for the ends; together at the start; apart from the first step behind it
    assert [plan is plans[0] for plan in plans] == [True] * 3 + [False] * 6
    assert all(plan is plans[3] for plan in plans[3:])


def test_up_and_down_again(backend):
    params = make_params([3000, 500], device=backend.device)
    run = Lockstep(params, lambda: FastBiP(params, sparsity=0.95, levels="joint", mask_lr=0.01))
    for sparsity in (0.5, 0.999, 0.0, 0.3, 0.95):
        run.opt.param_groups[0]["sparsity"] = sparsity
        run.random_steps(2)
        assert run.opt.report().kept == reference.kept(3500, sparsity)


def test_resume_in_the_middle_goes_the_same_way(backend):
    def begin():
        params = make_params([700, 90], device=backend.device)
        opt = FastBiP(params, sparsity=0.8, levels="joint")
        return params, opt, SparsitySchedule(opt, start=0.1, steps=10)

    params, opt, schedule = begin()
    saved = None
    for i in range(12):
        if i == 5:
            saved = copy.deepcopy((opt.state_dict(), schedule.state_dict(), [p.detach() for p in params]))
        fill_gradients(params, i)
        opt.step()
        schedule.step()
    others, twin, other_schedule = begin()
    twin.load_state_dict(saved[0])
    other_schedule.load_state_dict(saved[1])
    for i in range(5, 12):
        fill_gradients(others, i)
        twin.step()
        other_schedule.step()
    assert sparsities(twin) == sparsities(opt) == [0.8]
    for given, expected in zip(snapshot(twin).values(), snapshot(opt).values(), strict=True):
        assert given.equal(expected)


def test_groups_that_come_later_keep_their_sparsity():
    opt = FastBiP(make_params([100]), sparsity=0.8)
    schedule = SparsitySchedule(opt, steps=2)
    opt.add_param_group({"params": make_params([50], 1), "sparsity": 0.6})
    schedule.step()
    assert sparsities(opt)[1] == 0.6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "cosine", "steps": 1}, "kind must be 'cubic' or 'linear', got 'cosine'"),
        ({"kind": ["cubic"], "steps": 1}, r"kind must be 'cubic' or 'linear', got \['cubic'\]"),
        ({"start": None, "steps": 1}, r"start must be in \[0, 1\), got None"),
        ({"start": 1.0, "steps": 1}, r"start must be in \[0, 1\), got 1.0"),
        ({"steps": 0}, "steps must be an integer of at least 1, got 0"),
        ({"steps": 2.5}, "steps must be an integer of at least 1, got 2.5"),
        ({"steps": 1, "begin": -1}, "begin must be an integer of at least 0, got -1"),
    ],
)
def test_arguments_out_of_range(options, message):
    opt = FastBiP([nn.Parameter(torch.ones(5, 5))], sparsity=0.8)
    with pytest.raises(ValueError, match=message):
        SparsitySchedule(opt, **options)
    assert sparsities(opt) == [0.8]
    with pytest.raises(ValueError, match=r"state_dict must come from SparsitySchedule\.state_dict"):
        SparsitySchedule(opt, steps=1).load_state_dict({"count": 1})


@pytest.mark.parametrize("optimizer", [None, 3, torch.optim.SGD([nn.Parameter(torch.ones(2, 2))], lr=0.1)], ids=["none", "number", "SGD"])
def test_it_is_for_this_optimizer_alone(optimizer):
    with pytest.raises(TypeError, match=f"optimizer must be a FastBiP, got {type(optimizer).__name__}"):
        SparsitySchedule(optimizer, steps=3)

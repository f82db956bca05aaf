"""Presets: the defaults of what is not given, a step size of the scores that follows lr, and a sparsity that grows."""

import copy
import math

import pytest
import torch
from helpers import fill_gradients, make_params
from lockstep import Lockstep
from torch import nn

from bip_fast import FastBiP, SparsitySchedule, presets


def twin(params):
    return [nn.Parameter(p.detach().clone()) for p in params]


def train(params, opt, steps, first=0, after=lambda: None):
    for i in range(first, first + steps):
        fill_gradients(params, i)
        opt.step()
        after()


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def test_the_default_is_the_paper():
    group = FastBiP(make_params([40]), sparsity=0.5).param_groups[0]
    expected = {"lr": 0.01, "mask_lr": 0.1, "gamma": 1.0, "momentum": 0.9, "mask_momentum": 0.0, "weight_decay": 1e-4, "nesterov": False}
    assert {key: group[key] for key in expected} == expected
    assert group["mask_lr_per_lr"] is None
    opt = FastBiP(make_params([40]), sparsity=0.5, optimizer="adamw")
    assert opt.param_groups[0]["betas"] == (0.9, 0.999)
    assert opt.phase == "lower"


@pytest.mark.parametrize("rule", ["sgd", "adamw"])
def test_joint_is_the_options_that_it_stands_for(rule):
    params = make_params([300, 1100])
    other = twin(params)
    opt = FastBiP(params, sparsity=0.9, preset="joint", optimizer=rule)
    told = {key: value for key, value in presets.PRESETS["joint"][rule].items() if key != "ramp"}
    assert told["levels"] == "joint"
    assert math.isinf(told["gamma"])
    spelled = FastBiP(other, sparsity=0.9, optimizer=rule, **told)
    train(params, opt, 4)
    train(other, spelled, 4)
    assert same(params, other)


def test_what_is_given_wins():
    opt = FastBiP(make_params([40]), sparsity=0.5, preset="joint", lr=0.3, gamma=2.0, levels="alternating", mask_lr=0.7)
    group = opt.param_groups[0]
    assert (group["lr"], group["gamma"], group["mask_lr"], group["mask_lr_per_lr"], opt.phase) == (0.3, 2.0, 0.7, None, "lower")
    group = FastBiP(make_params([40]), sparsity=0.5, mask_lr_per_lr=5).param_groups[0]
    assert (group["mask_lr"], group["mask_lr_per_lr"]) == (None, 5)
    group = FastBiP([{"params": make_params([40]), "mask_lr": 0.2}], sparsity=0.5, preset="joint").param_groups[0]
    assert (group["mask_lr"], group["mask_lr_per_lr"]) == (0.2, None)


def test_the_scores_follow_the_schedule_of_the_weights(backend):
    params = make_params([300, 1100], device=backend.device)
    run = Lockstep(params, lambda: FastBiP(params, sparsity=0.8, levels="joint", lr=0.1, mask_lr_per_lr=3.0, weight_decay=0.01))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(run.opt, 8)
    for i in range(8):
        fill_gradients(params, i)
        run.step()
        schedule.step()
    scores = run.opt.scores_of(params[0])
    fill_gradients(params, 9)
    run.step()  # lr is 0 at the end of the cosine
    assert torch.equal(run.opt.scores_of(params[0]), scores)


def test_squares_as_scores(backend):
    values = torch.tensor([[0.5, -3.0, 0.1, math.nan, 1.0, -0.2]], device=backend.device)
    params = [nn.Parameter(values.clone())]
    opt = FastBiP(params, sparsity=0.5, score_start="square")
    assert torch.allclose(opt.scores_of(params[0]), torch.tensor([[0.125, 1.0, 0.005, 0.0, 0.5, 0.02]], device=backend.device))
    assert opt.mask_of(params[0]).flatten().tolist() == [True, True, False, False, True, False]  # of the magnitudes
    filters = [nn.Parameter(torch.tensor([[1.0, 0.0], [0.6, 0.6], [0.1, 0.1]], device=backend.device))]
    opt = FastBiP(filters, sparsity=0.5, pattern="filter", score_start="square", min_kept=0)
    assert torch.allclose(opt.scores_of(filters[0])[:, 0], torch.tensor([0.25, 0.18, 0.005], device=backend.device))


def test_the_sparsity_grows_as_the_schedule_says():
    params = make_params([300, 1100])
    other = twin(params)
    options = {"optimizer": "adamw", "lr": 0.01}
    opt = FastBiP(params, sparsity=0.9, preset="joint", steps=20, **options)
    assert sum(int(opt.mask_of(p).sum()) for p in params) == 1400  # nothing is pruned yet
    spelled = FastBiP(other, sparsity=0.9, preset="joint", **options)
    schedule = SparsitySchedule(spelled, steps=12)  # the first 60 % of the run
    spelled.set_scores({})
    train(params, opt, 14)
    train(other, spelled, 14, after=schedule.step)
    assert same(params, other)
    assert sum(int(opt.mask_of(p).sum()) for p in params) == 1400 - round(0.9 * 1400)


@pytest.mark.parametrize(("steps", "taken", "short"), [(20, 10, 1), (20, 5, 6), (1, 1, 1)])
def test_a_run_that_ends_before_its_sparsity_is_there(steps, taken, short):
    params = make_params([300, 1100])
    opt = FastBiP(params, sparsity=0.9, preset="joint", steps=steps)
    train(params, opt, taken)
    with pytest.warns(UserWarning, match=rf"finalize\(\) came {short} steps before .* steps must be the number of optimizer steps"):
        opt.finalize()
    assert opt.report().sparsity < 0.9


@pytest.mark.parametrize("sparsity", [0.9, 0.0])
def test_a_run_that_is_long_enough(sparsity, recwarn):
    params = make_params([300, 1100])
    opt = FastBiP(params, sparsity=sparsity, preset="joint", steps=20)
    train(params, opt, 11 if sparsity else 2)
    opt.finalize()
    assert opt.report().kept == 1400 - round(sparsity * 1400)
    assert not recwarn.list


def test_a_run_that_grows_resumes_and_is_copied_bit_for_bit(backend):
    params = make_params([300, 1100], device=backend.device)
    opt = FastBiP(params, sparsity=0.9, preset="joint", steps=20)
    train(params, opt, 5)
    saved, (copied, copied_opt) = copy.deepcopy(opt.state_dict()), copy.deepcopy((params, opt))
    loaded = twin(params)
    loaded_opt = FastBiP(loaded, sparsity=0.5, preset="joint", steps=99)
    loaded_opt.load_state_dict(saved)
    for own, optimizer in ((params, opt), (copied, copied_opt), (loaded, loaded_opt)):
        train(own, optimizer, 8, first=5)
    assert same(params, copied)
    assert same(params, loaded)
    assert loaded_opt.param_groups[0]["sparsity"] == 0.9


def test_a_state_with_and_one_without_steps_do_not_go_together():
    first, second = make_params([40]), make_params([40])
    grows, stays = FastBiP(first, sparsity=0.9, preset="joint", steps=20), FastBiP(second, sparsity=0.9, preset="joint")
    with pytest.raises(ValueError, match="state_dict must be of an optimizer that was made without steps, got one with steps"):
        stays.load_state_dict(copy.deepcopy(grows.state_dict()))
    with pytest.raises(ValueError, match="state_dict must be of an optimizer that was made with steps, got one without steps"):
        grows.load_state_dict(copy.deepcopy(stays.state_dict()))


DAMAGED = [{"steps": 0}, {"begin": None}, {"start": 1.0}, {"kind": {"square": 1}}, {"kind": "cubic"}]
DAMAGED += [{"count": "x"}, {"count": -1}, {"ends": {"0": 7.0}}, {"ends": {"0": "x"}}, {"ends": [0.9]}]


@pytest.mark.parametrize("damage", [None, *DAMAGED], ids=str)
def test_a_damaged_ramp_changes_nothing(damage):
    params = make_params([40])
    opt = FastBiP(params, sparsity=0.9, preset="joint", steps=20)
    train(params, opt, 3)
    damaged = copy.deepcopy(opt.state_dict())
    for state in damaged["state"].values():
        state["bip"]["ramp"] = {"count": 3} if damage is None else state["bip"]["ramp"] | damage
    damaged["param_groups"][0]["lr"] = 0.77
    before = copy.deepcopy(opt.param_groups[0])
    with pytest.raises(ValueError, match="must"):
        opt.load_state_dict(damaged)
    after = opt.param_groups[0]
    assert {key: before[key] for key in before if key != "params"} == {key: after[key] for key in after if key != "params"}
    assert opt.state_dict()["state"][0]["bip"]["ramp"]["count"] == 3


def test_after_the_ramp_the_sparsity_is_what_is_set(backend):
    params = make_params([300, 1100], device=backend.device)
    opt = FastBiP(params, sparsity=0.5, preset="joint", steps=8)  # grows in the first 4
    train(params, opt, 4)
    opt.param_groups[0]["sparsity"] = 0.8
    train(params, opt, 2, first=4)
    assert sum(int(opt.mask_of(p).sum()) for p in params) == 280
    loaded = twin(params)
    loaded_opt = FastBiP(loaded, sparsity=0.5, preset="joint", steps=8)
    loaded_opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert loaded_opt.param_groups[0]["sparsity"] == 0.8
    for own, optimizer in ((params, opt), (loaded, loaded_opt)):
        train(own, optimizer, 2, first=6)
    assert same(params, loaded)


def test_one_schedule_is_enough():
    opt = FastBiP(make_params([40]), sparsity=0.9, preset="joint", steps=20)
    with pytest.raises(ValueError, match="optimizer must be made without steps, with which it makes its sparsity grow itself"):
        SparsitySchedule(opt, steps=10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "best"}, "preset must be 'paper' or 'joint', got 'best'"),
        ({"steps": 10}, r"steps must be left out with preset='paper', whose sparsity does not grow, got 10"),
        ({"preset": "joint", "steps": 0}, "steps must be an integer of at least 1, got 0"),
        ({"mask_lr": 0.1, "mask_lr_per_lr": 1.0}, "give one of mask_lr and mask_lr_per_lr, and None for the other"),
        ({"mask_lr_per_lr": -1.0}, "mask_lr_per_lr must be a finite float32 number of at least 0, got -1.0"),
        ({"score_start": "cube"}, "score_start must be 'magnitude' or 'square', got 'cube'"),
        ({"preset": "joint", "optimizer": torch.optim.Adagrad}, "give one of mask_lr and mask_lr_per_lr"),
    ],
)
def test_options_that_do_not_go(options, message):
    with pytest.raises(ValueError, match=message):
        FastBiP(make_params([40]), sparsity=0.5, **options)


def test_a_group_says_mask_lr_in_one_way():
    opt = FastBiP(make_params([40]), sparsity=0.5, preset="joint")
    opt.param_groups[0]["mask_lr"] = 0.5
    with pytest.raises(ValueError, match=r"give one of mask_lr and mask_lr_per_lr, and None for the other, got mask_lr=0.5 and"):
        opt.step()
    opt.param_groups[0]["mask_lr_per_lr"] = None
    opt.step()

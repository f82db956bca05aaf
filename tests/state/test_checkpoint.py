"""States that were damaged or laid out otherwise on the way, and copies of model and optimizer."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from helpers import assert_bits, assert_same_snapshot, fill_gradients, make_model, make_params, pruned_of, snapshot
from lockstep import MOVING, after_steps
from torch import nn

from bip_fast import FastBiP

# --- states --------------------------------------------------------------------------------------------------------------------------


def test_a_state_does_not_depend_on_anyones_layout(backend):
    """Saved from channels_last, made contiguous on the way, loaded into either layout: the same masks."""
    model = make_model(device=backend.device).to(memory_format=torch.channels_last)
    opt = FastBiP(model, **MOVING)
    for i in range(4):
        fill_gradients(model.parameters(), i)
        opt.step()
    saved = copy.deepcopy(opt.state_dict())
    for state in saved["state"].values():
        state |= {name: x.contiguous() for name, x in state.items() if isinstance(x, torch.Tensor)}
    for layout in (torch.channels_last, torch.contiguous_format):
        fresh = make_model(5, device=backend.device).to(memory_format=layout)
        other = FastBiP(fresh, **MOVING)
        other.load_state_dict(saved)
        for p, q in zip(pruned_in_order(model), pruned_in_order(fresh), strict=True):
            assert_bits(other.mask_of(q), opt.mask_of(p))
            assert_bits(q.detach(), p.detach())


@pytest.mark.parametrize(("pattern", "expected"), [("2:4", "2 of every 4 neighbours"), ("block:2x4", "whole units")])
def test_what_lies_side_by_side_depends_on_the_layout(backend, pattern, expected):
    """N:M and blocks are of neighbours in memory: a state of another memory format is refused, one of the same is not."""
    layouts = torch.contiguous_format, torch.channels_last
    one, other = (torch.nn.Conv2d(16, 8, 3).to(backend.device, memory_format=layout) for layout in layouts)
    sparsity = None if pattern == "2:4" else 0.5
    state = FastBiP([one.weight], sparsity=sparsity, pattern=pattern).state_dict()
    opt = FastBiP([other.weight], sparsity=sparsity, pattern=pattern)
    before = opt.mask_of(other.weight)
    with pytest.raises(ValueError, match=rf"must hold {expected}, got a mask of .* \(another memory layout\?\)"):
        opt.load_state_dict(state)
    assert torch.equal(opt.mask_of(other.weight), before)
    opt.load_state_dict(opt.state_dict())
    FastBiP([one.weight], sparsity=sparsity, pattern=pattern).load_state_dict(state)


def pruned_in_order(model):
    pruned = pruned_of(model)
    return [p for p in model.parameters() if p in pruned]


def _state(name, change):
    def damage(saved):
        saved["state"][1][name] = change(saved["state"][1][name])

    return damage


def _extra(name, value):
    """In what belongs to no parameter, of which every state has a copy."""

    def damage(saved):
        for state in saved["state"].values():
            state["bip"][name] = value

    return damage


DAMAGE = {
    "mask of floats": _state("mask", lambda x: x.float()),
    "mask of ones": _state("mask", lambda x: x.fill_(-1)),
    "mask with a bit more": _state("mask", lambda x: x ^ torch.tensor([1] + [0] * (len(x) - 1), dtype=torch.int32, device=x.device)),
    "theta on meta": _state("theta", lambda x: x.to("meta")),
    "sparse theta": _state("theta", lambda x: x.to_sparse()),
    "theta of integers": _state("theta", lambda x: x.int()),
    "theta a list": _state("theta", lambda x: [1, 2]),
    "theta missing": lambda saved: saved["state"][1].pop("theta"),
    "no state": lambda saved: saved.update(state=None),
    "a state that is none": lambda saved: saved["state"].update({1: 5}),
    "score momentum of another shape": lambda saved: saved["state"][1].update(score_momentum=torch.zeros(3)),
    "score momentum none": lambda saved: saved["state"][1].update(score_momentum=None),
    "no extra": lambda saved: [state.pop("bip") for state in saved["state"].values()],
    "extra none": lambda saved: [state.update(bip=None) for state in saved["state"].values()],
    "extra beside the states": lambda saved: saved.update(bip=None),
    "levels a number": _extra("levels", 3),
    "kept of another": _extra("kept", 1),
    "cycle a text": _extra("cycle", "abc"),
    "cycle too far": _extra("cycle", 7),
    "other levels": _extra("levels", {"joint": 1}),
    "other lower steps": _extra("lower_steps", 3),
    "counter none": _extra("num_nonfinite", None),
    "counters": _extra("num_nonfinite", torch.zeros(2)),
    "counter sparse": _extra("num_nonfinite", torch.zeros(1).to_sparse()),
    "counter on meta": _extra("num_nonfinite", torch.zeros((), device="meta")),
    "counter of numpy": _extra("num_nonfinite", torch.zeros(()).numpy()),
    "sparsity none": lambda saved: saved["param_groups"][0].update(sparsity=None),
    "lr negative": lambda saved: saved["param_groups"][0].update(lr=-1.0),
    "prune false": lambda saved: saved["param_groups"][0].update(prune=False),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_state_changes_nothing(backend, damage):
    params, others = make_params([300, 200], device=backend.device), make_params([300, 200], 1, device=backend.device)
    saved = copy.deepcopy(after_steps(params).state_dict())
    other = after_steps(others, steps=2)
    before, groups, phase = snapshot(other), copy.deepcopy({**other.param_groups[0], "params": None}), other.phase
    damage(saved)
    with pytest.raises(ValueError, match=r"state_dict|sparsity|lr"):
        other.load_state_dict(saved)
    assert_same_snapshot(snapshot(other), before)
    assert {**other.param_groups[0], "params": None} == groups
    assert other.phase == phase
    fill_gradients(others, 9)
    other.step()


def test_a_count_of_one_dimension(backend):
    (p,) = make_params([300], device=backend.device)
    opt = after_steps([p])
    saved = copy.deepcopy(opt.state_dict())
    _extra("num_nonfinite", torch.tensor([7]))(saved)
    opt.load_state_dict(saved)
    assert opt.num_nonfinite == 7
    with pytest.raises(TypeError, match="state_dict must be a dict, got NoneType"):
        opt.load_state_dict(None)


@pytest.mark.parametrize("rule", ["sgd", "adamw"])
def test_a_checkpoint_of_version_0_1_goes_on(rule):
    """One that has what belongs to no parameter beside the states."""
    saved = torch.load(Path(__file__).parent / "data" / "saved_by_0.1.pt", weights_only=True)[rule]
    model = nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 6))
    model.load_state_dict(saved["model"])
    options = {"sgd": {"steps": 10, "preset": "joint"}, "adamw": {"optimizer": "adamw"}}[rule]
    opt = FastBiP(model, sparsity=0.6, **options)
    opt.load_state_dict(saved["optimizer"])
    for i in range(5, 9):
        random = torch.Generator().manual_seed(i)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=random)
        opt.step()
    for name, expected in saved["after"].items():
        assert_bits(model.state_dict()[name], expected, name)


def test_load_hooks_may_change_the_state(backend):
    params, others = make_params([300], device=backend.device), make_params([300], 1, device=backend.device)
    opt, other = after_steps(params), FastBiP(others, **MOVING)

    def hook(optimizer, state_dict):
        groups = [{**group, "lr": 0.125} for group in state_dict["param_groups"]]
        return {**state_dict, "param_groups": groups}

    other.register_load_state_dict_pre_hook(hook)
    other.load_state_dict(opt.state_dict())
    assert other.param_groups[0]["lr"] == 0.125


# --- copies --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deepcopy", "pickle"])
def test_a_copy_of_model_and_optimizer_goes_on_alone(backend, how):
    """The same bits, its own parameters, and the names, exclusions and phase of the original."""
    model = make_model(device=backend.device)
    opt = FastBiP(model, **(MOVING | {"mask_momentum": 0.5}), lower_steps=2, exclude="head")
    for i in range(4):
        fill_gradients(model.parameters(), i)
        opt.step()
    with opt.upper():
        twin, other = how((model, opt))
    assert other.phase == opt.phase == "lower"
    assert other.report().rows == opt.report().rows
    for i in range(5):
        for m, o in ((model, opt), (twin, other)):
            fill_gradients(m.parameters(), 10 + i)
            o.step()
        assert other.phase == opt.phase
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert_bits(q.detach(), p.detach())
    with pytest.raises(ValueError, match=r"head\.weight"):
        other.mask_of(twin.head.weight)

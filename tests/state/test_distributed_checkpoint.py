"""States as `torch.distributed.checkpoint` takes them, as version 0.1 wrote them, and with names and keys of others in the groups."""

import copy
import io
import warnings
from pathlib import Path

import pytest
import torch
from helpers import assert_bits, assert_same_snapshot, fill_gradients, make_model, whole_state
from lockstep import MOVING
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

from bip_fast import FastBiP

CASES = {
    "sgd": {},
    "adamw": {"optimizer": "adamw", "momentum": None, "nesterov": None},
    "function": {"optimizer": lambda groups: torch.optim.Adam(groups, lr=0.01), "lr": None, "momentum": None, "weight_decay": None},
    "joint with a mask momentum": {"levels": "joint", "mask_momentum": 0.7},
    "filter": {"pattern": "filter"},
    "channel": {"pattern": "channel"},
    "block": {"pattern": "block:2x2"},
    "2:4": {"pattern": "2:4", "sparsity": None},
    "grows": {"preset": "joint", "steps": 12, "levels": None, "mask_lr": None},
}
OLD_TORCH = pytest.mark.skipif(
    torch.__version__ < "2.6", reason="torch before 2.6 keeps no names in groups, and flattens states of tensors and numbers only"
)
OPTIONS = {
    "plain": {},
    "flattened": {"flatten_optimizer_state_dict": True},
    "full": {"full_state_dict": True},
    "full on the CPU": {"full_state_dict": True, "cpu_offload": True},
}


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 12), nn.Linear(12, 4))


def made(model, case):
    given = {key: value for key, value in (MOVING | CASES[case]).items() if value is not None}
    return FastBiP(model, **given)


def advance(model, opt, steps, seed):
    for i in range(steps):
        fill_gradients([p for p in model.parameters() if p.requires_grad], seed + i)
        opt.step()


def through_a_file(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize(
    "options", [pytest.param(options, id=name, marks=OLD_TORCH if name == "flattened" else ()) for name, options in OPTIONS.items()]
)
@pytest.mark.parametrize("case", CASES)
def test_resume_through_distributed_checkpoint(case, options):
    model, fresh = small(), small()
    opt, other = made(model, case), made(fresh, case)
    advance(model, opt, 5, 0)
    if case == "function" and "full_state_dict" in options:
        advance(fresh, other, 1, 50)  # torch loads a full state into one that has the same keys, which come with the first step
    fresh.load_state_dict(copy.deepcopy(model.state_dict()))
    options = StateDictOptions(**options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        state = through_a_file(get_optimizer_state_dict(model, opt, options=options))
        set_optimizer_state_dict(fresh, other, state, options=options)
    assert other.phase == opt.phase
    assert_same_snapshot(whole_state(other), whole_state(opt))
    for owner, optimizer in ((model, opt), (fresh, other)):
        advance(owner, optimizer, 6, 100)
    assert_same_snapshot(whole_state(other), whole_state(opt))
    assert other.phase == opt.phase


def test_a_frozen_parameter_has_no_state_there():
    """`torch.distributed.checkpoint` leaves out what does not learn; it stays as it is."""
    model, fresh = (small().to(torch.bfloat16) for _ in range(2))
    for m in (model, fresh):
        m[0].bias.requires_grad_(False)
    opt, other = (FastBiP(m.named_parameters(), **MOVING) for m in (model, fresh))
    advance(model, opt, 3, 0)
    set_optimizer_state_dict(fresh, other, get_optimizer_state_dict(model, opt))
    assert_bits(fresh[0].bias.detach(), model[0].bias.detach())
    assert_same_snapshot(whole_state(other), whole_state(opt))


def test_looking_takes_no_step():
    """A state that is not there yet is made by a step of size 0 in other optimizers."""
    model = small()
    opt = FastBiP(model, **MOVING)
    before, phase = whole_state(opt), opt.phase
    get_optimizer_state_dict(model, opt)
    assert (opt.phase, opt._stepped) == (phase, False)
    assert_same_snapshot(whole_state(opt), before)


def test_a_checkpoint_of_version_0_1():
    """Written by that version: after 4 steps, with a mask momentum and a gradient that was not finite; "after" is 5 steps later."""
    saved = torch.load(Path(__file__).parent / "checkpoint_0_1.pt", weights_only=True)
    model = nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 12), nn.Linear(12, 3))
    opt = FastBiP(model, sparsity=0.6, lr=0.05, mask_lr=0.3, lower_steps=2, mask_momentum=0.5)
    model.load_state_dict(saved["model"])
    opt.load_state_dict(saved["optimizer"])
    assert opt.phase == "lower"
    assert opt.num_nonfinite == 1
    for i in range(5):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 + i))
        opt.step()
    for name, x in model.state_dict().items():
        assert_bits(x, saved["after"][name], name)


@OLD_TORCH
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_names_and_keys_of_others_survive(options):
    model, fresh = small(), small()
    opt, other = (FastBiP(list(m.named_parameters()), **MOVING) for m in (model, fresh))
    for optimizer in (opt, other):
        torch.optim.lr_scheduler.StepLR(optimizer, 3)  # puts initial_lr there
        optimizer.param_groups[0]["tag"] = "other"
    opt.param_groups[0] |= {"tag": "first", "initial_lr": 0.375}
    names = [name for name, _ in model.named_parameters()]
    assert opt.param_groups[0]["param_names"] == opt.state_dict()["param_groups"][0]["param_names"] == names
    options = StateDictOptions(**options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        set_optimizer_state_dict(fresh, other, through_a_file(get_optimizer_state_dict(model, opt, options=options)), options=options)
    group = other.param_groups[0]
    assert (group["param_names"], group["tag"], group["initial_lr"]) == (names, "first", 0.375)


@OLD_TORCH
def test_an_added_group_has_names_too():
    model, more = small(), nn.Linear(4, 8)
    opt = FastBiP(list(model.named_parameters()), **MOVING)
    opt.add_param_group({"params": list(more.named_parameters())})
    assert opt.param_groups[1]["param_names"] == ["weight", "bias"]
    plain = FastBiP(make_model(), **MOVING)
    plain.add_param_group({"params": list(more.parameters())})

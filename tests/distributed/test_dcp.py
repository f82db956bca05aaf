"""Checkpoints of `torch.distributed.checkpoint`: in one process, and saved on some ranks and loaded on others."""

import copy
import os
import signal

import pytest
import torch
import torch.distributed as dist
from ranks import run_and_lose, run_on
from sharded_runs import whole
from torch import nn

from bip_fast import FastBiP
from bip_fast.engine.shards import Ranks

dcp = pytest.importorskip("torch.distributed.checkpoint", reason="needs a torch with torch.distributed.checkpoint")
from torch.distributed.checkpoint.state_dict import (  # noqa: E402
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

pytestmark = pytest.mark.slow


def adagrad(groups):
    return torch.optim.Adagrad(groups, lr=0.05)


OPTIONS = {
    "sgd": {"sparsity": 0.7, "mask_momentum": 0.9},
    "adamw": {"sparsity": 0.7, "optimizer": "adamw", "preset": "joint", "steps": 20},
    "callable": {"sparsity": 0.7, "optimizer": adagrad},
    "filters": {"sparsity": 0.5, "pattern": "filter"},
    "2:4": {"pattern": "2:4", "exclude": "4.weight"},
    "blocks": {"sparsity": 0.5, "pattern": "block:4x2", "scope": "layer", "exclude": "2.weight"},
    "layer": {"sparsity": 0.8, "scope": "layer", "lower_steps": 2},
}
RATES = {"mask_lr": 0.3, "gamma": 0.7}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 48), nn.ReLU(), nn.Linear(48, 49), nn.ReLU(), nn.Linear(49, 48))


def made(model, name):
    options = OPTIONS[name]
    return FastBiP(model, **({} if name == "adamw" else RATES), **options)


def train(model, opt, steps):
    for step in steps:
        for number, p in enumerate(model.parameters()):
            random = torch.Generator().manual_seed(100 * step + number)
            g = torch.randn(tuple(p.shape), generator=random)
            if step == 3:
                g.view(-1)[5] = torch.nan
            p.grad = g if not hasattr(p, "device_mesh") else _placed(g, p)
        opt.step()
        opt.zero_grad()


def _placed(g, p):
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(g, p.device_mesh, p.placements, src_data_rank=None)


def outcome(model, opt):
    found = {name: whole(x.detach()) for name, x in model.named_parameters()}
    for number, p in enumerate(opt.pruned_params):
        found |= {f"mask {number}": whole(opt.mask_of(p)), f"scores {number}": whole(opt.scores_of(p))}
    return found | {"phase": opt.phase, "nonfinite": opt.num_nonfinite, "sparsity": opt.param_groups[0]["sparsity"]}


def same(given, expected):
    assert given.keys() == expected.keys()
    for name, x in expected.items():
        assert torch.equal(given[name], x) if isinstance(x, torch.Tensor) else given[name] == x, name


def never_stopped(name):
    model = network()
    opt = made(model, name)
    train(model, opt, range(9))
    return outcome(model, opt)


# --- one process -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how", [{}, {"flatten_optimizer_state_dict": True}, {"full_state_dict": True}, {"full_state_dict": True, "cpu_offload": True}], ids=str
)
@pytest.mark.parametrize("name", OPTIONS)
def test_a_state_through_torch_goes_on_bit_for_bit(name, how):
    options = StateDictOptions(**how)
    model = network()
    opt = made(model, name)
    train(model, opt, range(5))
    saved = copy.deepcopy((get_model_state_dict(model, options=options), get_optimizer_state_dict(model, opt, options=options)))
    train(model, opt, range(5, 9))
    other = network()
    again = made(other, name)
    set_model_state_dict(other, saved[0], options=options)
    set_optimizer_state_dict(other, again, saved[1], options=options)
    train(other, again, range(5, 9))
    same(outcome(other, again), outcome(model, opt))


# --- several ---------------------------------------------------------------------------------------------------------------------------


def _sharded():
    from torch.distributed.fsdp import fully_shard

    model = network()
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    return fully_shard(model)


def _state(model, opt, flat):
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    return {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, opt, options=options)}


def save(folder, flat):
    for name in SHARDED:
        model = _sharded()
        opt = made(model, name)
        train(model, opt, range(5))
        dcp.save(_state(model, opt, flat), checkpoint_id=f"{folder}/{name}")


def load(folder, flat):
    found = {}
    for name in SHARDED:
        model = _sharded()
        opt = made(model, name)
        state = _state(model, opt, flat)
        dcp.load(state, checkpoint_id=f"{folder}/{name}")
        set_model_state_dict(model, state["model"])
        set_optimizer_state_dict(model, opt, state["optimizer"], options=StateDictOptions(flatten_optimizer_state_dict=flat))
        train(model, opt, range(5, 9))
        found[name] = outcome(model, opt)
    return found if dist.get_rank() == 0 else None


SHARDED = list(OPTIONS)


@pytest.mark.parametrize(("ranks", "others", "flat"), [(2, 3, False), (4, 2, True), (3, 1, False), (1, 4, True)])
def test_saved_on_some_ranks_and_loaded_on_others(tmp_path, ranks, others, flat):
    run_on(ranks, save, str(tmp_path), flat)
    found = run_on(others, load, str(tmp_path), flat)[0]
    for name, given in found.items():
        same(given, never_stopped(name))


def save_and_die(folder):
    """The last rank ends in the middle of a step after the checkpoint, while the others wait for what it has counted."""
    save(folder, False)
    model = _sharded()
    opt = made(model, "sgd")
    train(model, opt, range(5))
    if dist.get_rank() == dist.get_world_size() - 1:
        Ranks.add = lambda self, x: os.kill(os.getpid(), signal.SIGKILL)
    train(model, opt, range(5, 9))


def test_a_rank_that_is_lost_in_a_step_ends_all_and_the_checkpoint_goes_on(tmp_path):
    codes, errors = run_and_lose(3, save_and_die, str(tmp_path))
    assert codes[2] == -signal.SIGKILL
    assert None not in codes, "a rank waits for ever"
    assert 0 not in codes
    assert len(errors) == 2
    assert all("shards.py" in error for error in errors), "it ends in the sums of the selection"
    found = run_on(2, load, str(tmp_path), False)[0]
    same(found["sgd"], never_stopped("sgd"))

"""An error on one rank alone: no rank waits for another, all have an error that says where it came from, and nothing is half done."""

import copy
import itertools

import pytest
import torch
import torch.distributed as dist
from helpers import load_simulator, simulated
from ranks import run_on
from sharded_runs import gradient, mesh_of, placed, placements_of, weights, whole
from torch import nn

import bip_fast
from bip_fast import FastBiP
from bip_fast.engine.launch import kernel_tables
from bip_fast.engine.shards import local_of

if not dist.is_available():
    pytest.skip("needs torch.distributed", allow_module_level=True)

pytestmark = pytest.mark.slow

SHAPES = [(64, 40), (33, 31)]
UNITS = [(3000, 2), (500, 3)]  # so many that the pass turns some before all ranks are heard


def made(shapes=SHAPES, **options):
    mesh = mesh_of((dist.get_world_size(),))
    params = [nn.Parameter(placed(x, mesh, placements_of("0", x))) for x in weights(shapes)]
    return params, FastBiP([(f"w{number}", p) for number, p in enumerate(params)], **{"sparsity": 0.7} | options)


def advance(params, opt, *phases):
    for step, phase in enumerate(phases):
        for number, p in enumerate(params):
            g = gradient(tuple(p.shape), step, number)
            p.grad = placed(g, p.device_mesh, p.placements)
        with getattr(opt, phase)():
            opt.step()


def everything(params, opt):
    """Of this rank alone, without a word to others."""
    states = [x.to_local() if hasattr(x, "to_local") else x for p in params for x in opt.state[p].values() if isinstance(x, torch.Tensor)]
    return [x.clone() for x in (*states, *(p.detach().to_local() for p in params))] + [opt.phase, opt.param_groups[0]["lr"]]


def same(first, second):
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(first, second, strict=True))


def error_of(call, *arguments):
    """Kind and text of the error that it must raise."""
    try:
        call(*arguments)
    except Exception as error:
        return type(error).__name__, str(error)
    raise AssertionError("no error on this rank")


def is_the_top(params, opt):
    one = slice(1) if opt.param_groups[0]["pattern"] == "filter" else slice(None)  # of the weights of a filter
    scores, mask = (torch.cat([whole(of(p))[:, one].flatten() for p in params]) for of in (opt.scores_of, opt.mask_of))
    return torch.equal(mask, bip_fast.topk_mask(scores, mask.numel() - round(0.7 * mask.numel())))


# --- loading -----------------------------------------------------------------------------------------------------------------------------


def cut(x):
    """A DTensor of the same shape, of which this rank has a row less."""
    from torch.distributed.tensor import DTensor

    local = x.to_local()[:-1]
    return DTensor.from_local(local, x.device_mesh, x.placements, run_check=False, shape=x.shape, stride=x.stride())


def turned(x):
    """A DTensor of the same shape, which the ranks share out along the other dimension."""
    from torch.distributed.tensor import DTensor, Shard

    local = x.to_local().reshape(x.shape[0], -1)
    return DTensor.from_local(local, x.device_mesh, [Shard(1)], run_check=False, shape=x.shape, stride=x.stride())


def flipped(mask):
    local = mask.to_local().clone()
    local.view(-1)[0] ^= True
    return type(mask).from_local(local, mask.device_mesh, mask.placements, run_check=False, shape=mask.shape, stride=mask.stride())


def changed(name, key, change):
    def damage(state):
        own = state["state"][name]
        if change is None:
            del own[key]
        else:
            own[key] = change(own[key])
        return state

    return damage


def of_another_rule(state):
    for own in state["state"].values():
        own["bip"]["optimizer"] = {"adamw": 1}
    return state


DAMAGES = {
    "truncated": (changed(1, "scores", cut), "scores of shape (16, 31) on this rank for w1"),
    "truncated mask": (changed(1, "mask", cut), "mask of shape (16, 31) on this rank for w1"),
    "shared out in another way": (changed(0, "theta", turned), "theta of shape (32, 40) on this rank for w0, got (64, 20)"),
    "another shape": (changed(0, "momentum", lambda x: x[:, :-1]), "for w0"),
    "of another rule": (of_another_rule, "optimizer='sgd', got one of 'adamw'"),
    "a key is missing": (changed(0, "theta", None), "theta"),
    "no states": (lambda state: state | {"state": {}}, "states without 'bip'"),
    "no dict": (lambda state: None, "must be a dict, got NoneType"),
}
ALIKE = {  # found from what all ranks say together: all have the same error
    "masks that keep others": (changed(0, "mask", flipped), "damaged"),
    "another phase": (changed(0, "bip", lambda own: own | {"cycle": 1 - own["cycle"]}), "must be the same on all ranks"),
}


def load_damaged():
    params, opt = made()
    advance(params, opt, "upper", "lower")
    state = copy.deepcopy(opt.state_dict())
    advance(params, opt, "joint", "lower")
    found, before = {}, everything(params, opt)
    for name, (damage, _) in (DAMAGES | ALIKE).items():
        own = {"state": {number: dict(x) for number, x in state["state"].items()}, "param_groups": state["param_groups"]}
        given = damage(copy.deepcopy(own)) if dist.get_rank() == 1 else own
        found[name] = (*error_of(opt.load_state_dict, given), same(before, everything(params, opt)))
    opt.load_state_dict(state)
    advance(params, opt, "upper")
    return found, is_the_top(params, opt), [load_damaged_through_torch(flat) for flat in (False, True)]


def test_a_state_that_is_damaged_on_one_rank_is_loaded_by_none():
    (first, right, through), (second, _, again) = run_on(2, load_damaged)
    assert right, "they go on together"
    for _, text, untouched in (case for cases in (*through, *again) for case in cases):
        assert "theta" in text
        assert untouched
    for name, (_, text) in (DAMAGES | ALIKE).items():
        for kind, said, untouched in (first[name], second[name]):
            assert text in said, name
            assert kind in (("TypeError", "RuntimeError") if name == "no dict" else ("ValueError",)), name
            assert untouched, name
        assert ("on rank 1" in first[name][1]) == (name in DAMAGES)


def load_damaged_through_torch(flat):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = fully_shard(nn.Sequential(nn.Linear(24, 48), nn.ReLU(), nn.Linear(48, 12)))
    opt = FastBiP(model, sparsity=0.7)
    params, options = opt.pruned_params, StateDictOptions(flatten_optimizer_state_dict=flat)
    state = get_optimizer_state_dict(model, opt, options=options)
    before, found = everything(params, opt), []
    for damage in ("cut", "missing"):
        given = copy.deepcopy(state)
        own, key = (given, "state.0.weight.theta") if flat else (given["state"]["0.weight"], "theta")
        if dist.get_rank() == 1 and damage == "cut":
            own[key] = cut(own[key])
        elif dist.get_rank() == 1:
            del own[key]
        error = error_of(lambda given=given: set_optimizer_state_dict(model, opt, given, options=options))
        found.append((*error, same(before, everything(params, opt))))
    return found


# --- everything else ----------------------------------------------------------------------------------------------------------------------


def fail_on_one():
    """Error and what else is to be known, by name."""
    found, second = {}, dist.get_rank() == 1
    most = kernel_tables.MAX_GROUP
    kernel_tables.MAX_GROUP = 1000 if second else most
    found["too many weights"] = error_of(made)
    kernel_tables.MAX_GROUP = most

    params, opt = made()
    scores = {p: torch.full(p.shape, 0.5) for p in params}
    scores[params[0]][0, 0] = 2.0 if second else 0.5
    found["scores out of range"] = error_of(opt.set_scores, scores)

    advance(params, opt, "upper")
    opt.param_groups[0]["scope"] = "layer"
    kernel_tables.MAX_GROUP = 500 if second else most
    found["too many weights for a new plan"] = error_of(advance, params, opt, "upper")
    kernel_tables.MAX_GROUP = most
    advance(params, opt, "upper")
    assert [int(whole(opt.mask_of(p)).sum()) for p in params] == [p.numel() - round(0.7 * p.numel()) for p in params]

    if second:
        local_of(params[0]).add_(1)
    found["written, then finalized"] = error_of(opt.finalize)
    return found, step_without()


STEPS = [{}, {"shapes": UNITS, "pattern": "filter", "min_kept": 2, "mask_lr": 1.0}]


def step_without(simulator=False):
    """What comes of steps that the second rank cannot make: the error in each phase, and whether the next step finds the mask."""
    if simulator:
        for table, kernels in simulated():
            table["cpu"] = kernels
    found = []
    for options, phase in itertools.product(STEPS, ("upper", "joint", "lower")):
        params, opt = made(**options)
        advance(params, opt, "upper", "joint")
        if dist.get_rank() == 1:
            kept = local_of(params[0]).clone()
            local_of(params[0]).add_(1)
        opt.param_groups[0]["scope"] = "layer"  # all make a new plan in this step, and again in the next
        try:
            advance(params, opt, phase)
            found.append("")
        except RuntimeError as error:
            found.append(str(error))
        if dist.get_rank() == 1:
            local_of(params[0]).copy_(kept)
            opt._engine.arena.mark_written()
        opt.param_groups[0]["scope"] = "global"
        advance(params, opt, "upper")
        found.append(is_the_top(params, opt))
    return found


def check_steps(first, second, told):
    """``told``: whether the first rank is told in an upper and joint step."""
    assert first[1::2] == second[1::2] == [True] * 6
    assert all("w0 was written by other code" in text for text in second[::2])
    assert ["another rank" in text for text in first[::2]] == [told, told, False] * 2, "a lower step has nothing to tell"
    assert all(text == "" or told for text in first[::2])


def test_what_one_rank_cannot_do_none_does():
    (first, steps), (second, others) = run_on(2, fail_on_one)
    texts = {
        "too many weights": "fewer than 2**32 weights on a rank",
        "scores out of range": "[0, 1]",
        "too many weights for a new plan": "fewer than 2**32 weights on a rank",
        "written, then finalized": "written",
    }
    for name, text in texts.items():
        assert "on rank 1" in first[name][1], name
        assert text in first[name][1], name
        assert text in second[name][1], name
        assert first[name][0] == second[name][0], name
    check_steps(steps, others, told=True)


def test_on_a_gpu_nobody_waits_for_a_rank_that_makes_no_step():
    """There the host reads nothing back, so the others go on, and the next step selects anew."""
    load_simulator()  # built here, once
    check_steps(*run_on(2, step_without, True), told=False)

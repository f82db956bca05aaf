"""Weights that ranks share out: every bit of masks, scores and theta is that of one process, whatever the layout."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from helpers import load_simulator
from ranks import run_on
from sharded_runs import PHASES, gradient, mesh_of, placed, placements_of, run, run_cases, weights, whole
from torch import nn

from bip_fast import FastBiP
from bip_fast.engine.layers import PRUNABLE, LayerRule

if not dist.is_available():
    pytest.skip("needs torch.distributed", allow_module_level=True)

SHAPES = [(65, 40), (33, 31), (3, 7)]
LARGE = [(65, 400), (330, 310), (3, 7)]
UNITS = [(64, 3, 3, 3), (48, 64), (33, 9)]
PLAIN = {
    "global": {"shapes": SHAPES, "options": {"sparsity": 0.7}},
    "layer, adamw": {"shapes": SHAPES, "options": {"sparsity": 0.7, "scope": "layer", "optimizer": "adamw"}},
    "erk": {"shapes": LARGE, "options": {"sparsity": 0.9, "scope": "erk"}},
    "momenta": {"shapes": LARGE, "options": {"sparsity": 0.9, "mask_lr": 1e-3, "mask_momentum": 0.9, "nesterov": True}},
    "all equal": {"shapes": SHAPES, "options": {"sparsity": 0.7}, "weights": "equal", "gradients": "equal"},
    "atoms": {"shapes": LARGE, "options": {"sparsity": 0.9}, "weights": "atoms"},
    "NaN on one rank": {"shapes": SHAPES, "options": {"sparsity": 0.7}, "gradients": "one rank"},
    "half precision": {"shapes": SHAPES, "options": {"sparsity": 0.7}, "dtype": torch.bfloat16},
}
MANY = {  # so many groups that digits are short, one with more entries than are listed
    "many layers": {"shapes": [*[(4, 5)] * 39, (130, 90)], "options": {"sparsity": 0.7, "scope": "layer"}, "weights": "atoms"},
}
ROWS = {
    "filters": {"shapes": UNITS, "options": {"sparsity": 0.6, "pattern": "filter"}},
    "few filters": {
        "shapes": UNITS,
        "options": {"sparsity": 0.95, "pattern": "filter", "min_kept": 3, "mask_lr": 3.0, "optimizer": "adamw"},
    },
    "2:4": {"shapes": [(64, 32), (47, 64)], "options": {"pattern": "2:4"}},
    "4:8, equal": {"shapes": [(64, 32), (48, 64)], "options": {"pattern": "4:8"}, "weights": "equal", "gradients": "one rank"},
    "blocks": {"shapes": [(64, 32), (48, 64)], "options": {"pattern": "block:4x4", "sparsity": 0.5}},
    "blocks, layer": {
        "shapes": [(64, 32), (48, 64)],
        "options": {"pattern": "block:2x8", "scope": "layer", "sparsity": 0.5, "mask_momentum": 0.9},
    },
}
COLUMNS = {
    "2:4": {"shapes": [(65, 32), (48, 64)], "options": {"pattern": "2:4"}},
    "4:8, equal": {"shapes": [(64, 32), (48, 64)], "options": {"pattern": "4:8"}, "weights": "equal"},
    "blocks": {"shapes": [(64, 32), (48, 64)], "options": {"pattern": "block:4x4", "sparsity": 0.5}},
    "channels": {"shapes": [(64, 4, 3, 3), (48, 64)], "options": {"pattern": "channel", "sparsity": 0.5}},
}
# mesh, how it shards (`sharded_runs.placements_of`), cases
LAYOUTS = [
    ((1,), "0", PLAIN),
    ((2,), "0", PLAIN | ROWS | MANY),
    ((3,), "0", PLAIN),
    ((4,), "0", PLAIN | ROWS),
    ((2, 2), "r0", PLAIN | ROWS),
    ((2,), "1", PLAIN | COLUMNS),
    ((2, 2), "01", PLAIN),
]


def differences(given, expected):
    def bits(x):
        return x.contiguous().view(torch.int32) if x.dtype == torch.float32 else x

    names = [name for name in expected if name != "selections"]
    assert given.keys() == expected.keys()
    return [name for name in names if given[name].shape != expected[name].shape or not torch.equal(bits(given[name]), bits(expected[name]))]


@pytest.mark.parametrize(
    ("mesh", "layout", "cases"),
    [
        pytest.param(mesh, layout, cases, id=f"{'x'.join(map(str, mesh))}-{layout}", marks=() if layout == "1" else pytest.mark.slow)
        for mesh, layout, cases in LAYOUTS
    ],
)
def test_every_bit_is_that_of_one_process(mesh, layout, cases):
    world = torch.Size(mesh).numel()
    found = run_on(world, run_cases, list(cases.values()), mesh, layout)[0]
    for (name, case), given in zip(cases.items(), found, strict=True):
        assert not differences(given, run(case)), name


BY_ROWS = {
    name: case for name, case in (PLAIN | ROWS).items() if name in ("erk", "momenta", "NaN on one rank", "few filters", "4:8, equal")
}
BY_COLUMNS = {"all equal": PLAIN["all equal"], "layer, adamw": PLAIN["layer, adamw"]} | COLUMNS | MANY


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "cases"), [("0", BY_ROWS), ("1", BY_COLUMNS)], ids=["rows", "columns"])
def test_the_kernels_for_cuda_give_the_same_bits(layout, cases):
    """On the host simulator, on every rank."""
    load_simulator()  # built here, once
    found = run_on(2, run_cases, list(cases.values()), (2,), layout, 10, True)[0]
    for (name, case), given in zip(cases.items(), found, strict=True):
        assert not differences(given, run(case, steps=10)), name


class Stacks(nn.Module):
    """Three matrices in one parameter, which two ranks cut inside the second, and experts."""

    def __init__(self, width):
        super().__init__()
        made = torch.Generator().manual_seed(0)
        self.attention = nn.MultiheadAttention(width, 2, bias=False)
        self.experts = nn.Module()
        self.experts.weight = nn.Parameter(torch.randn(3, 16, 32, generator=made))
        for number, p in enumerate(self.parameters()):
            p.data = torch.randn(p.shape, generator=made) * (1 + number)


STACKED = {
    "layer": {"scope": "layer", "optimizer": "adamw"},
    "erk": {"scope": "erk", "mask_momentum": 0.9},
    "global": {},
    "global, then layer": {},
}


def stacked(name, layout, width=16):
    """States after some steps, whole, of a Module whose parameters are sharded if ``layout`` says how, and what was kept of each matrix."""
    model, mesh = Stacks(width), mesh_of((dist.get_world_size(),)) if layout else None
    for module in model.modules():
        for key, p in list(module.named_parameters(recurse=False)):
            setattr(module, key, nn.Parameter(placed(p.detach(), mesh, placements_of(layout, p))))
    opt = FastBiP(model, sparsity=0.7, mask_lr=0.3, **STACKED[name])
    for step in range(6):
        if step == 3 and name == "global, then layer":
            opt.param_groups[0]["scope"] = "layer"
        for number, p in enumerate(model.parameters()):
            g = gradient(tuple(p.shape), step, number)
            p.grad = placed(g, mesh, placements_of(layout, g))
        with getattr(opt, PHASES[step % len(PHASES)])():
            opt.step()
        if step == 2:
            opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    kept = [[int(x.sum()) for x in whole(opt.mask_of(p)).chunk(3)] for p in opt.pruned_params]
    looks = (opt.mask_of, opt.scores_of, opt.weight_of)
    return kept, [whole(x) for p in opt.pruned_params for x in (p.detach(), *(look(p) for look in looks))]


def stacked_all(width):
    PRUNABLE.append(LayerRule(nn.Module, "weight", experts=True))
    found = {(name, layout): stacked(name, layout, width) for name in STACKED for layout in ("0", "1")}
    try:
        stacked("layer", "0", 10)
    except ValueError as error:
        return found, str(error), stacked("global", "0", 10)
    raise AssertionError("no error")


@pytest.mark.slow
def test_matrices_of_one_parameter_keep_their_budgets_wherever_ranks_cut():
    found, error, mixed = run_on(2, stacked_all, 16)[0]
    PRUNABLE.append(LayerRule(nn.Module, "weight", experts=True))
    try:
        for (name, layout), (kept, values) in found.items():
            expected, bits = stacked(name, "")
            assert kept == expected, (name, layout)
            assert all(torch.equal(x, y) for x, y in zip(values, bits, strict=True)), (name, layout)
            if name in ("layer", "global, then layer"):
                assert kept[0] == [256 - round(0.7 * 256)] * 3, "each matrix its own"
        assert stacked("global", "", 10)[0] == mixed[0]
    finally:
        PRUNABLE.pop()
    assert "attention.in_proj_weight of shape (30, 10) holds several matrices" in error
    assert "its scope must be 'global', got 'layer'" in error


def adagrad(groups):
    return torch.optim.Adagrad(groups, lr=0.01)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
}


def copies(folder):
    """Whether copies go on as what they were made of, and leave it alone."""
    mesh, found = mesh_of((dist.get_world_size(),)), []
    for options in ({"optimizer": "adamw"}, {"optimizer": adagrad}, {"pattern": "filter"}):
        for copied in COPIES.values():
            params = [nn.Parameter(placed(x, mesh, placements_of("0", x))) for x in weights(SHAPES)]
            opt = FastBiP(params, sparsity=0.7, **options)
            go_on(params, opt, range(2))
            others, other = copied((params, opt))
            copied(opt.state_dict())
            ends = [go_on(*own, range(2, 5)) for own in ((others, other), (params, opt))]
            found.append(all(torch.equal(x, y) for x, y in zip(*ends, strict=True)))
    torch.save(opt, f"{folder}/{dist.get_rank()}.pt")
    return found


def go_on(params, opt, steps):
    """Upper and lower steps in turn; the values and scores after them."""
    for step in steps:
        for number, p in enumerate(params):
            g = gradient(tuple(p.shape), step, number)
            p.grad = placed(g, p.device_mesh, p.placements)
        with opt.lower() if step % 2 else opt.upper():
            opt.step()
    return [whole(x) for p in params for x in (p.detach(), opt.scores_of(p))]


@pytest.mark.slow
def test_copies_and_pickles_go_on(tmp_path):
    assert run_on(2, copies, str(tmp_path)) == [[True] * 6] * 2
    with pytest.raises(RuntimeError, match="must be loaded by the rank that made it, rank 1 of 2, got rank 0 of 1; save state_dict"):
        torch.load(tmp_path / "1.pt", weights_only=False)


def skipped_on(rank):
    """Masks and values before and after a step whose gradients are infinite on one rank only."""
    mesh = mesh_of((dist.get_world_size(),))
    params = [nn.Parameter(placed(x, mesh, placements_of("0", x))) for x in weights(SHAPES)]
    opt = FastBiP(params, sparsity=0.7)
    found = []
    for step, phase in enumerate(("joint", "joint", "lower", "upper")):
        for number, p in enumerate(params):
            g = gradient(tuple(p.shape), step, number)
            p.grad = placed(g, mesh, placements_of("0", g))
        opt.grad_scale = torch.tensor(2.0)
        opt.found_inf = torch.tensor(float(step > 0 and dist.get_rank() == rank))
        with getattr(opt, phase)():
            opt.step()
        found.append([whole(x) for p in params for x in (p.detach().clone(), opt.mask_of(p), opt.scores_of(p), opt.weight_of(p))])
    return found


@pytest.mark.slow
def test_a_step_that_one_rank_must_skip_is_skipped_by_all():
    for found in run_on(2, skipped_on, 1):
        for later in found[1:]:
            assert all(torch.equal(x, y) for x, y in zip(found[0], later, strict=True))

"""The CUDA kernels on the simulator, in many orders of blocks, warps and lanes and on grids of many sizes: the bits are the same.

A result that depends on who comes first shows here: the reference, to which every run is compared, has no order.
"""

import pytest
import torch
from helpers import ADVERSARIAL_UNIT, load_simulator, make_params, use_backend
from lockstep import MOVING, Lockstep

from bip_fast import FastBiP, reference, topk_mask

SEEDS = [0, 1, 2, 3, 12345]
GRIDS = [1, 2, 4, 7]


@pytest.fixture
def simulator(monkeypatch):
    use_backend("sim", monkeypatch)
    simulator = load_simulator().sim
    yield simulator
    simulator.set_seed(0)
    simulator.set_max_grid(4)


def test_the_simulator_runs_the_kernels(simulator):
    """The fixture does route there: launches are counted, and a step has at most as many as the design allows, however many layers."""
    params = make_params([100 + i for i in range(50)])
    opt = FastBiP(params, **MOVING)
    for phase, most in (("lower", 1), ("upper", 2), ("joint", 2)):
        simulator.launches()
        with getattr(opt, phase)():
            opt.step()
        assert 1 <= simulator.launches() <= most, phase
    topk_mask(torch.rand(100), 10)
    assert simulator.launches() >= 1


@pytest.mark.parametrize("pattern", ["filter", "block:2x2"])
def test_units_take_one_launch_more(simulator, pattern):
    """One for their sums and scores, one as for weights, and one that finishes and writes the masks of their weights."""
    model = torch.nn.Sequential(torch.nn.Linear(24, 36), torch.nn.Linear(36, 5))
    opt = FastBiP(model, pattern=pattern, **MOVING)
    for phase, launches in (("lower", 1), ("upper", 3), ("joint", 3)):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        with getattr(opt, phase)():
            simulator.launches()
            opt.step()
            assert simulator.launches() == launches, phase


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("seed", SEEDS)
def test_topk_in_any_order(simulator, seed, grid):
    simulator.set_seed(seed)
    simulator.set_max_grid(grid)
    for name in ("all equal", "half and half", "neighbouring bits", "atoms and a few between", "ascending"):
        scores = ADVERSARIAL_UNIT[name](5000)
        for k in (1, 1700, 4999):
            assert torch.equal(topk_mask(scores, k), reference.topk_mask(scores, k)), (name, k)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("seed", SEEDS)
def test_steps_in_any_order(simulator, seed, grid):
    simulator.set_seed(seed)
    simulator.set_max_grid(grid)
    for scope in ("global", "layer"):
        params = make_params([2000, 1, 1025, 33, 3000])
        run = Lockstep(params, lambda params=params, scope=scope: FastBiP(params, **MOVING, scope=scope))
        run.random_steps(4)
        run.random_steps(2, seed=1, phase="joint")


@pytest.mark.parametrize("grid", [1, 5])
def test_more_units_than_one_launch_settles(simulator, grid):
    """Their windows miss, so that the finish samples and judges them, and writes the masks of their weights after a barrier."""
    simulator.set_max_grid(grid)
    params = [torch.nn.Parameter(torch.rand(2110, 1000, generator=torch.Generator().manual_seed(0)) - 0.5)]
    run = Lockstep(params, lambda: FastBiP(params, **MOVING, pattern="block:1x4"))
    run.random_steps(2)
    run.random_steps(1, seed=1, phase="joint")
    row = run.opt.report().selections[0]
    assert row.steps == 3
    assert row.fallbacks >= 2

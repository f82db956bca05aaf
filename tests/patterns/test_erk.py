"""Erdos-Renyi-Kernel budgets: exact totals, and the masks that follow, in lock-step with the reference."""

import pytest
from helpers import make_model
from lockstep import Lockstep, run_of
from torch import nn

from bip_fast import FastBiP, reference
from bip_fast.engine.budgets import erk_kept

hypothesis = pytest.importorskip("hypothesis", reason="needs the package hypothesis: pip install 'bip-fast[test]'")
st = hypothesis.strategies


def test_by_hand():
    """Sums of dimensions 20, 110 and 200 of products 100, 1000 and 10000; 1110 weights are kept: 67.3, 370.0 and 672.7. The remainders are
    .27, 0 and .73, and one weight is left over."""
    assert erk_kept([(10, 10), (10, 100), (100, 100)], 0.9) == [67, 370, 673]


def test_a_tensor_that_would_keep_more_than_it_has_stays_whole():
    """Of 2220 kept, shares 134.5, 740 and 1345: the first has only 100; the others share 2120 as 110 to 200."""
    assert erk_kept([(10, 10), (10, 100), (100, 100)], 0.8) == [100, 752, 1368]


@hypothesis.given(
    shapes=st.lists(st.lists(st.integers(0, 12), min_size=2, max_size=4).map(tuple), min_size=1, max_size=7),
    sparsity=st.floats(0, 0.999),
)
def test_totals_are_exact_and_nobody_keeps_more_than_it_has(shapes, sparsity):
    sizes = [1] * len(shapes)
    for i, shape in enumerate(shapes):
        for dim in shape:
            sizes[i] *= dim
    keeps = erk_kept(shapes, sparsity)
    assert sum(keeps) == reference.kept(sum(sizes), sparsity)
    assert all(0 <= k <= size for k, size in zip(keeps, sizes, strict=True))


def test_denser_where_dimensions_are_small():
    keeps = erk_kept([(8, 8, 3, 3), (64, 64, 3, 3), (512, 512, 3, 3)], 0.95)
    densities = [k / n for k, n in zip(keeps, (576, 36864, 2359296), strict=True)]
    assert densities == sorted(densities, reverse=True)


@pytest.mark.parametrize("levels", ["alternating", "joint"])
def test_masks_follow_the_budgets(backend, levels):
    model = make_model(device=backend.device)
    run = run_of(model, scope="erk", levels=levels)
    run.random_steps(8)
    rows = run.opt.report()
    assert rows.kept == reference.kept(rows.total, run.opt.param_groups[0]["sparsity"])
    assert len({row.sparsity for row in rows}) > 1


def test_scopes_side_by_side_and_changes_on_the_way(backend):
    """Two sparsities of scope erk and a global group; then another scope, then another sparsity, which needs no new plan."""
    params = [
        nn.Parameter(p.detach().clone()) for seed in range(2) for p in make_model(seed, device=backend.device).parameters() if p.dim() >= 2
    ]
    groups = [{"params": params[:2], "scope": "erk"}, {"params": params[2:4], "sparsity": 0.5, "scope": "erk"}, {"params": params[4:]}]
    run = Lockstep(params, lambda: FastBiP(groups, sparsity=0.8, mask_lr=0.3))
    run.random_steps(4)
    run.opt.param_groups[2]["scope"] = "erk"
    run.random_steps(4, seed=1)
    plan = run.opt._engine.plan
    for sparsity in (0.81, 0.9, 0.7):
        run.opt.param_groups[0]["sparsity"] = sparsity
        run.random_steps(2, seed=2)
    assert run.opt._engine.plan is plan

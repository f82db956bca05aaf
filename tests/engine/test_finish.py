"""The end of a run: frozen masks, the final model, the report."""

import json

import pytest
import torch
from helpers import assert_bits, fill_gradients, make_model, make_params, pruned_of, train_step
from lockstep import MOVING, run_of

from bip_fast import FastBiP, reference


def test_freeze_masks_leaves_lower_steps(backend):
    model = make_model(device=backend.device)
    run = run_of(model)
    run.random_steps(3)
    assert run.opt.phase == "upper"
    run.opt.freeze_masks()
    masks = {p: run.opt.mask_of(p) for p in pruned_of(model)}
    for i in range(6):
        assert run.opt.phase == "lower"
        run.random_steps(1, seed=i)
    for p, mask in masks.items():
        assert_bits(run.opt.mask_of(p), mask)


def test_freeze_masks_of_joint_levels(backend):
    run = run_of(make_model(device=backend.device), levels="joint")
    run.random_steps(3)
    run.opt.freeze_masks()
    assert run.opt.phase == "lower"
    run.random_steps(4, seed=1)


@pytest.mark.parametrize("phase", ["upper", "joint"])
def test_frozen_masks_refuse_to_move(backend, phase):
    params = make_params([50], device=backend.device)
    opt = FastBiP(params, sparsity=0.5)
    opt.freeze_masks()
    mask = opt.mask_of(params[0])
    fill_gradients(params, 0)
    with pytest.raises(RuntimeError, match=r"freeze_masks|frozen"), getattr(opt, phase)():
        opt.step()
    assert_bits(opt.mask_of(params[0]), mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_finalize_leaves_a_plain_pruned_model(backend, dtype):
    """Values as they were, exact zeros, no state; the model trains on with any optimizer."""
    model = make_model(device=backend.device).to(dtype)
    opt = FastBiP(model, sparsity=0.9, lr=0.05)
    for i in range(4):
        fill_gradients(model.parameters(), i)
        opt.step()
    before = {p: p.detach().clone() for p in model.parameters()}
    masks = {p: opt.mask_of(p) for p in pruned_of(model)}
    opt.finalize()
    assert len(opt.state) == 0
    for p, value in before.items():
        assert_bits(p.detach(), value)
    for p, mask in masks.items():
        assert not p[~mask].any()
    n = sum(p.numel() for p in masks)
    assert sum(int(m.sum()) for m in masks.values()) == reference.kept(n, 0.9)
    fill_gradients(model.parameters(), 9)
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def test_nothing_works_after_finalize(backend):
    model = make_model(device=backend.device)
    opt = FastBiP(model, sparsity=0.5)
    opt.finalize()
    with pytest.raises(RuntimeError, match="finalize"):
        opt.step()
    with pytest.raises((RuntimeError, ValueError)):
        opt.mask_of(model.conv.weight)


def test_finalize_lets_go_of_the_memory(backend):
    """After finalize nobody writes the parameters but their owner: no error about foreign writes, and a new optimizer may take over."""
    model = make_model(device=backend.device)
    FastBiP(model, sparsity=0.5).finalize()
    with torch.no_grad():
        model.conv.weight.mul_(2)
    opt = FastBiP(model, sparsity=0.7)
    train_step(model, opt, 0, backend.device)


# --- report ----------------------------------------------------------------------------------------------------------------------------


def test_report_counts_what_is_there(backend):
    """One row per pruned tensor: its name, shape, kept of total; and the sums."""
    model = make_model(device=backend.device)
    opt = FastBiP(model, **MOVING)
    for i in range(4):
        train_step(model, opt, i, backend.device)
    report = opt.report()
    rows = {row.name: row for row in report}
    assert list(rows) == ["conv.weight", "depthwise.weight", "head.weight"]
    for name, row in rows.items():
        p = model.get_parameter(name)
        assert (tuple(row.shape), row.kept, row.total) == (tuple(p.shape), int(opt.mask_of(p).sum()), p.numel())
        assert name in str(report)
    total = sum(p.numel() for p in pruned_of(model))
    assert (report.kept, report.total) == (reference.kept(total, 0.8), total)
    assert report.sparsity == pytest.approx(0.8, abs=1 / total)
    json.dumps(report.as_dict())


def test_report_of_a_finished_run(backend):
    """The same rows after finalize, from the plain parameters."""
    model = make_model(device=backend.device)
    opt = FastBiP(model, **MOVING)
    before = list(opt.report())
    opt.finalize()
    assert list(opt.report()) == before


# --- frozen masks and new groups -------------------------------------------------------------------------------------------------------


def test_a_group_added_to_frozen_masks(backend):
    """A dense one joins and no mask moves, whatever the sparsity is now; a pruned one is refused."""
    params, new = make_params([300], device=backend.device), make_params([40], 1, device=backend.device, pruned=False)
    opt = FastBiP(params, sparsity=0.5)
    opt.freeze_masks()
    mask = opt.mask_of(params[0])
    opt.param_groups[0]["sparsity"] = 0.9
    opt.add_param_group({"params": new})
    assert_bits(opt.mask_of(params[0]), mask)
    with pytest.raises(RuntimeError, match="frozen"):
        opt.add_param_group({"params": make_params([50], 2, device=backend.device)})
    fill_gradients([*params, *new], 0)
    opt.step()
    assert_bits(opt.mask_of(params[0]), mask)

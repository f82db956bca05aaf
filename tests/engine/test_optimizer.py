"""`FastBiP` on whole networks: lock-step with the reference, the phases, what is pruned, and what a user can look at."""

import copy

import pytest
import torch
from helpers import TOLERANCE, ConvNet, assert_bits, batch, bits, fill_gradients, flat_like, make_model, make_params, pruned_of, train_step
from lockstep import MOVING, Lockstep, run_of
from torch import nn

from bip_fast import FastBiP, reference


def zeros_of(opt, params):
    return [bits(p)[~opt.mask_of(p).cpu()] for p in params]


# --- lock-step -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"nesterov": True}, {"mask_momentum": 0.9}, {"scope": "layer"}, {"momentum": 0.0}], ids=str)
@pytest.mark.parametrize("levels", ["alternating", "joint"])
def test_lock_step_with_the_reference(backend, levels, options):
    """24 steps on a network with random gradients; every weight, score and mask after each."""
    run = run_of(make_model(device=backend.device), levels=levels, **options)
    run.random_steps(24)


@pytest.mark.parametrize("levels", ["alternating", "joint"])
def test_lock_step_while_training(backend, levels):
    """Gradients from the network's own backward, taken at z."""
    model = make_model(device=backend.device)
    run = run_of(model, levels=levels, lower_steps=2)
    for i in range(20):
        x, y = batch(i, backend.device)
        run.opt.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        run.step()


def test_training_learns(backend):
    """On one batch the loss of the pruned network falls to a fraction."""
    model = make_model(width=16, device=backend.device)
    opt = FastBiP(model, sparsity=0.5, lr=0.05, mask_lr=0.1)
    losses = [train_step(model, opt, 0, backend.device) for _ in range(60)]
    assert losses[-1] < 0.2 * losses[0]


def test_upper_step_brings_back_a_weight_the_loss_asks_for(backend):
    """A pruned weight with theta*g < 0 gains score until it is kept; a kept one with h > 0 loses its place."""
    p = nn.Parameter(torch.tensor([[0.9, 0.5]], device=backend.device))
    opt = FastBiP([p], density=0.5, mask_lr=0.5, gamma=1e9)
    assert opt.mask_of(p).tolist() == [[True, False]]
    p.grad = torch.tensor([[1.0, -1.0]], device=backend.device)
    with opt.upper():
        opt.step()
    assert opt.mask_of(p).tolist() == [[False, True]]
    assert p.tolist() == [[0.0, 0.5]]
    assert opt.weight_of(p).tolist() == [[pytest.approx(0.9), 0.5]]


def test_pruned_weights_stay_exactly_zero(backend):
    """Through 200 momentum steps under one mask: +0, not -0 and not nearly."""
    model = make_model(device=backend.device)
    opt = FastBiP(model, sparsity=0.9, lr=0.1, momentum=0.99, nesterov=True)
    opt.freeze_masks()
    for i in range(200):
        if i < 20:
            fill_gradients(model.parameters(), i)
        opt.step()
    zeros = torch.cat(zeros_of(opt, pruned_of(model)))
    assert zeros.numel() == reference_zeros(model, 0.9)
    assert not zeros.any()


def reference_zeros(model, sparsity):
    n = sum(p.numel() for p in pruned_of(model))
    return n - reference.kept(n, sparsity)


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_exactly_k_are_kept(backend, scope):
    model = make_model(device=backend.device)
    opt = FastBiP(model, sparsity=0.9, scope=scope, mask_lr=1.0)
    for i in range(6):
        fill_gradients(model.parameters(), i)
        opt.step()
        kept = [int(opt.mask_of(p).sum()) for p in pruned_of(model)]
        sizes = [p.numel() for p in pruned_of(model)]
        if scope == "global":
            assert sum(kept) == reference.kept(sum(sizes), 0.9)
        else:
            assert kept == [reference.kept(n, 0.9) for n in sizes]


def test_density_is_one_minus_sparsity(backend):
    p, q = make_params([400, 400], device=backend.device)
    q.data.copy_(p.data)
    by_density, by_sparsity = FastBiP([p], density=0.25), FastBiP([q], sparsity=0.75)
    assert int(by_density.mask_of(p).sum()) == 100
    assert_bits(by_density.mask_of(p), by_sparsity.mask_of(q))


def test_zero_sparsity_is_sgd(backend):
    """Nothing is pruned, so lower steps are torch.optim.SGD up to its fused rounding."""
    ours, theirs = make_model(device=backend.device), make_model(device=backend.device)
    opt = FastBiP(ours, sparsity=0.0, lr=0.05, momentum=0.9, weight_decay=0.01)
    sgd = torch.optim.SGD(theirs.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    opt.freeze_masks()
    for i in range(20):
        for model, optimizer in ((ours, opt), (theirs, sgd)):
            fill_gradients(model.parameters(), i)
            optimizer.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, **TOLERANCE["float32 trajectory"])


def test_dense_parameters_move_in_lower_steps_only(backend):
    model = make_model(device=backend.device)
    opt = FastBiP(model, sparsity=0.5)
    dense = [model.norm.weight, model.norm.bias, model.head.bias, model.depthwise.bias]
    for phase, moves in (("upper", False), ("lower", True), ("joint", True)):
        before = [p.detach().clone() for p in dense]
        fill_gradients(model.parameters(), 1)
        with getattr(opt, phase)():
            opt.step()
        assert [not torch.equal(p, old) for p, old in zip(dense, before, strict=True)] == [moves] * 4, phase


# --- phases ----------------------------------------------------------------------------------------------------------------------


def phases(opt, steps):
    seen = []
    for _ in range(steps):
        seen.append(opt.phase)
        opt.step()
    return seen


def test_the_phases_alternate(backend):
    opt = FastBiP(make_params([50], device=backend.device), sparsity=0.5)
    assert phases(opt, 5) == ["lower", "upper", "lower", "upper", "lower"]


def test_several_lower_steps_before_an_upper(backend):
    opt = FastBiP(make_params([50], device=backend.device), sparsity=0.5, lower_steps=3)
    assert phases(opt, 9) == ["lower", "lower", "lower", "upper", "lower", "lower", "lower", "upper", "lower"]


def test_joint_has_one_phase(backend):
    opt = FastBiP(make_params([50], device=backend.device), sparsity=0.5, levels="joint")
    assert phases(opt, 3) == ["joint"] * 3


def test_a_forced_phase_does_not_advance_the_cycle(backend):
    params = make_params([64], device=backend.device)
    run = Lockstep(params, lambda: FastBiP(params, **MOVING))
    run.random_steps(1)
    assert run.opt.phase == "upper"
    for phase in ("lower", "joint", "lower", "upper"):
        run.random_steps(2, phase=phase)
        assert run.opt.phase == "upper"
    run.random_steps(1)
    assert run.opt.phase == "lower"


def test_phase_says_what_is_forced_and_nesting_works(backend):
    opt = FastBiP(make_params([64], device=backend.device), sparsity=0.5)
    with opt.upper():
        assert opt.phase == "upper"
        with opt.joint():
            assert opt.phase == "joint"
        assert opt.phase == "upper"
    assert opt.phase == "lower"


def test_a_forced_phase_ends_with_an_exception(backend):
    opt = FastBiP(make_params([64], device=backend.device), sparsity=0.5)
    with pytest.raises(KeyError), opt.upper():
        raise KeyError
    assert opt.phase == "lower"


def test_sparsity_can_change_on_the_way(backend):
    """A sparsity schedule: the new value counts from the next upper step, not in a lower one."""
    params = make_params([500, 700], device=backend.device)
    run = Lockstep(params, lambda: FastBiP(params, **(MOVING | {"sparsity": 0.2})))
    for i, sparsity in enumerate((0.3, 0.5, 0.9, 0.1)):
        kept = sum(int(run.opt.mask_of(p).sum()) for p in params)
        run.opt.param_groups[0]["sparsity"] = sparsity
        run.random_steps(1, seed=i, phase="lower")
        assert sum(int(run.opt.mask_of(p).sum()) for p in params) == kept
        run.random_steps(1, seed=10 + i, phase="upper")
        assert sum(int(run.opt.mask_of(p).sum()) for p in params) == reference.kept(1200, sparsity)


# --- views for the user ----------------------------------------------------------------------------------------------------------


def test_mask_weight_and_scores_are_copies_shaped_like_the_parameter(backend):
    model = make_model(device=backend.device)
    opt = FastBiP(model, sparsity=0.5)
    p = model.conv.weight
    for view, dtype in ((opt.mask_of, torch.bool), (opt.weight_of, torch.float32), (opt.scores_of, torch.float32)):
        first = view(p)
        assert (first.shape, first.stride(), first.dtype, first.device) == (p.shape, p.stride(), dtype, p.device)
        before = first.clone()
        first.zero_()
        assert_bits(view(p), before)
        assert not first.requires_grad


def test_start_is_magnitude_pruning(backend):
    """Before any step the parameters are already pruned, and theta is what they were."""
    model = make_model(device=backend.device)
    before = copy.deepcopy(model)
    opt = FastBiP(model, sparsity=0.7)
    old = torch.cat([flat_like(p, p) for n, p in before.named_parameters() if n in ("conv.weight", "depthwise.weight", "head.weight")])
    new = torch.cat([flat_like(p, p) for n, p in model.named_parameters() if n in ("conv.weight", "depthwise.weight", "head.weight")])
    mask = reference.topk_mask(old.abs().clamp(max=1), reference.kept(old.numel(), 0.7))
    assert_bits(new, reference.masked(mask, old))
    assert_bits(opt.weight_of(model.conv.weight), before.conv.weight.detach())


def test_two_models_at_once(backend):
    runs = [run_of(make_model(seed, device=backend.device, width=4 + seed), sparsity=0.5 + seed / 10) for seed in range(2)]
    for i in range(10):
        for run in runs:
            run.random_steps(1, seed=i)


def test_the_default_model_is_untouched_outside_its_weights(backend):
    """No hooks, no new attributes, buffers or modules."""
    model, plain = make_model(device=backend.device), make_model(device=backend.device)
    opt = FastBiP(model, sparsity=0.5)
    opt.step()
    assert type(model) is ConvNet
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert [sorted(vars(m)) for m in model.modules()] == [sorted(vars(m)) for m in plain.modules()]
    assert not any(m._forward_pre_hooks or m._forward_hooks or m._backward_hooks for m in model.modules())

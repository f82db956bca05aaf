"""Mixed precision: GradScaler's protocol, autocast, and gradients unscaled before they are squared."""

import math

import pytest
import torch
from helpers import assert_same_snapshot, batch, fill_gradients, make_model, make_params, snapshot
from lockstep import MOVING, Lockstep, run_of
from torch import nn

from bip_fast import FastBiP

SCALES = [1.0, 65536.0, 1.0 / 1024, 1000.0]  # 1000: its inverse is rounded, in the kernel as in the reference


def make_scaler(backend, scale):
    return torch.amp.GradScaler(backend.device.type, init_scale=scale, growth_interval=10**6)


def seen_scale(scaler):
    scaler.scale(torch.zeros(1, device=scaler._device))  # a scaler has no scale before its first use
    return scaler


def test_declares_that_it_unscales_itself():
    assert FastBiP._step_supports_amp_scaling is True


@pytest.mark.sanitizer
@pytest.mark.parametrize("levels", ["alternating", "joint"])
@pytest.mark.parametrize("scale", SCALES)
def test_gradients_are_unscaled_in_the_kernel(backend, scale, levels):
    """`param.grad` holds scale*g; every formula sees g = grad * (1/scale), also the square in A4."""
    params = make_params([300, 1025], device=backend.device) + make_params([40], 1, device=backend.device, pruned=False)
    run = Lockstep(params, lambda: FastBiP(params, **MOVING, levels=levels))
    scaler = seen_scale(make_scaler(backend, scale))
    for i in range(6):
        fill_gradients(params, i, scale=scale)
        before = [p.grad.clone() for p in params]
        run.step(scale=scale, run=lambda: scaler.step(run.opt))
        scaler.update()
        assert all(torch.equal(p.grad, g) for p, g in zip(params, before, strict=True)), "the gradients themselves stay scaled"


def test_half_precision_gradients_that_only_fit_unscaled(backend):
    """A scale of 2**16 in fp16: g = grad / 2**16 is below fp16's smallest number, and must not be rounded to it."""
    params = make_params([700], device=backend.device, dtype=torch.float16)
    run = Lockstep(params, lambda: FastBiP(params, **MOVING, levels="joint"))
    scaler = seen_scale(make_scaler(backend, 65536.0))
    for i in range(4):
        fill_gradients(params, i, scale=1e-3)
        run.step(scale=65536.0, run=lambda: scaler.step(run.opt))
        scaler.update()


def test_unscale_before_the_step(backend):
    """The user unscaled to clip: the kernel does not do it again."""
    run = run_of(make_model(device=backend.device))
    scaler = seen_scale(make_scaler(backend, 1024.0))
    for i in range(6):
        fill_gradients(run.states, i, scale=1024.0)
        scaler.unscale_(run.opt)
        nn.utils.clip_grad_norm_(list(run.states), 1.0)
        run.step(run=lambda: scaler.step(run.opt))
        scaler.update()


@pytest.mark.parametrize("unscale_first", [False, True])
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_found_inf_skips_the_whole_step(backend, bad, unscale_first):
    """Nothing moves anywhere, the scale halves, the phase goes on; nothing is counted as skipped entries."""
    params = make_params([300, 1025], device=backend.device)
    run = Lockstep(params, lambda: FastBiP(params, **MOVING))
    run.random_steps(2)
    scaler = seen_scale(make_scaler(backend, 1024.0))
    for phase, following in (("lower", "upper"), ("upper", "lower")):
        fill_gradients(params, 1, scale=1024.0)
        params[1].grad[0, 7] = bad
        if unscale_first:
            scaler.unscale_(run.opt)
        before, scale = snapshot(run.opt), scaler.get_scale()
        assert run.opt.phase == phase
        run.step(skipped=True, run=lambda: scaler.step(run.opt))
        scaler.update()
        assert_same_snapshot(snapshot(run.opt), before)
        assert run.opt.phase == following
        assert scaler.get_scale() == scale / 2
    assert run.opt.num_nonfinite == 0
    run.random_steps(4, seed=1)


@pytest.mark.parametrize("unscale_first", [False, True])
def test_no_trace_of_the_scaler_is_left(backend, unscale_first):
    """A plain step after a scaled one: its gradients are taken as they are."""
    params = make_params([300], device=backend.device)
    run = Lockstep(params, lambda: FastBiP(params, **MOVING))
    scaler = seen_scale(make_scaler(backend, 1024.0))
    for i in range(3):
        fill_gradients(params, i, scale=1024.0)
        if unscale_first:
            scaler.unscale_(run.opt)
        run.step(scale=1.0 if unscale_first else 1024.0, run=lambda: scaler.step(run.opt))
        scaler.update()
        run.random_steps(1, seed=i)


def test_a_disabled_scaler(backend):
    params = make_params([300], device=backend.device)
    run = Lockstep(params, lambda: FastBiP(params, **MOVING))
    scaler = torch.amp.GradScaler(backend.device.type, enabled=False)
    for i in range(4):
        fill_gradients(params, i)
        run.step(run=lambda: scaler.step(run.opt))
        scaler.update()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_training(backend, dtype):
    """The whole loop of torch.amp on a network; steps in lock-step, and the loss falls."""
    model = make_model(width=16, device=backend.device)
    run = run_of(model, sparsity=0.5, mask_lr=0.1)
    scaler = make_scaler(backend, 1024.0)
    x, y = batch(0, backend.device)
    losses = []
    for _ in range(30):
        run.opt.zero_grad()
        with torch.autocast(backend.device.type, dtype=dtype):
            loss = nn.functional.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        run.step(scale=scaler.get_scale(), run=lambda: scaler.step(run.opt))
        scaler.update()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


def test_two_optimizers_under_one_scaler(backend):
    """A bad gradient of one does not skip the other."""
    first, second = make_params([300], device=backend.device), make_params([300], 1, device=backend.device)
    runs = [Lockstep(params, lambda params=params: FastBiP(params, **MOVING)) for params in (first, second)]
    scaler = seen_scale(make_scaler(backend, 256.0))
    for i in range(4):
        scale = scaler.get_scale()
        fill_gradients(first + second, i, scale=scale)
        first[0].grad[0, 0] = math.inf if i == 1 else 1.0
        runs[0].step(scale=scale, skipped=i == 1, run=lambda: scaler.step(runs[0].opt))
        runs[1].step(scale=scale, run=lambda: scaler.step(runs[1].opt))
        scaler.update()


def test_a_scaler_and_no_gradients(backend):
    """No parameter has a gradient: as many optimizers, it does nothing or says so, but neither breaks nor moves a weight."""
    params = make_params([300], device=backend.device)
    opt = FastBiP(params, **MOVING)
    scaler = seen_scale(make_scaler(backend, 256.0))
    before = snapshot(opt)
    scaler.step(opt)
    assert_same_snapshot(snapshot(opt), before)

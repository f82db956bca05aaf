"""Which parameters are pruned, in any layout, tied, frozen or without a gradient."""

import pytest
import torch
from helpers import Tied, assert_bits, fill_gradients, make_model, make_params, pruned_of, train_step
from lockstep import MOVING, Lockstep, run_of
from torch import nn

from bip_fast import FastBiP, reference

# --- what is pruned --------------------------------------------------------------------------------------------------------------


def is_pruned(opt, p):
    try:
        opt.mask_of(p)
    except ValueError:
        return False
    return True


def test_a_module_prunes_its_conv_and_linear_weights(backend):
    model = nn.Sequential(
        nn.Embedding(9, 4),
        nn.Conv1d(4, 4, 1),
        nn.Conv2d(4, 4, 1),
        nn.Conv3d(4, 4, 1),
        nn.ConvTranspose2d(4, 4, 1),
        nn.Linear(4, 4),
        nn.LayerNorm(4),
    ).to(backend.device)
    opt = FastBiP(model, sparsity=0.5)
    given = {name for name, p in model.named_parameters() if is_pruned(opt, p)}
    assert given == {"1.weight", "2.weight", "3.weight", "4.weight", "5.weight"}


@pytest.mark.parametrize("form", ["list", "generator", "named", "groups"])
def test_a_list_prunes_what_has_two_dimensions(backend, form):
    model = make_model(device=backend.device)
    params = {
        "list": lambda: list(model.parameters()),
        "generator": model.parameters,
        "named": model.named_parameters,
        "groups": lambda: [{"params": model.parameters()}],
    }[form]()
    opt = FastBiP(params, sparsity=0.5)
    assert {p for p in model.parameters() if is_pruned(opt, p)} == {p for p in model.parameters() if p.dim() >= 2}


@pytest.mark.parametrize("how", ["name", "pattern", "module", "parameter"])
def test_exclude(backend, how):
    model = make_model(device=backend.device)
    exclude = {"name": ["head.weight"], "pattern": ["head*"], "module": [model.head], "parameter": [model.head.weight]}[how]
    opt = FastBiP(model, sparsity=0.5, exclude=exclude)
    assert {p for p in model.parameters() if is_pruned(opt, p)} == pruned_of(model) - {model.head.weight}
    fill_gradients(model.parameters(), 0)
    before = model.head.weight.detach().clone()
    opt.step()
    assert not torch.equal(before, model.head.weight), "an excluded weight still learns"


def test_exclude_is_one_thing_or_many(backend):
    model = make_model(device=backend.device)
    opt = FastBiP(model, sparsity=0.5, exclude=("conv.weight", model.head))
    assert {p for p in model.parameters() if is_pruned(opt, p)} == {model.depthwise.weight}


def test_tied_weights_count_once(backend):
    model = make_model(kind=Tied, device=backend.device)
    run = Lockstep(model.parameters(), lambda: FastBiP(model, **MOVING))
    assert sum(p.numel() for group in run.opt.param_groups for p in group["params"]) == 12 * 12 + 12
    for i in range(10):
        run.opt.zero_grad()
        x = torch.randn(4, 12, generator=backend.generator(i)).to(backend.device)
        model(x).square().sum().backward()
        run.step()
    assert model.first.weight is model.second.weight
    assert int((model.first.weight != 0).sum()) == reference.kept(144, 0.8)


# --- layouts and missing gradients -----------------------------------------------------------------------------------------------


def test_channels_last(backend):
    """The order of equal scores is the parameter's own memory order, and z keeps its strides."""
    model = make_model(device=backend.device).to(memory_format=torch.channels_last)
    strides = model.conv.weight.stride()
    run = run_of(model)
    run.random_steps(10)
    assert model.conv.weight.stride() == strides
    for given in (run.opt.mask_of, run.opt.weight_of, run.opt.scores_of):
        assert given(model.conv.weight).stride() == strides
    assert_bits(model.conv.weight.detach(), reference.masked(run.opt.mask_of(model.conv.weight), run.opt.weight_of(model.conv.weight)))


def test_gradients_of_another_layout(backend):
    model = make_model(device=backend.device)
    run = run_of(model)
    for i in range(6):
        fill_gradients(model.parameters(), i)
        model.conv.weight.grad = model.conv.weight.grad.contiguous(memory_format=torch.channels_last)
        model.head.weight.grad = model.head.weight.grad.t().contiguous().t()
        model.norm.bias.grad = torch.randn(12, device=backend.device)[::2]
        run.step()


def test_expanded_gradients(backend):
    """`p.sum().backward()` leaves a gradient with stride 0."""
    params = make_params([70, 1030], device=backend.device)
    run = Lockstep(params, lambda: FastBiP(params, **MOVING))
    for _ in range(4):
        for p in params:
            p.grad = torch.full((), 0.5, device=backend.device).expand_as(p)
        run.step()


def test_transposed_parameters(backend):
    p = nn.Parameter(torch.randn(30, 40, generator=backend.generator(0)).t().to(backend.device))
    run = Lockstep([p], lambda: FastBiP([p], **MOVING))
    run.random_steps(6)
    assert p.stride() == (1, 40)


@pytest.mark.parametrize("phase", ["lower", "upper", "joint"])
def test_no_gradient(backend, phase):
    """A parameter without gradient stays whole in a lower step; in an upper one its scores stay and still compete."""
    params = make_params([300, 300, 300], device=backend.device) + make_params([20], 1, device=backend.device, pruned=False)
    run = Lockstep(params, lambda: FastBiP(params, **MOVING))
    run.random_steps(4)
    for i in range(6):
        fill_gradients(params, 100 + i)
        params[i % 3].grad = None
        if i > 3:
            params[3].grad = None
        run.step(phase)


def test_no_gradients_at_all(backend):
    params = make_params([300], device=backend.device)
    run = Lockstep(params, lambda: FastBiP(params, **MOVING))
    for phase in ("lower", "upper", "joint", None):
        run.step(phase)


def test_frozen_parameters_are_left_alone(backend):
    model = make_model(device=backend.device)
    model.conv.weight.requires_grad_(False)
    opt = FastBiP((p for p in model.parameters() if p.requires_grad), sparsity=0.5)
    before = model.conv.weight.detach().clone()
    train_step(model, opt, 0, backend.device)
    assert_bits(model.conv.weight.detach(), before)

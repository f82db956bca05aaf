"""Promises that only show when something unusual happens: other default dtypes, shared memory, late changes, foreign writes."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from helpers import assert_bits, assert_same_snapshot, fill_gradients, make_model, make_params, snapshot
from lockstep import MOVING, Lockstep, after_steps, run_of
from torch import nn

from bip_fast import FastBiP, topk_mask
from bip_fast.engine.budgets import Budget, selection_groups
from bip_fast.engine.launch.gradients import gradient_table

# --- memory --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_default_dtype(backend, dtype):
    """State is fp32 whatever torch's default is; the kernels would write past the end of anything smaller."""
    model = make_model(device=backend.device)
    torch.set_default_dtype(dtype)
    try:
        run = run_of(model, mask_momentum=0.5)
        run.opt.load_state_dict(run.opt.state_dict())
    finally:
        torch.set_default_dtype(torch.float32)
    run.random_steps(4)


def test_parameters_that_share_memory(backend):
    first, second = nn.Linear(8, 8).to(backend.device), nn.Linear(8, 8).to(backend.device)
    second.weight.data = first.weight.data
    with pytest.raises(ValueError, match=r"0\.weight and 1\.weight share memory"):
        FastBiP(nn.Sequential(first, second), sparsity=0.5)
    flat = torch.randn(100, device=backend.device)
    with pytest.raises(ValueError, match="share memory"):
        FastBiP([nn.Parameter(flat[:60].view(6, 10)), nn.Parameter(flat[50:].view(5, 10))], sparsity=0.5)


def test_negated_views_are_read_as_they_look(backend):
    """The lazy negative bit of torch, as the imaginary part of a conjugate has it."""
    (p,) = params = make_params([300], device=backend.device)
    run = Lockstep(params, lambda: FastBiP(params, **MOVING))
    p.grad = torch._neg_view(torch.randn(p.shape, generator=backend.generator(0)).to(backend.device))
    run.step("joint")
    scores = torch._neg_view(torch.tensor([1.0, 2.0, 3.0], device=backend.device))
    assert topk_mask(scores, 1).tolist() == [True, False, False]


def test_fake_tensors_are_refused():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), pytest.raises(TypeError, match="FakeTensor"):
        topk_mask(torch.ones(10), 3)


def test_lazy_and_inference_parameters():
    with pytest.raises(ValueError, match=r"no shape yet"):
        FastBiP(nn.LazyLinear(4), sparsity=0.5)
    with torch.inference_mode():
        layer = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="inference"):
        FastBiP(layer, sparsity=0.5)


def test_made_in_inference_mode(backend):
    """An optimizer made there works outside of it."""
    model = make_model(device=backend.device)
    with torch.inference_mode():
        opt = FastBiP(model, **MOVING)
    opt.load_state_dict(opt.state_dict())
    fill_gradients(model.parameters(), 0)
    opt.step()


def test_a_compiled_loop(backend):
    model, same = (make_model(device=backend.device) for _ in range(2))
    opt, plain = FastBiP(model, **MOVING), FastBiP(same, **MOVING)
    step = torch.compile(lambda: opt.step(), backend="eager")
    for i in range(4):
        fill_gradients(model.parameters(), i)
        fill_gradients(same.parameters(), i)
        step()
        plain.step()
    assert_same_snapshot(snapshot(opt), snapshot(plain))


def test_strides_of_dimensions_of_one_do_not_matter(backend):
    """A 1x1 convolution in channels_last has other strides than its gradient, and the same memory: nothing is copied."""
    p = nn.Parameter(torch.randn(6, 5, 1, 1).to(backend.device))
    run = Lockstep([p], lambda: FastBiP([p], **MOVING))
    grad = torch.randn(6, 5, generator=backend.generator(0)).to(backend.device)
    p.grad = grad.as_strided((6, 5, 1, 1), (5, 1, 7, 3))
    assert gradient_table(run.opt._engine.arena)[0]["data"][0] == grad.data_ptr()
    run.step("joint")


# --- what is pruned ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["module", "list", "named", "groups", "added"])
def test_frozen_parameters_stay_as_they_are(backend, form):
    model = make_model(device=backend.device)
    model.conv.weight.requires_grad_(False)
    before = model.conv.weight.detach().clone()
    given = {
        "module": lambda: model,
        "list": model.parameters,
        "named": model.named_parameters,
        "groups": lambda: [{"params": model.parameters()}],
        "added": lambda: [model.head.weight],
    }[form]()
    opt = FastBiP(given, sparsity=0.9)
    if form == "added":
        opt.add_param_group({"params": [model.conv.weight, model.depthwise.weight]})
    assert_bits(model.conv.weight.detach(), before)
    assert int((opt.mask_of(model.head.weight)).sum()) < model.head.weight.numel()


def test_parametrized_layers_are_named(backend):
    plain, normed = nn.Linear(4, 4), nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="a parametrization computes the weights of the model itself; remove it first"):
        FastBiP(normed, sparsity=0.5)
    with pytest.warns(UserWarning, match=r"parametrization.* 1:"):
        FastBiP(nn.Sequential(plain, normed).to(backend.device), sparsity=0.5)


def test_every_name_of_a_tied_weight_excludes_it(backend):
    model = make_model(device=backend.device)
    model.twin = nn.Linear(model.head.in_features, model.head.out_features, bias=False).to(backend.device)
    model.twin.weight = model.head.weight
    for name in ("head", "twin", "twin.weight"):
        opt = FastBiP(model, sparsity=0.5, exclude=name)
        with pytest.raises(ValueError, match=r"head\.weight"):
            opt.mask_of(model.twin.weight)
        opt.finalize()


def test_the_largest_group():
    budget = Budget((2**16, 2**15), 2**31, 0.5, "global")
    with pytest.raises(ValueError, match=r"2\*\*32"):
        selection_groups([budget] * 2)
    assert len(selection_groups([budget._replace(scope="layer")] * 2)) == 2


# --- options -------------------------------------------------------------------------------------------------------------------------


def test_density_and_sparsity_are_one_group(backend):
    """1 - 0.7 is not 0.3 in floating point; the weights compete all the same."""
    small, large = make_params([100, 100], device=backend.device)
    with torch.no_grad():
        large.mul_(1000)
    opt = FastBiP([{"params": [small], "density": 0.7}, {"params": [large]}], sparsity=0.3)
    assert int(opt.mask_of(large).sum()) == 100
    assert int(opt.mask_of(small).sum()) == 40


LATE = {
    "sparsity": [None, 1.0, "0.5"],
    "density": [0.5],
    "prune": [False, "yes"],
    "lr": [-1.0, math.inf, 1e39, torch.tensor(-1.0), torch.tensor(1j)],
    "gamma": [0.0, 1e-60],
    "scope": ["channel"],
    "levels": ["joint"],
    "lower_steps": [2],
    "nesterov": [2],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in LATE.items() for value in values])
def test_a_wrong_value_set_by_hand(name, value):
    """Found at the next step, which changes nothing."""
    params = make_params([50])
    opt = after_steps(params)
    before, old = snapshot(opt), dict(opt.param_groups[0])
    opt.param_groups[0][name] = value
    if name in ("levels", "lower_steps"):
        opt.param_groups[0]["lr"] = 0.5  # options are checked when one that counts has changed
    fill_gradients(params, 1)
    with pytest.raises(ValueError, match=name):
        opt.step()
    opt.param_groups[0].update(old)
    assert_same_snapshot(snapshot(opt), before)


def test_a_tensor_changed_in_place():
    opt = FastBiP(make_params([50]), sparsity=0.5, lr=torch.tensor(0.1))
    opt.step()
    opt.param_groups[0]["lr"].fill_(-1)
    with pytest.raises(ValueError, match="lr"):
        opt.step()


def test_numbers_of_numpy(backend):
    (p,) = make_params([200_000 if backend.name == "cpu" else 2000], device=backend.device)
    opt = FastBiP([p], sparsity=np.float16(0.5), lr=np.float32(0.1), lower_steps=np.int64(2))
    assert int(opt.mask_of(p).sum()) == p.numel() // 2


@pytest.mark.parametrize("options", [{"nesterov": True, "momentum": 0.0}, {"density": 1e-17}, {"sparsity": torch.tensor(0.5)}], ids=str)
def test_options_that_do_not_go(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        FastBiP(make_params([50]), **({"sparsity": 0.5} if "nesterov" in options else {}), **options)


def test_wrong_kinds_of_argument():
    opt = FastBiP(make_params([50]), sparsity=0.5)
    with pytest.raises(TypeError, match="str"):
        opt.mask_of("0.weight")
    with pytest.raises(TypeError, match="exclude"):
        FastBiP(make_model(), sparsity=0.5, exclude=None)


def test_a_refused_phase_does_not_call_the_closure():
    opt = FastBiP(make_params([50]), sparsity=0.5)
    opt.freeze_masks()
    calls = []
    with pytest.raises(RuntimeError, match="frozen"), opt.upper():
        opt.step(lambda: calls.append(1))
    assert not calls


def test_contexts_that_end_out_of_order():
    opt = FastBiP(make_params([50]), sparsity=0.5)
    first, second = opt.upper(), opt.joint()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert opt.phase == "joint"
    second.__exit__(None, None, None)
    assert opt.phase == "lower"


# --- the counter ---------------------------------------------------------------------------------------------------------------------


def test_the_counter_goes_wherever_the_optimizer_goes(backend):
    params, others = make_params([300], device=backend.device), make_params([300], 1, device=backend.device)
    opt, other = FastBiP(params, **MOVING), FastBiP(others, **MOVING)
    fill_gradients(params, 0)
    params[0].grad[0, :7] = math.inf
    opt.step()
    assert opt.num_nonfinite == 7
    other.load_state_dict(opt.state_dict())
    assert other.num_nonfinite == 7
    assert copy.deepcopy(opt).num_nonfinite == 7
    opt.add_param_group({"params": make_params([40], 2, device=backend.device)})
    assert opt.num_nonfinite == 7


# --- somebody else wrote -------------------------------------------------------------------------------------------------------------


def test_a_write_is_found_by_everything_that_would_lose_it(backend):
    model = make_model(device=backend.device)
    opt = FastBiP(model, **MOVING)
    with torch.no_grad():
        model.conv.weight.add_(1)
    for act in (
        opt.finalize,
        lambda: copy.deepcopy(opt),
        lambda: pickle.dumps(opt),
        lambda: opt.add_param_group({"params": make_params([40], 2, device=backend.device)}),
    ):
        with pytest.raises(RuntimeError, match=r"conv\.weight was written"):
            act()
    assert len(opt.param_groups) == 2


def test_a_write_into_a_dense_half_precision_parameter(backend):
    """It has an fp32 theta behind it, so the write would be lost."""
    model = make_model(device=backend.device).to(torch.bfloat16)
    opt = FastBiP(model, sparsity=0.5)
    with torch.no_grad():
        model.norm.weight.add_(1)
    with pytest.raises(RuntimeError, match=r"norm\.weight was written"):
        opt.step()


def test_loading_into_a_parameter_that_moved(backend):
    model = make_model(device=backend.device)
    opt = FastBiP(model, **MOVING)
    saved = copy.deepcopy(opt.state_dict())
    model.conv.weight.data = model.conv.weight.data.clone()
    with pytest.raises(RuntimeError, match=r"memory of conv\.weight was replaced"):
        opt.load_state_dict(saved)


# --- groups that come later -----------------------------------------------------------------------------------------------------------


def test_names_given_with_a_new_group(backend):
    opt = FastBiP(make_params([50], device=backend.device), sparsity=0.5)
    p = make_params([60], 1, device=backend.device)[0]
    opt.add_param_group({"params": [("tail.weight", p)]})
    assert [row.name for row in opt.report()][1] == "tail.weight"


def test_no_group_after_finalize(backend):
    opt = FastBiP(make_params([50], device=backend.device), sparsity=0.5)
    opt.finalize()
    with pytest.raises(RuntimeError, match="finalize"):
        opt.add_param_group({"params": make_params([60], 1, device=backend.device)})
    opt.finalize()

"""Zeros that stay under any optimizer."""

import copy

import pytest
import torch
from masked_network import Network, dead, pruned, train, with_filters
from torch import nn

from bip_fast import FastBiP
from bip_fast.export.masks import apply_masks, attach_masks, load_masks, masks_of, save_masks

OPTIMIZERS = {
    "sgd": lambda groups: torch.optim.SGD(groups, 0.01, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "sgd one by one": lambda groups: torch.optim.SGD(groups, 0.01, momentum=0.9, foreach=False),
    "adam": lambda groups: torch.optim.Adam(groups, 0.01, weight_decay=0.1),
    "adam fused": lambda groups: torch.optim.Adam(groups, 0.01, weight_decay=0.1, amsgrad=True, fused=True),
    "adamw": lambda groups: torch.optim.AdamW(groups, 0.01, weight_decay=0.1),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, 0.01, centered=True, momentum=0.5),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_zeros_stay_exact_under_any_optimizer(name, dtype):
    """Momenta were filled before the masks came, so they push dead weights at every step."""
    torch.manual_seed(0)
    model = Network().to(memory_format=torch.channels_last).to(dtype)
    slow, fast = [model.conv.weight, model.tied.weight], [model.fc.weight, model.whole.weight, model.norm.weight]
    optimizer = OPTIMIZERS[name]([{"params": slow, "lr": 0.003}, {"params": fast}])
    train(model, optimizer, 3)
    masks = masks_of(pruned())
    attach_masks(model, optimizer, masks)
    assert not dead(model, masks).any()  # at once
    before = copy.deepcopy(model.state_dict())
    train(model, optimizer, 20, after=lambda: check_gradients(model, masks))
    assert torch.equal(dead(model, masks), torch.zeros(sum(int((~mask).sum()) for mask in masks.values())))
    for key, mask in masks.items():
        now = model.state_dict()[key]
        learnt = (now != before[key])[mask].float().mean()
        assert learnt > (0.9 if dtype == torch.float32 else 0.01)  # steps are too small for most bfloat16 weights
    assert not torch.equal(model.whole.weight, before["whole.weight"])


def check_gradients(model, masks):
    for name, mask in masks.items():
        grad = model.get_parameter(name).grad
        assert not grad[~mask].any()
        assert grad[mask].any()


@pytest.mark.parametrize("given", [True, False], ids=["masks of the optimizer", "zeros of the model"])
def test_vectors_of_dead_filters_stay_zero(given):
    model = with_filters()
    opt = FastBiP(model, sparsity=0.5, pattern="filter", scope="layer", coupled=[["0.weight", "1.weight", "1.bias"]])
    masks = masks_of(opt)
    opt.finalize()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01, weight_decay=0.1)
    attach_masks(model, optimizer, masks if given else None)
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.randn(6, 3, 4, 4)).square().sum().backward()
        optimizer.step()
    assert not dead(model, masks).any()
    assert len(dead(model, {name: mask for name, mask in masks.items() if mask.dim() < 2})) == 4 + 4 + 4 + 3


def test_without_masks_the_same_training_revives_weights():
    """What the test above would miss if it could not fail."""
    model = pruned()
    masks = masks_of(model)
    train(model, torch.optim.Adam(model.parameters(), 0.01), 1)
    assert dead(model, masks).ne(0).float().mean() > 0.9


def test_gradients_of_dead_weights_do_not_count():
    """Neither in the norm that is clipped, nor in Adam's moments; also when gradients are accumulated, or are not finite there."""
    model = pruned()
    masks = masks_of(model)
    optimizer = torch.optim.Adam(model.parameters())
    attach_masks(model, optimizer)
    for _ in range(2):
        model(torch.randn(6, 3, 4, 4)).square().sum().backward()
    own = [p.grad[masks[name]] if name in masks else p.grad.flatten() for name, p in model.named_parameters() if p.grad is not None]
    expected = torch.cat([x.flatten() for x in own]).norm()
    assert nn.utils.clip_grad_norm_(model.parameters(), 1e9) == pytest.approx(float(expected), rel=1e-5)
    optimizer.step()
    assert not optimizer.state[model.fc.weight]["exp_avg_sq"][~masks["fc.weight"]].any()
    model.fc.weight.grad = torch.where(masks["fc.weight"], 0.1, float("nan"))  # by hand, past the hook
    optimizer.step()
    assert not dead(model, masks).any()
    assert model.fc.weight.isfinite().all()


def test_default_masks_are_the_zeros_of_now_and_the_handle_has_them(tmp_path):
    pytest.importorskip("safetensors", reason="mask files need safetensors")
    model = pruned()
    masks = masks_of(model)
    handle = attach_masks(model, torch.optim.SGD(model.parameters(), 0.1))
    assert len(handle) == 3
    save_masks(tmp_path / "m", handle.masks)
    loaded = load_masks(tmp_path / "m")
    assert loaded.keys() == masks.keys()
    assert all(torch.equal(loaded[name], mask) for name, mask in masks.items())


def test_the_handle_lets_go():
    model = pruned()
    masks = masks_of(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with attach_masks(model, optimizer) as handle:
        train(model, optimizer, 2)
        assert not dead(model, masks).any()
    train(model, optimizer, 1)
    assert dead(model, masks).any()
    handle.remove()  # again


def test_masks_follow_a_model_that_moves():
    """dtype and memory format change here; the other device is the same code."""
    model = pruned()
    masks = masks_of(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    attach_masks(model, optimizer)
    model.to(torch.float64).to(memory_format=torch.contiguous_format)
    train(model, optimizer, 3)
    assert model.conv.weight.dtype == torch.float64
    assert not dead(model, masks).any()
    model.load_state_dict(Network().state_dict())  # revives all; the next step masks them again
    train(model, optimizer, 1)
    assert not dead(model, masks).any()


def test_a_mask_on_another_device_is_brought_to_the_weight():
    model = pruned()
    handle = attach_masks(model, torch.optim.SGD(model.parameters(), 0.1))
    one = handle._of[model.fc.weight]
    one.dead = one.dead.to("meta")
    with pytest.raises(NotImplementedError):  # it tries to bring the mask to the parameter, which meta cannot
        one.zero_(model.fc.weight)


@pytest.mark.parametrize("change", ["replaced", "reshaped", "parametrized"])
def test_a_parameter_that_is_not_the_same_is_an_error(change):
    model = pruned()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    attach_masks(model, optimizer)
    optimizer.step()
    if change == "replaced":
        model.fc.weight = nn.Parameter(torch.randn(7, 5))
    elif change == "reshaped":
        model.fc.weight.data = torch.randn(7, 6)
    else:
        nn.utils.parametrizations.weight_norm(model.fc)
    with pytest.raises(RuntimeError, match=r"fc.weight must keep the shape \(7, 5\)|fc.weight is not the parameter any more"):
        optimizer.step()


def test_a_copied_model_is_free_and_can_have_masks_of_its_own():
    model = pruned()
    masks = masks_of(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    attach_masks(model, optimizer)
    train(model, optimizer, 2)
    copied = copy.deepcopy(model)
    other = torch.optim.SGD(copied.parameters(), 0.1)
    train(copied, other, 1)
    assert dead(copied, masks).any()
    attach_masks(copied, other, masks)
    train(copied, other, 2)
    assert not dead(copied, masks).any()
    train(model, optimizer, 1)
    assert not dead(model, masks).any()


def test_the_model_is_saved_as_ever():
    model = pruned()
    keys = list(model.state_dict())
    attach_masks(model, torch.optim.SGD(model.parameters(), 0.1))
    assert list(model.state_dict()) == keys
    assert torch.equal(copy.deepcopy(model).fc.weight, model.fc.weight)


def test_a_group_that_is_added_later_is_masked():
    model = pruned()
    masks = masks_of(model)
    optimizer = torch.optim.SGD([model.fc.weight], 0.1)
    attach_masks(model, optimizer)
    optimizer.add_param_group({"params": [model.conv.weight, model.tied.weight], "weight_decay": 0.1})
    train(model, optimizer, 3)
    assert not dead(model, masks).any()


def test_two_optimizers_share_a_model():
    model = pruned()
    masks = masks_of(model)
    first, second = torch.optim.SGD([model.fc.weight], 0.1), torch.optim.Adam([model.conv.weight, model.tied.weight], 0.1)
    attach_masks(model, first)
    attach_masks(model, second)
    train(model, first, 2, after=second.step)
    assert not dead(model, masks).any()


def test_two_masks_of_a_tied_weight_both_count():
    model = pruned(keep=1)
    torch.manual_seed(3)
    first, second = (torch.rand(7, 7) < 0.5 for _ in range(2))
    apply_masks(model, {"tied.weight": first, "tied_too.weight": second})
    assert torch.equal(model.tied.weight != 0, first & second)


def test_frozen_weights_are_no_trouble():
    model = pruned()
    masks = masks_of(model)
    model.fc.weight.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    attach_masks(model, optimizer)
    train(model, optimizer, 2)
    assert not dead(model, masks).any()


def test_a_closure_is_masked_too():
    model = pruned().to(memory_format=torch.contiguous_format)  # LBFGS cannot take another
    masks = masks_of(model)
    params = [p for name, p in model.named_parameters() if not name.startswith("empty")]
    optimizer = torch.optim.LBFGS(params, 0.1, max_iter=3)
    attach_masks(model, optimizer)
    x = torch.randn(6, 3, 4, 4)

    def closure():
        optimizer.zero_grad()
        loss = model(x).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert not dead(model, masks).any()


def test_what_cannot_be_masked_is_refused():
    model = pruned()
    with pytest.raises(TypeError, match=r"must not be a FastBiP.*freeze_masks\(\)"):
        attach_masks(model, FastBiP(copy.deepcopy(model), sparsity=0.5))
    with pytest.raises(TypeError, match=r"must be a torch.optim.Optimizer, got Linear"):
        attach_masks(model, nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"got one that has none of conv.weight, fc.weight, tied.weight$"):
        attach_masks(model, torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1))
    dense = pruned(keep=1)
    with pytest.raises(ValueError, match="a model without zeros"):
        attach_masks(dense, torch.optim.SGD(dense.parameters(), 0.1))

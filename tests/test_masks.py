"""Masks without their network: files, dense checkpoints, other optimizers."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from helpers import Tied, make_model
from torch import nn

from bip_fast import FastBiP

pytest.importorskip("safetensors", reason="needs the package safetensors: pip install 'bip-fast[test]'")

from bip_fast.export.masks import apply_masks, attach_masks, load_masks, masks_of, save_masks


def pruned_model(seed: int = 0, sparsity: float = 0.7) -> nn.Module:
    torch.manual_seed(seed)
    model = make_model()
    opt = FastBiP(model, sparsity=sparsity)
    opt.finalize()
    return model


def test_a_file_has_one_bit_for_each_weight(tmp_path):
    model = nn.Linear(1000, 100)
    with torch.no_grad():
        model.weight[:, ::3] = 0
    path = tmp_path / "masks.safetensors"
    save_masks(path, model)
    assert 100_000 / 8 <= path.stat().st_size <= 100_000 / 8 + 500
    masks = load_masks(path)
    assert list(masks) == ["weight"]
    assert torch.equal(masks["weight"], model.weight != 0)
    assert [p.name for p in tmp_path.iterdir()] == ["masks.safetensors"], "nothing is left beside it"


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_onto_a_dense_checkpoint_of_any_layout(tmp_path, memory_format):
    torch.manual_seed(3)
    dense = nn.Sequential(nn.Conv2d(3, 7, 3), nn.Conv2d(7, 5, 2)).to(memory_format=memory_format)
    pruned = copy.deepcopy(dense)
    FastBiP(pruned, sparsity=0.6).finalize()
    save_masks(tmp_path / "m", pruned)
    plain = copy.deepcopy(dense).to(memory_format=torch.contiguous_format).to(torch.bfloat16)
    apply_masks(plain, load_masks(tmp_path / "m"))
    for a, b in zip(plain.parameters(), pruned.parameters(), strict=True):
        assert torch.equal(a != 0, b.to(torch.bfloat16) != 0)


def test_masks_of_a_mapping_and_of_tied_weights(tmp_path):
    masks = {"a": torch.rand(3, 5, 7) > 0.5, "b": torch.zeros(0, 4, dtype=torch.bool), "c": torch.ones(33, dtype=torch.bool)}
    save_masks(tmp_path / "m", masks)
    again = load_masks(tmp_path / "m")
    assert again.keys() == masks.keys()
    assert all(torch.equal(again[name], masks[name]) for name in masks)
    model = Tied()
    FastBiP(model, sparsity=0.5).finalize()
    assert len({id(dict(model.named_parameters(remove_duplicate=False))[name]) for name in masks_of(model)}) == len(masks_of(model))


def test_what_cannot_be_saved():
    with pytest.raises(ValueError, match="not pruned"):
        save_masks("never", nn.Linear(3, 3))
    with pytest.raises(ValueError, match="bool"):
        save_masks("never", {"a": torch.ones(3)})


def test_wrong_files(tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(FileNotFoundError, match="no mask file"):
        load_masks(tmp_path / "none")
    good = tmp_path / "good"
    save_masks(good, {"a": torch.ones(100, dtype=torch.bool)})
    for number, data in enumerate([good.read_bytes()[:-3], b"", b"not a file at all", good.read_bytes()[:20]]):
        path = tmp_path / f"bad{number}"
        path.write_bytes(data)
        with pytest.raises(ValueError, match="must be a file of save_masks"):
            load_masks(path)
    known = {"format": "bip_fast masks", "version": "1"}
    four = {"a": torch.ones(4, dtype=torch.int32)}
    for name, tensors, about in [
        ("weights", {"a": torch.ones(3)}, None),
        ("version", four, {**known, "version": "2", "shapes": '{"a": [100]}'}),
        ("length", {"a": torch.ones(3, dtype=torch.int32)}, {**known, "shapes": '{"a": [100]}'}),
        ("missing", four, {**known, "shapes": json.dumps({"a": [100], "b": [1]})}),
    ]:
        save_file(tensors, tmp_path / name, about)
        with pytest.raises(ValueError, match="must be a file of save_masks"):
            load_masks(tmp_path / name)


def test_masks_of_another_model_change_nothing():
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    name = next(iter(masks_of(pruned_model())))
    with pytest.raises(ValueError, match="nope"):
        apply_masks(model, {**masks_of(pruned_model()), "nope": torch.ones(2, dtype=torch.bool)})
    with pytest.raises(ValueError, match="shapes"):
        apply_masks(model, {**masks_of(pruned_model()), name: torch.zeros(2, dtype=torch.bool)})
    assert all(torch.equal(before[key], x) for key, x in model.state_dict().items())


# --- under another optimizer ---------------------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "sgd": lambda params: torch.optim.SGD(params, 0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adamw": lambda params: torch.optim.AdamW(params, 0.01, weight_decay=0.1),
    "adam, foreach": lambda params: torch.optim.Adam(params, 0.01, weight_decay=0.1, foreach=True),
    "rmsprop": lambda params: torch.optim.RMSprop(params, 0.01, momentum=0.5),
}


def noise(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(p)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_zeros_stay_under_any_optimizer(name):
    model = pruned_model()
    masks = masks_of(model)
    before = {key: x.clone() for key, x in model.state_dict().items()}
    params = list(model.parameters())
    opt = OPTIMIZERS[name]([{"params": params[:2]}, {"params": params[2:], "lr": 0.02}])
    handle = attach_masks(model, opt)
    for step in range(20):
        noise(model, step)
        opt.step()
        now = dict(model.named_parameters())
        for key, mask in masks.items():
            assert torch.equal(now[key] != 0, mask), (step, key)
            assert not bool(now[key].grad[~mask].any()), "momenta see only what is there"
    assert all(bool((now[key] != before[key]).any()) for key in masks), "kept weights learn"
    handle.remove()
    noise(model, 99)
    opt.step()
    assert any(bool(now[key][~mask].any()) for key, mask in masks.items()), "without masks zeros go"


def test_given_masks_and_with():
    model = make_model()
    name = "head.weight"
    mask = torch.zeros(dict(model.named_parameters())[name].shape, dtype=torch.bool)
    opt = torch.optim.SGD(model.parameters(), 0.1)
    with attach_masks(model, opt, {name: mask}):
        assert not bool(model.head.weight.any()), "given masks count at once"
        noise(model, 0)
        opt.step()
        assert not bool(model.head.weight.any())
    noise(model, 1)
    opt.step()
    assert bool(model.head.weight.any())


def test_masks_follow_to_another_dtype_and_place():
    model = pruned_model()
    masks = masks_of(model)
    opt = torch.optim.SGD(model.parameters(), 0.1)
    attach_masks(model, opt)
    model.to(torch.bfloat16)
    noise(model, 0)
    opt.step()
    for key, mask in masks.items():
        assert torch.equal(dict(model.named_parameters())[key] != 0, mask)


def test_what_cannot_be_attached():
    model = pruned_model()
    with pytest.raises(ValueError, match="FastBiP"):
        attach_masks(model, FastBiP(make_model(), sparsity=0.5))
    with pytest.raises(ValueError, match="none of the"):
        attach_masks(model, torch.optim.SGD(make_model().parameters(), 0.1))
    with pytest.raises(ValueError, match="none of the 0"):
        attach_masks(make_model(), torch.optim.SGD(make_model().parameters(), 0.1))

"""Mask files, masks onto dense models, and zeros that stay under any optimizer."""

import copy
import json

import pytest
import torch
from torch import nn

from bip_fast import FastBiP
from bip_fast.arena import pack_mask
from bip_fast.export.masks import apply_masks, attach_masks, load_masks, masks_of, save_masks
from bip_fast.report import report

safetensors_torch = pytest.importorskip("safetensors.torch", reason="mask files need safetensors")


class Network(nn.Module):
    """Conv in channels_last, Linear, norms, a tied pair, a layer without weights, one that is never pruned."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3, padding=1)
        self.norm = nn.BatchNorm2d(5)
        self.fc = nn.Linear(5, 7)
        self.tied = nn.Linear(7, 7)
        self.tied_too = nn.Linear(7, 7)
        self.tied_too.weight = self.tied.weight
        self.empty = nn.Linear(0, 4, bias=False)
        self.whole = nn.Linear(7, 2)

    def forward(self, x):
        x = self.fc(torch.relu(self.norm(self.conv(x))).mean((2, 3)))
        return self.whole(self.tied_too(torch.relu(self.tied(x))))


def pruned(seed=0, dtype=torch.float32, keep=0.4):
    torch.manual_seed(seed)
    model = Network().to(memory_format=torch.channels_last)
    with torch.no_grad():
        for name in ("conv", "fc", "tied"):
            p = getattr(model, name).weight
            p.mul_(torch.rand(p.shape) < keep)
    return model.to(dtype)


def dead(model, masks):
    """The entries that must be zero, all in one tensor."""
    params = dict(model.named_parameters(remove_duplicate=False))
    return torch.cat([params[name].detach()[~mask.to(params[name].device)].flatten().float() for name, mask in masks.items()])


def train(model, optimizer, steps, after=lambda: None):
    dtype = model.whole.weight.dtype
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(6, 3, 4, 4).to(dtype)).square().sum().backward()
        after()
        optimizer.step()


# --- where masks come from -----------------------------------------------------------------------------------------------------------


def test_masks_of_a_model_are_its_zeros_under_first_names():
    model = pruned()
    masks = masks_of(model)
    assert list(masks) == ["conv.weight", "fc.weight", "tied.weight"]  # no tied_too, nothing that is whole or empty
    for name, mask in masks.items():
        assert torch.equal(mask, model.get_parameter(name) != 0)


def test_masks_of_an_optimizer_are_its_own():
    """A kept weight whose value is 0 is kept: the model alone cannot know."""
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    opt = FastBiP(model, sparsity=0.5, exclude="2")
    with opt.lower():
        model[0].weight.grad = opt.weight_of(model[0].weight) / 0.5  # one step of lr 0.5 ends at 0
        opt.param_groups[0]["lr"], opt.param_groups[0]["weight_decay"] = 0.5, 0.0
        opt.step()
    assert report(model).rows[0].kept == 0
    masks = masks_of(opt)
    assert list(masks) == ["0.weight"]
    assert torch.equal(masks["0.weight"], opt.mask_of(model[0].weight))
    assert int(masks["0.weight"].sum()) == 32


def test_masks_of_an_optimizer_belong_to_their_names():
    """Names and masks are in one order, with dense groups and other groups between."""
    model = pruned()
    opt = FastBiP(
        [
            {"params": [("whole.weight", model.whole.weight)], "prune": False},
            {"params": [("tied.weight", model.tied.weight)], "sparsity": 0.8},
            {"params": [("fc.bias", model.fc.bias), ("conv.weight", model.conv.weight), ("fc.weight", model.fc.weight)]},
        ],
        sparsity=0.5,
    )
    masks = masks_of(opt)
    assert set(masks) == {"tied.weight", "conv.weight", "fc.weight"}
    for name, mask in masks.items():
        assert torch.equal(mask, opt.mask_of(model.get_parameter(name)))


def test_an_optimizer_without_names_or_state_is_refused():
    model = pruned()
    opt = FastBiP(model.parameters(), sparsity=0.5)
    with pytest.raises(ValueError, match=r"masks need names.*parameter 0 of shape"):
        masks_of(opt)
    opt.finalize()
    with pytest.raises((ValueError, RuntimeError)):
        masks_of(opt)


@pytest.mark.parametrize(
    ("source", "kind", "message"),
    [
        (nn.Linear(3, 3), ValueError, "there are no masks: got a model without zeros"),
        (nn.ReLU(), ValueError, "there are no masks"),
        ({}, ValueError, "an empty mapping"),
        ({"a": torch.ones(3)}, TypeError, "bool tensors, got torch.float32 for 'a'"),
        ({"a": [True]}, TypeError, "bool tensors, got list for 'a'"),
        ([1], TypeError, "a Module, a mapping or a FastBiP, got list"),
        (nn.Linear(3, 3, device="meta"), ValueError, "weight must be a dense tensor with data"),
    ],
)
def test_what_has_no_masks_is_refused(source, kind, message, tmp_path):
    with pytest.raises(kind, match=message):
        save_masks(tmp_path / "masks.safetensors", source)
    assert not list(tmp_path.iterdir())


# --- files ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (7,), (8,), (9,), (31, 3), (4, 5, 3, 3), (257, 33)])
def test_any_shape_comes_back(shape, tmp_path):
    torch.manual_seed(1)
    masks = {"layer.weight": torch.rand(shape) < 0.3, "b": torch.ones(3, dtype=torch.bool)}
    save_masks(tmp_path / "m", masks)
    loaded = load_masks(tmp_path / "m")
    assert loaded.keys() == masks.keys()
    for name, mask in masks.items():
        assert loaded[name].dtype == torch.bool
        assert torch.equal(loaded[name], mask)
        loaded[name].logical_not_()  # an ordinary tensor of its own memory


def test_a_file_has_one_bit_per_weight_in_index_order(tmp_path):
    """The bytes of the mask words of a FastBiP state, also of a weight in channels_last."""
    model = pruned()
    assert not model.conv.weight.is_contiguous()
    save_masks(tmp_path / "m", model)
    stored = safetensors_torch.load_file(tmp_path / "m")
    assert {name: x.numel() for name, x in stored.items()} == {"conv.weight": 17, "fc.weight": 5, "tied.weight": 7}
    words = pack_mask((model.conv.weight != 0).flatten())
    assert torch.equal(stored["conv.weight"], words.view(torch.uint8)[:17])
    big = torch.rand(1000, 1000) < 0.1
    save_masks(tmp_path / "big", {"w": big})
    assert (tmp_path / "big").stat().st_size < 125_000 + 400


def test_a_run_gives_the_same_file_from_optimizer_and_model(tmp_path):
    model = pruned()
    opt = FastBiP(model, sparsity=0.7)
    save_masks(tmp_path / "running", opt)
    names = [row.name for row in opt.report()]
    opt.finalize()
    save_masks(tmp_path / "final", model)
    running, final = load_masks(tmp_path / "running"), load_masks(tmp_path / "final")
    assert set(running) == set(names)
    for name in final:
        assert torch.equal(running[name], final[name])
    assert all(bool(running[name].all()) for name in running.keys() - final.keys())  # a layer that kept all has no zeros


def test_an_old_file_is_replaced_when_the_new_one_is_whole(tmp_path, monkeypatch):
    path = tmp_path / "masks.safetensors"
    save_masks(path, {"a": torch.ones(9, dtype=torch.bool)})
    before = path.read_bytes()
    save_masks(str(path), {"b": torch.zeros(9, dtype=torch.bool)})
    assert list(load_masks(str(path))) == ["b"]
    path.write_bytes(before)

    def fails(packed, file, metadata):
        file.write_bytes(b"half of it")
        raise OSError("no space left")

    monkeypatch.setattr(safetensors_torch, "save_file", fails)
    with pytest.raises(OSError, match="no space"):
        save_masks(path, {"b": torch.zeros(9, dtype=torch.bool)})
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["masks.safetensors"]


def rewritten(path, **changes):
    """The file with other metadata; None removes a key."""
    with safetensors_torch.safe_open(path, framework="pt") as file:
        metadata = {key: value for key, value in {**file.metadata(), **changes}.items() if value is not None}
    safetensors_torch.save_file(safetensors_torch.load_file(path), path, metadata)


def about(shape, crc=None):
    return json.dumps({"w": {"shape": shape, "crc32": crc}})


DAMAGE = {
    "empty": (lambda path: path.write_bytes(b""), "not a mask file, or damaged"),
    "text": (lambda path: path.write_text("not masks, but a text that is long enough to have a header"), "not a mask file, or damaged"),
    "cut in the header": (lambda path: path.write_bytes(path.read_bytes()[:40]), "not a mask file, or damaged"),
    "cut at the end": (lambda path: path.write_bytes(path.read_bytes()[:-1]), "not a mask file, or damaged"),
    "a bit flipped": (lambda path: path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 4])), "checksum of w"),
    "weights": (lambda path: safetensors_torch.save_file({"w": torch.ones(3)}, path), "not a mask file: its metadata"),
    "other format": (lambda path: rewritten(path, format="other"), "got 'other'"),
    "newer": (lambda path: rewritten(path, version="2"), "has version '2' of the mask format, this bip_fast reads '1'"),
    "no shapes": (lambda path: rewritten(path, masks=None), "is damaged: KeyError"),
    "no json": (lambda path: rewritten(path, masks="{"), "is damaged: JSONDecodeError"),
    "a list": (lambda path: rewritten(path, masks="[]"), "is damaged: AttributeError"),
    "other names": (lambda path: rewritten(path, masks="{}"), "are of other weights"),
    "other shape": (lambda path: rewritten(path, masks=about([5, 5])), r"\[5, 5\] must have 4 bytes, got \(3,\)"),
    "huge shape": (lambda path: rewritten(path, masks=about([2**40, 2**40])), "must have"),
    "negative shape": (lambda path: rewritten(path, masks=about([-4, -5])), "must have a shape of sizes"),
    "text as shape": (lambda path: rewritten(path, masks=about("20")), "must have a shape of sizes"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_file_that_is_wrong_or_damaged_is_one_clear_error(damage, tmp_path):
    path = tmp_path / "masks.safetensors"
    save_masks(path, {"w": torch.rand(4, 5) < 0.5})
    spoil, message = DAMAGE[damage]
    spoil(path)
    with pytest.raises(ValueError, match=message) as caught:
        load_masks(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_or_folder_is_named(tmp_path):
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(FileNotFoundError, match="there is no file"):
            load_masks(path)
    with pytest.raises(FileNotFoundError, match="in a folder that exists"):
        save_masks(tmp_path / "nowhere" / "m", {"w": torch.ones(3, dtype=torch.bool)})


# --- masks onto models ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_masks_go_onto_a_dense_model(dtype, tmp_path):
    source, model = pruned(), pruned(seed=1, dtype=dtype, keep=1)
    with torch.no_grad():
        model.fc.weight.view(-1)[0] = float("nan")  # dead in the mask: 0*nan is not 0
        source.fc.weight.view(-1)[0] = 0
    save_masks(tmp_path / "m", source)
    before = copy.deepcopy(model.state_dict())
    masks = load_masks(tmp_path / "m")
    apply_masks(model, masks)
    assert not dead(model, masks).any()
    assert not model.conv.weight.is_contiguous()
    for name, x in model.state_dict().items():
        mask = masks.get(name, masks["tied.weight"] if name == "tied_too.weight" else torch.tensor(True))
        assert torch.equal(x, torch.where(mask, before[name], 0)), name


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("nowhere.weight", (7, 5), "got 'nowhere.weight', which it does not have"),
        ("fc.running_mean", (7,), "which it does not have"),
        ("norm.running_mean", (5,), "which it does not have"),  # a buffer
        ("fc.weight", (5, 7), r"fc.weight must have shape \(7, 5\), got \(5, 7\)"),
        ("fc.weight", (35,), r"must have shape \(7, 5\)"),
    ],
)
def test_masks_that_do_not_fit_change_nothing(name, shape, message):
    model = pruned(keep=1)
    before = copy.deepcopy(model.state_dict())
    masks = {"conv.weight": torch.zeros(5, 3, 3, 3, dtype=torch.bool), name: torch.zeros(shape, dtype=torch.bool)}
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for call in (lambda: apply_masks(model, masks), lambda: attach_masks(model, optimizer, masks)):
        with pytest.raises(ValueError, match=message):
            call()
    assert all(torch.equal(x, before[key]) for key, x in model.state_dict().items())


def test_a_model_without_data_is_refused():
    with pytest.raises(ValueError, match="must be a dense tensor with data"):
        apply_masks(nn.Linear(2, 2, device="meta"), {"weight": torch.zeros(2, 2, dtype=torch.bool)})


# --- masks that stay -----------------------------------------------------------------------------------------------------------------

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

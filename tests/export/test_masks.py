"""Mask files, and masks onto dense models."""

import copy
import json
import os
import stat

import pytest
import torch
from masked_network import dead, pruned, with_filters
from torch import nn

from bip_fast import FastBiP
from bip_fast.engine.report import report
from bip_fast.engine.units import pack_mask
from bip_fast.export.masks import apply_masks, attach_masks, load_masks, masks_of, save_masks

safetensors_torch = pytest.importorskip("safetensors.torch", reason="mask files need safetensors")


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


FILTERS = {"pattern": "filter", "scope": "layer", "coupled": [["0.weight", "1.weight", "1.bias"]]}
VECTORS = {"0.bias": 8, "1.weight": 8, "1.bias": 8, "3.bias": 6}


def test_vectors_that_go_with_filters_have_masks(tmp_path):
    model = with_filters()
    dense = copy.deepcopy(model)
    opt = FastBiP(model, sparsity=0.5, **FILTERS)
    masks = masks_of(opt)
    assert {name: mask.numel() for name, mask in masks.items() if mask.dim() < 2} == VECTORS
    for name in VECTORS:
        p = model.get_parameter(name)
        assert torch.equal(masks[name], opt.mask_of(p))
        assert torch.equal(opt.weight_of(p), dense.get_parameter(name))
        assert opt.scores_of(p)[masks[name]].min() >= opt.scores_of(p)[~masks[name]].max()
        with pytest.raises(ValueError, match=f"got {name}, which goes with others"):
            opt.set_scores({p: torch.ones_like(p)})
    save_masks(tmp_path / "m", opt)
    opt.finalize()
    apply_masks(dense, load_masks(tmp_path / "m"))
    x = torch.randn(5, 3, 4, 4)
    assert torch.equal(dense.eval()(x), model.eval()(x))
    from_model = masks_of(model)
    assert from_model.keys() == masks.keys()
    assert all(torch.equal(mask, masks[name]) for name, mask in from_model.items())


def test_zeros_of_vectors_that_belong_to_no_filter_are_free():
    model = with_filters()
    assert set(masks_of(FastBiP(model, sparsity=0.5))) == {"0.weight", "3.weight", "6.weight"}
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1)
        model[0].weight[3] = model[0].bias[4] = 0  # a filter, and a bias of another
        model[1].weight.fill_(0)  # as some batch-norms start
        model[1].bias.fill_(0)
    assert set(masks_of(model)) == {"0.weight"}
    with torch.no_grad():
        model[0].bias[3] = 0
    assert masks_of(model)["0.bias"].tolist() == [True] * 3 + [False] + [True] * 4, "not the entry whose filter lives"


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


@pytest.mark.skipif(os.name != "posix", reason="needs file modes of POSIX")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_the_mode_of_a_file_is_what_the_umask_leaves(umask, mode, tmp_path):
    before = os.umask(umask)
    try:
        for _ in range(2):  # a new file, and one that is replaced
            save_masks(tmp_path / "m", pruned())
            assert stat.S_IMODE((tmp_path / "m").stat().st_mode) == mode
    finally:
        os.umask(before)


def test_a_name_of_the_format_is_refused(tmp_path):
    with pytest.raises(ValueError, match="masks must have other names than '__metadata__'"):
        save_masks(tmp_path / "m", {"a": torch.ones(3, dtype=torch.bool), "__metadata__": torch.ones(3, dtype=torch.bool)})
    assert not list(tmp_path.iterdir())


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

"""Residual networks: sizes known from the paper, shapes, shortcuts, and models of the user's own."""

import pytest
import torch
from torch import nn

from bip_fast.experiments import ExperimentError
from bip_fast.experiments.resnet import MODELS, BasicBlock, build

# He et al. give 0.27, 0.46 and 0.85 million for the CIFAR networks; ResNet-18 in CIFAR form has 11.17 million.
SIZES = {
    "resnet20": 269_722,
    "resnet20b": 269_722 + 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64,
    "resnet32": 464_154,
    "resnet56": 853_018,
    "resnet18": 11_173_962,
}
DEPTHS = {"resnet20": 20, "resnet20b": 20, "resnet32": 32, "resnet56": 56, "resnet18": 18}


@pytest.mark.parametrize("name", MODELS)
def test_number_of_weights_and_layers(name):
    model = build(name, 3, 10)
    assert sum(p.numel() for p in model.parameters()) == SIZES[name]
    layers = [m for m in model.modules() if isinstance(m, nn.Linear) or (isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3))]
    assert len(layers) == DEPTHS[name]


@pytest.mark.parametrize(("channels", "size", "classes"), [(1, 8, 10), (1, 14, 10), (1, 28, 10), (3, 32, 100)])
def test_logits_for_every_data_set(channels, size, classes):
    model = build("resnet20", channels, classes, width=4)
    assert model(torch.randn(2, channels, size, size)).shape == (2, classes)
    assert model.conv1.weight.shape == (4, channels, 3, 3)


@pytest.mark.parametrize(("name", "sizes"), [("resnet20", (16, 8, 4)), ("resnet18", (16, 8, 4, 2))])
def test_stages_halve_the_resolution_and_double_the_width(name, sizes):
    x = torch.randn(1, 4, 16, 16)
    for stage, size in zip(build(name, 3, 10, width=4).stages, sizes, strict=True):
        x = stage(x)
        assert x.shape == (1, 4 * 16 // size, size, size)


def test_option_a_shortcut_subsamples_and_pads_with_zeros():
    block = BasicBlock(2, 4, 2, projection=False)
    nn.init.zeros_(block.bn2.weight)  # the branch gives 0, only the shortcut is left
    x = torch.rand(3, 2, 6, 6)
    out = block(x)
    assert torch.equal(out[:, :2], x[:, :, ::2, ::2])
    assert not out[:, 2:].any()
    assert not list(block.parameters())[6:]  # two convolutions and two norms; the shortcut has no weights


def test_projection_shortcut_is_used_where_the_shape_changes():
    block = BasicBlock(2, 4, 2, projection=True).eval()
    nn.init.zeros_(block.bn2.weight)
    x = torch.randn(3, 2, 6, 6)
    torch.testing.assert_close(block(x), block.shortcut(x).relu())
    assert BasicBlock(4, 4, 1, projection=True).shortcut is None


def test_the_same_seed_gives_the_same_network():
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        states.append(build("resnet20", 1, 10, width=4).state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["conv1.weight"], states[2]["conv1.weight"])


OWN = """
from torch import nn
def small(channels, classes):
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(classes))
def wrong(channels, classes):
    return channels
def broken(channels, classes):
    raise RuntimeError("no\\nmemory")
"""


def test_own_model_from_a_file_or_a_package(tmp_path, monkeypatch):
    file = tmp_path / "own_model_for_test.py"
    file.write_text(OWN)
    assert isinstance(build(f"{file}:small", 3, 10), nn.Sequential)
    monkeypatch.syspath_prepend(tmp_path)
    assert isinstance(build("own_model_for_test:small", 3, 10), nn.Sequential)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet21", "must be one of resnet20"),
        ("FILE:wrong", "must return a torch.nn.Module, got int"),
        ("FILE:broken", "RuntimeError: no memory"),
        ("FILE:absent", "AttributeError"),
        ("no_such_package_here:small", "ModuleNotFoundError"),
        ("no_such_file.py:small", "FileNotFoundError"),
    ],
)
def test_a_wrong_model_is_one_line(tmp_path, name, message):
    file = tmp_path / "own.py"
    file.write_text(OWN)
    with pytest.raises(ExperimentError) as error:
        build(name.replace("FILE", str(file)), 3, 10)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_width_is_for_the_named_networks_only(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    with pytest.raises(ExperimentError, match="--width is for"):
        build(f"{tmp_path / 'own.py'}:small", 3, 10, width=8)

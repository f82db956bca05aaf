"""Models: sizes known from the papers, shapes, shortcuts, other libraries' models and the user's own."""

import itertools
import sys
import types

import pytest
import torch
from torch import nn

from bip_fast.experiments import ExperimentError
from bip_fast.experiments.models import MODELS, build
from bip_fast.experiments.resnet import BasicBlock

# 13 convolutions with two numbers of norm for each output, and a linear layer.
VGG_CHANNELS = (3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
VGG_SIZE = sum(9 * a * b + 2 * b for a, b in itertools.pairwise(VGG_CHANNELS)) + 512 * 10 + 10

# He et al. give 0.27, 0.46 and 0.85 million for the CIFAR networks; ResNet-18 in CIFAR form has 11.17 million.
SIZES = {
    "resnet20": 269_722,
    "resnet20b": 269_722 + 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64,
    "resnet32": 464_154,
    "resnet56": 853_018,
    "resnet18": 11_173_962,
    # Of the networks for ImageNet, as torchvision counts them, with 10 classes in place of 1000.
    "resnet18-imagenet": 11_689_512 - 513 * 990,
    "resnet50": 25_557_032 - 2049 * 990,
    "vgg16bn": VGG_SIZE,
}
DEPTHS = {
    "resnet20": 20,
    "resnet20b": 20,
    "resnet32": 32,
    "resnet56": 56,
    "resnet18": 18,
    "resnet18-imagenet": 17,  # and the 7x7 stem
    "resnet50": 17,  # of 3x3, in its bottlenecks, and the linear layer
    "vgg16bn": 14,
}


@pytest.mark.parametrize("name", MODELS)
def test_number_of_weights_and_layers(name):
    model = build(name, 3, 10)
    assert sum(p.numel() for p in model.parameters()) == SIZES[name]
    layers = [m for m in model.modules() if isinstance(m, nn.Linear) or (isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3))]
    assert len(layers) == DEPTHS[name]


@pytest.mark.parametrize("name", ["resnet18-imagenet", "resnet50", "vgg16bn"])
@pytest.mark.parametrize(("channels", "size"), [(1, 8), (1, 28), (3, 64)])
def test_large_networks_take_images_of_any_size(name, channels, size):
    model = build(name, channels, 7, width=2)
    assert model(torch.randn(2, channels, size, size)).shape == (2, 7)
    model.eval()(torch.randn(1, channels, size, size)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_bottleneck_has_its_stride_in_the_middle():
    block = build("resnet50", 3, 10, width=4).stages[1][0]
    assert [layer.stride for layer in (block.conv1, block.conv2, block.conv3)] == [(1, 1), (2, 2), (1, 1)]
    assert block(torch.randn(2, 16, 8, 8)).shape == (2, 32, 4, 4)


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


# --- other libraries: neither need be installed here ---------------------------------------------------------------------------------


@pytest.fixture
def library(monkeypatch):
    """Stands in for a library: knows two models, and remembers how it was called."""

    def install(name, module_name, make):
        calls = []
        module = types.ModuleType(module_name)
        module.__spec__ = types.SimpleNamespace()
        module.list_models = lambda: ["resnet26", "vit_tiny"]

        def remembered(model, **options):
            calls.append((model, options))
            return nn.Linear(2, 3)

        setattr(module, make, remembered)
        for part in {name, module_name}:
            monkeypatch.setitem(sys.modules, part, module)
        return calls

    return install


def test_models_of_timm(library):
    calls = library("timm", "timm", "create_model")
    assert isinstance(build("timm:vit_tiny", 1, 10), nn.Linear)
    assert calls == [("vit_tiny", {"pretrained": False, "in_chans": 1, "num_classes": 10})]
    with pytest.raises(ExperimentError, match=r"timm has no such model; close to it: resnet26"):
        build("timm:resnet62", 1, 10)


def test_models_of_torchvision(library):
    calls = library("torchvision", "torchvision.models", "get_model")
    assert isinstance(build("torchvision:resnet26", 3, 10), nn.Linear)
    assert calls == [("resnet26", {"weights": None, "num_classes": 10})]
    with pytest.raises(ExperimentError, match="images of 3 channels, and the data set has 1"):
        build("torchvision:resnet26", 1, 10)


@pytest.mark.parametrize("name", ["timm", "torchvision"])
def test_a_library_that_is_not_there_is_one_line(monkeypatch, name):
    monkeypatch.setattr("importlib.util.find_spec", lambda asked: None)
    with pytest.raises(ExperimentError, match=f"needs {name}: pip install {name}"):
        build(f"{name}:resnet26", 3, 10)

"""Models: sizes known from the papers, shapes, shortcuts, other libraries' models and the user's own."""

import itertools
import sys
import types

import pytest
import torch
from torch import nn

from bip_fast.errors import UserError
from bip_fast.experiments.models.names import MODELS, build
from bip_fast.experiments.models.resnet import BasicBlock

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
    # With the 1000 classes of ImageNet, as torchvision counts them.
    "resnet18-imagenet": 11_689_512,
    "resnet50": 25_557_032,
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
    with torch.device("meta"):  # only shapes are counted
        model = build(name, 3, 1000 if name in ("resnet18-imagenet", "resnet50") else 10)
    assert sum(p.numel() for p in model.parameters()) == SIZES[name]
    layers = [m for m in model.modules() if isinstance(m, nn.Linear) or (isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3))]
    assert len(layers) == DEPTHS[name]


@pytest.mark.parametrize("name", ["resnet18-imagenet", "resnet50", "vgg16bn"])
@pytest.mark.parametrize(("channels", "size"), [(1, 8), (1, 28), (3, 32), (3, 64)])
def test_large_networks_take_images_of_any_size(name, channels, size):
    model = build(name, channels, 7, width=2)
    assert model(torch.randn(2, channels, size, size)).shape == (2, 7)
    model.eval()(torch.randn(1, channels, size, size)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def outputs_of(model, layers, size):
    """(channels, height) of what the layers give for one image."""
    shapes = []
    for layer in layers:
        layer.register_forward_hook(lambda layer, inputs, output: shapes.append(tuple(output.shape[1:3])))
    model.eval()(torch.randn(1, 3, size, size))
    return shapes


@pytest.mark.parametrize(("name", "factor"), [("resnet18-imagenet", 1), ("resnet50", 4)])
def test_stem_for_imagenet_quarters_the_resolution(name, factor):
    model = build(name, 3, 10, width=2)
    assert outputs_of(model, [model.conv1, model.pool], 64) == [(2, 32), (2, 16)]
    assert outputs_of(model, model.stages, 64) == [(2 * factor, 16), (4 * factor, 8), (8 * factor, 4), (16 * factor, 2)]


def test_vgg_halves_the_resolution_after_each_of_four_stages():
    model = build("vgg16bn", 3, 10, width=2)
    pools = [layer for layer in model.features if isinstance(layer, nn.MaxPool2d)]
    assert outputs_of(model, [*pools, model.features], 32) == [(2, 16), (4, 8), (8, 4), (16, 2), (16, 2)]


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
    with pytest.raises(UserError) as error:
        build(name.replace("FILE", str(file)), 3, 10)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_width_is_for_the_named_networks_only(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    with pytest.raises(UserError, match="--width is for"):
        build(f"{tmp_path / 'own.py'}:small", 3, 10, width=8)


# --- other libraries: neither need be installed here ---------------------------------------------------------------------------------


@pytest.fixture
def library(monkeypatch):
    """Stands in for a library: knows four models, and remembers how it was called."""

    def install(name, module_name, make):
        calls = []
        module = types.ModuleType(module_name)
        module.list_models = lambda: ["vit_tiny", "resnet26", "resnet50", "resnet50d"]

        def remembered(model, **options):
            calls.append((model, options))
            return nn.Linear(2, 3)

        setattr(module, make, remembered)
        for part in {name, module_name}:
            monkeypatch.setitem(sys.modules, part, module)
        return calls

    return install


# timm lists architectures only; a name with a tag is one that it takes.
@pytest.mark.parametrize("name", ["vit_tiny", "resnet50.a1_in1k"])
def test_models_of_timm(library, name):
    calls = library("timm", "timm", "create_model")
    assert isinstance(build(f"timm:{name}", 1, 10), nn.Linear)
    assert calls == [(name, {"pretrained": False, "in_chans": 1, "num_classes": 10})]


def test_models_of_torchvision(library):
    calls = library("torchvision", "torchvision.models", "get_model")
    assert isinstance(build("torchvision:resnet26", 3, 7), nn.Linear)
    assert calls == [("resnet26", {"weights": None, "num_classes": 7})]


@pytest.mark.parametrize("channels", [1, 4])
def test_models_of_torchvision_take_three_channels(library, channels):
    calls = library("torchvision", "torchvision.models", "get_model")
    with pytest.raises(UserError, match=f"images of 3 channels, and the data set has {channels}"):
        build("torchvision:resnet26", channels, 10)
    assert not calls


@pytest.mark.parametrize(("name", "module", "make"), [("timm", "timm", "create_model"), ("torchvision", "torchvision.models", "get_model")])
@pytest.mark.parametrize("asked", ["resnet5", "hub:resnet50", "%"])
def test_an_unknown_model_of_a_library_is_answered_with_the_three_closest(library, name, module, make, asked):
    calls = library(name, module, make)
    with pytest.raises(UserError, match=f"{name}:{asked}: {name} has no such model; close to it: ") as error:
        build(f"{name}:{asked}", 3, 10)
    close = str(error.value).rpartition("close to it: ")[2].split(", ")
    assert len(set(close)) == 3
    if asked == "resnet5":
        assert close == ["resnet50", "resnet50d", "resnet26"]
    assert not calls


def test_the_prefix_of_a_library_wins_over_a_package_of_that_name(library, tmp_path, monkeypatch):
    calls = library("timm", "timm", "create_model")
    sys.modules["timm"].vit_tiny = lambda channels, classes: nn.Identity()
    assert isinstance(build("timm:vit_tiny", 3, 10), nn.Linear)
    assert len(calls) == 1
    # Only the whole word before the colon is a prefix.
    (tmp_path / "timm_of_mine.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    assert isinstance(build("timm_of_mine:small", 3, 10), nn.Sequential)
    assert len(calls) == 1


def test_width_is_not_for_models_of_a_library(library):
    library("timm", "timm", "create_model")
    with pytest.raises(UserError, match="--width is for"):
        build("timm:vit_tiny", 3, 10, width=8)


def forget(monkeypatch, library):
    """The next import of it looks for it again."""
    for name in [name for name in sys.modules if name.partition(".")[0] == library]:
        monkeypatch.delitem(sys.modules, name)


class Absent:
    """Finder that says of one package what Python says of one that is not installed."""

    def __init__(self, package):
        self.package = package

    def find_spec(self, name, path=None, target=None):
        if name == self.package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


@pytest.mark.parametrize("name", ["timm", "torchvision"])
def test_a_library_that_is_not_there_is_one_line(monkeypatch, name):
    forget(monkeypatch, name)
    monkeypatch.setattr(sys, "meta_path", [Absent(name), *sys.meta_path])
    with pytest.raises(UserError, match=f"needs {name}: pip install {name}$"):
        build(f"{name}:resnet26", 3, 10)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("raise RuntimeError('operator\\nmissing')", "RuntimeError: operator missing"),
        ("import no_such_package_here", "ModuleNotFoundError: No module named 'no_such_package_here'"),
    ],
)
def test_a_library_that_cannot_be_imported_is_one_line(tmp_path, monkeypatch, code, message):
    forget(monkeypatch, "torchvision")
    (tmp_path / "torchvision.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=f"--model torchvision:resnet26: cannot import torchvision: {message}$") as error:
        build("torchvision:resnet26", 3, 10)
    assert "\n" not in str(error.value)

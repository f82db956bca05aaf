"""Residual networks for small images (He et al., 2016), and any model of the user's own.

CIFAR form: a 3x3 stem, no pooling before the global one. ResNet-20, -32, -56: three stages of n = (depth - 2) / 6 blocks, widths
16, 32, 64, shortcuts without weights (option A); ResNet-20b has 1x1 convolutions on those that change the shape (option B), so that
whole channels can be removed from its stages. ResNet-18: four stages of two blocks, widths 64 to 512, 1x1 convolutions where the
shape changes.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch.nn.functional as F
from torch import Tensor, nn

from . import ExperimentError

__all__ = ["MODELS", "ResNet", "build"]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut: (batch, inputs, h, w) to (batch, outputs, h / stride, w / stride)."""

    def __init__(self, inputs: int, outputs: int, stride: int, projection: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride = stride
        self.new_channels = outputs - inputs
        changes = stride != 1 or inputs != outputs
        self.shortcut: nn.Module | None = None
        if changes and projection:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        if self.shortcut is not None:
            x = self.shortcut(x)
        elif self.stride != 1 or self.new_channels:  # option A: every second pixel, zeros for the new channels
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))
        return F.relu(out + x, inplace=True)


class ResNet(nn.Module):
    """CIFAR form of a residual network: images (batch, channels, h, w) to logits (batch, classes).

    Args:
        blocks: number of blocks in each stage; the first stage keeps the resolution, every other one halves it.
        width: channels of the first stage; every other stage has twice as many as the one before.
        projection: 1x1 convolutions on the shortcuts that change the shape, instead of option A.
    """

    def __init__(self, blocks: tuple[int, ...], width: int, channels: int, classes: int, *, projection: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        stages, inputs = [], width
        for stage, count in enumerate(blocks):
            outputs = width << stage
            layers = []
            for block in range(count):
                layers.append(BasicBlock(inputs, outputs, 2 if stage and not block else 1, projection))
                inputs = outputs
            stages.append(nn.Sequential(*layers))
        self.stages = nn.Sequential(*stages)
        self.fc = nn.Linear(inputs, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return self.fc(self.stages(x).mean((2, 3)))


def _cifar(depth: int, *, projection: bool = False) -> Callable[[int, int, int | None], nn.Module]:
    count = (depth - 2) // 6
    return lambda channels, classes, width: ResNet((count,) * 3, width or 16, channels, classes, projection=projection)


MODELS: dict[str, Callable[[int, int, int | None], nn.Module]] = {
    "resnet20": _cifar(20),
    "resnet20b": _cifar(20, projection=True),
    "resnet32": _cifar(32),
    "resnet56": _cifar(56),
    "resnet18": lambda channels, classes, width: ResNet((2, 2, 2, 2), width or 64, channels, classes, projection=True),
}


def build(name: str, channels: int, classes: int, width: int | None = None) -> nn.Module:
    """Fresh model, initialised from torch's global random state.

    Args:
        name: one of `MODELS`, or the user's own: ``FILE.py:function`` or ``package.module:function``, called with (channels, classes).
        width: channels of the first stage, for `MODELS` only.

    Raises:
        ExperimentError: there is no such model, or the user's function does not return a module.
    """
    if name in MODELS:
        return MODELS[name](channels, classes, width)
    where, colon, function = name.rpartition(":")
    if not colon:
        raise ExperimentError(f"--model must be one of {', '.join(MODELS)}, FILE.py:function or package.module:function, got {name!r}")
    if width is not None:
        raise ExperimentError(f"--width is for {', '.join(MODELS)}, got --model {name}")
    try:
        model = getattr(_import(where), function)(channels, classes)
    except Exception as error:  # the user's code may raise anything
        message = " ".join(str(error).split())
        raise ExperimentError(
            f"--model {name} failed when called with ({channels}, {classes}): {type(error).__name__}: {message}"
        ) from error
    if not isinstance(model, nn.Module):
        raise ExperimentError(f"--model {name} must return a torch.nn.Module, got {type(model).__name__}")
    return model


def _import(where: str) -> ModuleType:
    if not where.endswith(".py"):
        return importlib.import_module(where)
    spec = importlib.util.spec_from_file_location(Path(where).stem, where)
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot read {where}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

"""Residual networks (He et al., 2016).

CIFAR form: a 3x3 stem, no pooling before the global one. ResNet-20, -32, -56: three stages of n = (depth - 2) / 6 blocks, widths
16, 32, 64, shortcuts without weights (option A); ResNet-20b has 1x1 convolutions on those that change the shape (option B), so that
whole channels can be removed from its stages. ResNet-18: four stages of two blocks, widths 64 to 512, 1x1 convolutions where the
shape changes. The ImageNet form has a 7x7 stem, max pooling and four stages, for ResNet-50 of bottlenecks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["BasicBlock", "Bottleneck", "ImageNetResNet", "ResNet", "cifar_resnet", "imagenet_resnet", "start_convolutions"]


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
        start_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return self.fc(self.stages(x).mean((2, 3)))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions beside a shortcut: (batch, inputs, h, w) to (batch, outputs, h / stride, w / stride).

    The stride is in the 3x3 convolution, as in the networks that are in use today, not in the first one as in the paper.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        inner = outputs // 4
        self.conv1 = nn.Conv2d(inputs, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        out = self.bn3(self.conv3(out))
        return F.relu(out + (x if self.shortcut is None else self.shortcut(x)), inplace=True)


class ImageNetResNet(nn.Module):
    """ImageNet form: a 7x7 stem of stride 2 and 3x3 max pooling, then four stages; images (batch, channels, h, w) to logits.

    Args:
        blocks: number of blocks in each stage.
        width: channels of the stem; stage i has ``width * 2**i``, with bottlenecks four times that.
    """

    def __init__(self, blocks: tuple[int, ...], width: int, channels: int, classes: int, *, bottleneck: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.pool = nn.MaxPool2d(3, 2, padding=1)
        stages, inputs = [], width
        for stage, count in enumerate(blocks):
            outputs = (width << stage) * (4 if bottleneck else 1)
            layers: list[nn.Module] = []
            for block in range(count):
                stride = 2 if stage and not block else 1
                layers.append(Bottleneck(inputs, outputs, stride) if bottleneck else BasicBlock(inputs, outputs, stride, True))
                inputs = outputs
            stages.append(nn.Sequential(*layers))
        self.stages = nn.Sequential(*stages)
        self.fc = nn.Linear(inputs, classes)
        start_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.bn1(self.conv1(x)), inplace=True))
        return self.fc(self.stages(x).mean((2, 3)))


def start_convolutions(model: nn.Module) -> None:
    """He initialisation of all convolutions, in their order."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def cifar_resnet(blocks: tuple[int, ...], default: int, *, projection: bool = False) -> Callable[[int, int, int | None], nn.Module]:
    """Maker of a network in CIFAR form, called with (channels, classes, width)."""
    return lambda channels, classes, width: ResNet(blocks, width or default, channels, classes, projection=projection)


def imagenet_resnet(blocks: tuple[int, ...], *, bottleneck: bool) -> Callable[[int, int, int | None], nn.Module]:
    """Maker of a network in ImageNet form, called with (channels, classes, width)."""
    return lambda channels, classes, width: ImageNetResNet(blocks, width or 64, channels, classes, bottleneck=bottleneck)

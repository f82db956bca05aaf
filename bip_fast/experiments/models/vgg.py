"""VGG-16 with batch-norm (Simonyan and Zisserman, 2015; Ioffe and Szegedy, 2015) in the form that pruning papers use on small images:
thirteen 3x3 convolutions, mean pooling, one linear layer."""

from __future__ import annotations

from torch import Tensor, nn

from .resnet import start_convolutions

__all__ = ["VGG", "vgg16bn"]

STAGES = ((1, 2), (2, 2), (4, 3), (8, 3), (8, 3))  # channels, in widths, and convolutions of every stage


class VGG(nn.Module):
    """Images (batch, channels, h, w) of any size to logits (batch, classes); every stage but the last ends in 2x2 max pooling."""

    def __init__(self, channels: int, classes: int, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for number, (factor, count) in enumerate(STAGES):
            for _ in range(count):
                convolution = nn.Conv2d(channels, factor * width, 3, padding=1, bias=False)
                layers += [convolution, nn.BatchNorm2d(factor * width), nn.ReLU(inplace=True)]
                channels = factor * width
            if number + 1 < len(STAGES):
                layers.append(nn.MaxPool2d(2, ceil_mode=True))  # an 8x8 image still has a pixel at the end
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(channels, classes)
        start_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).mean((2, 3)))


def vgg16bn(channels: int, classes: int, width: int | None) -> nn.Module:
    """VGG-16 with batch-norm; ``width``: channels of the first stage, 64 by default."""
    return VGG(channels, classes, width or 64)

"""A data set in memory: images stay uint8 (n, channels, h, w) and become normalised float32 batch by batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..ranks import WHOLE, Share
from .augment import Augment, normalised
from .batches import Epoch, Position, WholeBatches
from .kinds import IMAGES, Kind

__all__ = ["Dataset", "split", "statistics"]

EVALUATED = 500  # images of an evaluation batch


@dataclass(frozen=True)
class Dataset(WholeBatches):
    """Images uint8 (n, channels, h, w) and labels int64 (n,) of both parts; mean and std (channels,) of the training images.

    ``note`` says what a reader of the results should know, for example that a file is not the official one.
    """

    name: str
    classes: int
    padding: int
    mirror: bool
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    mean: Tensor
    std: Tensor
    note: str = ""
    kind: Kind = IMAGES

    @property
    def channels(self) -> int:
        return self.train_images.shape[1]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of an image: channels, height, width."""
        channels, height, width = self.train_images.shape[1:]
        return channels, height, width

    def example(self) -> Tensor:
        """Two images, float32 (2, channels, height, width)."""
        return self.train_images[:2].float()

    def epoch(self, batch_size: int, position: Position, share: Share = WHOLE) -> Epoch:
        """Augmented batches of an epoch from ``position.step`` on, or a part of each."""
        augment = Augment(self.padding, self.mirror, self.mean, self.std)
        return Epoch(self.train_images, self.train_labels, augment, batch_size, position, share)

    def test_batches(self, share: Share = WHOLE) -> Iterator[tuple[Tensor, Tensor]]:
        """All test images in order, or some of their batches, normalised and not augmented."""
        batches = zip(self.test_images.split(EVALUATED), self.test_labels.split(EVALUATED), strict=True)
        for images, labels in share.every(batches):
            yield normalised(images, self.mean, self.std), labels

    def selected(self, train: Tensor, test: Tensor | None = None) -> Dataset:
        """Only training images ``train``, with own statistics; with ``test``, these training images in place of the test images."""
        parts: dict[str, Any] = {"train_images": self.train_images[train], "train_labels": self.train_labels[train]}
        if test is not None:
            parts |= {"test_images": self.train_images[test], "test_labels": self.train_labels[test]}
        return replace(self, **parts).with_own_statistics()

    def to(self, device: torch.device) -> Dataset:
        """Copy with all tensors on ``device``."""
        moved: dict[str, Any] = {name: x.to(device) for name, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **moved)

    def with_own_statistics(self) -> Dataset:
        """The same images with mean and std taken again from the training part."""
        mean, std = statistics(self.train_images)
        return replace(self, mean=mean, std=std)


def statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (channels,) float32 of uint8 images, in float64, a block at a time."""
    total = torch.zeros(images.shape[1], dtype=torch.float64)
    squares = torch.zeros_like(total)
    for block in images.split(4096):
        x = block.double()
        total += x.sum((0, 2, 3))
        squares += (x * x).sum((0, 2, 3))
    count = images.numel() // images.shape[1]
    mean = total / count
    std = (squares / count - mean * mean).clamp(min=0).sqrt()
    return mean.float(), torch.where(std > 0, std, torch.ones_like(std)).float()


def split(labels: Tensor, fraction: float) -> tuple[Tensor, Tensor]:
    """Indices (first, second) of a stratified split: of every class, the same ``fraction`` goes to the second part.

    It depends on the labels only, never on a seed, so that every run is measured on the same images.
    """
    generator = torch.Generator().manual_seed(20221013)
    second = torch.zeros(labels.numel(), dtype=torch.bool)
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        shuffled = members[torch.randperm(members.numel(), generator=generator)]
        second[shuffled[: round(fraction * members.numel())]] = True
    return (~second).nonzero().flatten(), second.nonzero().flatten()

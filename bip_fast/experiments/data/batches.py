"""Batches of images in memory, and the random numbers that each is made with.

The order of an epoch depends on (seed, stage, epoch) only and the augmentation of a batch on (seed, stage, epoch, step), so a run can
continue from any batch with the same bits.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..ranks import WHOLE, Share
from .augment import Augment
from .scoring import IGNORED, counted

__all__ = ["Epoch", "Position", "WholeBatches", "batch_count", "epoch_order", "places_of", "targets_of"]


class Position(NamedTuple):
    """Which batch: the random numbers of a batch are a function of it."""

    seed: int
    stage: str
    epoch: int
    step: int = 0

    def generator(self, purpose: int) -> torch.Generator:
        entropy = [self.seed, int.from_bytes(self.stage.encode(), "little"), self.epoch, self.step, purpose]
        state = np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]
        return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def batch_count(images: int, batch_size: int) -> int:
    """Batches of an epoch over so many images; the last, smaller one is dropped unless it is the only one."""
    return max(1, images // batch_size)


class WholeBatches:
    """Data sets of images: every batch has as many."""

    train_labels: Tensor

    def steps(self, batch_size: int) -> int:
        """Batches of an epoch."""
        return batch_count(len(self.train_labels), batch_size)

    def seen(self, batch_size: int) -> int:
        """Images of an epoch."""
        return self.steps(batch_size) * min(batch_size, len(self.train_labels))


def epoch_order(labels: Tensor, position: Position) -> Tensor:
    """Random order (n,) of the images with these labels in an epoch, on their device."""
    order = torch.randperm(len(labels), generator=position._replace(step=0).generator(0))
    return on_device(order, labels.device)


def on_device(x: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on ``device``; on CUDA without waiting for the work that is queued there."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def places_of(share: Share, items: int) -> slice:
    """Where in a batch of so many items those of a rank are; batches of text are sorted by length, so neighbours go to different ranks. A
    rank without any takes the first, which `targets_of` does not count: few networks take an empty batch."""
    return slice(share.rank, None, share.ranks) if share.rank < items else slice(0, 1)


def targets_of(share: Share, labels: Tensor) -> tuple[Tensor, ...]:
    """What the loss of a rank's part is taken of: its own of the labels (batch, ...), and if there are several ranks what the sum of its
    losses is divided by, float32, so that the mean over ranks is the mean over the batch."""
    if share.ranks == 1:
        return (labels,)
    own = labels[places_of(share, len(labels))]
    return own if share.rank < len(labels) else torch.full_like(own, IGNORED), counted(labels) / share.ranks


class Epoch:
    """Augmented batches of one epoch, from ``position.step`` to its end, on the device of the data.

    All random numbers are drawn when it is made, on the CPU, so that every device trains on the same ones, and go to the device at once:
    making a batch neither copies from the host nor waits for it.

    Args:
        images, labels: of the training part.
        share: which part of every batch is made. Random numbers are those of the whole one.
    """

    def __init__(self, images: Tensor, labels: Tensor, augment: Augment, batch_size: int, position: Position, share: Share = WHOLE) -> None:
        self.share = share
        self.images, self.labels, self.augment = images, labels, augment
        self.batch_size, self.first = batch_size, position.step
        self.order = epoch_order(labels, position)
        n = min(batch_size, len(self.order))
        steps = range(self.first, batch_count(len(labels), batch_size))
        drawn = [augment.draw(n, position._replace(step=step).generator(1)) for step in steps]
        self.shifts, self.flips = (on_device(torch.stack(part), self.order.device) for part in zip(*drawn, strict=True))

    def batch(self, step: int) -> tuple[Tensor, ...]:
        """Batch ``step``: augmented, normalised images (batch, channels, h, w) float32, and labels int64 (batch,) as from `targets_of`."""
        chosen = self.order[step * self.batch_size : (step + 1) * self.batch_size]
        shifts, flips, own = self.shifts[step - self.first], self.flips[step - self.first], places_of(self.share, len(chosen))
        images = self.augment(self.images[chosen[own]], shifts[:, own], flips[own])
        return images, *targets_of(self.share, self.labels[chosen])

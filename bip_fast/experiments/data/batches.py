"""Batches of images in memory, and the random numbers that each is made with.

The order of an epoch depends on (seed, stage, epoch) only and the augmentation of a batch on (seed, stage, epoch, step), so a run can
continue from any batch with the same bits.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .augment import Augment

__all__ = ["Epoch", "Position", "WholeBatches", "batch_count", "epoch_order"]


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


class Epoch:
    """Augmented batches of one epoch, from ``position.step`` to its end, on the device of the data.

    All random numbers are drawn when it is made, on the CPU, so that every device trains on the same ones, and go to the device at once:
    making a batch neither copies from the host nor waits for it.

    Args:
        images, labels: of the training part.
    """

    def __init__(self, images: Tensor, labels: Tensor, augment: Augment, batch_size: int, position: Position) -> None:
        self.images, self.labels, self.augment = images, labels, augment
        self.batch_size, self.first = batch_size, position.step
        self.order = epoch_order(labels, position)
        n = min(batch_size, len(self.order))
        steps = range(self.first, batch_count(len(labels), batch_size))
        drawn = [augment.draw(n, position._replace(step=step).generator(1)) for step in steps]
        self.shifts, self.flips = (on_device(torch.stack(part), self.order.device) for part in zip(*drawn, strict=True))

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Batch ``step``: augmented, normalised images (batch, channels, h, w) float32 and labels int64 (batch,)."""
        chosen = self.order[step * self.batch_size : (step + 1) * self.batch_size]
        drawn = step - self.first
        return self.augment(self.images[chosen], self.shifts[drawn], self.flips[drawn]), self.labels[chosen]

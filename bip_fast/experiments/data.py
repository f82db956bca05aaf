"""Data sets in memory: loading, splits, batches and augmentation.

Images stay uint8 (n, channels, h, w) and become normalised float32 batch by batch. The order of an epoch depends on (seed, stage, epoch)
only and the augmentation of a batch on (seed, stage, epoch, step), so a run can continue from any batch with the same bits.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import ExperimentError
from .augment import Augment, normalised
from .files import Arrays, read_cifar, read_fashion_mnist

if TYPE_CHECKING:
    from .settings import Settings

__all__ = ["DATA", "Dataset", "Epoch", "Position", "batch_count", "hold_out", "load", "split", "ordered_batches"]


class Source(NamedTuple):
    """What is fixed for a data set: ``padding`` of the random crop in pixels, and whether images may be mirrored."""

    classes: int
    padding: int
    mirror: bool
    folders: tuple[str, ...]


DATA = {
    "digits": Source(10, 1, False, ()),
    "fashion-mnist": Source(10, 2, True, ("fashion-mnist", "FashionMNIST/raw")),
    "cifar10": Source(10, 4, True, ("cifar10",)),
    "cifar100": Source(100, 4, True, ("cifar100",)),
}


VALIDATION_IMAGES = 5000  # held out by default, where that is at most a fifth


@dataclass(frozen=True)
class Dataset:
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

    @property
    def channels(self) -> int:
        return self.train_images.shape[1]

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


def split(labels: Tensor, fraction: float, seed: int = 20221013) -> tuple[Tensor, Tensor]:
    """Indices (first, second) of a stratified split: of every class, the same ``fraction`` goes to the second part.

    By default it depends on the labels only, not on the seed of a run, so that every run is measured on the same images.
    """
    generator = torch.Generator().manual_seed(seed)
    second = torch.zeros(labels.numel(), dtype=torch.bool)
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        shuffled = members[torch.randperm(members.numel(), generator=generator)]
        second[shuffled[: round(fraction * members.numel())]] = True
    return (~second).nonzero().flatten(), second.nonzero().flatten()


def hold_out(data: Dataset, count: int = VALIDATION_IMAGES, seed: int = 0) -> Dataset:
    """For choosing options: ``count`` training images take the place of the test images, which are dropped.

    The part is stratified, chosen by ``seed``, and at most a fifth of the training images.
    """
    train, held = split(data.train_labels, min(count / len(data.train_labels), 0.2), seed)
    images, labels = data.train_images, data.train_labels
    data = replace(data, train_images=images[train], train_labels=labels[train], test_images=images[held], test_labels=labels[held])
    return data.with_own_statistics()


def subset(data: Dataset, count: int, seed: int = 0) -> Dataset:
    """A stratified part of about ``count`` training images, chosen by ``seed``; the test images stay.

    Raises:
        ExperimentError: there are not so many.
    """
    total = len(data.train_labels)
    if count > total:
        raise ExperimentError(f"--train-images must be at most {total:,} for {data.name}, got {count:,}")
    _, chosen = split(data.train_labels, count / total, seed)
    if not len(chosen):
        raise ExperimentError(f"--train-images must leave an image of some class, got {count:,} of {total:,}")
    return replace(data, train_images=data.train_images[chosen], train_labels=data.train_labels[chosen]).with_own_statistics()


def at_stride(data: Dataset, stride: int) -> Dataset:
    """Every ``stride``-th pixel in both directions."""
    parts = {name: getattr(data, name)[:, :, ::stride, ::stride].contiguous() for name in ("train_images", "test_images")}
    return replace(data, **parts, padding=max(1, data.padding // stride)).with_own_statistics()


def prepared(data: Dataset, settings: Settings) -> Dataset:
    """The part of a data set that a run works on: held-out images in place of the test images, fewer images, fewer pixels."""
    if settings.validate:
        data = hold_out(data, settings.validation_images)
    if settings.train_images is not None:
        data = subset(data, settings.train_images)
    return at_stride(data, settings.stride) if settings.stride > 1 else data


def load(name: str, data_dir: Path | None = None) -> Dataset:
    """Data set ``name`` of `DATA`.

    Args:
        data_dir: the folder with the standard files, or one that has them in the customary subfolder. Digits come with scikit-learn.

    Raises:
        ExperimentError: a file is missing or damaged, or scikit-learn is not installed.
    """
    if name not in DATA:
        raise ExperimentError(f"--data must be one of {', '.join(DATA)}, got {name!r}")
    if name == "digits":
        arrays = _digits()
    elif data_dir is None:
        raise ExperimentError(f"--data {name} needs --data-dir, the folder with its files")
    elif not data_dir.is_dir():
        raise ExperimentError(f"--data-dir must be a folder, got {data_dir}")
    else:
        folder = next((data_dir / sub for sub in DATA[name].folders if (data_dir / sub).is_dir()), data_dir)
        arrays = read_fashion_mnist(folder) if name == "fashion-mnist" else read_cifar(folder, DATA[name].classes)
    # A copy: the bytes that were read are read-only.
    images, labels, test_images, test_labels = (torch.from_numpy(np.array(part)) for part in arrays[:4])
    mean, std = statistics(images)
    note = f"not the official files (md5): {', '.join(arrays.unofficial)}" if arrays.unofficial else ""
    source = DATA[name]
    fixed = (name, source.classes, source.padding, source.mirror)
    return Dataset(*fixed, images, labels, test_images, test_labels, mean, std, note)


def _digits() -> Arrays:
    """scikit-learn's 1797 digits of 8x8; a third of every class is the test set."""
    if importlib.util.find_spec("sklearn") is None:
        raise ExperimentError("--data digits needs scikit-learn: pip install 'bip_fast[cli]'")
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images, labels = bunch.images[:, None].astype(np.uint8), bunch.target.astype(np.int64)
    train, test = (part.numpy() for part in split(torch.from_numpy(labels), 1 / 3))
    return Arrays(images[train], labels[train], images[test], labels[test], ())


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


def batch_count(data: Dataset, batch_size: int) -> int:
    """Batches of an epoch; the last, smaller one is dropped unless it is the only one."""
    return max(1, len(data.train_labels) // batch_size)


def epoch_order(data: Dataset, position: Position) -> Tensor:
    """Random order (n,) of the training images in an epoch, on the device of the data."""
    order = torch.randperm(len(data.train_labels), generator=position._replace(step=0).generator(0))
    return on_device(order, data.train_labels.device)


def on_device(x: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on ``device``; on CUDA without waiting for the work that is queued there."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


class Epoch:
    """Augmented batches of one epoch, from ``position.step`` to its end, on the device of the data.

    All random numbers are drawn when it is made, on the CPU, so that every device trains on the same ones, and go to the device at once:
    making a batch neither copies from the host nor waits for it.
    """

    def __init__(self, data: Dataset, batch_size: int, position: Position) -> None:
        self.data, self.batch_size, self.first = data, batch_size, position.step
        self.augment = Augment(data.padding, data.mirror, data.mean, data.std)
        self.order = epoch_order(data, position)
        n = min(batch_size, len(self.order))
        steps = range(self.first, batch_count(data, batch_size))
        drawn = [self.augment.draw(n, position._replace(step=step).generator(1)) for step in steps]
        self.shifts, self.flips = (on_device(torch.stack(part), self.order.device) for part in zip(*drawn, strict=True))

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Batch ``step``: augmented, normalised images (batch, channels, h, w) float32 and labels int64 (batch,)."""
        chosen = self.order[step * self.batch_size : (step + 1) * self.batch_size]
        drawn = step - self.first
        images = self.augment(self.data.train_images[chosen], self.shifts[drawn], self.flips[drawn])
        return images, self.data.train_labels[chosen]


def ordered_batches(data: Dataset, batch_size: int = 500) -> Iterator[tuple[Tensor, Tensor]]:
    """All test images in order, normalised and not augmented."""
    for images, labels in zip(data.test_images.split(batch_size), data.test_labels.split(batch_size), strict=True):
        yield normalised(images, data.mean, data.std), labels

"""Data sets in memory: loading, splits, batches and augmentation.

Images stay uint8 (n, channels, h, w) and become normalised float32 batch by batch. The order of an epoch depends on (seed, stage, epoch)
only and the augmentation of a batch on (seed, stage, epoch, step), so a run can continue from any batch with the same bits.
ImageNet is streamed from its files (streamed.py).
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...errors import UserError
from .augment import Augment, normalised
from .image_folders import Streamed, read_image_folders
from .standard import Arrays, cifar_files, fashion_mnist_files, read_cifar, read_fashion_mnist
from .tiny_imagenet import read_tiny_imagenet

if TYPE_CHECKING:
    from ..runs.settings import Settings

__all__ = [
    "AnyData", "DATA", "Dataset", "Epoch", "Position", "at_stride", "batch_count", "fingerprint", "hold_out", "load", "ordered_batches",
    "prepared", "split", "subset",
]  # fmt: skip


class Source(NamedTuple):
    """What is fixed for a data set: ``shape`` of an image (channels, height, width), ``padding`` of the random crop in pixels, whether
    images may be mirrored, and the customary ``folders``."""

    shape: tuple[int, int, int]
    classes: int
    padding: int
    mirror: bool
    folders: tuple[str, ...]


DATA = {
    "digits": Source((1, 8, 8), 10, 1, False, ()),
    "fashion-mnist": Source((1, 28, 28), 10, 2, True, ("fashion-mnist", "FashionMNIST/raw")),
    "cifar10": Source((3, 32, 32), 10, 4, True, ("cifar10",)),
    "cifar100": Source((3, 32, 32), 100, 4, True, ("cifar100",)),
    "tiny-imagenet": Source((3, 64, 64), 200, 4, True, ("tiny-imagenet-200", "tiny-imagenet")),
    # Crops are not shifts, see streamed.py.
    "imagenet": Source((3, 224, 224), 1000, 0, True, ("imagenet",)),
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

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of an image: channels, height, width."""
        channels, height, width = self.train_images.shape[1:]
        return channels, height, width

    def example(self) -> Tensor:
        """Two images, float32 (2, channels, height, width)."""
        return self.train_images[:2].float()

    def epoch(self, batch_size: int, position: Position) -> Epoch:
        """Augmented batches of an epoch from ``position.step`` on."""
        return Epoch(self, batch_size, position)

    def test_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """All test images in order, normalised and not augmented."""
        return ordered_batches(self)

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


AnyData = Dataset | Streamed


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


def stratified(labels: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Indices (others, chosen) of ``count`` chosen ones, in every class the same share as far as whole numbers allow."""
    generator = torch.Generator().manual_seed(seed)
    classes = [(labels == label).nonzero().flatten() for label in labels.unique()]
    exact = [len(members) * count / len(labels) for members in classes]
    by_remainder = sorted(range(len(classes)), key=lambda i: (int(exact[i]) - exact[i], i))
    more = set(by_remainder[: count - sum(map(int, exact))])
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for i, members in enumerate(classes):
        chosen[members[torch.randperm(len(members), generator=generator)][: int(exact[i]) + (i in more)]] = True
    return (~chosen).nonzero().flatten(), chosen.nonzero().flatten()


def hold_out(data: AnyData, count: int = VALIDATION_IMAGES, seed: int = 0) -> AnyData:
    """For choosing options: ``count`` training images take the place of the test images, which are dropped.

    The part is stratified, chosen by ``seed`` (not by the seed of a run), and at most a fifth of the training images.
    """
    return data.selected(*stratified(data.train_labels, min(count, len(data.train_labels) // 5), seed))


def subset(data: AnyData, count: int, seed: int = 0) -> AnyData:
    """A stratified part of ``count`` training images, chosen by ``seed``; the test images stay.

    Raises:
        UserError: there are not so many.
    """
    if count > len(data.train_labels):
        raise UserError(f"--train-images must be at most {len(data.train_labels):,} for --data {data.name}, got {count:,}")
    return data.selected(stratified(data.train_labels, count, seed)[1])


def at_stride(data: AnyData, stride: int) -> AnyData:
    """Every ``stride``-th pixel in both directions."""
    if not isinstance(data, Dataset):
        raise UserError(f"--stride is for data sets in memory, got --data {data.name}")
    parts = {name: getattr(data, name)[:, :, ::stride, ::stride].contiguous() for name in ("train_images", "test_images")}
    return replace(data, **parts, padding=max(1, data.padding // stride)).with_own_statistics()


def prepared(data: AnyData, settings: Settings) -> AnyData:
    """The part of a data set that a run works on: held-out images in place of the test images, fewer images, fewer pixels."""
    if settings.validate:
        data = hold_out(data, settings.validation_images)
    if settings.train_images is not None:
        data = subset(data, settings.train_images)
    return at_stride(data, settings.stride) if settings.stride > 1 else data


def load(name: str, data_dir: Path | None = None) -> AnyData:
    """Data set ``name`` of `DATA`.

    Args:
        data_dir: the folder with the standard files, or one that has them in the customary subfolder. Digits come with scikit-learn.

    Raises:
        UserError: a file is missing or damaged, or scikit-learn is not installed.
    """
    if name not in DATA:
        raise UserError(f"--data must be one of {', '.join(DATA)}, got {name!r}")
    if name == "digits":
        arrays = _digits()
    elif data_dir is None:
        raise UserError(f"--data {name} needs --data-dir, the folder with its files")
    elif not data_dir.is_dir():
        raise UserError(f"--data-dir must be a folder, got {data_dir}")
    else:
        folder = _folder(name, data_dir)
        if name == "imagenet":
            return read_image_folders(folder, name, DATA[name].classes)
        arrays = _read(name, folder)
    # Bytes of a file are read-only, which torch does not know.
    images, labels, test_images, test_labels = (torch.from_numpy(part if part.flags.writeable else part.copy()) for part in arrays[:4])
    mean, std = statistics(images)
    note = f"not the official files (md5): {', '.join(arrays.unofficial)}" if arrays.unofficial else ""
    source = DATA[name]
    fixed = (name, source.classes, source.padding, source.mirror)
    return Dataset(*fixed, images, labels, test_images, test_labels, mean, std, note)


def _folder(name: str, data_dir: Path) -> Path:
    return next((data_dir / sub for sub in DATA[name].folders if (data_dir / sub).is_dir()), data_dir)


def fingerprint(name: str, data_dir: Path | None = None) -> str:
    """Hash of names, sizes and first megabytes of the files that `load` reads, of folders only the names; "" for digits without any."""
    if data_dir is None or name == "digits":
        return ""
    folder, found = _folder(name, data_dir), hashlib.sha256()
    for path in sorted(path for path in _files(name, folder) if path.exists()):
        found.update(str(path.relative_to(folder)).encode())
        if path.is_file():
            found.update(f" {path.stat().st_size}\n".encode())
            with path.open("rb") as file:
                found.update(file.read(2**20))
    return found.hexdigest()


def _files(name: str, folder: Path) -> list[Path]:
    """What `load` reads in ``folder``, of images in folders for each class these folders; not all need be there."""
    if name == "fashion-mnist":
        return fashion_mnist_files(folder)
    if name.startswith("cifar"):
        return cifar_files(folder, DATA[name].classes)
    parts = ["train"] if name == "tiny-imagenet" else ["train", "val"]
    classes = [path for part in parts for path in (folder / part).glob("*") if path.is_dir()]
    return [*classes, folder / "wnids.txt", folder / "val" / "val_annotations.txt"] if name == "tiny-imagenet" else classes


def _read(name: str, folder: Path) -> Arrays:
    if name == "fashion-mnist":
        return read_fashion_mnist(folder)
    if name == "tiny-imagenet":
        return read_tiny_imagenet(folder, DATA[name].classes)
    return read_cifar(folder, DATA[name].classes)


def _digits() -> Arrays:
    """scikit-learn's 1797 digits of 8x8; a third of every class is the test set."""
    if importlib.util.find_spec("sklearn") is None:
        raise UserError("--data digits needs scikit-learn: pip install 'bip_fast[cli]'")
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


def batch_count(data: AnyData, batch_size: int) -> int:
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

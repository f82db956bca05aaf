"""ImageNet, which does not fit in memory: files in a folder for each class, decoded by torchvision in worker processes as they are needed.

It has the small interface of `dataset.Dataset` that training and evaluation use. The random numbers of a batch are a function of its
position and are drawn here, not in the workers, so a run continues from any batch with the same images.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
import signal
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import UserError, one_line
from ..ranks import WHOLE, Share, count_here
from .augment import normalised
from .batches import Position, WholeBatches, batch_count, places_of, targets_of
from .kinds import IMAGES, Kind

__all__ = ["Streamed", "crop_of", "read_image_folders"]

SIZE, RESIZED = 224, 256  # pixels that the network sees, and the shorter side before the centre is cut out for evaluation
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as they are customary
TRIES = 10  # crops of another shape than the image are drawn again
EVALUATED = 256  # images of an evaluation batch

Item = tuple[bytes, "list[float] | None"]  # a file, and the random numbers of its crop


def crop_of(width: int, height: int, numbers: Sequence[float]) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a random crop of 8 to 100 % of the area, from 3:4 to 4:3; the centre if none of the tries fits.

    Args:
        numbers: 2 * TRIES + 2 of them, uniform in [0, 1): area and shape of each try, then place.
    """
    for i in range(TRIES):
        area = width * height * (0.08 + 0.92 * numbers[2 * i])
        shape = math.exp(math.log(3 / 4) + 2 * math.log(4 / 3) * numbers[2 * i + 1])
        w, h = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < w <= width and 0 < h <= height:
            return int(numbers[-2] * (height - h + 1)), int(numbers[-1] * (width - w + 1)), h, w
    w = min(width, round(height * 4 / 3))
    h = min(height, round(width * 4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w


class _Decoder(torch.utils.data.Dataset[Any]):
    """Files to uint8 images (3, SIZE, SIZE), or to what is wrong with them; made in the process that trains and used in its workers."""

    def __getitem__(self, item: Item) -> Tensor | str:
        loader: Any = importlib.import_module("torchvision.datasets.folder").default_loader
        functional: Any = importlib.import_module("torchvision.transforms.functional")
        path, numbers = os.fsdecode(item[0]), item[1]
        try:
            image = loader(path)
        except (OSError, SyntaxError, ValueError) as error:
            return f"{path} is damaged: {one_line(error, 120)}"
        if numbers is None:
            image = functional.center_crop(functional.resize(image, RESIZED), [SIZE, SIZE])
        else:
            width, height = image.size
            image = functional.resized_crop(image, *crop_of(width, height, numbers[:-1]), [SIZE, SIZE])
            if numbers[-1] < 0.5:
                image = functional.hflip(image)
        return functional.pil_to_tensor(image)


def _together(parts: list[Tensor | str]) -> Tensor | str:
    """A batch, or the first of its errors: a worker's exception would come with its traceback."""
    images = [x for x in parts if isinstance(x, Tensor)]
    return torch.stack(images) if len(images) == len(parts) else next(x for x in parts if isinstance(x, str))


def _leave_signals_to_the_parent(worker: int) -> None:
    """The parent needs its workers for the batch after which it stops. A worker whose parent is gone ends by itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setpgrp"):
        os.setpgrp()  # torchrun, `timeout` and others send signals to all processes of a group


def _stream(batches: Iterable[Sequence[Item]], workers: int) -> Iterator[Tensor]:
    loader: Any = torch.utils.data.DataLoader(
        _Decoder(),
        batch_sampler=batches,  # type: ignore[arg-type]
        num_workers=workers,
        collate_fn=_together,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_leave_signals_to_the_parent,
        generator=torch.Generator(),  # its own: torch's global random state belongs to the model
        multiprocessing_context="spawn" if workers else None,
    )
    for images in loader:
        if isinstance(images, str):
            raise UserError(images)
        yield images


@dataclass(frozen=True)
class Streamed(WholeBatches):
    """Files and labels int64 (n,) of both parts; the attributes mean what they mean in `dataset.Dataset`."""

    name: str
    classes: int
    train_files: np.ndarray  # of paths as bytes: a million Path objects would take a gigabyte
    train_labels: Tensor
    test_files: np.ndarray
    test_labels: Tensor
    note: str = ""
    channels: int = 3
    kind: Kind = IMAGES
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    workers: int = field(default_factory=lambda: max(1, min(16, (os.cpu_count() or 1) // count_here())))

    @property
    def shape(self) -> tuple[int, int, int]:
        return 3, SIZE, SIZE

    def example(self) -> Tensor:
        """Two images as a model would see them, float32 (2, 3, SIZE, SIZE): not real ones."""
        return torch.zeros(2, *self.shape)

    def to(self, device: torch.device) -> Streamed:
        """The same with batches and labels on ``device``."""
        return replace(self, device=device, train_labels=self.train_labels.to(device), test_labels=self.test_labels.to(device))

    def selected(self, train: Tensor, test: Tensor | None = None) -> Streamed:
        """Only training images ``train``; with ``test``, these training images in place of the test images. Both are indices."""
        parts = {"train_files": self.train_files[train.numpy()], "train_labels": self.train_labels[train]}
        if test is not None:
            parts |= {"test_files": self.train_files[test.numpy()], "test_labels": self.train_labels[test]}
        return replace(self, **parts)

    def epoch(self, batch_size: int, position: Position, share: Share = WHOLE) -> _Epoch:
        """Batches of an epoch from ``position.step`` on, or a part of each."""
        return _Epoch(self, batch_size, position, share)

    def test_batches(self, share: Share = WHOLE) -> Iterator[tuple[Tensor, Tensor]]:
        """All test images in order, or some of their batches: the centre of each."""
        items: list[Item] = [(path, None) for path in self.test_files]
        batches = list(share.every(items[i : i + EVALUATED] for i in range(0, len(items), EVALUATED)))
        for images, labels in zip(_stream(batches, self.workers), share.every(self.test_labels.split(EVALUATED)), strict=True):
            yield self.normalised(images), labels

    def normalised(self, images: Tensor) -> Tensor:
        """uint8 images on the device, as the network sees them."""
        mean, std = (255 * torch.tensor(x, device=self.device) for x in (MEAN, STD))
        return normalised(images.to(self.device, non_blocking=True), mean, std)


class _Epoch:
    """As `batches.Epoch`, but batches must be asked for in their order."""

    def __init__(self, data: Streamed, batch_size: int, position: Position, share: Share) -> None:
        count, self.share = len(data.train_labels), share
        self.data, self.next, self.position = data, position.step, position
        self.order = torch.randperm(count, generator=position._replace(step=0).generator(0))
        self.n, self.steps = min(batch_size, count), batch_count(count, batch_size)
        self.images = _stream(_Items(self), data.workers)

    def chosen(self, step: int) -> Tensor:
        """Indices of the images of a batch."""
        return self.order[step * self.n :][: self.n]

    def batch(self, step: int) -> tuple[Tensor, ...]:
        """Batch ``step``: augmented, normalised images (batch, 3, SIZE, SIZE) float32, and labels int64 (batch,) as from `targets_of`."""
        if step != self.next:
            raise ValueError(f"batches of files come in their order: expected {self.next}, got {step}")
        self.next += 1
        labels = self.data.train_labels[self.chosen(step).to(self.data.device)]
        return self.data.normalised(next(self.images)), *targets_of(self.share, labels)


class _Items:
    """What the workers are given of an epoch, batch by batch; numbers are drawn when they are needed."""

    def __init__(self, epoch: _Epoch) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.epoch.steps - self.epoch.position.step

    def __iter__(self) -> Iterator[list[Item]]:
        epoch = self.epoch
        for step in range(epoch.position.step, epoch.steps):
            generator = epoch.position._replace(step=step).generator(1)
            numbers = torch.rand(epoch.n, 2 * TRIES + 3, dtype=torch.float64, generator=generator).tolist()
            items = [(epoch.data.train_files[i], own) for i, own in zip(epoch.chosen(step).tolist(), numbers, strict=True)]
            yield items[places_of(epoch.share, len(items))]


def read_image_folders(folder: Path, name: str, classes: int) -> Streamed:
    """A folder with `train` and `val`, each with a folder of images for every class.

    Raises:
        UserError: something is missing, the parts have different classes, or torchvision is not installed.
    """
    if importlib.util.find_spec("torchvision") is None:
        raise UserError(f"--data {name} needs torchvision: pip install torchvision")
    image_folder: Any = importlib.import_module("torchvision.datasets").ImageFolder
    parts = []
    for part in ("train", "val"):
        try:
            parts.append(image_folder(str(folder / part)))
        except (OSError, RuntimeError) as error:  # FileNotFoundError where a class is empty
            raise UserError(f"{folder / part}: {one_line(error, 160)}") from error
    train, test = parts
    if train.class_to_idx != test.class_to_idx or len(train.class_to_idx) != classes:
        found = f"{len(train.class_to_idx)} and {len(test.class_to_idx)}"
        raise UserError(f"{folder}: train and val must have the same {classes} folders, got {found}")
    files = [np.array([os.fsencode(path) for path, _ in part.samples]) for part in parts]
    labels = [torch.tensor([label for _, label in part.samples]) for part in parts]
    return Streamed(name, classes, files[0], labels[0], files[1], labels[1])

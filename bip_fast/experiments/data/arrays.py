"""What every reader returns, the check that images and labels fit, and whether a file is the published one."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ...errors import UserError

__all__ = ["Arrays", "checked", "is_official"]

# md5 of the official files; of the IDX files, unzipped, so that another compression level makes no difference.
OFFICIAL = {
    "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
    "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
    "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
    "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
    "cifar-10-batches-py/data_batch_1": "c99cafc152244af753f735de768cd75f",
    "cifar-10-batches-py/data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "cifar-10-batches-py/data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "cifar-10-batches-py/data_batch_4": "634d18415352ddfa80567beed471001a",
    "cifar-10-batches-py/data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "cifar-10-batches-py/test_batch": "40351d587109b95175f43aff81a1287e",
    "cifar-100-python/train": "16019d7e3df5f24257cddd939b257f8d",
    "cifar-100-python/test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
}


class Arrays(NamedTuple):
    """Images (n, channels, h, w) uint8 and labels (n,) int64 of both parts; ``unofficial``: files that are not the published ones."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    unofficial: tuple[str, ...]


def is_official(name: str, contents: bytes) -> bool:
    return hashlib.md5(contents, usedforsecurity=False).hexdigest() == OFFICIAL[name]


def checked(
    path: Path, images: np.ndarray, labels: np.ndarray, shape: tuple[int, ...], classes: int, labels_path: Path | None = None
) -> list[np.ndarray]:
    """Images and labels, if they fit each other and the data set; ``labels_path``: their own file, if they have one."""
    if images.dtype != np.uint8 or images.shape[1:] != shape or not len(images):
        raise UserError(f"{path}: expected uint8 images of {shape}, got {images.dtype} of {images.shape[1:]}, {len(images)} images")
    if labels.shape != (len(images),):
        raise UserError(f"{path}: {len(images)} images, but {labels.size} labels")
    if labels.min() < 0 or labels.max() >= classes:
        raise UserError(f"{labels_path or path}: labels must be in [0, {classes}), got {labels.min()} to {labels.max()}")
    return [images, labels.astype(np.int64)]

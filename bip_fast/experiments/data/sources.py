"""The data sets that there are: what is fixed for each, where its files are, and `load`."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

import torch

from ...errors import UserError
from .arrays import Arrays
from .cifar import cifar_files, read_cifar
from .dataset import Dataset, statistics
from .digits import read_digits
from .idx import fashion_mnist_files, read_fashion_mnist
from .image_folders import read_image_folders
from .parts import AnyData
from .tiny_imagenet import read_tiny_imagenet

__all__ = ["DATA", "fingerprint", "load"]


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
        arrays = read_digits()
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

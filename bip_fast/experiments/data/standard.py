"""The standard files of the data sets, read without torchvision and without trusting them.

IDX (Fashion-MNIST): 4 bytes magic, big-endian sizes, then bytes; plain or gzipped. CIFAR: Python pickles, in their folder or still in
the tar.gz; only arrays, bytes, numbers, lists and dicts are unpickled, so a hostile file cannot run code. Lengths, shapes and label
ranges are always checked, and the md5 of the contents tells whether it is the official file.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import lzma
import math
import pickle
import struct
import tarfile
import zlib
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from ...errors import UserError, one_line

__all__ = ["Arrays", "cifar_files", "fashion_mnist_files", "read_cifar", "read_fashion_mnist"]

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


def _is_official(name: str, contents: bytes) -> bool:
    return hashlib.md5(contents, usedforsecurity=False).hexdigest() == OFFICIAL[name]


def _idx_file(folder: Path, name: str) -> Path:
    """The one to read; the zipped one where there are both."""
    zipped = folder / f"{name}.gz"
    return zipped if zipped.is_file() else folder / name


def fashion_mnist_files(folder: Path) -> list[Path]:
    """What `read_fashion_mnist` reads, whether it is there or not."""
    return [_idx_file(folder, f"{part}-{what}") for part in ("train", "t10k") for what in ("images-idx3-ubyte", "labels-idx1-ubyte")]


def _idx(folder: Path, name: str, dimensions: int) -> tuple[np.ndarray, bool]:
    """Array of uint8 of one IDX file, and whether it is the official one."""
    path = _idx_file(folder, name)
    if not path.is_file():
        raise UserError(f"fashion-mnist: {name}.gz is missing; looked for it (and for {name}) in {folder}")
    try:
        contents = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} is damaged: {error}") from error
    start = 4 + 4 * dimensions
    if len(contents) < start or contents[:4] != bytes((0, 0, 8, dimensions)):
        raise UserError(f"{path} is not an IDX file of bytes with {dimensions} dimension(s)")
    shape = struct.unpack(f">{dimensions}I", contents[4:start])
    expected = math.prod(shape)
    if len(contents) - start != expected:
        raise UserError(f"{path} is damaged: its header promises {expected} bytes, got {len(contents) - start}")
    return np.frombuffer(contents, np.uint8, offset=start).reshape(shape), _is_official(name, contents)


def read_fashion_mnist(folder: Path) -> Arrays:
    """The four IDX files in ``folder``: images of 28x28.

    Raises:
        UserError: a file is missing, damaged or of another shape.
    """
    parts, unofficial = [], []
    for part in ("train", "t10k"):
        names = f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte"
        (images, first), (labels, second) = _idx(folder, names[0], 3), _idx(folder, names[1], 1)
        unofficial += [name for name, official in zip(names, (first, second), strict=True) if not official]
        parts += _checked(folder / names[0], images[:, None], labels, (1, 28, 28), 10, folder / names[1])
    return Arrays(parts[0], parts[1], parts[2], parts[3], tuple(unofficial))


def _checked(
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


def _latin1(text: str, encoding: str) -> bytes:
    """What old pickles call for bytes; no other codec."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"codec {encoding!r} is not allowed")
    return text.encode("latin1")


class _ArrayUnpickler(pickle.Unpickler):
    """Arrays and plain containers only; any other name in the file is refused before it is looked up."""

    allowed: ClassVar[dict[tuple[str, str], Any]] = {
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy._core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("_codecs", "encode"): _latin1,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed in a data file")
        return self.allowed[module, name]


def _unpickled(path: Path, contents: bytes, label_key: bytes) -> tuple[np.ndarray, np.ndarray]:
    try:
        batch = _ArrayUnpickler(io.BytesIO(contents), encoding="bytes").load()
        data, labels = batch[b"data"], np.asarray(batch[label_key])
    except Exception as error:  # a damaged pickle raises nearly anything
        raise UserError(f"{path} is damaged: {one_line(error, named=True)}") from error
    if not isinstance(data, np.ndarray) or data.ndim != 2 or data.shape[1] != 3072 or labels.dtype.kind not in "iu":
        raise UserError(f"{path}: expected an array of rows of 3072 bytes and whole-number labels")
    return data.reshape(-1, 3, 32, 32), labels


def _cifar(classes: int) -> tuple[str, list[str], str]:
    """Folder, names of the training files and name of the test file, as they are published."""
    if classes == 10:
        return "cifar-10-batches-py", [f"data_batch_{i}" for i in range(1, 6)], "test_batch"
    return "cifar-100-python", ["train"], "test"


def cifar_files(folder: Path, classes: int) -> list[Path]:
    """What `read_cifar` reads, whether it is there or not: the files in their folder, or in ``folder``, or else the published archive."""
    inner, train, test = _cifar(classes)
    for place in (folder / inner, folder):
        if any((place / name).is_file() for name in (*train, test)):
            return [place / name for name in (*train, test)]
    return [folder / f"cifar-{classes}-python.tar.gz"]


def _contents(folder: Path, classes: int) -> dict[str, tuple[Path, bytes]]:
    """Path and bytes of each file, also of those in an archive."""
    inner, train, test = _cifar(classes)
    names = [*train, test]
    files = cifar_files(folder, classes)
    if len(files) == len(names):
        for path in files:
            if not path.is_file():
                raise UserError(f"{path.name} is missing in {path.parent}")
        return {path.name: (path, path.read_bytes()) for path in files}
    (archive,) = files
    if not archive.is_file():
        raise UserError(f"{names[0]} is missing; looked in {folder / inner} and {folder}, and for {archive}")
    found: dict[str, tuple[Path, bytes]] = {}
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                name = member.name.removeprefix("./").removeprefix(f"{inner}/")
                stream = tar.extractfile(member) if name in names else None
                if stream is not None:
                    found[name] = (archive / name, stream.read())
    except (OSError, EOFError, KeyError, tarfile.TarError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{archive} is damaged: {one_line(error)}") from error
    for name in names:
        if name not in found:
            raise UserError(f"{inner}/{name} is missing in {archive}")
    return found


def read_cifar(folder: Path, classes: int) -> Arrays:
    """CIFAR-10 or CIFAR-100 (fine labels): images of 3x32x32.

    Raises:
        UserError: a file is missing, damaged or of another shape.
    """
    inner, train, test = _cifar(classes)
    contents = _contents(folder, classes)
    parts: dict[str, list[np.ndarray]] = {}
    for name, (path, stored) in contents.items():
        images, labels = _unpickled(path, stored, b"labels" if classes == 10 else b"fine_labels")
        parts[name] = _checked(path, images, labels, (3, 32, 32), classes)
    unofficial = tuple(name for name, (_, stored) in contents.items() if not _is_official(f"{inner}/{name}", stored))
    images, labels = (np.concatenate([parts[name][i] for name in train]) for i in (0, 1))
    return Arrays(images, labels, parts[test][0], parts[test][1], unofficial)

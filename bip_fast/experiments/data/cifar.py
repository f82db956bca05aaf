"""CIFAR-10 and CIFAR-100: Python pickles, in their folder or still in the tar.gz.

Only arrays, bytes, numbers, lists and dicts are unpickled, so a hostile file cannot run code. Lengths, shapes and label ranges are always
checked.
"""

from __future__ import annotations

import io
import lzma
import pickle
import tarfile
import zlib
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ...errors import UserError, one_line
from .arrays import Arrays, checked, is_official

__all__ = ["cifar_files", "read_cifar"]


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
        parts[name] = checked(path, images, labels, (3, 32, 32), classes)
    unofficial = tuple(name for name, (_, stored) in contents.items() if not is_official(f"{inner}/{name}", stored))
    images, labels = (np.concatenate([parts[name][i] for name in train]) for i in (0, 1))
    return Arrays(images, labels, parts[test][0], parts[test][1], unofficial)

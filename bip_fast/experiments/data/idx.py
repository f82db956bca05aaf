"""IDX files (Fashion-MNIST): 4 bytes magic, big-endian sizes, then bytes; plain or gzipped. Lengths and shapes are always checked."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np

from ...errors import UserError
from .arrays import Arrays, checked, is_official

__all__ = ["fashion_mnist_files", "read_fashion_mnist"]


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
    return np.frombuffer(contents, np.uint8, offset=start).reshape(shape), is_official(name, contents)


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
        parts += checked(folder / names[0], images[:, None], labels, (1, 28, 28), 10, folder / names[1])
    return Arrays(parts[0], parts[1], parts[2], parts[3], tuple(unofficial))

"""Tiny-ImageNet as it is published: a folder of JPEG files, decoded once into memory.

    wnids.txt                       the 200 classes, one a line; class i is line i
    train/<wnid>/images/*.JPEG      500 images of each
    val/images/*.JPEG               10,000 images
    val/val_annotations.txt         file, wnid and a box for each of them, with tabs between

The labels of the published test images are not public, so the validation images are the test set, as everywhere in the literature.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from ...errors import UserError, one_line
from .arrays import Arrays

__all__ = ["read_tiny_imagenet"]

SIZE = (64, 64)  # width and height


def read_tiny_imagenet(folder: Path, classes: int = 200) -> Arrays:
    """Images uint8 (n, 3, 64, 64), grey ones in three equal channels, in the order of class and file name.

    Raises:
        UserError: a file is missing, damaged, of another size or not annotated, or Pillow is not installed.
    """
    if importlib.util.find_spec("PIL") is None:
        raise UserError("--data tiny-imagenet needs Pillow: pip install 'bip_fast[cli]'")
    wnids = _lines(folder / "wnids.txt")
    if len(wnids) != classes or len(set(wnids)) != classes:
        raise UserError(f"{folder / 'wnids.txt'}: expected {classes} different classes, got {len(set(wnids))} in {len(wnids)} lines")
    unknown = sorted({path.name for path in (folder / "train").glob("*") if path.is_dir()} - set(wnids))
    if unknown:
        raise UserError(f"{folder / 'train' / unknown[0]} is no class of wnids.txt")
    files, labels = [], []
    for label, wnid in enumerate(wnids):
        own = sorted((folder / "train" / wnid / "images").glob("*.JPEG"))
        if not own:
            raise UserError(f"there are no .JPEG files in {folder / 'train' / wnid / 'images'}")
        files += own
        labels += [label] * len(own)
    test_files, test_labels = _annotated(folder / "val", wnids)
    return Arrays(_images(files), np.array(labels, np.int64), _images(test_files), np.array(test_labels, np.int64), ())


def _images(files: Sequence[Path]) -> np.ndarray:
    images = np.empty((len(files), 3, *SIZE[::-1]), np.uint8)
    with ThreadPoolExecutor() as pool:  # Pillow decodes outside of Python's lock
        for _ in pool.map(_decode_into, files, images):
            pass
    return images


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"tiny-imagenet: cannot read {path}: {getattr(error, 'strerror', None) or error}") from error


def _annotated(folder: Path, wnids: Sequence[str]) -> tuple[list[Path], list[int]]:
    """Files of the validation images and their labels."""
    annotations = folder / "val_annotations.txt"
    try:
        lines = annotations.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"tiny-imagenet: cannot read {annotations}: {getattr(error, 'strerror', None) or error}") from error
    number = {wnid: i for i, wnid in enumerate(wnids)}
    labels: dict[str, int] = {}
    for i, line in enumerate(lines, 1):
        fields = line.split("\t")
        if len(fields) != 6 or fields[1] not in number:
            raise UserError(f"{annotations}, line {i}: expected file, class of wnids.txt and box with tabs between, got {line[:60]!r}")
        if fields[0] in labels:
            raise UserError(f"{annotations}, line {i}: {fields[0]} was in an earlier line")
        labels[fields[0]] = number[fields[1]]
    found = sorted(path.name for path in (folder / "images").glob("*.JPEG"))
    for name in sorted(set(found) ^ set(labels)):
        what = "is not in val_annotations.txt" if name not in labels else "is missing"
        raise UserError(f"{folder / 'images' / name} {what}")
    if not found:
        raise UserError(f"there are no .JPEG files in {folder / 'images'}")
    return [folder / "images" / name for name in found], [labels[name] for name in found]


def _decode_into(path: Path, out: np.ndarray) -> None:
    from PIL import Image

    try:
        with Image.open(path, formats=["JPEG"]) as image:
            size, pixels = image.size, np.asarray(image.convert("RGB")) if image.size == SIZE else None
    except Exception as error:  # Pillow raises nearly anything for damaged files
        raise UserError(f"{path} is damaged: {one_line(error, 120)}") from error
    if pixels is None:
        raise UserError(f"{path}: expected {SIZE[0]}x{SIZE[1]} pixels, got {size[0]}x{size[1]}")
    out[:] = pixels.transpose(2, 0, 1)

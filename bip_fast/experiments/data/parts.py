"""Parts of a data set: held-out images or sentences, fewer of them, fewer pixels."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ...errors import UserError
from .dataset import Dataset
from .image_folders import Streamed
from .sentences import Sentences, Tokens
from .windows import Prose, Windows

__all__ = ["VALIDATION_IMAGES", "AnyData", "AnyRead", "Split", "at_stride", "hold_out", "subset"]

VALIDATION_IMAGES = 5000  # held out by default, where that is at most a fifth
AnyData = Dataset | Streamed | Tokens | Windows  # what a network is trained on
AnyRead = Dataset | Streamed | Sentences | Prose  # what a reader gives
Split = Dataset | Streamed | Sentences | Windows  # of what parts are taken: windows know their number, a text does not


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


def hold_out(data: Split, count: int = VALIDATION_IMAGES, seed: int = 0) -> Split:
    """For choosing options: ``count`` training images take the place of the test images, which are dropped.

    The part is stratified, chosen by ``seed`` (not by the seed of a run), and at most a fifth of the training images.
    """
    count = min(count, len(data.train_labels) // 5)
    if isinstance(data, Windows):
        return data.held_out(count)
    return data.selected(*stratified(data.train_labels, count, seed))


def subset(data: Split, count: int, seed: int = 0) -> Split:
    """A stratified part of ``count`` training images, chosen by ``seed``; the test images stay.

    Raises:
        UserError: there are not so many.
    """
    if count > len(data.train_labels):
        raise UserError(f"--train-images must be at most {len(data.train_labels):,} for --data {data.name}, got {count:,}")
    if isinstance(data, Windows):
        return data.first(count)
    return data.selected(stratified(data.train_labels, count, seed)[1])


def at_stride(data: Split, stride: int) -> Split:
    """Every ``stride``-th pixel in both directions."""
    if not isinstance(data, Dataset):
        raise UserError(f"--stride is for data sets in memory, got --data {data.name}")
    parts = {name: getattr(data, name)[:, :, ::stride, ::stride].contiguous() for name in ("train_images", "test_images")}
    return replace(data, **parts, padding=max(1, data.padding // stride)).with_own_statistics()

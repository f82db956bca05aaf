"""scikit-learn's digits, which need no file."""

from __future__ import annotations

import importlib.util

import numpy as np
import torch

from ...errors import UserError
from .arrays import Arrays
from .dataset import split

__all__ = ["read_digits"]


def read_digits() -> Arrays:
    """scikit-learn's 1797 digits of 8x8; a third of every class is the test set."""
    if importlib.util.find_spec("sklearn") is None:
        raise UserError("--data digits needs scikit-learn: pip install 'bip_fast[cli]'")
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images, labels = bunch.images[:, None].astype(np.uint8), bunch.target.astype(np.int64)
    train, test = (part.numpy() for part in split(torch.from_numpy(labels), 1 / 3))
    return Arrays(images[train], labels[train], images[test], labels[test], ())

"""Kinds of data, as far as sentences for people differ between them."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["IMAGES", "TEXT", "Kind"]


class Kind(NamedTuple):
    """Words.

    Args:
        items: what a data set consists of.
        weights: what competes in a network for them.
    """

    items: str
    weights: str


IMAGES = Kind("images", "all Conv and Linear weights")
TEXT = Kind("sentences", "the matrices of the encoder")

"""Sparsity patterns: how the weights of a tensor form units, each of which is kept or dropped as one. The kernels know units, not names.

====================  ==============================================================================================================
"unstructured"        every weight is a unit
"filter"              the weights of one output channel
"channel"             the weights that read one input channel
"block:RxC"           blocks of R rows and C columns of the weight as a matrix, its first dimension by all others; smaller at the edges
"N:M"                 every weight is a unit, and of every M that follow each other in a row of that matrix N are kept
====================  ==============================================================================================================

Of stacked matrices (`layers`) each is divided on its own. Where one is stored as inputs by outputs, R still counts outputs and C inputs,
and N:M does not fit. Rows and columns are else those of the memory: in ``channels_last`` the columns run over the input channels of one
kernel position first, which is the order that sparse kernels for that layout read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from ..reference import Blocks
from .layers import Layer

__all__ = ["NofM", "Pattern", "Refused", "parse"]

SIZES = (2, 4, 8, 16, 32)  # M of N:M: what one mask word divides into
SINGLE = "unstructured"
PLURALS = {"filter": "filters", "channel": "input channels", "block": "blocks"}  # of units of several weights
EXPECTED = '"unstructured", "filter", "channel", "N:M" with N < M and M one of 2, 4, 8, 16, 32, or "block:RxC"'


class Refused(Exception):
    """A tensor stays dense, because the pattern does not fit it or for another reason, which is the message."""


class NofM(NamedTuple):
    """Of every ``of`` entries that follow each other ``keep`` are kept."""

    keep: int
    of: int


class Pattern(NamedTuple):
    """One kind of unit.

    Args:
        name: as the user wrote it.
        kind: "unstructured", "filter", "channel", "N:M" or "block".
        sizes: N and M, or R and C.
    """

    name: str
    kind: str
    sizes: tuple[int, int] = (1, 1)

    @property
    def units(self) -> str:
        """What a sparsity is a share of."""
        return PLURALS.get(self.kind, "weights")

    @property
    def sparsity(self) -> float | None:
        """The one fraction of zeros that the pattern has, None if it leaves that open."""
        return 1 - self.sizes[0] / self.sizes[1] if self.kind == "N:M" else None

    def divide(self, shape: Sequence[int], stride: Sequence[int], layer: Layer) -> Blocks | NofM | None:
        """Units of a dense tensor; None: its entries.

        Raises:
            Refused: they would not be what the pattern promises.
        """
        if self.kind == SINGLE:
            return None
        if 0 in shape:
            raise Refused("it has no entries")
        order = memory_order(shape, stride)
        if self.kind in ("filter", "channel"):
            outputs = (self.kind == "filter") != layer.transposed
            return _along(order, shape, 0, 1) if outputs else _along(order, shape, 1, layer.groups)
        if order[0] != 0:
            raise Refused("its first dimension is not the outermost in memory")
        rows, cols = shape[0], math.prod(shape[1:])
        if self.kind == "block":
            high, wide = reversed(self.sizes) if layer.transposed and len(shape) == 2 else self.sizes
            return Blocks(rows, cols, min(high, rows), min(wide, cols))
        if layer.transposed:
            raise Refused(f"{self.name} runs along the inputs, which are not neighbours in memory in a transposed weight")
        if cols % self.sizes[1]:
            raise Refused(f"its {cols} inputs per output are not a multiple of {self.sizes[1]}")
        return NofM(*self.sizes)


def memory_order(shape: Sequence[int], stride: Sequence[int]) -> list[int]:
    """Dimensions of a dense tensor from the outermost in memory to the innermost. Those of size 1 stay where they are named."""
    order = sorted((d for d, size in enumerate(shape) if size != 1), key=lambda d: -stride[d])
    for d, size in enumerate(shape):
        if size == 1:
            order.insert(d, d)
    return order


def _along(order: list[int], shape: Sequence[int], dim: int, groups: int) -> Blocks:
    """Units are the places along a dimension; with groups, each of which has its own, a share of dimension 0 times the places."""
    if groups > 1 and order[0] != 0:
        raise Refused("its first dimension, which its groups divide, is not the outermost in memory")
    place = order.index(dim)
    before, after = (math.prod(shape[d] for d in part) for part in (order[:place], order[place + 1 :]))
    return Blocks(before, shape[dim] * after, max(before // groups, 1), max(after, 1))


def parse(text: object) -> Pattern:
    """The pattern of a name; ValueError says which there are."""
    if text in (SINGLE, "filter", "channel"):
        return Pattern(str(text), str(text))
    if isinstance(text, str):
        n_of_m, block = re.fullmatch(r"(\d+):(\d+)", text), re.fullmatch(r"block:(\d+)x(\d+)", text)
        if n_of_m and 0 < int(n_of_m[1]) < int(n_of_m[2]) and int(n_of_m[2]) in SIZES:
            return Pattern(text, "N:M", (int(n_of_m[1]), int(n_of_m[2])))
        if block and int(block[1]) and int(block[2]):
            return Pattern(text, "block", (int(block[1]), int(block[2])))
    raise ValueError(f"pattern must be {EXPECTED}, got {text!r}")

"""Kinds of data, as far as sentences for people differ between them."""

from __future__ import annotations

import math
from typing import NamedTuple

__all__ = ["IMAGES", "LANGUAGE", "TEXT", "Kind"]


class Kind(NamedTuple):
    """Words.

    Args:
        items: what a data set consists of.
        weights: what competes in a network for them.
        answers: what is right or wrong, if not the items.
    """

    items: str
    weights: str
    answers: str = ""

    def told(self, accuracy: float, loss: float, part: str) -> str:
        """A score in words."""
        if self.answers:
            return f"perplexity {math.exp(loss):.2f}, {100 * accuracy:.2f} % of the {part} {self.answers} right"
        return f"{100 * accuracy:.2f} % of the {part} {self.items} right"


IMAGES = Kind("images", "the weights of all layers that are pruned")
TEXT = Kind("sentences", "the matrices of the encoder")
LANGUAGE = Kind("windows of text", "the matrices of the decoder", "tokens")

"""What a weight is worth before a stage trains it: one score for every entry of every weight that can be pruned, by name;
larger is kept.

A filter, channel or block has the mean of its entries, also where the papers know single weights only. The criteria of methods that prune
at one moment are in `at_start`, the start of Hydra's scores in `hydra`; all others go by magnitude.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...engine.layers import weights
from ..data.batches import Position
from ..data.parts import AnyData
from ..settings import Settings

__all__ = ["MAGNITUDE", "Criterion", "Scored", "Scores", "Select", "magnitude", "to_unit_interval"]

Scores = dict[str, Tensor]
Select = Callable[[Scores, float], dict[str, Tensor]]  # which entries stay at a sparsity; a weight without a mask keeps all


@dataclass(frozen=True)
class Scored:
    """What a criterion may look at.

    Args:
        model: left as it is, but by criteria that prune on their way (`layerwise`).
        sparsity: of the masks that are chosen by the scores.
        select: masks as the stage chooses them, under its pattern, scope and budgets.
    """

    model: nn.Module
    settings: Settings
    data: AnyData
    sparsity: float
    select: Select

    @property
    def position(self) -> Position:
        """The random numbers of criteria."""
        return Position(self.settings.seed, "scores", 0)

    def batches(self, count: int) -> list[tuple[Tensor, Tensor]]:
        """The first batches of an epoch of their own, whole on every rank."""
        epoch = self.data.epoch(self.settings.batch_size, self.position)
        return [(inputs, labels) for inputs, labels in (epoch.batch(i) for i in range(count))]


@dataclass(frozen=True)
class Criterion:
    """A way to score weights.

    Args:
        scores: one for every entry of every weight that can be pruned, or of every one that competes.
        images: forward and backward passes that it takes, in images.
    """

    name: str
    scores: Callable[[Scored], Scores]
    images: Callable[[Settings, AnyData], int] = lambda settings, data: 0


def to_unit_interval(scores: Mapping[Any, Tensor]) -> dict[Any, Tensor]:
    """The same order in [0, 1], as `FastBiP.set_scores` takes it. What is not negative is divided by a power of two, which is exact;
    otherwise the lowest becomes 0, rounded to float32."""
    lowest = min((float(x.min()) for x in scores.values() if x.numel()), default=0.0)
    largest = max((float(x.max()) for x in scores.values() if x.numel()), default=1.0)
    if lowest < 0:
        span = (largest - lowest) or 1.0
        return {key: ((x.double() - lowest) / span).float() for key, x in scores.items()}
    exponent = math.frexp(largest)[1] if largest > 1 else 0
    return {key: torch.ldexp(x.float(), torch.tensor(-exponent)) for key, x in scores.items()}


def magnitude(model: nn.Module) -> Scores:
    """|theta| of every weight that can be pruned."""
    return {name: x.detach().abs() for name, x in weights(model)}


MAGNITUDE = Criterion("magnitude", lambda of: magnitude(of.model))

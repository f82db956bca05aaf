"""Iterative magnitude pruning, in rounds: each starts from the network that the round before has trained."""

from __future__ import annotations

import math

from ..settings import Settings
from .stage import Method, Stage, retraining

__all__ = ["IMP", "rounds"]


def rounds(start: float, end: float, share: float) -> list[float]:
    """Sparsities of iterative pruning from ``start`` to ``end``, each of which removes ``share`` of what is left; the last one less.

    All but the last depend on ``start`` and ``share`` only, so that runs to several ends have them in common. They are rounded as people
    write them, 0.790285 for 1 - 0.8**7; an ``end`` that is written with fewer digits takes no round for the rest.
    """
    found: list[float] = []
    while start < end and (not found or found[-1] < end):
        left = (1 - start) * (1 - share) ** (len(found) + 1)
        found.append(end if left < 1.001 * (1 - end) else round(1 - left, max(6, 3 - math.floor(math.log10(left)))))
    return found


def _iterative(settings: Settings, start: float) -> tuple[Stage, ...]:
    sparsities = rounds(start, settings.sparsity, settings.per_round)
    return tuple(retraining(settings, f"round {100 * sparsity:.4g} %", sparsity, settings.epochs) for sparsity in sparsities)


IMP = Method(
    "iterative magnitude pruning: a share of the weights (per_round) goes, the rest rewinds and is trained for E, and again",
    "D + E for each round",
    "Frankle and Carbin 2019; rewind to an epoch: Frankle et al. 2020; of the step size: Renda et al. 2020, arXiv 2003.02389",
    True,
    _iterative,
    {"rewind": "init"},
    uses=("lr", "rewind"),
    in_rounds=True,
    any_sparsity=True,
    adamw={"rewind": "init"},
)

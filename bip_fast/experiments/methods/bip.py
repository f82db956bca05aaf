"""BiP: weights and masks are learned at two levels, with the settings of this project and with those of the paper."""

from __future__ import annotations

from ..settings import Settings
from .stage import STEPS, Method, Stage, recipe, retraining

__all__ = ["BIP", "PAPER"]


def _bip(settings: Settings, start: float) -> tuple[Stage, ...]:
    own = recipe(settings, "prune", mask_lr=settings.mask_lr, freeze=settings.freeze)
    learned = Stage(own, settings.sparsity, settings.levels, ramp=settings.ramp)
    if settings.rewind is None:
        return (learned,)
    return learned, retraining(settings, "retrain", settings.sparsity, settings.pretrain_epochs)


BIP = Method(
    "learns weights and masks at two levels, from one backward pass (levels joint) or on separate batches (alternating)",
    "D + E",
    "Zhang et al. 2022, with the settings of this project (docs/paper.md)",
    True,
    _bip,
    {"levels": "joint", "lr": 0.2, "mask_lr": 1.6, "gamma": 1e30, "ramp": 0.5, "score_start": "square"},
    uses=STEPS,
)

PAPER = Method(
    "the same with the settings of the paper: separate batches, the whole sparsity from the first step",
    "D + E",
    "Zhang et al. 2022, arXiv 2210.04092",
    True,
    _bip,
    {"lr": 0.01, "mask_lr": 0.1, "weight_decay": 1e-4},
    uses=STEPS,
)

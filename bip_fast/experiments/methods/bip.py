"""BiP: weights and masks are learned at two levels, with the settings of this project and with those of the paper."""

from __future__ import annotations

import math
from typing import Any

from ...presets import PRESETS
from ..settings import Settings
from .stage import STEPS, Method, Stage, recipe, retraining

__all__ = ["BIP", "PAPER"]


def _bip(settings: Settings, start: float) -> tuple[Stage, ...]:
    own = recipe(settings, "prune", mask_lr=settings.mask_lr, freeze=settings.freeze)
    learned = Stage(own, settings.sparsity, settings.levels, ramp=settings.ramp, ramp_start=settings.ramp_start)
    if settings.rewind is None:
        return (learned,)
    return learned, retraining(settings, "retrain", settings.sparsity, settings.pretrain_epochs)


def _preset(preset: str, rule: str, *names: str) -> dict[str, Any]:
    """Settings that are options of the optimizer, as its preset has them."""
    options = dict(PRESETS[preset][rule])
    if (per_lr := options.get("mask_lr_per_lr")) is not None:
        options["mask_lr"] = float(f"{per_lr * options['lr']:.12g}")
    if math.isinf(options["gamma"]):
        options["gamma"] = 1e30  # files of settings have no infinity, and 1 / gamma is 0 beside every weight
    return {name: options[name] for name in names}


_JOINT = ("levels", "lr", "mask_lr", "gamma", "ramp", "score_start")

BIP = Method(
    "learns weights and masks at two levels, from one backward pass (levels joint) or on separate batches (alternating)",
    "D + E",
    "Zhang et al. 2022, with the settings of this project (docs/paper.md)",
    True,
    _bip,
    _preset("joint", "sgd", *_JOINT),
    uses=STEPS,
    adamw=_preset("joint", "adamw", *_JOINT),
)

PAPER = Method(
    "the same with the settings of the paper: separate batches, the whole sparsity from the first step",
    "D + E",
    "Zhang et al. 2022, arXiv 2210.04092",
    True,
    _bip,
    _preset("paper", "sgd", "lr", "mask_lr", "weight_decay"),
    uses=STEPS,
    adamw=_preset("paper", "adamw", "mask_lr"),
)

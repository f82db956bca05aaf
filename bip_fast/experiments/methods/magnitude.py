"""Magnitude pruning of a trained network: at once (omp), or more and more while it trains on (gmp)."""

from __future__ import annotations

from ..settings import Settings
from .stage import Method, Stage, recipe, retraining

__all__ = ["GMP", "OMP", "OMP_FINETUNE"]


def _one_shot(settings: Settings, start: float) -> tuple[Stage, ...]:
    return (retraining(settings, "retrain", settings.sparsity, settings.epochs),)


def _gradual(settings: Settings, start: float) -> tuple[Stage, ...]:
    own = recipe(settings, "prune")
    return (Stage(own, settings.sparsity, ramp=settings.ramp, ramp_start=settings.ramp_start, follow_magnitude=True),)


OMP = Method(
    "one-shot magnitude pruning of the trained network, weights back to where they began (rewind), trained again",
    "D + E",
    "Frankle and Carbin 2019, arXiv 1803.03635; rewind: Frankle et al. 2020, arXiv 1912.05671",
    True,
    _one_shot,
    {"rewind": "init"},
    uses=("lr", "rewind"),
    adamw={"rewind": "init"},
)

OMP_FINETUNE = Method(
    "one-shot magnitude pruning of the trained network, its weights fine-tuned under a restarted step size",
    "D + E",
    "Han et al. 2015, arXiv 1506.02626; restarted: Le and Hua 2021, arXiv 2105.03193",
    True,
    _one_shot,
    uses=("lr", "rewind"),
    one_shot=True,
)

GMP = Method(
    "gradual magnitude pruning: the sparsity grows along a cubic curve (ramp), masks are chosen anew on the way",
    "D + E",
    "Zhu and Gupta 2017, arXiv 1710.01878",
    True,
    _gradual,
    {"ramp": 0.5},
    uses=("lr", "ramp", "ramp_start"),
    adamw={"ramp": 0.6},
)

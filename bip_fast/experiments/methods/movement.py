"""Movement pruning (Sanh, Wolf and Rush 2020, arXiv 2005.07683): a weight is worth what training has moved it away from 0.

    s = -mask_lr * sum of theta * g over the steps so far,  g = dloss/d(m*theta)     by the straight-through estimate
    m = top-v(s), v the share that is kept                                           hard movement pruning
    v falls from 1 along a cubic after a warm-up, and stays at its last value in a cool-down, while scores and weights go on

Only weights that are kept receive a gradient. So these are joint steps without an implicit term whose scores begin equal, in the middle of
[0, 1], where they are stored: the order of the weights does not depend on ``mask_lr``, which only has to be so small that few scores reach
an end of that range, and so large that float32 does not lose small steps beside 0.5.
"""

from __future__ import annotations

import torch

from ...engine.layers import weights
from ..settings import Settings
from .criteria import Criterion
from .stage import Method, Stage, recipe

__all__ = ["MOVEMENT"]

MIDDLE = Criterion("middle", lambda of: {name: torch.full_like(x, 0.5) for name, x in weights(of.model)})


def _movement(settings: Settings, start: float) -> tuple[Stage, ...]:
    own = recipe(settings, "prune", mask_lr=settings.mask_lr)
    return (Stage(own, settings.sparsity, "joint", MIDDLE, ramp=settings.ramp, ramp_start=settings.ramp_start),)


# As in their runs of 10 epochs with a warm-up of 1 and a cool-down of 2.
_SCHEDULE = {"gamma": 1e30, "ramp_start": 0.1, "ramp": 0.8}

MOVEMENT = Method(
    "keeps what moves away from 0 while it trains: scores sum -theta * g; the sparsity grows after a warm-up and stays in a cool-down",
    "D + E",
    "Sanh et al. 2020, arXiv 2005.07683",
    True,
    _movement,
    {**_SCHEDULE, "mask_lr": 1.0},
    uses=("lr", "mask_lr", "ramp", "ramp_start"),
    adamw={**_SCHEDULE, "mask_lr": 10.0},
)

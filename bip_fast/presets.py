"""Presets: the values of the options that a user of `FastBiP` does not give. Everything given beside a preset wins.

"paper" has the steps and the start of the paper. "joint" has what did best in the comparisons of this project (docs/paper.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from .engine.options import LOWER_KEYS, MASK_RATES, check_count
from .engine.rules import GIVEN, Rule, rule_of

__all__ = ["PRESETS", "grows", "preset_options", "preset_rows", "preset_text", "ramp_steps"]

OWN = "optimizer of your own"  # what `GIVEN` is called where people read it

_SGD = {"momentum": 0.9, "nesterov": False}
_ADAMW = {"betas": (0.9, 0.999), "eps": 1e-8}
_PAPER = {"levels": "alternating", "mask_lr": 0.1, "gamma": 1.0, "mask_momentum": 0.0, "score_start": "magnitude", "ramp": 0.0}
_JOINT = {"levels": "joint", "gamma": math.inf, "mask_momentum": 0.0, "score_start": "square"}

# preset, then rule of the lower level; an optimizer of the user's brings its own options, and then "joint" has no step size of the scores
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "paper": {
        "sgd": {**_PAPER, **_SGD, "lr": 0.01, "weight_decay": 1e-4},
        "adamw": {**_PAPER, **_ADAMW, "lr": 1e-3, "weight_decay": 1e-2},
        GIVEN.name: _PAPER,
    },
    "joint": {
        "sgd": {**_JOINT, **_SGD, "lr": 0.2, "mask_lr_per_lr": 8.0, "weight_decay": 5e-4, "ramp": 0.5},
        "adamw": {**_JOINT, **_ADAMW, "lr": 1e-4, "mask_lr_per_lr": 1e4, "weight_decay": 1e-2, "ramp": 0.6},
        GIVEN.name: {**_JOINT, "ramp": 0.6},
    },
}


def grows(preset: str, optimizer: Any) -> bool:
    """Whether the sparsity of a preset grows under ``optimizer``, which is given as to `FastBiP`, once it is told the ``steps``."""
    return bool(PRESETS.get(preset, {}).get(rule_of(optimizer).name, {}).get("ramp"))


def preset_rows() -> list[tuple[str, str]]:
    """(preset and rule, its values) of every preset, for people to read."""
    return [
        (f"{preset}, {OWN if rule == GIVEN.name else rule}", ", ".join(f"{key} {preset_text(value)}" for key, value in options.items()))
        for preset, rules in PRESETS.items()
        for rule, options in rules.items()
    ]


def preset_text(value: Any) -> str:
    """The value of an option as people read it."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def preset_options(preset: str, rule: Rule, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a preset under a rule, with what is not None in ``given`` in their place.

    Raises:
        ValueError: there is no such preset; or an option of the lower level is given beside an optimizer of the user's, which has its own.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset must be {' or '.join(map(repr, PRESETS))}, got {preset!r}")
    chosen = {key: value for key, value in given.items() if value is not None}
    for key in LOWER_KEYS:
        if rule.gradient and key in chosen:
            raise ValueError(f"{key} must be given to the optimizer that your function makes, got {key}={chosen[key]!r} beside it")
    options = {**dict.fromkeys(MASK_RATES), **PRESETS[preset][rule.name]}
    if not chosen.keys().isdisjoint(MASK_RATES):
        options |= dict.fromkeys(MASK_RATES)  # what is given of the two has no other beside it
    return options | chosen


def ramp_steps(preset: str, ramp: float, steps: int | None) -> int:
    """Number of steps in which the sparsity grows, in a run of ``steps``; 0: it is there from the first one.

    Raises:
        ValueError: ``steps`` is no positive integer, or is given though nothing grows.
    """
    if steps is None:
        return 0
    length = check_count("steps", steps, 1)
    if not ramp:
        raise ValueError(f"steps must be left out with preset={preset!r}, whose sparsity does not grow, got {steps!r}")
    return max(round(ramp * length), 1)

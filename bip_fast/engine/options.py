"""Options of `FastBiP`: their names, the values that each may have, errors for all others, and the table that the kernels read."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
import torch

from .native import kernels
from .patterns import parse
from .rules import RULES, Rule

__all__ = [
    "ALL_KEYS",
    "LEVELS",
    "LOWER_KEYS",
    "MASK_RATES",
    "SCORE_STARTS",
    "SHARED_KEYS",
    "UPPER_KEYS",
    "SCOPES",
    "check_count",
    "check_group",
    "check_levels",
    "check_lower_steps",
    "check_score_start",
    "group_keys",
    "hyper_table",
    "refuse_count",
    "resolve_defaults",
    "resolve_density",
    "resolve_mask_lr",
    "resolve_pattern",
]

LEVELS = ("alternating", "joint")
SCORE_STARTS = ("magnitude", "square")
SCOPES = ("global", "layer", "erk")
MASK_RATES = ("mask_lr", "mask_lr_per_lr")  # two ways to say one thing: where one is given the other is None
UPPER_KEYS = (*MASK_RATES, "gamma", "mask_momentum")
LOWER_KEYS = tuple(dict.fromkeys(key for rule in RULES.values() for key in rule.options))
SHARED_KEYS = (*UPPER_KEYS, "sparsity", "pattern", "scope", "min_kept", "prune")  # under any rule
ALL_KEYS = (*LOWER_KEYS, *SHARED_KEYS)  # of any rule
_OF_THE_OPTIMIZER = ("preset", "optimizer", "score_start", "levels", "lower_steps", "exclude", "overrides", "coupled")


class _Range(NamedTuple):
    expected: str
    contains: Callable[[float], bool]


_LARGEST = float(np.finfo(np.float32).max)  # what the kernels can hold
_NOT_NEGATIVE = _Range("a finite float32 number of at least 0", lambda x: 0 <= x <= _LARGEST)
_RANGES = {
    "sparsity": _Range("in [0, 1)", lambda x: 0 <= x < 1),
    "density": _Range("in (0, 1]", lambda x: 0 < x <= 1),
    "lr": _NOT_NEGATIVE,
    "mask_lr": _NOT_NEGATIVE,
    "mask_lr_per_lr": _NOT_NEGATIVE,
    "gamma": _Range("greater than 0", lambda x: x > 0 and 1 / x <= _LARGEST),
    "momentum": _NOT_NEGATIVE,
    "mask_momentum": _NOT_NEGATIVE,
    "weight_decay": _NOT_NEGATIVE,
    # A dropped weight has no gradient and so no moments: with eps 0 its AdamW step is 0/0.
    "eps": _Range("a finite float32 number greater than 0", lambda x: x <= _LARGEST and float(np.float32(x)) > 0),
    "beta": _Range("two numbers in [0, 1)", lambda x: 0 <= x < 1),
}
_MAY_BE_TENSORS = (*LOWER_KEYS, *UPPER_KEYS, "beta")  # what schedulers move
_CHOICES = {"levels": LEVELS, "scope": SCOPES, "score_start": SCORE_STARTS}


def _check_number(name: str, value: Any) -> None:
    """ValueError unless it is a number in range; what schedulers move may be a tensor with one number."""
    number = isinstance(value, Real) or (name in _MAY_BE_TENSORS and isinstance(value, torch.Tensor) and value.numel() == 1)
    if number and isinstance(value, torch.Tensor) and (value.is_complex() or value.device.type == "meta"):
        number = False
    if not number or not _RANGES[name].contains(float(value)):
        raise ValueError(f"{name} must be {_RANGES[name].expected}, got {value!r}")


def _check_betas(betas: Any) -> None:
    pair = isinstance(betas, Sequence) and not isinstance(betas, str) and len(betas) == 2
    try:
        if not pair:
            raise ValueError
        for beta in betas:
            _check_number("beta", beta)
    except ValueError:
        raise ValueError(f"betas must be {_RANGES['beta'].expected}, got {betas!r}") from None


def group_keys(rule: Rule) -> tuple[str, ...]:
    """Options that every parameter group has under a rule."""
    return (*rule.options, *SHARED_KEYS)


def _check_choice(name: str, value: Any) -> None:
    if value not in _CHOICES[name]:
        raise ValueError(f"{name} must be {' or '.join(map(repr, _CHOICES[name]))}, got {value!r}")


def _check_flag(name: str, value: Any) -> None:
    if not isinstance(value, (bool, int)) or value not in (0, 1):
        raise ValueError(f"{name} must be True or False, got {value!r}")


def check_levels(levels: Any) -> str:
    """``levels`` if it is one of `LEVELS`; else ValueError."""
    _check_choice("levels", levels)
    return str(levels)


def check_score_start(score_start: Any) -> str:
    """``score_start`` if it is one of `SCORE_STARTS`; else ValueError."""
    _check_choice("score_start", score_start)
    return str(score_start)


def check_count(name: str, value: Any, least: int) -> int:
    """``value`` as an int of at least ``least``; else ValueError."""
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if number < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    return number


def check_lower_steps(lower_steps: Any) -> int:
    """``lower_steps`` as an int of at least 1; else ValueError."""
    return check_count("lower_steps", lower_steps, 1)


def refuse_count(options: Mapping[str, Any]) -> None:
    """ValueError for a ``k`` that the user gives. An optimizer of the user's may have an option of that name."""
    if "k" in options:
        raise ValueError("k is not an option: say which fraction of the weights becomes zero with sparsity, or stays with density")


def resolve_density(options: dict[str, Any]) -> None:
    """Turn ``density`` into ``sparsity = 1 - density``, in place.

    Raises:
        ValueError: both are given, or the density is out of range.
    """
    density = options.pop("density", None)
    if density is None:
        return
    if options.get("sparsity") is not None:
        raise ValueError(f"give one of sparsity and density, got both: sparsity={options['sparsity']!r} and density={density!r}")
    _check_number("density", density)
    # Rounded, so that density=0.7 and sparsity=0.3 are one selection group and not two that differ in the last bit.
    options["sparsity"] = round(1 - float(density), 12)
    if options["sparsity"] >= 1:
        raise ValueError(f"density must be at least 1e-12, got {density!r}")


def resolve_mask_lr(options: dict[str, Any]) -> None:
    """Set ``mask_lr`` to None where ``mask_lr_per_lr`` is given, and the other way round, in place."""
    given = [name for name in MASK_RATES if options.get(name) is not None]
    if len(given) == 1:
        options |= {**dict.fromkeys(MASK_RATES), given[0]: options[given[0]]}


def resolve_pattern(options: dict[str, Any]) -> None:
    """Set the sparsity to None, in place, where the pattern has one of its own (N:M).

    Raises:
        ValueError: the pattern is none, or another sparsity is given beside it.
    """
    if "pattern" not in options:
        return
    own = parse(options["pattern"]).sparsity
    if own is None:
        return
    given = options.get("sparsity")
    if given is not None and (not isinstance(given, Real) or abs(float(given) - own) > 1e-9):
        raise ValueError(f"sparsity must be {own:g} or left out with pattern {options['pattern']!r}, got {given!r}")
    options["sparsity"] = None


def resolve_defaults(defaults: dict[str, Any], unknown: Mapping[str, Any], rule: Rule) -> None:
    """Resolve and check the arguments that become the defaults of all parameter groups, in place.

    Args:
        defaults: the arguments.
        unknown: those that have no such name.
        rule: of the lower level.

    Raises:
        TypeError: an argument is unknown.
        ValueError: one is out of range, or two contradict each other.
    """
    refuse_count(unknown)
    resolve_density(defaults)
    if unknown:
        raise TypeError(f"FastBiP got unknown arguments: {', '.join(unknown)}")
    resolve_pattern(defaults)
    check_group(defaults, rule)


def check_group(group: dict[str, Any], rule: Rule) -> None:
    """Check the options of one parameter group under a rule.

    Raises:
        ValueError: names the first option out of range, what was expected and what came.
    """
    for name in _OF_THE_OPTIMIZER:
        if name in group:
            raise ValueError(f"{name} belongs to the optimizer, not to a parameter group, got {group[name]!r}")
    if group.get("density") is not None:
        raise ValueError(f"density of a group that exists is its sparsity: set sparsity to 1 - density, got density={group['density']!r}")
    for name in LOWER_KEYS:
        if name in group and name not in rule.options and not rule.gradient:
            raise ValueError(
                f"{name} is not an option of optimizer={rule.name!r}, which has {', '.join(rule.options)}; got {group[name]!r}"
            )
    if (group["mask_lr"] is None) == (group["mask_lr_per_lr"] is None):
        given = f"mask_lr={group['mask_lr']!r} and mask_lr_per_lr={group['mask_lr_per_lr']!r}"
        raise ValueError(f"give one of mask_lr and mask_lr_per_lr, and None for the other, got {given}")
    for name in (*rule.options, *UPPER_KEYS):
        if name == "betas":
            _check_betas(group[name])
        elif name == "nesterov":
            _check_flag(name, group[name])
        elif group[name] is not None or name not in MASK_RATES:
            _check_number(name, group[name])
    _check_flag("prune", group["prune"])
    resolve_pattern({"pattern": group["pattern"], "sparsity": group["sparsity"]})
    check_count("min_kept", group["min_kept"], 0)
    _check_choice("scope", group["scope"])
    if "nesterov" in rule.options and group["nesterov"] and not group["momentum"] > 0:
        raise ValueError(f"nesterov needs a momentum greater than 0, got momentum={group['momentum']!r}")
    if group["sparsity"] is not None:
        _check_number("sparsity", group["sparsity"])


def _mask_lr(group: dict[str, Any]) -> float:
    follows = group["mask_lr"] is None
    if follows and "lr" not in group:
        raise ValueError("mask_lr must be given where the optimizer has no lr that it could follow, got mask_lr_per_lr alone")
    return float(group["mask_lr_per_lr"]) * float(group["lr"]) if follows else float(group["mask_lr"])


def hyper_table(groups: Sequence[dict[str, Any]], rule: Rule) -> np.ndarray:
    """Hyper-parameters for the kernels: a row of ``hyper_dtype`` per parameter group."""
    table = np.zeros(len(groups), dtype=kernels().hyper_dtype)
    for key in (*rule.options, *UPPER_KEYS):
        if key == "betas":
            table["beta1"], table["beta2"] = zip(*[map(float, group["betas"]) for group in groups], strict=True)
        elif key != "gamma" and key not in MASK_RATES:
            table[key] = [float(group[key]) for group in groups]
    table["mask_lr"] = [_mask_lr(group) for group in groups]
    table["inv_gamma"] = [1 / float(group["gamma"]) for group in groups]
    return table

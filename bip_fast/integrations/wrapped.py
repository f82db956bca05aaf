"""What the modules for single trainers share: the `FastBiP` behind a trainer's wrapper, its numbers with a prefix, a share of a run."""

from __future__ import annotations

from numbers import Real
from typing import Any

from ..optimizer import FastBiP

__all__ = ["PREFIX", "check_share", "numbers", "unwrapped"]

PREFIX = "pruning/"  # of the names in a trainer's logs


def unwrapped(optimizer: Any) -> FastBiP:
    """The `FastBiP` that an `AcceleratedOptimizer`, a `LightningOptimizer` or the like holds, or that ``optimizer`` is itself.

    Raises:
        TypeError: it is another optimizer.
    """
    inner = optimizer
    while (below := getattr(inner, "optimizer", None)) is not None:
        inner = below
    if not isinstance(inner, FastBiP):
        raise TypeError(f"the optimizer must be a FastBiP, got {type(inner).__name__}")
    return inner


def numbers(optimizer: FastBiP, prefix: str, layers: bool) -> dict[str, float]:
    """`FastBiP.metrics` with a prefix before every name."""
    return {prefix + name: value for name, value in optimizer.metrics(layers=layers).items()}


def check_share(name: str, value: Any) -> float | None:
    """The share of a run, or None; ValueError unless it is in [0, 1]."""
    if value is not None and not (isinstance(value, Real) and 0 <= float(value) <= 1):
        raise ValueError(f"{name} must be in [0, 1], got {value!r}")
    return None if value is None else float(value)

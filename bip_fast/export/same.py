"""Whether two networks computed the same, up to the rounding of sums in another order.

Rounding is relative to the numbers that are summed, which are not at hand; for most entries of an output they are about as large as the
entries. So an entry may differ by a share of itself plus that share of a scale, three times the median magnitude: about the largest of
ordinary numbers, and not moved by a few that are -1e9 or the lowest float there is, as in masked logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["near", "same"]


def near(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Equal shapes, and equal up to rounding; integers, bools, infinities and nan are equal exactly. Waits for the device.

    Args:
        tolerance: for floating-point and complex numbers. Entries that are equal bit for bit, such as a constant fill, have no part in the
            scale.
    """
    if found.shape != expected.shape:
        return False
    if expected.is_complex():
        return found.is_complex() and near(torch.view_as_real(found.resolve_conj()), torch.view_as_real(expected.resolve_conj()), tolerance)
    if not expected.is_floating_point():
        return torch.equal(found, expected)
    other = ~((found == expected) | (found.isnan() & expected.isnan()))
    a, b = (x[other].to(torch.float64 if x.dtype == torch.float64 else torch.float32) for x in (found, expected))
    if not len(b):
        return True
    if not (a.isfinite() & b.isfinite()).all():
        return False
    size = b.abs()
    scale = min(float(size.max()), 3 * float(size.median()))
    return bool(((a - b).abs() <= tolerance * (size + scale)).all())


def same(found: Sequence[Any], expected: Sequence[Any], tolerances: dict[torch.dtype, float]) -> bool:
    """Equal leaves of two outputs, tensors as in `near` with the tolerance of their dtype."""
    if len(found) != len(expected):
        return False
    for a, b in zip(found, expected, strict=True):
        if isinstance(b, Tensor) != isinstance(a, Tensor):
            return False
        if not (near(a, b, tolerances.get(b.dtype, 1e-4)) if isinstance(b, Tensor) else bool(a == b)):
            return False
    return True

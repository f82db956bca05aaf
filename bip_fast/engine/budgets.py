"""Budgets: which units compete for a place in the mask, and how many of them get one."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from ..reference import kept
from .native import MAX_GROUP
from .parameter import Parameter
from .units import UnitSet

__all__ = ["Budget", "SelectionGroup", "budget_of", "erk_kept", "selection_groups"]


class Budget(NamedTuple):
    """What one rival, a pruned tensor or a set of units, asks for.

    Args:
        shape: of the (first) tensor.
        units: how many things compete: weights, filters, blocks.
        least: how many of them are kept in any case.
        kind: only units of one kind compete.
    """

    shape: tuple[int, ...]
    units: int
    sparsity: float
    scope: str
    least: int = 0
    kind: str = "unstructured"


def budget_of(rival: Parameter | UnitSet, options: Mapping[str, Any]) -> Budget:
    """What a parameter, or a set of units, asks for under the ``options`` of its parameter group."""
    least = min(int(options["min_kept"]), rival.total) if isinstance(rival, UnitSet) else 0
    return Budget(tuple(rival.whole), rival.total, float(options["sparsity"]), options["scope"], least, rival.pattern)


class SelectionGroup(NamedTuple):
    """Parameters and sets of units that compete: ``members`` are positions in the list of budgets, in order."""

    members: list[int]
    numel: int
    kept: int


def erk_kept(
    shapes: Sequence[tuple[int, ...]], sparsity: float, units: Sequence[int] | None = None, least: Sequence[int] | None = None
) -> list[int]:
    """How many units each tensor keeps under Erdos-Renyi-Kernel budgets (Mocanu et al. 2018; with kernels, Evci et al. 2020).

    The density of a tensor is proportional to the sum of its dimensions over their product: small layers stay denser than large ones. A
    tensor that would keep more than it has stays whole, and the others share what is left. All together keep ``n - round(sparsity*n)`` of n
    units, exactly: remainders of the division go to the largest, earlier tensors first.

    Args:
        shapes: of the tensors.
        sparsity: in [0, 1).
        units: how many each has; default: its weights.
        least: how many each keeps before the others are shared out, all together more than n - round(sparsity*n) if need be; default: 0.
    """
    units = [math.prod(shape) for shape in shapes] if units is None else units
    keeps = [0] * len(shapes) if least is None else list(least)
    room = [u - k for u, k in zip(units, keeps, strict=True)]
    weights = [Fraction(u * sum(shape), math.prod(shape)) if u else Fraction(0) for u, shape in zip(units, shapes, strict=True)]
    rest = max(kept(sum(units), sparsity) - sum(keeps), 0)
    open_, whole = {i for i in range(len(shapes)) if room[i]}, {-1}
    while whole and open_:
        total = sum(weights[i] for i in open_)
        whole = {i for i in open_ if rest * weights[i] >= room[i] * total}
        for i in whole:
            keeps[i] = units[i]
        open_ -= whole
        rest -= sum(room[i] for i in whole)
    if open_:
        parts = {i: divmod(rest * weights[i], total) for i in open_}
        for i, (quotient, _) in parts.items():
            keeps[i] += int(quotient)
        rest -= sum(int(quotient) for quotient, _ in parts.values())
        for i in sorted(open_, key=lambda i: (-parts[i][1], i))[:rest]:
            keeps[i] += 1
    return keeps


def selection_groups(budgets: Sequence[Budget], most: int = MAX_GROUP) -> list[SelectionGroup]:
    """Groups of tensors that share one budget.

    Scope "layer" makes one group per tensor; scope "global" one group of all tensors with the same sparsity and kind of unit; scope "erk"
    one group per tensor, of which those with the same sparsity and kind together keep what a global group would (`erk_kept`).

    Raises:
        ValueError: a group has ``most`` units or more.
    """
    members: dict[Hashable, list[int]] = {}
    together: dict[Hashable, list[int]] = {}
    for position, budget in enumerate(budgets):
        rivals = budget.kind, budget.sparsity
        members.setdefault(rivals if budget.scope == "global" else (position,), []).append(position)
        if budget.scope == "erk":
            together.setdefault(rivals, []).append(position)
    shares: dict[int, int] = {}
    for positions in together.values():
        rivals_of = [budgets[i] for i in positions]
        keeps = erk_kept([b.shape for b in rivals_of], rivals_of[0].sparsity, [b.units for b in rivals_of], [b.least for b in rivals_of])
        shares |= dict(zip(positions, keeps, strict=True))
    groups = []
    for positions in members.values():
        numel = sum(budgets[position].units for position in positions)
        if numel >= most:
            fewer = f"2**{most.bit_length() - 1}"
            raise ValueError(f'a selection group must have fewer than {fewer} weights, got {numel}; scope="layer" makes smaller groups')
        first = positions[0]
        least = sum(budgets[position].least for position in positions)
        groups.append(SelectionGroup(positions, numel, shares.get(first, max(kept(numel, budgets[first].sparsity), least))))
    return groups

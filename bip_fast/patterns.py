"""Sparsity sets and budgets: what is a selection group, and how many of its weights are kept."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

from .ops import MAX_GROUP
from .reference import kept

__all__ = ["PATTERNS", "SCOPES", "Budget", "SelectionGroup", "erk_kept", "selection_groups"]

PATTERNS = ("unstructured",)
SCOPES = ("global", "layer", "erk")


class Budget(NamedTuple):
    """What one pruned tensor asks for."""

    shape: tuple[int, ...]
    sparsity: float
    scope: str

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


class SelectionGroup(NamedTuple):
    """Tensors whose weights compete: ``members`` are positions in the list of budgets, in order."""

    members: list[int]
    numel: int
    kept: int


def erk_kept(shapes: Sequence[tuple[int, ...]], sparsity: float) -> list[int]:
    """How many weights each tensor keeps under Erdos-Renyi-Kernel budgets (Mocanu et al. 2018; with kernels, Evci et al. 2020).

    The density of a tensor is proportional to the sum of its dimensions over their product, so what it keeps to the sum of its dimensions:
    small layers stay denser than large ones. A tensor that would keep more than it has stays whole, and the others share what is left.
    All together keep ``n - round(sparsity*n)``, exactly: remainders of the division go to the largest, earlier tensors first.
    """
    sizes = [math.prod(shape) for shape in shapes]
    rest = kept(sum(sizes), sparsity)
    keeps = [0] * len(shapes)
    open_, whole = {i for i, size in enumerate(sizes) if size}, {-1}
    while whole and open_:
        total = sum(sum(shapes[i]) for i in open_)
        whole = {i for i in open_ if rest * sum(shapes[i]) >= sizes[i] * total}
        for i in whole:
            keeps[i] = sizes[i]
        open_ -= whole
        rest -= sum(sizes[i] for i in whole)
    if open_:
        parts = {i: divmod(rest * sum(shapes[i]), total) for i in open_}
        for i, (quotient, _) in parts.items():
            keeps[i] = quotient
        rest -= sum(quotient for quotient, _ in parts.values())
        for i in sorted(open_, key=lambda i: (-parts[i][1], i))[:rest]:
            keeps[i] += 1
    return keeps


def selection_groups(budgets: Sequence[Budget]) -> list[SelectionGroup]:
    """Groups of tensors that share one budget.

    Scope "layer" makes one group per tensor; scope "global" one group of all tensors with the same sparsity; scope "erk" one group per
    tensor, of which those with the same sparsity together keep what a global group would (`erk_kept`).

    Raises:
        ValueError: a group has 2**32 weights or more.
    """
    members: dict[Hashable, list[int]] = {}
    together: dict[float, list[int]] = {}
    for position, budget in enumerate(budgets):
        key = budget.sparsity if budget.scope == "global" else (position,)
        members.setdefault(key, []).append(position)
        if budget.scope == "erk":
            together.setdefault(budget.sparsity, []).append(position)
    shares: dict[int, int] = {}
    for sparsity, positions in together.items():
        shares |= dict(zip(positions, erk_kept([budgets[i].shape for i in positions], sparsity), strict=True))
    groups = []
    for positions in members.values():
        numel = sum(budgets[position].numel for position in positions)
        if numel >= MAX_GROUP:
            raise ValueError(f'a selection group must have fewer than 2**32 weights, got {numel}; scope="layer" makes smaller groups')
        first = positions[0]
        groups.append(SelectionGroup(positions, numel, shares.get(first, kept(numel, budgets[first].sparsity))))
    return groups

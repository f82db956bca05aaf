"""Sparsity sets and budgets: what is a selection group, and how many of its weights are kept."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

from .ops import MAX_GROUP
from .reference import kept

__all__ = ["PATTERNS", "SCOPES", "Budget", "SelectionGroup", "selection_groups"]

PATTERNS = ("unstructured",)
SCOPES = ("global", "layer")


class Budget(NamedTuple):
    """What one pruned tensor asks for."""

    numel: int
    sparsity: float
    scope: str


class SelectionGroup(NamedTuple):
    """Tensors whose weights compete: ``members`` are positions in the list of budgets, in order."""

    members: list[int]
    numel: int
    kept: int


def selection_groups(budgets: Sequence[Budget]) -> list[SelectionGroup]:
    """Groups of tensors that share one budget.

    Scope "layer" makes one group per tensor; scope "global" one group of all tensors with the same sparsity.

    Raises:
        ValueError: a group has 2**32 weights or more.
    """
    members: dict[Hashable, list[int]] = {}
    for position, budget in enumerate(budgets):
        key = budget.sparsity if budget.scope == "global" else (position,)
        members.setdefault(key, []).append(position)
    groups = []
    for positions in members.values():
        numel = sum(budgets[position].numel for position in positions)
        if numel >= MAX_GROUP:
            raise ValueError(f'a selection group must have fewer than 2**32 weights, got {numel}; scope="layer" makes smaller groups')
        groups.append(SelectionGroup(positions, numel, kept(numel, budgets[positions[0]].sparsity)))
    return groups

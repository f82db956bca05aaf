"""What becomes of every parameter: pruned in which units, following the units of others, or dense, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from ..reference import Blocks
from .coverage import Known
from .native import DTYPES, is_ordinary
from .patterns import Layer, NofM, Refused, parse
from .report import Decision

__all__ = ["Member", "Roster", "is_pruned", "roster_of"]


class Member(NamedTuple):
    """A parameter as the optimizer sees it.

    Args:
        pruned: it has scores, alone or with others.
        row: its parameter group.
        division: what its units are; None: its entries, or it is dense.
        unit_set: number of the set that its units are, -1 if it has none.
    """

    param: Tensor
    label: str
    pruned: bool
    row: int
    division: Blocks | NofM | None = None
    unit_set: int = -1

    @property
    def masked(self) -> bool:
        """It has a mask: pruned, or a vector whose entries go with the filters of a layer."""
        return self.pruned or self.unit_set >= 0

    @property
    def scored(self) -> bool:
        """Every entry has a score of its own."""
        return self.pruned and self.unit_set < 0


class Roster(NamedTuple):
    """Every parameter once, and what was decided about those of two or more dimensions."""

    members: list[Member]
    decisions: tuple[Decision, ...]


def _is_dense(p: Tensor) -> bool:
    """True when the entries fill one stretch of memory, in whatever order of dimensions."""
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(p.stride(), p.shape, strict=True) if size != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _check_param(p: Tensor, label: str, device: torch.device) -> None:
    """Raise ValueError unless the kernels can work on ``p`` where it lies."""
    if is_lazy(p):
        raise ValueError(f"{label} has no shape yet; run the model once on an example before you make the optimizer")
    if not is_ordinary(p):
        raise ValueError(f"{label} must be an ordinary tensor, got {type(p).__name__}")
    if p.layout != torch.strided or p.dtype not in DTYPES:
        raise ValueError(f"{label} must be a dense tensor of float32, bfloat16 or float16, got {p.layout} of {p.dtype}")
    if p.device != device:
        raise ValueError(f"all parameters must be on one device, got {label} on {p.device} and others on {device}")
    if p.is_inference():
        raise ValueError(f"{label} was made in inference mode and cannot be trained; make the model outside of it")
    if p.numel() and not _is_dense(p):
        raise ValueError(f"{label} must fill its memory densely, got shape {tuple(p.shape)} with strides {p.stride()}; use .contiguous()")


def _divided(group: Mapping[str, Any], p: Tensor, known: Known) -> Blocks | NofM | None:
    """Units of a parameter that is pruned.

    Raises:
        Refused: it is not, and why.
    """
    if p in known.dense:
        raise Refused(known.dense[p])
    if not group["prune"]:
        raise Refused("its parameter group is not pruned")
    if p.dim() < 2:
        raise Refused("it has fewer than two dimensions")
    pattern = parse(group["pattern"])
    ends = {"filter": known.outputs, "channel": known.inputs}.get(pattern.kind, {})
    if p in ends:
        raise Refused(ends[p])
    return pattern.divide(p.shape, p.stride(), known.layers.get(p, Layer()))


def is_pruned(group: Mapping[str, Any], p: Tensor, known: Known) -> bool:
    """The rule: a parameter of a group that is pruned, with two or more dimensions, that nothing speaks against."""
    try:
        _divided(group, p, known)
    except Refused:
        return False
    return True


def roster_of(param_groups: Sequence[Mapping[str, Any]], known: Known) -> Roster:
    """Every parameter of the groups, checked; ValueError names one that the kernels cannot work on."""
    params = [(row, group, p) for row, group in enumerate(param_groups) for p in group["params"]]
    members: dict[Tensor, Member] = {}
    reasons: dict[Tensor, str] = {}
    for number, (row, group, p) in enumerate(params):
        label = known.names.get(p) or f"parameter {number} of shape {'?' if is_lazy(p) else tuple(p.shape)}"
        _check_param(p, label, params[0][2].device)
        if p in members:
            continue
        try:
            members[p] = Member(p, label, True, row, _divided(group, p, known))
        except Refused as refused:
            members[p] = Member(p, label, False, row)
            reasons[p] = str(refused)
    _check_apart(list(members.values()))
    _check_effect(members, param_groups, known)
    frozen = _join_units(members, reasons, param_groups, known)
    decisions = [
        Decision(m.label, tuple(p.shape), str(param_groups[m.row]["pattern"]) if m.pruned else None, reasons.get(p))
        for p, m in members.items()
        if p.dim() >= 2
    ]
    left_out = [Decision(name, shape, None, reason) for name, shape, reason in known.left_out]
    left_out += [Decision(known.names[p], tuple(p.shape), None, "it is frozen, and outlives the filters it belongs to") for p in frozen]
    return Roster(list(members.values()), (*decisions, *left_out))


def _check_effect(members: Mapping[Tensor, Member], param_groups: Sequence[Mapping[str, Any]], known: Known) -> None:
    """ValueError when lists couple weights that are pruned, and none of them by filters. A list of weights that go by other patterns (as
    ``overrides`` may say) has no filters to couple, and may be beside others."""
    pruned = [members[p] for tensors in known.coupled for p in tensors if p in members and members[p].pruned]
    if pruned and all(param_groups[m.row]["pattern"] != "filter" for m in pruned):
        found = param_groups[pruned[0].row]["pattern"]
        raise ValueError(f'coupled must hold weights of pattern "filter", got {pruned[0].label} of pattern {found!r}')


def _join_units(
    members: dict[Tensor, Member], reasons: dict[Tensor, str], param_groups: Sequence[Mapping[str, Any]], known: Known
) -> list[Tensor]:
    """Number the sets of units, coupled tensors in one, and take in the vectors that follow. Returns those that cannot: they are frozen."""
    count, frozen = 0, []
    for tensors in [*known.coupled, *known.biases]:
        weights = [members[p] for p in tensors if p in members and p.dim() >= 2]
        structured = [m for m in weights if m.pruned and param_groups[m.row]["pattern"] == "filter"]
        if not structured:
            continue
        apart = next((f"{m.label}, which stays dense: {reasons[m.param]}" for m in weights if not m.pruned), None)
        if any(p not in members and p.dim() >= 2 for p in tensors):
            apart = "a layer that is frozen"
        if apart is not None:  # such filters can never be removed, so that there is nothing to win
            for m in structured:
                members[m.param] = m._replace(pruned=False, division=None)
                reasons[m.param] = f"its filters are coupled with those of {apart}"
            continue
        _check_coupled(weights, param_groups)
        units = _units_of(weights[0])
        for m in weights:
            members[m.param] = m._replace(unit_set=count)
        for p in tensors:
            if p.dim() < 2 and (p not in members or p in known.dense):
                frozen.append(p)
            elif p.dim() < 2:
                if p.numel() != units:
                    raise ValueError(f"coupled has {members[p].label} of {p.numel()} entries beside {weights[0].label} of {units} filters")
                members[p] = members[p]._replace(division=Blocks(1, units, 1, 1), unit_set=count)
        count += 1
    for p, m in members.items():
        if m.pruned and isinstance(m.division, Blocks) and m.unit_set < 0:
            members[p] = m._replace(unit_set=count)
            count += 1
    return frozen


def _units_of(member: Member) -> int:
    return member.division.units if isinstance(member.division, Blocks) else -1


def _check_coupled(weights: Sequence[Member], param_groups: Sequence[Mapping[str, Any]]) -> None:
    first = weights[0]
    for m in weights:
        if param_groups[m.row]["pattern"] != "filter" or m.row != first.row:
            raise ValueError(f'coupled weights must be in one parameter group of pattern "filter", got {first.label} and {m.label}')
        if _units_of(m) != _units_of(first):
            raise ValueError(
                f"coupled weights must have as many filters, got {first.label} with {_units_of(first)} and {m.label} with {_units_of(m)}"
            )


def _check_apart(members: list[Member]) -> None:
    """ValueError when two parameters share memory: each would be pruned as if the other did not exist."""
    placed = sorted((m.param.data_ptr(), m.param.data_ptr() + m.param.numel() * m.param.element_size(), m.label) for m in members)
    placed = [place for place in placed if place[0] < place[1] and place[0]]
    for (_, end, first), (begin, _, second) in pairwise(placed):
        if begin < end:
            raise ValueError(f"{first} and {second} share memory; tie them as one parameter (`a.weight = b.weight`)")

"""Which parameters are pruned, and why the others are not."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from ..reference import Blocks
from .layers import Layer
from .native import DTYPES, is_ordinary, kernels
from .parameter import Parameter, Seen, matrix_shape
from .patterns import SINGLE, NofM, Refused, memory_order, parse
from .report import Decision
from .shards import Ranks, Shard, local_of, shard_of, units_of

__all__ = ["check_split", "decide", "frozen", "would_prune"]


def frozen(p: Tensor) -> str | None:
    """The reason why a parameter that does not learn stays dense; None if it learns."""
    return "it is frozen" if p.is_leaf and not p.requires_grad else None


# --- the rule ------------------------------------------------------------------------------------------------------------------------


def _divided(param: Parameter, group: Mapping[str, Any]) -> Blocks | NofM | None:
    """How the entries of a pruned parameter form units.

    Raises:
        Refused: it is not pruned; the message is the reason.
    """
    if param.dense is not None:
        raise Refused(param.dense)
    if not group["prune"]:
        raise Refused("its parameter group is not pruned")
    if param.tensor.dim() < 2:
        raise Refused("it has fewer than two dimensions")
    pattern = parse(group["pattern"])
    if pattern.kind in param.ends:
        raise Refused(param.ends[pattern.kind])
    shape, stride, layer = param.tensor.shape, param.tensor.stride(), param.layer
    if layer.matrices == 1 and not layer.experts:
        return pattern.divide(shape, stride, layer)
    if not param.tensor.numel():
        raise Refused("it has no entries")
    if shape[0] % layer.matrices:
        raise Refused(f"its first dimension of {shape[0]} does not divide into {layer.matrices} matrices")
    if memory_order(shape, stride)[0] != 0:
        raise Refused("its matrices do not lie behind each other in memory")
    one = matrix_shape(shape, layer)
    return pattern.divide(one, stride[len(stride) - len(one) :], layer)


def would_prune(param: Parameter, group: Mapping[str, Any]) -> bool:
    """Whether a parameter is pruned in a group: two or more dimensions, and nothing that speaks against it."""
    try:
        _divided(param, group)
    except Refused:
        return False
    return True


def decide(param_groups: Sequence[Mapping[str, Any]], seen: Seen) -> tuple[list[Parameter], tuple[Decision, ...], Ranks]:
    """Decide about all parameters of the groups.

    Returns:
        a record for every parameter, each once, in the order of the groups; for reports what became of those of two or more dimensions; and
        the ranks over which the weights are shared out.

    Raises:
        ValueError: the kernels cannot work on a parameter, or coupled parameters do not fit each other; the message names them.
    """
    given = [(number, group, p) for number, group in enumerate(param_groups) for p in group["params"]]
    ranks = Ranks(p for _, _, p in given)
    decided: dict[Tensor, Parameter] = {}
    for position, (number, group, p) in enumerate(given):
        param = seen.of(p)
        name = param.name or f"parameter {position} of shape {'?' if is_lazy(p) else tuple(p.shape)}"
        local = local_of(p)
        _check_param(local, name, local_of(given[0][2]).device)
        if p in decided:
            continue
        param = replace(param, name=name, group=number, pattern=str(group["pattern"]), whole=p.shape, dtype=p.dtype)
        param = _sharded(replace(param, shape=local.shape, stride=local.stride()), group, ranks)
        try:
            decided[p] = replace(param, division=_divided(param, group))
        except Refused as refused:
            decided[p] = replace(param, dense=str(refused))
    _check_apart(decided.values())
    _check_effect(decided, seen)
    outliving = _join_units(decided, seen)
    if ranks.groups:
        decided = {p: _placed(param) for p, param in decided.items()}
        _check_sets(decided.values())
    decisions = [
        Decision(param.name, tuple(param.whole), param.pattern if param.pruned else None, param.dense)
        for p, param in decided.items()
        if p.dim() >= 2
    ]
    staying = [Decision(seen.of(p).name, tuple(p.shape), None, "it is frozen, and outlives the filters it belongs to") for p in outliving]
    return list(decided.values()), (*decisions, *seen.left_out, *staying), ranks


# --- what this rank has ------------------------------------------------------------------------------------------------------------------


def _sharded(param: Parameter, group: Mapping[str, Any], ranks: Ranks) -> Parameter:
    """With what this rank has of it; ValueError if the kernels cannot work on that."""
    try:
        shard = shard_of(param.tensor, ranks)
    except ValueError as error:
        raise ValueError(f"{param.name} {error}") from error
    param, layer = replace(param, shard=shard), param.layer
    if shard is None or param.shape == param.whole or not (layer.matrices > 1 or layer.experts) or param.whole[0] % layer.matrices:
        return param
    if param.dense is not None or not group["prune"]:
        return param
    if group["pattern"] != SINGLE:
        raise ValueError(
            f"{param.name} holds several matrices, and is sharded over ranks: its pattern must be {SINGLE!r}, got {group['pattern']!r}"
        )
    if _parts_are_aligned(shard, layer):
        return replace(param, split="cut")
    return replace(param, split="mixed", layer=layer._replace(matrices=1, experts=False))  # entries have the same order among themselves


def _parts_are_aligned(shard: Shard, layer: Layer) -> bool:
    """Whether what a rank has of each of several matrices begins where tensors may, if all its entries lie behind each other. All ranks
    find the same, also where they have parts of different lengths."""
    rows, *others = shard.spans
    size = 1 if layer.experts else rows.size // layer.matrices
    return math.gcd(size, rows.step) * math.prod(math.gcd(span.size, span.step) for span in others) % kernels().ALIGN == 0


def check_split(decided: Iterable[Parameter], param_groups: Sequence[Mapping[str, Any]]) -> None:
    """ValueError where matrices of one parameter, which their ranks do not let apart, should have budgets of their own."""
    for param in decided:
        scope = param_groups[param.group]["scope"]
        if param.pruned and param.split == "mixed" and scope != "global":
            raise ValueError(
                f"{param.name} of shape {tuple(param.whole)} holds several matrices, and the ranks cut it at places that are no multiple "
                f"of {kernels().ALIGN} entries, got {tuple(param.shape)} on this rank: its scope must be 'global', got {scope!r}"
            )


def _placed(param: Parameter) -> Parameter:
    """With the units that this rank has, and their places among all; ValueError where units are split over the ranks."""
    if param.shard is None or not param.masked:
        return param
    if param.shape == param.whole:  # repeated on every rank
        return replace(param, whole_division=param.division if isinstance(param.division, Blocks) else None)
    try:
        if isinstance(param.division, Blocks):
            own, places = units_of(param.shard, param.division)
            return replace(param, division=own, places=places, whole_division=param.division)
        if isinstance(param.division, NofM):
            units_of(param.shard, Blocks(param.whole[0], param.whole[1:].numel(), 1, param.division.of))
    except ValueError as error:
        raise ValueError(f"{param.name} cannot have pattern {param.pattern!r} as it is sharded, {error}") from error
    return replace(param, places=param.shard.places())


def _check_sets(decided: Iterable[Parameter]) -> None:
    """ValueError unless a rank has the same units of all parameters of a set."""
    first: dict[int, Parameter] = {}
    for param in (param for param in decided if param.unit_set >= 0):
        other = first.setdefault(param.unit_set, param)
        if (param.places, _units_of(param), param.elsewhere) != (other.places, _units_of(other), other.elsewhere):
            raise ValueError(f"{param.name} and {other.name} share their filters and must be sharded alike, along these")


# --- units of several parameters -----------------------------------------------------------------------------------------------------


def _join_units(decided: dict[Tensor, Parameter], seen: Seen) -> list[Tensor]:
    """Give every set of units a number, in place: one set for coupled parameters and the vectors that follow their filters.

    Returns:
        vectors that should follow, but are frozen.
    """
    count, outliving = 0, []
    for tensors in [*seen.coupled, *seen.biases]:
        weights = [decided[p] for p in tensors if p in decided and p.dim() >= 2]
        structured = [param for param in weights if param.pruned and param.pattern == "filter"]
        if not structured:
            continue
        apart = next((f"{param.name}, which stays dense: {param.dense}" for param in weights if not param.pruned), None)
        if any(p not in decided and p.dim() >= 2 for p in tensors):
            apart = "a layer that is frozen"
        if apart is not None:  # one of them must stay, so none can be removed and pruning them would win nothing
            for param in structured:
                decided[param.tensor] = replace(param, dense=f"its filters are coupled with those of {apart}", division=None)
            continue
        _check_coupled(weights)
        units, matrices = _units_of(weights[0]), weights[0].matrices
        for param in weights:
            decided[param.tensor] = replace(param, unit_set=count)
        for p in tensors:
            if p.dim() < 2 and (p not in decided or seen.of(p).dense is not None):
                outliving.append(p)
            elif p.dim() < 2:
                if p.numel() != units * matrices:
                    own = f"{weights[0].name} of {units * matrices} filters"
                    raise ValueError(f"coupled has {decided[p].name} of {p.numel()} entries beside {own}")
                stack = Layer(matrices=matrices)  # it has a stretch for every matrix
                decided[p] = replace(decided[p], layer=stack, division=Blocks(1, units, 1, 1), unit_set=count)
        count += matrices
    for p, param in decided.items():
        if param.pruned and isinstance(param.division, Blocks) and param.unit_set < 0:
            decided[p] = replace(param, unit_set=count)
            count += param.matrices
    return outliving


def _units_of(param: Parameter) -> int:
    return param.division.units if isinstance(param.division, Blocks) else -1


def _check_coupled(weights: Sequence[Parameter]) -> None:
    first = weights[0]
    for param in weights:
        if param.pattern != "filter" or param.group != first.group:
            raise ValueError(f'coupled weights must be in one parameter group of pattern "filter", got {first.name} and {param.name}')
        found = [(own.matrices, _units_of(own)) for own in (first, param)]
        if found[0] != found[1]:
            counts = [f"{units}" if matrices == 1 else f"{matrices} times {units}" for matrices, units in found]
            raise ValueError(
                f"coupled weights must have the same number of filters, got {first.name} with {counts[0]} and {param.name} with {counts[1]}"
            )


def _check_effect(decided: Mapping[Tensor, Parameter], seen: Seen) -> None:
    """ValueError when lists couple pruned weights, but none of these by filters. One list may hold weights of other patterns, as
    ``overrides`` can make them, if another list has filters."""
    pruned = [decided[p] for tensors in seen.coupled for p in tensors if p in decided and decided[p].pruned]
    if pruned and all(param.pattern != "filter" for param in pruned):
        raise ValueError(f'coupled must hold weights of pattern "filter", got {pruned[0].name} of pattern {pruned[0].pattern!r}')


# --- what the kernels can work on ----------------------------------------------------------------------------------------------------


def _fills_its_memory(p: Tensor) -> bool:
    """True when the entries fill one stretch of memory, in whatever order of dimensions."""
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(p.stride(), p.shape, strict=True) if size != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _check_param(p: Tensor, name: str, device: torch.device) -> None:
    """Raise ValueError unless the kernels can work on ``p`` where it lies."""
    if is_lazy(p):
        raise ValueError(f"{name} has no shape yet; run the model once on an example before you make the optimizer")
    if not is_ordinary(p):
        raise ValueError(f"{name} must be an ordinary tensor or a DTensor, got {type(p).__name__}")
    if p.layout != torch.strided or p.dtype not in DTYPES:
        raise ValueError(f"{name} must be a dense tensor of float32, bfloat16 or float16, got {p.layout} of {p.dtype}")
    if p.device != device:
        raise ValueError(f"all parameters must be on one device, got {name} on {p.device} and others on {device}")
    if p.is_inference():
        raise ValueError(f"{name} was made in inference mode and cannot be trained; make the model outside of it")
    if p.numel() and not _fills_its_memory(p):
        raise ValueError(f"{name} must fill its memory densely, got shape {tuple(p.shape)} with strides {p.stride()}; use .contiguous()")


def _check_apart(decided: Iterable[Parameter]) -> None:
    """ValueError when two parameters share memory: each would be pruned as if the other did not exist."""
    placed = sorted((x.data_ptr(), x.data_ptr() + x.numel() * x.element_size(), param.name) for param in decided for x in [param.local])
    placed = [place for place in placed if place[0] < place[1] and place[0]]
    for (_, end, first), (begin, _, second) in pairwise(placed):
        if begin < end:
            raise ValueError(f"{first} and {second} share memory; tie them as one parameter (`a.weight = b.weight`)")

"""Which parameters are pruned: from a Module, a list, names or parameter groups to groups of tensors."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

from .arena import Member
from .ops import DTYPES, is_ordinary

__all__ = ["Given", "frozen_of", "is_pruned", "members_of", "param_groups_of", "split_names"]


class Given(NamedTuple):
    """What the first argument of `FastBiP` says."""

    groups: list[dict[str, Any]]
    names: dict[Tensor, str]
    excluded: set[Tensor]  # dense although their group is pruned
    aliases: list[tuple[str, Tensor]]  # every name, of tied parameters too


def split_names(params: Any) -> tuple[list[Any], dict[Tensor, str]]:
    """Parameters of a group, and the names of those that came as ``(name, parameter)``."""
    if isinstance(params, (set, frozenset)):
        raise TypeError("params must have an order, got a set; pass a list")
    pairs = [item if isinstance(item, tuple) else (None, item) for item in ([params] if isinstance(params, Tensor) else params)]
    return [p for _, p in pairs], {p: name for name, p in pairs if name is not None}


def _module_groups(model: nn.Module) -> Given:
    """Conv and Linear weights, and a second group of all other parameters; parameters that are frozen are in neither."""
    layers = (layer for layer in model.modules() if isinstance(layer, (_ConvNd, nn.Linear)))
    weights = {layer._parameters.get("weight") for layer in layers}  # None where a parametrization computes the weight
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters() if p.requires_grad}
    aliases: list[tuple[str, Tensor]] = list(model.named_parameters(remove_duplicate=False))
    pruned = [p for p in names if p in weights]
    dense = [p for p in names if p not in weights]
    groups: list[dict[str, Any]] = [{"params": pruned, "prune": True}, {"params": dense, "prune": False}]
    computed = [
        name for name, layer in model.named_modules() if isinstance(layer, (_ConvNd, nn.Linear)) and "weight" not in layer._parameters
    ]
    if computed and not pruned:
        raise ValueError(f"nothing to prune: a parametrization computes the weights of {', '.join(computed[:5])}; remove it first")
    if computed:
        warnings.warn(f"a parametrization computes the weights of {', '.join(computed[:5])}: they are not pruned", stacklevel=4)
    return Given([group for group in groups if group["params"]], names, set(), aliases)


def _list_groups(params: Any) -> Given:
    if isinstance(params, (Tensor, str, Mapping)):
        raise TypeError(f"params must be a Module, or an iterable of parameters or of parameter groups, got {type(params).__name__}")
    if isinstance(params, (set, frozenset)):
        raise TypeError("params must have an order, got a set; pass a list")
    given = list(params)
    if given and not isinstance(given[0], dict):
        given = [{"params": given}]
    names: dict[Tensor, str] = {}
    groups = []
    for group in given:
        if not isinstance(group, dict) or "params" not in group:
            raise TypeError(f'a parameter group must be a dict with "params", got {group!r}')
        members, named = split_names(group["params"])
        names |= named
        groups.append({**group, "params": members})
    return Given(groups, names, frozen_of(p for group in groups for p in group["params"]), [(name, p) for p, name in names.items()])


def frozen_of(params: Iterable[Any]) -> set[Tensor]:
    """Parameters that do not learn, so that nobody expects them to change."""
    return {p for p in params if isinstance(p, Tensor) and p.is_leaf and not p.requires_grad}


def _excluded_by(item: Any, prunable: list[Tensor], aliases: list[tuple[str, Tensor]]) -> set[Tensor]:
    """Parameters that one entry of ``exclude`` means; ValueError if there are none."""
    if isinstance(item, str):
        if not aliases:
            raise ValueError(f"exclude has the name {item!r}, but the parameters came without names; pass the model or named_parameters()")
        found = {p for name, p in aliases if fnmatchcase(name, item) or fnmatchcase(name, item + ".*")} & set(prunable)
        what = repr(item)
    elif isinstance(item, nn.Module):
        own = set(item.parameters())
        found, what = {p for p in prunable if p in own}, type(item).__name__
    elif isinstance(item, Tensor):
        found, what = {p for p in prunable if p is item}, f"a parameter of shape {tuple(item.shape)}"
    else:
        raise TypeError(f"exclude must hold names, modules and parameters, got {type(item).__name__}")
    if not found:
        raise ValueError(f"exclude must match weights that would be pruned, got {what}, which matches none")
    return found


def param_groups_of(params: nn.Module | Iterable[Any], exclude: Any) -> Given:
    """Parameter groups, names, and the parameters that stay dense although their group is pruned.

    Args:
        params: Module (its Conv and Linear weights are pruned), parameters, ``(name, parameter)`` pairs, or groups of either.
        exclude: one or many of: a parameter's name, the name of its module, a pattern of `fnmatch`, a Module, a parameter.

    Raises:
        TypeError: not one of these.
        ValueError: an entry of ``exclude`` matches nothing that would be pruned.
    """
    given = _module_groups(params) if isinstance(params, nn.Module) else _list_groups(params)
    prunable = [
        p
        for group in given.groups
        for p in group["params"]
        if isinstance(p, Tensor) and not is_lazy(p) and is_pruned({"prune": True, **group}, p, set())
    ]
    if not isinstance(exclude, (str, nn.Module, Tensor, Iterable)):
        raise TypeError(f"exclude must be or hold names, modules and parameters, got {type(exclude).__name__}")
    for item in [exclude] if isinstance(exclude, (str, nn.Module, Tensor)) else exclude:
        given.excluded.update(_excluded_by(item, prunable, given.aliases))
    return given


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


def is_pruned(group: Mapping[str, Any], p: Tensor, excluded: set[Tensor]) -> bool:
    """The rule: a parameter of a group that is pruned, with two or more dimensions, and not excluded."""
    return bool(group["prune"]) and p.dim() >= 2 and p not in excluded


def members_of(param_groups: Sequence[Mapping[str, Any]], names: Mapping[Tensor, str], excluded: set[Tensor]) -> list[Member]:
    """Every parameter of the groups once, checked; ValueError names one that the kernels cannot work on."""
    params = [(row, group, p) for row, group in enumerate(param_groups) for p in group["params"]]
    members: dict[Tensor, Member] = {}
    for number, (row, group, p) in enumerate(params):
        label = names.get(p) or f"parameter {number} of shape {'?' if is_lazy(p) else tuple(p.shape)}"
        _check_param(p, label, params[0][2].device)
        members.setdefault(p, Member(p, label, is_pruned(group, p, excluded), row))
    _check_apart(list(members.values()))
    return list(members.values())


def _check_apart(members: list[Member]) -> None:
    """ValueError when two parameters share memory: each would be pruned as if the other did not exist."""
    placed = sorted((m.param.data_ptr(), m.param.data_ptr() + m.param.numel() * m.param.element_size(), m.label) for m in members)
    placed = [place for place in placed if place[0] < place[1] and place[0]]
    for (_, end, first), (begin, _, second) in pairwise(placed):
        if begin < end:
            raise ValueError(f"{first} and {second} share memory; tie them as one parameter (`a.weight = b.weight`)")

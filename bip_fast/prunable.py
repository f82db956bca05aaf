"""Which parameters are pruned: from a Module, a list, names or parameter groups to groups of tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

from .arena import Member
from .ops import DTYPES

__all__ = ["Given", "is_pruned", "members_of", "param_groups_of", "split_names"]


class Given(NamedTuple):
    """What the first argument of `FastBiP` says."""

    groups: list[dict[str, Any]]
    names: dict[Tensor, str]
    excluded: set[Tensor]


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
    pruned = [p for p in names if p in weights]
    dense = [p for p in names if p not in weights]
    groups: list[dict[str, Any]] = [{"params": pruned, "prune": True}, {"params": dense, "prune": False}]
    return Given([group for group in groups if group["params"]], names, set())


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
    return Given(groups, names, set())


def _excluded_by(item: Any, prunable: list[Tensor], names: dict[Tensor, str]) -> set[Tensor]:
    """Parameters that one entry of ``exclude`` means; ValueError if there are none."""
    if isinstance(item, str):
        if not names:
            raise ValueError(f"exclude has the name {item!r}, but the parameters came without names; pass the model or named_parameters()")
        found = {p for p in prunable if any(fnmatchcase(names.get(p, ""), pattern) for pattern in (item, item + ".*"))}
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
    for item in [exclude] if isinstance(exclude, (str, nn.Module, Tensor)) else exclude:
        given.excluded.update(_excluded_by(item, prunable, given.names))
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
    if hasattr(p, "__tensor_flatten__"):
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
    return list(members.values())

"""Which parameters are pruned: from a Module, a list, names or parameter groups to groups of tensors, and what is known about each."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from itertools import chain
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

from .options import GROUP_KEYS
from .patterns import Layer

__all__ = ["OUTPUTS", "Given", "Known", "frozen_of", "param_groups_of", "split_names"]

OUTPUTS = "<outputs>"  # in a list of coupled filters: the model returns them
NO_LAYER = "it is not the weight of a Conv or Linear layer"


@dataclass
class Known:
    """What the optimizer was told about parameters, besides their groups.

    Args:
        names: labels for errors and reports.
        dense: why a parameter stays dense although its group may be pruned.
        layers: of the weights of a Module.
        inputs, outputs: weights whose channels, or filters, are nobody's to remove, and why: of a Module the first and the last, unless
            somebody knows better.
        coupled: weights whose filters are kept or dropped together, and the vectors that belong to these filters, as the user says.
        biases: weights and their layer's bias, of all others.
        left_out: (name, shape, reason) of parameters of a Module that the optimizer does not have.
    """

    names: dict[Tensor, str] = field(default_factory=dict)
    dense: dict[Tensor, str] = field(default_factory=dict)
    layers: dict[Tensor, Layer] = field(default_factory=dict)
    inputs: dict[Tensor, str] = field(default_factory=dict)
    outputs: dict[Tensor, str] = field(default_factory=dict)
    coupled: list[list[Tensor]] = field(default_factory=list)
    biases: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    left_out: list[tuple[str, tuple[int, ...], str]] = field(default_factory=list)

    def with_group(self, names: Mapping[Tensor, str], params: Iterable[Any]) -> Known:
        """The same, and what another parameter group says."""
        return replace(self, names=self.names | dict(names), dense=self.dense | frozen_of(params))


class Given(NamedTuple):
    """What the first argument of `FastBiP` says."""

    groups: list[dict[str, Any]]
    known: Known
    aliases: list[tuple[str, Tensor]]  # every name, of tied parameters too


def split_names(params: Any) -> tuple[list[Any], dict[Tensor, str]]:
    """Parameters of a group, and the names of those that came as ``(name, parameter)``."""
    if isinstance(params, (set, frozenset)):
        raise TypeError("params must have an order, got a set; pass a list")
    pairs = [item if isinstance(item, tuple) else (None, item) for item in ([params] if isinstance(params, Tensor) else params)]
    return [p for _, p in pairs], {p: name for name, p in pairs if name is not None}


def _is_matrix(p: Tensor) -> bool:
    return not is_lazy(p) and p.dim() >= 2


def _layer_of(module: nn.Module) -> Layer:
    return Layer(bool(getattr(module, "transposed", False)), int(getattr(module, "groups", 1)))


def _module_groups(model: nn.Module) -> Given:
    """Conv and Linear weights, and a second group of all other parameters; parameters that are frozen are in neither."""
    modules = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, (_ConvNd, nn.Linear))]
    weights = {layer.weight: layer for _, layer in modules if layer._parameters.get("weight") is not None}
    learning: dict[Tensor, str] = {p: name for name, p in model.named_parameters() if p.requires_grad}
    pruned = [p for p in learning if p in weights]
    dense = [p for p in learning if p not in weights]
    computed = [name for name, layer in modules if "weight" not in layer._parameters]  # by a parametrization
    if computed and not pruned:
        raise ValueError(f"nothing to prune: a parametrization computes the weights of {', '.join(computed[:5])}; remove it first")
    if computed:
        warnings.warn(f"a parametrization computes the weights of {', '.join(computed[:5])}: they are not pruned", stacklevel=4)
    vectors = {p: name for name, p in model.named_parameters() if not p.requires_grad and not is_lazy(p) and p.dim() < 2}
    known = Known(
        names=learning | vectors, layers={p: _layer_of(weights[p]) for p in pruned}, dense={p: NO_LAYER for p in dense if _is_matrix(p)}
    )
    known.inputs = dict.fromkeys(list(weights)[:1], "it is the first layer of the model")
    known.outputs = dict.fromkeys(list(weights)[-1:], "it is the last layer of the model")
    known.biases = [(p, layer.bias) for p, layer in weights.items() if p in learning and layer.bias in known.names]
    known.left_out = [
        (name, tuple(p.shape), "it is frozen") for name, p in model.named_parameters() if not p.requires_grad and _is_matrix(p)
    ]
    groups: list[dict[str, Any]] = [{"params": pruned, "prune": True}, {"params": dense, "prune": False}]
    return Given([group for group in groups if group["params"]], known, list(model.named_parameters(remove_duplicate=False)))


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
    known = Known(names=names, dense=frozen_of(p for group in groups for p in group["params"]))
    return Given(groups, known, [(name, p) for p, name in names.items()])


def frozen_of(params: Iterable[Any]) -> dict[Tensor, str]:
    """Parameters that do not learn, so that nobody expects them to change, and that as a reason."""
    return {p: "it is frozen" for p in params if isinstance(p, Tensor) and p.is_leaf and not p.requires_grad}


def _named(what: str, pattern: str, prunable: Sequence[Tensor], aliases: list[tuple[str, Tensor]]) -> set[Tensor]:
    """Weights that would be pruned and have a name, or are in a module of a name, that matches; ValueError if there are none."""
    if not aliases:
        raise ValueError(f"{what} has the name {pattern!r}, but the parameters came without names; pass the model or named_parameters()")
    found = {p for name, p in aliases if fnmatchcase(name, pattern) or fnmatchcase(name, pattern + ".*")} & set(prunable)
    if not found:
        raise ValueError(f"{what} must match weights that would be pruned, got {pattern!r}, which matches none")
    return found


def _excluded_by(item: Any, prunable: list[Tensor], aliases: list[tuple[str, Tensor]]) -> set[Tensor]:
    """Parameters that one entry of ``exclude`` means; ValueError if there are none."""
    if isinstance(item, str):
        return _named("exclude", item, prunable, aliases)
    if isinstance(item, nn.Module):
        own = set(item.parameters())
        found, what = {p for p in prunable if p in own}, type(item).__name__
    elif isinstance(item, Tensor):
        found, what = {p for p in prunable if p is item}, f"a parameter of shape {tuple(item.shape)}"
    else:
        raise TypeError(f"exclude must hold names, modules and parameters, got {type(item).__name__}")
    if not found:
        raise ValueError(f"exclude must match weights that would be pruned, got {what}, which matches none")
    return found


def _overridden(given: Given, overrides: Mapping[str, Any], prunable: list[Tensor]) -> list[dict[str, Any]]:
    """The groups, where weights that ``overrides`` names have groups of their own, behind the one that they were in."""
    options: dict[Tensor, dict[str, Any]] = {}
    for pattern, value in overrides.items():
        if not isinstance(pattern, str):
            raise TypeError(f"overrides must have names as keys, got {pattern!r}")
        chosen = dict(value) if isinstance(value, Mapping) else {"sparsity": value}
        if chosen.keys() & {"params", "prune"} or None in chosen.values():
            raise ValueError(f"overrides must give a sparsity, or a dict of options of a parameter group, got {value!r} for {pattern!r}")
        if unknown := sorted(map(str, chosen.keys() - {*GROUP_KEYS, "density"})):
            raise ValueError(f"overrides must give options of a parameter group, got {', '.join(map(repr, unknown))} for {pattern!r}")
        for p in _named("overrides", pattern, prunable, given.aliases):
            options[p] = chosen
    groups = []
    for group in given.groups:
        parts: list[tuple[dict[str, Any], list[Tensor]]] = [({}, [p for p in group["params"] if p not in options])]
        for p in group["params"]:
            if p in options:
                same = next((members for own, members in parts if own == options[p]), None)
                parts.append((options[p], [p])) if same is None else same.append(p)
        for own, members in parts:
            if members:
                rest = {key: value for key, value in group.items() if own.keys().isdisjoint({"sparsity", "density"}) or key != "sparsity"}
                groups.append({**rest, **own, "params": members})
    return groups


def _coupled(given: Given, coupled: Iterable[Iterable[str]]) -> list[list[Tensor]]:
    """Lists of names as lists of parameters; vectors named there follow these weights and not their own layer's alone. Lists of what the
    model returns couple nothing, but where there are some, the last layer is one like the others."""
    by_name = dict(given.aliases)
    lists: list[list[Tensor]] = []
    outputs: list[list[Tensor]] = []
    seen: set[Tensor] = set()
    for names in coupled:
        if isinstance(names, str):
            raise TypeError(f"coupled must hold lists of names, got the string {names!r}")
        own = list(names)
        returned = OUTPUTS in own
        own = [name for name in own if name != OUTPUTS]
        for name in own:
            if name not in by_name:
                raise ValueError(f"coupled must hold names of parameters, got {name!r}, which is none")
            if by_name[name] in seen:
                raise ValueError(f"coupled must name a parameter once, got {name!r} again")
            seen.add(by_name[name])
        members = [by_name[name] for name in own]
        if all(not is_lazy(p) and p.dim() < 2 for p in members):
            raise ValueError(f"coupled must have a weight in every list, got {own}")
        (outputs if returned else lists).append(members)
    if outputs:
        given.known.outputs = dict.fromkeys(chain.from_iterable(outputs), "its filters are outputs of the model")
    biases = dict(given.known.biases)
    given.known.biases = [pair for pair in given.known.biases if seen.isdisjoint(pair)]
    return [members + [biases[p] for p in members if p in biases and biases[p] not in seen] for members in lists]


def param_groups_of(
    params: nn.Module | Iterable[Any], exclude: Any = (), overrides: Mapping[str, Any] | None = None, coupled: Iterable[Iterable[str]] = ()
) -> Given:
    """Parameter groups, and what is known about the parameters in them.

    Args:
        params: Module (its Conv and Linear weights are pruned), parameters, ``(name, parameter)`` pairs, or groups of either.
        exclude: one or many of: a parameter's name, the name of its module, a pattern of `fnmatch`, a Module, a parameter.
        overrides: for names as in ``exclude`` a sparsity, or options of a parameter group; the last that matches counts.
        coupled: lists of names of parameters whose filters are kept or dropped together, or with `OUTPUTS` stay.

    Raises:
        TypeError: not one of these.
        ValueError: a name matches nothing that would be pruned.
    """
    given = _module_groups(params) if isinstance(params, nn.Module) else _list_groups(params)
    prunable = [
        p
        for group in given.groups
        for p in group["params"]
        if isinstance(p, Tensor) and group.get("prune", True) and _is_matrix(p) and p not in given.known.dense
    ]
    if not isinstance(exclude, (str, nn.Module, Tensor, Iterable)):
        raise TypeError(f"exclude must be or hold names, modules and parameters, got {type(exclude).__name__}")
    for item in [exclude] if isinstance(exclude, (str, nn.Module, Tensor)) else exclude:
        given.known.dense |= dict.fromkeys(_excluded_by(item, prunable, given.aliases), "it is excluded")
    if overrides is not None and not isinstance(overrides, Mapping):
        raise TypeError(f"overrides must be a dict of names, got {type(overrides).__name__}")
    given.known.coupled = _coupled(given, coupled)
    return given._replace(groups=_overridden(given, overrides or {}, prunable))

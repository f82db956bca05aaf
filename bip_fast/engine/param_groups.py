"""From what the user gave to parameter groups: a Module, parameters, names or dicts, and ``exclude``, ``overrides``, ``coupled``.

On the way everything is noted that is known of a parameter besides its group (`coverage.Seen`).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from itertools import chain
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .coverage import frozen
from .layers import Layer, conv_and_linear, joined, plain_name, uses
from .options import LOWER_KEYS, MASK_RATES, SHARED_KEYS
from .parameter import Parameter, Seen
from .report import Decision

__all__ = ["OUTPUTS", "param_groups_of", "seen_in_group", "split_names"]

OUTPUTS = "<outputs>"  # in a list of coupled filters: the model returns them
_OF_PRUNING = {*SHARED_KEYS, "density"}  # options that say nothing to a parameter that is not pruned
NO_LAYER = "it is not a matrix of a layer that is pruned; bip_fast.register_layer adds layers"

Groups = list[dict[str, Any]]
Names = list[tuple[str, Tensor]]  # tied parameters are in it under each of their names


def split_names(params: Any) -> tuple[list[Any], dict[Tensor, str]]:
    """Parameters of a group, and the names of those that came as ``(name, parameter)``."""
    if isinstance(params, (set, frozenset)):
        raise TypeError("params must have an order, got a set; pass a list")
    pairs = [item if isinstance(item, tuple) else (None, item) for item in ([params] if isinstance(params, Tensor) else params)]
    return [p for _, p in pairs], {p: name for name, p in pairs if name is not None}


def _is_matrix(p: Tensor) -> bool:
    return not is_lazy(p) and p.dim() >= 2


def _module_groups(model: nn.Module) -> tuple[Groups, Seen]:
    """What the table of layers says is pruned, and a second group of all other parameters; parameters that are frozen are in neither."""
    found = list(uses(model))
    use_of = joined(model, found)
    learning = [p for p in model.parameters() if p.requires_grad]
    pruned = [p for p in learning if p in use_of and use_of[p].dense is None]
    dense = [p for p in learning if p not in use_of or use_of[p].dense is not None]
    by_parametrization = [name for name, layer in conv_and_linear(model) if "weight" not in layer._parameters]
    computed = [name or "the model itself" for name in by_parametrization]
    if computed and not pruned:
        raise ValueError(f"nothing to prune: a parametrization computes the weights of {', '.join(computed[:5])}; remove it first")
    if computed:
        warnings.warn(f"a parametrization computes the weights of {', '.join(computed[:5])}: they are not pruned", stacklevel=4)
    seen: dict[Tensor, Parameter] = {}
    left_out = []
    # Embeddings count as layers: behind one, no layer reads the inputs of the model, and where one makes the outputs, no layer does.
    first, last = ({use.parameter for use in found if use.module is found[end].module} if found else set() for end in (0, -1))
    for raw, p in model.named_parameters():
        name = plain_name(model, raw)
        if not p.requires_grad and _is_matrix(p):
            left_out.append(Decision(name, tuple(p.shape), None, "it is frozen"))
        elif p.requires_grad or not is_lazy(p):  # vectors that are frozen have a name too: a layer's filters may be theirs
            use = use_of.get(p)
            reason = NO_LAYER if use is None and _is_matrix(p) else use.dense if use is not None else None
            ends = {"channel": "it is the first layer of the model"} if p in first else {}
            ends |= {"filter": "it is the last layer of the model"} if p in last else {}
            seen[p] = Parameter(p, name, use.layer if use is not None else Layer(), reason, ends)
    biases = [
        (p, use.bias)
        for p, use in use_of.items()
        if p in seen and p.requires_grad and use.dense is None and use.bias is not None and use.bias in seen
    ]
    groups: Groups = [{"params": pruned, "prune": True}, {"params": dense, "prune": False}]
    return [group for group in groups if group["params"]], Seen(seen, biases=biases, left_out=left_out)


def _list_groups(params: Any) -> tuple[Groups, Seen]:
    if isinstance(params, (Tensor, str, Mapping)):
        raise TypeError(f"params must be a Module, or an iterable of parameters or of parameter groups, got {type(params).__name__}")
    if isinstance(params, (set, frozenset)):
        raise TypeError("params must have an order, got a set; pass a list")
    given = list(params)
    if given and not isinstance(given[0], dict):
        given = [{"params": given}]
    seen = Seen()
    groups = []
    for group in given:
        if not isinstance(group, dict) or "params" not in group:
            raise TypeError(f'a parameter group must be a dict with "params", got {group!r}')
        own, names = split_names(group["params"])
        seen = seen_in_group(seen, own, names)
        groups.append({**group, "params": own})
    return groups, seen


def seen_in_group(seen: Seen, params: Iterable[Any], names: Mapping[Tensor, str]) -> Seen:
    """``seen``, and what one more parameter group tells: names, and which of its parameters are frozen."""
    tensors = [p for p in params if isinstance(p, Tensor)]
    return seen.updated(replace(seen.of(p), name=names.get(p, seen.of(p).name), dense=frozen(p) or seen.of(p).dense) for p in tensors)


def _named(what: str, pattern: str, prunable: Sequence[Tensor], names: Names) -> set[Tensor]:
    """Those of ``prunable`` whose own name, or whose module's name, matches; ValueError if there are none."""
    if not names:
        raise ValueError(f"{what} gives the name {pattern!r}, but the parameters came without names; pass the model or named_parameters()")
    found = {p for name, p in names if fnmatchcase(name, pattern) or fnmatchcase(name, pattern + ".*")} & set(prunable)
    if not found:
        raise ValueError(f"{what} must match weights that would be pruned, got {pattern!r}, which matches none")
    return found


def _excluded_by(item: Any, prunable: list[Tensor], names: Names) -> set[Tensor]:
    """Which of ``prunable`` one entry of ``exclude`` means; ValueError if there are none."""
    if isinstance(item, str):
        return _named("exclude", item, prunable, names)
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


def _rest(group: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a group that go with the ``own`` ones of some of its weights: where one thing can be said in two ways, theirs wins."""
    said = {key for pair in (("sparsity", "density"), MASK_RATES) if not own.keys().isdisjoint(pair) for key in pair}
    return {key: value for key, value in group.items() if key not in said}


def _override(pattern: str, value: Any, inner: bool) -> dict[str, Any]:
    """The options that one entry of ``overrides`` gives; ValueError if it is none. With ``inner`` it may be of the user's optimizer."""
    chosen = dict(value) if isinstance(value, Mapping) else {"sparsity": value}
    unset = {key for key, own in chosen.items() if own is None and (key in _OF_PRUNING or not inner)}
    if chosen.keys() & {"params", "prune"} or unset:
        raise ValueError(f"overrides must give a sparsity, or a dict of options of a parameter group, got {value!r} for {pattern!r}")
    unknown = {key for key in chosen if not isinstance(key, str)} if inner else chosen.keys() - {*LOWER_KEYS, *_OF_PRUNING}
    if unknown:
        given = ", ".join(map(repr, sorted(map(str, unknown))))
        raise ValueError(f"overrides must give options of a parameter group, got {given} for {pattern!r}")
    return chosen


def _overridden(groups: Groups, overrides: Mapping[str, Any], prunable: list[Tensor], names: Names, inner: bool) -> Groups:
    """The groups, with weights that ``overrides`` names in groups of their own, each behind the group that the weight was in."""
    learning = [p for group in groups for p in group["params"] if isinstance(p, Tensor)]
    options: dict[Tensor, dict[str, Any]] = {}
    for pattern, value in overrides.items():
        if not isinstance(pattern, str):
            raise TypeError(f"overrides must have names as keys, got {pattern!r}")
        chosen = _override(pattern, value, inner)
        of_any = chosen.keys().isdisjoint(_OF_PRUNING)  # so that biases and dense weights have them too
        for p in _named("overrides", pattern, learning if of_any else prunable, names):
            options[p] = chosen
    divided: Groups = []
    for group in groups:
        parts: list[tuple[dict[str, Any], list[Tensor]]] = [({}, [p for p in group["params"] if p not in options])]
        for p in group["params"]:
            if p in options:
                same = next((members for own, members in parts if own == options[p]), None)
                parts.append((options[p], [p])) if same is None else same.append(p)
        for own, members in parts:
            if members:
                divided.append({**_rest(group, own), **own, "params": members})
    return divided


def _coupled(seen: Seen, coupled: Iterable[Iterable[str]], names: Names) -> Seen:
    """Turn lists of names into lists of parameters. A vector that is named follows the weights of its list, and not only its own layer.
    A list with `OUTPUTS` couples nothing: its filters stay, and the last layer is no longer taken for the outputs of the model."""
    by_name = dict(names)
    lists: list[list[Tensor]] = []
    outputs: list[list[Tensor]] = []
    listed: set[Tensor] = set()
    if isinstance(coupled, (str, Mapping)) or not isinstance(coupled, Iterable):
        raise TypeError(f"coupled must be a list of lists of names, got {coupled!r}")
    for given in coupled:
        if isinstance(given, str) or not isinstance(given, Iterable):
            raise TypeError(f"coupled must hold lists of names, got {given!r}")
        own = list(given)
        returned = OUTPUTS in own
        own = [name for name in own if name != OUTPUTS]
        for name in own:
            if name not in by_name:
                raise ValueError(f"coupled must hold names of parameters, got {name!r}, which is not one")
            if by_name[name] in listed:
                raise ValueError(f"coupled must name a parameter once, got {name!r} again")
            listed.add(by_name[name])
        members = [by_name[name] for name in own]
        if all(not is_lazy(p) and p.dim() < 2 for p in members):
            raise ValueError(f"coupled must have a weight in every list, got {own}")
        (outputs if returned else lists).append(members)
    if outputs:
        of_outputs = set(chain.from_iterable(outputs))
        seen = seen.updated(_with_outputs(seen.of(p), p in of_outputs) for p in dict.fromkeys([*seen.parameters, *of_outputs]))
    bias_of = dict(seen.biases)
    lists = [members + [bias_of[p] for p in members if p in bias_of and bias_of[p] not in listed] for members in lists]
    return replace(seen, coupled=lists, biases=[pair for pair in seen.biases if listed.isdisjoint(pair)])


def _with_outputs(param: Parameter, returned: bool) -> Parameter:
    """The record after the user has said which filters the model returns."""
    ends = {kind: reason for kind, reason in param.ends.items() if kind != "filter"}
    return replace(param, ends=ends | ({"filter": "its filters are outputs of the model"} if returned else {}))


def param_groups_of(
    params: nn.Module | Iterable[Any],
    exclude: Any = (),
    overrides: Mapping[str, Any] | None = None,
    coupled: Iterable[Iterable[str]] = (),
    *,
    inner: bool = False,
) -> tuple[Groups, Seen]:
    """Parameter groups, and what is known of the parameters besides.

    Args:
        params: Module (the matrices of its layers are pruned, see `layers`), parameters, ``(name, parameter)`` pairs, or groups of either.
        exclude: one or many of: a parameter's name, the name of its module, a pattern of `fnmatch`, a Module, a parameter.
        overrides: for names as in ``exclude`` a sparsity, or options of a parameter group; the last that matches counts. Step sizes and
            other options of the rule that moves weights alone are also for parameters that are not pruned.
        coupled: lists of names of parameters whose filters are kept or dropped together; with `OUTPUTS` in a list its filters stay.
        inner: an optimizer of the user's makes the steps of theta, so ``overrides`` may have options that only it knows.

    Raises:
        TypeError: not one of these.
        ValueError: a name matches nothing that would be pruned.
    """
    if isinstance(params, nn.Module):
        groups, seen = _module_groups(params)
        raw: Names = list(params.named_parameters(remove_duplicate=False))
        names = [*((plain_name(params, name), p) for name, p in raw), *raw]
    else:
        groups, seen = _list_groups(params)
        names = [(param.name, p) for p, param in seen.parameters.items() if param.name]
    prunable = [
        p
        for group in groups
        for p in group["params"]
        if isinstance(p, Tensor) and group.get("prune", True) and _is_matrix(p) and seen.of(p).dense is None
    ]
    if not isinstance(exclude, (str, nn.Module, Tensor, Iterable)):
        raise TypeError(f"exclude must be or hold names, modules and parameters, got {type(exclude).__name__}")
    staying = [p for p, param in seen.parameters.items() if param.dense is not None and _is_matrix(p)]  # to exclude them does no harm
    for item in [exclude] if isinstance(exclude, (str, nn.Module, Tensor)) else exclude:
        excluded = _excluded_by(item, [*prunable, *staying], names)
        seen = seen.updated(replace(seen.of(p), dense=seen.of(p).dense or "it is excluded") for p in excluded)
    if overrides is not None and not isinstance(overrides, Mapping):
        raise TypeError(f"overrides must be a dict of names, got {type(overrides).__name__}")
    seen = _coupled(seen, coupled, names)
    return _overridden(groups, overrides or {}, prunable, names, inner), seen

"""Saved states: what they hold besides the parameters' own, and the checks that a whole state must pass before any of it is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..reference import Blocks
from .agreement import check_same
from .arena import Arena, in_memory_order
from .inner import INNER
from .options import check_group
from .parameter import Parameter
from .patterns import NofM
from .phases import Phases
from .rules import Rule
from .shards import local_of

__all__ = ["EXTRA", "check_whole", "extra", "fitting", "fitting_groups"]

EXTRA = "bip"  # the key of every parameter's state for what belongs to no parameter
_KINDS = {"mask": ("int32", "bool"), "step": ("int64",)}  # all else is floating-point
_MAY_BE_MISSING = "score_momentum"  # zero until a mask_momentum asks for it


# --- what belongs to no parameter ----------------------------------------------------------------------------------------------------
#
# `torch.distributed.checkpoint` keeps nothing of an optimizer but the states of its parameters and the parameter groups, so each parameter
# has a copy. In flattened states it takes only tensors, numbers and dicts of these: a word is saved as the key of a dict.


def _word(word: str) -> dict[str, int]:
    return {word: 1}


def _read_word(saved: Any) -> str:
    if not isinstance(saved, Mapping) or len(saved) != 1:
        raise ValueError(f"state_dict must hold a word as the one key of a dict, got {saved!r:.80}")
    return str(next(iter(saved)))


def extra(arena: Arena, phases: Phases, ramp: Any) -> dict[str, Any]:
    """What is saved under `EXTRA`: the cycle of phases, where the ramp of the sparsity stands, the rule of the lower level, the count of
    non-finite gradients, and that of kept weights, to notice damage. Ranks that share out the parameters add up their counts."""
    cycle = phases.state()
    saved = {
        "levels": _word(cycle["levels"]),
        "lower_steps": int(cycle["lower_steps"]),
        "cycle": int(cycle["cycle"]),
        "frozen": int(cycle["frozen"]),
        "optimizer": _word(arena.rule.name),
        "num_nonfinite": arena.total_nonfinite(),
        "kept": int(arena.kept()),
    }
    if ramp is not None:
        state = ramp.state_dict()
        ends = {str(number): math.nan if end is None else float(end) for number, end in enumerate(state["ends"])}
        saved["ramp"] = {**state, "kind": _word(state["kind"]), "ends": ends}
    return saved


def _read_extra(state_dict: dict[str, Any]) -> dict[str, Any]:
    """The same with words as words, of a whole ``state_dict``. That of version 0.1 has it beside the states, as words."""
    if EXTRA in state_dict:
        old = dict(state_dict[EXTRA])
        return old | {"num_nonfinite": _count("num_nonfinite", old["num_nonfinite"])}
    first = next((state for state in state_dict["state"].values() if EXTRA in state), None)
    if first is None:
        raise ValueError(f"state_dict must come from FastBiP.state_dict(), got states without {EXTRA!r}")
    found = dict(first[EXTRA])
    for key in ("levels", "optimizer"):
        found[key] = _read_word(found[key])
    for key in ("lower_steps", "cycle", "num_nonfinite", "kept", "frozen"):
        found[key] = _count(key, found[key])
    ramp = found.get("ramp") or None
    if ramp is not None:
        ends = [ramp["ends"][str(number)] for number in range(len(ramp["ends"]))]
        ramp = {**ramp, "kind": _read_word(ramp["kind"]), "ends": [None if isinstance(x, float) and math.isnan(x) else x for x in ends]}
    return found | {"ramp": ramp}


def _count(name: str, x: Any) -> int:
    number = isinstance(x, Integral) or (
        isinstance(x, Tensor)
        and x.numel() == 1
        and x.layout == torch.strided
        and not (x.is_complex() or x.is_floating_point() or x.is_meta)
    )
    if not number:
        raise ValueError(f"state_dict must hold a whole number as {name}, got {x!r:.80}")
    return int(x)


def _expected(own: Mapping[str, Any]) -> dict[str, Any]:
    """Without what a state may have or not."""
    return {name: value for name, value in own.items() if name not in (_MAY_BE_MISSING, INNER, EXTRA)}


def fitting(
    arena: Arena, phases: Phases, ramp: Any, param_groups: Sequence[dict[str, Any]], state_dict: dict[str, Any]
) -> tuple[Sequence[dict[str, Any]], list[dict[str, Tensor]], dict[str, Any], int]:
    """`_fitting`, without collectives, with every way in which a damaged state can fail as a ValueError."""
    try:
        return _fitting(arena, phases, ramp, param_groups, state_dict)
    except (AttributeError, KeyError, TypeError, RuntimeError, IndexError) as error:  # NotImplementedError is a RuntimeError
        raise ValueError(f"state_dict must come from FastBiP.state_dict(), got one with {type(error).__name__}: {error}") from error


def _fitting(
    arena: Arena, phases: Phases, ramp: Any, param_groups: Sequence[dict[str, Any]], state_dict: dict[str, Any]
) -> tuple[Sequence[dict[str, Any]], list[dict[str, Tensor]], dict[str, Any], int]:
    """Groups, the state of every parameter of ``arena``, what belongs to none, and how many weights this rank counts as kept, of a
    ``state_dict`` that fits an optimizer with ``param_groups``.

    Raises:
        ValueError: it is from another optimizer, for other parameters or groups, damaged, or has options out of range.
    """
    if not {"state", "param_groups"} <= state_dict.keys():
        raise ValueError(f"state_dict must come from FastBiP.state_dict(), got one with the keys {list(state_dict)}")
    saved = _read_extra(state_dict)
    phases.check_state(saved)
    if saved["optimizer"] != arena.rule.name:
        raise ValueError(f"state_dict must be of optimizer={arena.rule.name!r}, got one of {saved['optimizer']!r}")
    if (ramp is None) != (saved["ramp"] is None):
        made = {True: "without steps", False: "with steps"}
        raise ValueError(f"state_dict must be of an optimizer that was made {made[ramp is None]}, got one {made[ramp is not None]}")
    if ramp is not None:
        ramp.check_state(saved["ramp"])
    groups = fitting_groups(arena.rule, param_groups, state_dict)
    params = [p for group in param_groups for p in group["params"]]
    number = dict(zip(params, (i for group in groups for i in group["params"]), strict=True))
    states, kept = [], 0
    for param in arena.parameters:
        state, own_shapes = state_dict["state"].get(number[param.tensor], {}), _expected(arena.saved_shapes(param))
        if not state and not param.tensor.requires_grad and not param.masked:
            state = arena.saved_state_of(param)  # of frozen ones `torch.distributed.checkpoint` loads nothing: they stay as they are
        state = {name: x for name, x in state.items() if not (isinstance(x, dict) and not x)}  # it makes these of keys that were not saved
        shapes = {name: tuple(x.shape) for name, x in _expected(state).items()}
        if shapes != own_shapes:
            raise ValueError(f"state_dict must hold {own_shapes} for {param.name}, got {shapes}")
        _check_values(arena, param, state)
        _check_parts(arena, param, state)
        if param.pruned and groups[param.group].get("sparsity") is None and param_groups[param.group]["sparsity"] is not None:
            raise ValueError(f"state_dict must have a sparsity for {param.name}, got None")
        kept += int(arena.mask_in(param, state).sum()) if param.masked and not param.elsewhere else 0
        states.append({name: value for name, value in state.items() if name != EXTRA})
    return groups, states, saved, kept


def check_whole(arena: Arena, groups: Sequence[dict[str, Any]], saved: Mapping[str, Any], kept: int) -> None:
    """ValueError, on all ranks alike, unless what each found `fitting` makes one state. Two small collectives where weights are sharded.

    Args:
        groups, saved, kept: as `fitting` gives them.
    """
    options = [[group.get(key) for key in ("sparsity", "scope", "min_kept")] for group in groups]
    check_same(arena.ranks, "step, phase and options of a state_dict", (sorted(saved.items(), key=str), options))
    (total,) = arena.ranks.added([kept], arena.device)
    if total != saved["kept"]:
        raise ValueError(f"state_dict is damaged: its masks keep {total} weights, and {saved['kept']} were saved")


def fitting_groups(rule: Rule, param_groups: Sequence[dict[str, Any]], state_dict: dict[str, Any]) -> Sequence[dict[str, Any]]:
    """The groups of a ``state_dict``; ValueError unless they fit ``param_groups``."""
    groups: Sequence[dict[str, Any]] = state_dict["param_groups"]
    expected, given = (
        [(len(group["params"]), group.get("prune"), group.get("pattern")) for group in side] for side in (param_groups, groups)
    )
    if expected != given:
        raise ValueError(f"state_dict must have parameter groups of (length, prune, pattern) {expected}, got {given}")
    for group, own in zip(groups, param_groups, strict=True):
        check_group({**own, **group}, rule)
    return groups


def _check_values(arena: Arena, param: Parameter, state: dict[str, Tensor]) -> None:
    """ValueError for a tensor of another kind than was saved."""
    for name, x in state.items():
        if name in (INNER, EXTRA):
            continue
        expected = " or ".join(_KINDS.get(name, ("a floating-point type",)))
        kind = x.is_floating_point() if name not in _KINDS else str(x.dtype).removeprefix("torch.") in _KINDS[name]
        if not kind or x.layout != torch.strided or x.device.type == "meta":
            raise ValueError(f"state_dict must hold {name} as a dense tensor of {expected} for {param.name}, got {x.dtype} on {x.device}")
    if "step" in state and int(state["step"]) < 0:
        raise ValueError(f"state_dict must hold a step of at least 0 for {param.name}, got {int(state['step'])}")
    scores = local_of(state["scores"]) if param.pruned else None
    if scores is not None and not bool(((scores >= 0) & (scores <= 1)).all()):  # false for NaN too
        raise ValueError(f"state_dict must hold scores in [0, 1] for {param.name}, got others")
    u = state.get(_MAY_BE_MISSING)
    if u is not None and (not param.pruned or u.shape != state["scores"].shape):
        shape = tuple(state["scores"].shape) if param.pruned else "none"
        raise ValueError(f"state_dict must hold {_MAY_BE_MISSING} of shape {shape} for {param.name}, got {tuple(u.shape)}")
    if param.division is not None:
        _check_division(param, arena.mask_in(param, state).cpu(), param.division)


def _check_parts(arena: Arena, param: Parameter, state: dict[str, Tensor]) -> None:
    """ValueError unless this rank's part of every tensor has the shape that it needs, or of units as many entries."""
    views = arena.state_of(param)
    views = {_MAY_BE_MISSING: views["scores"], **views} if "scores" in views else views
    for name, x in state.items():
        if name in views and x.shape == param.whole:
            found, expected = tuple(arena.own_part(param, x).shape), tuple(param.shape)
        elif name in views and name != "mask":
            found, expected = (arena.own_part(param, x).numel(),), (views[name].numel(),)
        else:
            continue
        if found != expected:
            raise ValueError(f"state_dict must hold {name} of shape {expected} on this rank for {param.name}, got {found}")


def _check_division(param: Parameter, mask: Tensor, division: Blocks | NofM) -> None:
    """ValueError for a mask that keeps parts of units, or another number of neighbours than its pattern says."""
    entries = in_memory_order(torch.empty_strided(param.shape, param.stride, dtype=torch.bool).copy_(mask))
    for flat in entries.split(param.parts[0].numel):
        _check_matrix(param, flat, division)


def _check_matrix(param: Parameter, flat: Tensor, division: Blocks | NofM) -> None:
    """`_check_division` of one matrix, in memory order."""
    if isinstance(division, NofM):
        right = bool((flat.view(-1, division.of).sum(1) == division.keep).all())
        expected, found = f"{division.keep} of every {division.of} neighbours", "other numbers in places"
    else:
        units = flat.view(division.rows, division.cols)[:: division.block_rows, :: division.block_cols]
        right = torch.equal(reference.expand(units.flatten(), division), flat)
        expected, found = "whole units", "parts of some"
    if not right:
        raise ValueError(f"state_dict must hold {expected}, got a mask of {param.name} with {found} (another memory layout?)")

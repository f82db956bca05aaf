"""Saved states: what they hold besides the parameters' own, and the checks that a whole state must pass before any of it is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..reference import Blocks
from .arena import Arena, in_memory_order
from .coverage import Parameter
from .inner import INNER
from .options import check_group
from .patterns import NofM
from .phases import Phases
from .units import unpack_mask

__all__ = ["EXTRA", "extra", "fitting"]

EXTRA = "bip"  # the key of a state_dict for what belongs to no parameter
_KINDS = {"mask": "int32", "step": "int64"}  # all else is floating-point
_MAY_BE_MISSING = "score_momentum"  # zero until a mask_momentum asks for it


def extra(arena: Arena, phases: Phases, ramp: Any) -> dict[str, Any]:
    """What is saved under `EXTRA`: the cycle of phases, where the ramp of the sparsity stands, the rule of the lower level, the count of
    non-finite gradients, and that of kept weights, to notice damage."""
    counts = {"num_nonfinite": arena.num_nonfinite.clone(), "kept": int(arena.kept())}
    return {**phases.state(), "ramp": ramp and ramp.state_dict(), "optimizer": arena.rule.name, **counts}


def _expected(own: Mapping[str, Any]) -> dict[str, Any]:
    """Without what a state may have or not."""
    return {name: value for name, value in own.items() if name not in (_MAY_BE_MISSING, INNER)}


def fitting(
    arena: Arena, phases: Phases, ramp: Any, param_groups: Sequence[dict[str, Any]], state_dict: dict[str, Any]
) -> tuple[Sequence[dict[str, Any]], list[dict[str, Tensor]]]:
    """`_fitting`, with every way in which a damaged state can fail as a ValueError."""
    try:
        return _fitting(arena, phases, ramp, param_groups, state_dict)
    except (AttributeError, KeyError, TypeError, RuntimeError, IndexError) as error:  # NotImplementedError is a RuntimeError
        raise ValueError(f"state_dict must come from FastBiP.state_dict(), got one with {type(error).__name__}: {error}") from error


def _fitting(
    arena: Arena, phases: Phases, ramp: Any, param_groups: Sequence[dict[str, Any]], state_dict: dict[str, Any]
) -> tuple[Sequence[dict[str, Any]], list[dict[str, Tensor]]]:
    """Groups, and the state of every parameter of ``arena``, of a ``state_dict`` that fits an optimizer with ``param_groups``.

    Raises:
        ValueError: it is from another optimizer, for other parameters or groups, damaged, or has options out of range.
    """
    if not {EXTRA, "state", "param_groups"} <= state_dict.keys() or not extra(arena, phases, ramp).keys() <= state_dict[EXTRA].keys():
        raise ValueError(f"state_dict must come from FastBiP.state_dict(), got one with the keys {list(state_dict)}")
    phases.check_state(state_dict[EXTRA])
    if state_dict[EXTRA]["optimizer"] != arena.rule.name:
        raise ValueError(f"state_dict must be of optimizer={arena.rule.name!r}, got one of {state_dict[EXTRA]['optimizer']!r}")
    if (ramp is None) != (state_dict[EXTRA]["ramp"] is None):
        made = {True: "without steps", False: "with steps"}
        raise ValueError(f"state_dict must be of an optimizer that was made {made[ramp is None]}, got one {made[ramp is not None]}")
    if ramp is not None:
        ramp.check_state(state_dict[EXTRA]["ramp"])
    count = state_dict[EXTRA]["num_nonfinite"]
    if not isinstance(count, Tensor) or count.numel() != 1 or count.layout != torch.strided or count.is_complex() or count.is_meta:
        raise ValueError(f"state_dict must hold a dense tensor of one number as num_nonfinite, got {count!r:.80}")
    groups = state_dict["param_groups"]
    expected, given = (
        [(len(group["params"]), group.get("prune"), group.get("pattern")) for group in side] for side in (param_groups, groups)
    )
    if expected != given:
        raise ValueError(f"state_dict must have parameter groups of (length, prune, pattern) {expected}, got {given}")
    for group, own in zip(groups, param_groups, strict=True):
        check_group({**own, **group}, arena.rule)
    params = [p for group in param_groups for p in group["params"]]
    number = dict(zip(params, (i for group in groups for i in group["params"]), strict=True))
    states, kept = [], 0
    for param in arena.parameters:
        state, own_shapes = state_dict["state"].get(number[param.tensor], {}), _expected(arena.saved_shapes(param))
        shapes = {name: tuple(x.shape) for name, x in _expected(state).items()}
        if shapes != own_shapes:
            raise ValueError(f"state_dict must hold {own_shapes} for {param.name}, got {shapes}")
        _check_values(param, state)
        if param.pruned and groups[param.group].get("sparsity") is None and param_groups[param.group]["sparsity"] is not None:
            raise ValueError(f"state_dict must have a sparsity for {param.name}, got None")
        kept += int(unpack_mask(state["mask"], param.numel).sum()) if param.masked else 0
        states.append(state)
    if kept != state_dict[EXTRA]["kept"]:
        raise ValueError(f"state_dict is damaged: its masks keep {kept} weights, and {state_dict[EXTRA]['kept']} were saved")
    return groups, states


def _check_values(param: Parameter, state: dict[str, Tensor]) -> None:
    """ValueError for a tensor of another kind than was saved."""
    for name, x in state.items():
        if name == INNER:
            continue
        expected = _KINDS.get(name, "a floating-point type")
        kind = x.is_floating_point() if name not in _KINDS else str(x.dtype) == f"torch.{expected}"
        if not kind or x.layout != torch.strided or x.device.type == "meta":
            raise ValueError(f"state_dict must hold {name} as a dense tensor of {expected} for {param.name}, got {x.dtype} on {x.device}")
    if "step" in state and int(state["step"]) < 0:
        raise ValueError(f"state_dict must hold a step of at least 0 for {param.name}, got {int(state['step'])}")
    if param.pruned and not bool(((state["scores"] >= 0) & (state["scores"] <= 1)).all()):  # false for NaN too
        raise ValueError(f"state_dict must hold scores in [0, 1] for {param.name}, got others")
    u = state.get(_MAY_BE_MISSING)
    if u is not None and (not param.pruned or u.shape != state["scores"].shape):
        shape = tuple(state["scores"].shape) if param.pruned else "none"
        raise ValueError(f"state_dict must hold {_MAY_BE_MISSING} of shape {shape} for {param.name}, got {tuple(u.shape)}")
    if param.division is not None:
        _check_division(param, unpack_mask(state["mask"].cpu(), param.numel).view(param.shape), param.division)


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

"""What a saved state must look like to be loaded: checked as a whole before anything is copied."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .arena import Arena
from .options import check_group

__all__ = ["EXTRA", "fitting"]

EXTRA = "bip"  # the key of a state_dict for what belongs to no parameter: cycle, frozen, num_nonfinite
_MAY_BE_MISSING = "score_momentum"  # zero until a mask_momentum asks for it


def _shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(x.shape) for name, x in state.items() if name != _MAY_BE_MISSING}


def fitting(
    arena: Arena, param_groups: Sequence[dict[str, Any]], state_dict: dict[str, Any]
) -> tuple[Sequence[dict[str, Any]], list[dict[str, Tensor]]]:
    """Groups, and the state of every slot of ``arena``, of a ``state_dict`` that fits an optimizer with ``param_groups``.

    Raises:
        ValueError: it is from another optimizer, for other parameters or groups, or has options out of range.
    """
    if not {EXTRA, "state", "param_groups"} <= state_dict.keys() or not {"cycle", "frozen", "num_nonfinite"} <= state_dict[EXTRA].keys():
        raise ValueError(f"state_dict must come from FastBiP.state_dict(), got one with the keys {list(state_dict)}")
    groups = state_dict["param_groups"]
    expected, given = ([(len(group["params"]), group.get("prune")) for group in side] for side in (param_groups, groups))
    if expected != given:
        raise ValueError(f"state_dict must have parameter groups of (length, prune) {expected}, got {given}")
    for group, own in zip(groups, param_groups, strict=True):
        check_group({**own, **group})
    params = [p for group in param_groups for p in group["params"]]
    number = dict(zip(params, (i for group in groups for i in group["params"]), strict=True))
    states = []
    for slot in arena.slots:
        state, own_shapes = state_dict["state"].get(number[slot.member.param], {}), _shapes(arena.state_of(slot))
        if _shapes(state) != own_shapes:
            raise ValueError(f"state_dict must hold {own_shapes} for {slot.member.label}, got {_shapes(state)}")
        u = state.get(_MAY_BE_MISSING)
        if u is not None and tuple(u.shape) != own_shapes.get("scores"):
            raise ValueError(f"state_dict must hold {_MAY_BE_MISSING} of shape {own_shapes.get('scores')} for {slot.member.label}")
        states.append(state)
    return groups, states

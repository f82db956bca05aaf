"""What `FastBiP` saves, loads and copies. The form of a saved state and the checks of one that is loaded are in `engine.checkpoint`."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from .engine.agreement import together
from .engine.checkpoint import EXTRA, check_whole, extra, fitting
from .engine.engine import Engine
from .engine.inner import INNER, InnerOptimizer
from .engine.phases import Phases
from .engine.units import unpack_mask

__all__ = ["compact_states", "load_options", "load_states", "saved_states", "shown_states", "whole_state"]

Groups = Sequence[dict[str, Any]]
States = dict[Tensor, dict[str, Any]]


def shown_states(engine: Engine, inner: InnerOptimizer | None) -> States:
    """``optimizer.state`` as torch shows it: views, and all keys of saved states, by which `torch.distributed.checkpoint` loads
    flattened ones."""
    keys: dict[str, Any] = {EXTRA: {}} if inner is None else {EXTRA: {}, INNER: {}}
    return {p: own | keys for p, own in engine.state().items()}


def saved_states(engine: Engine, phases: Phases, ramp: Any, inner: InnerOptimizer | None) -> States:
    """The state of every parameter, with what belongs to none under `EXTRA` of each, and what ``inner`` keeps of it under `INNER`."""
    whole = extra(engine.arena, phases, ramp)
    states: States = {p: own | {EXTRA: copy.deepcopy(whole)} for p, own in engine.saved_state().items()}
    for p, own in inner.saved_state().items() if inner is not None else ():
        states[p][INNER] = own
    return states


def load_states(
    engine: Engine, phases: Phases, ramp: Any, inner: InnerOptimizer | None, param_groups: Groups, state_dict: dict[str, Any]
) -> None:
    """Go on where ``state_dict`` was taken; mutates all that is given but it.

    Raises:
        ValueError: it does not fit, or is damaged. Nothing has changed then.
        RuntimeError: other code has moved a parameter.
    """
    with together(engine.arena.ranks, "load_state_dict()"):
        groups, states, whole, kept = fitting(engine.arena, phases, ramp, param_groups, state_dict)
        engine.arena.check_place()
        own: dict[Tensor, Any] = {
            param.tensor: state[INNER] for param, state in zip(engine.arena.parameters, states, strict=True) if state.get(INNER)
        }
        if inner is not None:
            inner.check_state(own)
    check_whole(engine.arena, groups, whole, kept)
    with together(engine.arena.ranks, "load_state_dict()"):
        if ramp is not None:
            ramp.load_state_dict(whole["ramp"])  # first: the sparsity of the groups is theirs
        load_options(param_groups, groups)
        engine.load(states, whole["num_nonfinite"])
        if inner is not None:
            inner.load(own, param_groups)
        phases.load(whole)


def load_options(param_groups: Groups, saved: Groups) -> None:
    """Take all of the saved groups but their parameters: options, names, and keys that others have put there."""
    for group, given in zip(param_groups, saved, strict=True):
        group.update(copy.deepcopy({key: value for key, value in given.items() if key != "params"}))


def compact_states(states: Mapping[Tensor, dict[str, Tensor]]) -> States:
    """Copies that do not share one large storage, which a pickle would hold once for each of its views."""
    return {p: {name: x.clone() for name, x in own.items()} for p, own in states.items()}


def whole_state(p: Tensor, state: dict[str, Any], new: Tensor) -> dict[str, Any]:
    """A saved state of ``p`` for a parameter that takes its place; where that is sharded, the mask has an entry for each of its entries."""
    if "mask" not in state or not hasattr(new, "placements") or hasattr(p, "placements"):
        return state
    return state | {"mask": unpack_mask(state["mask"], p.numel()).view(p.shape)}

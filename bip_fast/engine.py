"""What runs the steps of one optimizer: its arena, the launch plan for it, and the options that both were made for, kept in agreement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .arena import Arena
from .ops import StepPlan, backend
from .options import GROUP_KEYS, check_group, hyper_table
from .prunable import is_pruned, members_of

__all__ = ["Engine"]


def _value(option: Any) -> Any:
    """A tensor's value at this moment, so that a change in place is seen."""
    return option.tolist() if isinstance(option, Tensor) and option.device.type != "meta" else option


class Engine:
    """Kernels over the parameters of some groups.

    Args:
        param_groups: of the optimizer; looked at again in every step, so that schedulers are followed.
        names: labels for errors and reports.
        excluded: parameters that stay dense although their group is pruned.
        states: saved states of parameters that were trained before; all others start as their magnitude says.
        project: select the masks anew from all scores.

    Raises:
        ValueError: a parameter or an option cannot be used. Nothing was written then.
    """

    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(
        self,
        param_groups: Sequence[dict[str, Any]],
        names: Mapping[Tensor, str],
        excluded: set[Tensor],
        states: Mapping[Tensor, dict[str, Tensor]],
        project: bool,
    ) -> None:
        self._groups, self._excluded = param_groups, excluded
        self._members = members_of(param_groups, names, excluded)
        if not any(member.pruned for member in self._members):
            raise ValueError("nothing to prune: params must hold Conv or Linear weights, or parameters of two or more dimensions")
        device = self._members[0].param.device
        backend(device)
        self._checked: Any = None  # the options that were last found valid
        self._check_options()
        # Nothing is written before all memory is there.
        self.arena = Arena(self._members, device)
        self.replan()
        for slot in self.arena.slots:
            if slot.member.param in states:
                self.arena.load(slot, states[slot.member.param])
            else:
                self.arena.start(slot)
        self.arena.record()
        if project:
            self.run("upper", self.arena.no_gradients())

    def _selection(self) -> list[tuple[Any, ...]]:
        """What the selection groups depend on."""
        return [(group["sparsity"], group["scope"], group["mask_momentum"] > 0) for group in self._groups]

    def replan(self) -> None:
        """Make the plan for the options as they are now."""
        if any(group["mask_momentum"] > 0 for group in self._groups):
            self.arena.ensure_score_momentum()
        options = [(float(group["sparsity"] or 0), group["scope"]) for group in self._groups]  # None: nothing in it is pruned
        self._plan: StepPlan = self.arena.plan(options)
        self._planned = self._selection()

    def _check_options(self) -> None:
        """Check the options of all groups if they have changed since the last time."""
        seen = [tuple(_value(group.get(key)) for key in (*GROUP_KEYS, "density")) for group in self._groups]
        if seen == self._checked:
            return
        for group in self._groups:
            check_group(group)
        for member in self._members:
            group = self._groups[member.row]
            if member.pruned and group["sparsity"] is None:
                raise ValueError(f"give one of sparsity and density, got neither, for {member.label}")
            if member.pruned != is_pruned(group, member.param, self._excluded):
                raise ValueError(f"prune of a parameter group cannot change any more, got {group['prune']!r} for {member.label}")
        self._checked = seen

    def run(self, phase: str, gradients: np.ndarray, grad_scale: Tensor | None = None, found_inf: Tensor | None = None) -> bool:
        """One step of the kernels; True when the state has got new tensors."""
        self._check_options()
        stale = phase != "lower" and self._planned != self._selection()
        if stale:
            self.replan()
        self._plan.run(phase, hyper_table(self._groups), gradients, self.arena.num_nonfinite, grad_scale, found_inf)
        self.arena.mark_written()
        return stale

    def state(self) -> dict[Tensor, dict[str, Tensor]]:
        """Views of every parameter's state."""
        return {slot.member.param: self.arena.state_of(slot) for slot in self.arena.slots}

    def saved_state(self) -> dict[Tensor, dict[str, Tensor]]:
        """`state`, in the form that a checkpoint has."""
        return {slot.member.param: self.arena.saved_state_of(slot) for slot in self.arena.slots}

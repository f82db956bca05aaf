"""The flat storage: which parameter lives where, views of it, and the tables of pointers that the kernels read.

theta, momentum, scores and mask of all parameters lie in one array each. A parameter has the same offset in all of them, a multiple of
`ALIGN` entries; parameters with a score for every entry come first, then those with a mask only (their scores are those of units,
`units`), then dense ones that need an fp32 theta, then dense fp32 ones, whose theta is the parameter itself. So each array is as long as
its last user needs. Parameters stay in their own storage, so files of the model keep their size, and entry i of a slot is entry i of the
parameter's memory, whatever its layout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import reference
from ..reference import Blocks
from .budgets import Budget, SelectionGroup, selection_groups
from .members import Member
from .native import DTYPES, StepPlan, kernels
from .patterns import NofM
from .units import Part, Units, pack_mask, unpack_mask

__all__ = ["Arena", "Slot"]


class Slot(NamedTuple):
    """Where a member lives: entries [start, start + numel) of the flat arrays."""

    member: Member
    start: int
    numel: int
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def has_theta(self) -> bool:
        """False for a dense fp32 parameter, which is its own theta."""
        return self.member.masked or self.dtype != torch.float32


def in_memory_order(p: Tensor) -> Tensor:
    """The memory of a dense tensor as a flat view."""
    return p.detach().as_strided((p.numel(),), (1,), p.storage_offset())


def _same_layout(a: Tensor, shape: torch.Size, stride: tuple[int, ...]) -> bool:
    return a.stride() == stride or all(size == 1 or x == y for size, x, y in zip(shape, a.stride(), stride, strict=True))


class Arena:
    """State of all parameters of one optimizer, on one device.

    Args:
        members: every parameter once; pruned ones compete in this order.
        device: where all of them are.
    """

    def __init__(self, members: Sequence[Member], device: torch.device) -> None:
        align = kernels().ALIGN
        order = sorted(members, key=lambda m: 0 if m.scored else 1 if m.masked else 2 if m.param.dtype != torch.float32 else 3)
        self.device = device
        self.slots: list[Slot] = []
        start = scored_end = masked_end = theta_end = 0
        for member in order:
            p = member.param
            slot = Slot(member, start, p.numel(), p.shape, p.stride(), p.dtype)
            self.slots.append(slot)
            start += -(-slot.numel // align) * align
            scored_end = start if member.scored else scored_end
            masked_end = start if member.masked else masked_end
            theta_end = start if slot.has_theta else theta_end
        self.slot_of = {slot.member.param: slot for slot in self.slots}
        self.pruned = [self.slot_of[member.param] for member in members if member.pruned]
        self.num_scored = sum(slot.member.scored for slot in self.slots)
        self.momentum = torch.zeros(start, dtype=torch.float32, device=device)
        self.theta = torch.zeros(theta_end, dtype=torch.float32, device=device)
        self.scores = torch.zeros(scored_end, dtype=torch.float32, device=device)
        self.mask = torch.zeros(masked_end // 32, dtype=torch.int32, device=device)
        self.score_momentum: Tensor | None = None  # made when a mask_momentum asks for it
        self.num_nonfinite = torch.zeros((), dtype=torch.int64, device=device)
        sets: list[list[Part]] = [[] for _ in range(1 + max((m.unit_set for m in members), default=-1))]
        for i, slot in enumerate(self.slots):
            if isinstance(slot.member.division, Blocks):
                sets[slot.member.unit_set].append(Part(i, slot.member.division, slot.member.pruned))
        self.units = Units([sorted(parts, key=lambda part: not part.counts) for parts in sets], device)
        self.record()

    # --- views -----------------------------------------------------------------------------------------------------------------------

    def _view(self, flat: Tensor, slot: Slot) -> Tensor:
        return flat.as_strided(slot.shape, slot.stride, slot.start)

    def words(self, slot: Slot) -> Tensor:
        """Mask words of a pruned parameter, int32."""
        return self.mask[slot.start // 32 :][: -(-slot.numel // 32)]

    def state_of(self, slot: Slot) -> dict[str, Tensor]:
        """The slot's state as views, shaped like the parameter and with its strides; but ``mask`` is the words in memory order, and units
        have a score each."""
        state = {"momentum": self._view(self.momentum, slot)}
        if slot.has_theta:
            state["theta"] = self._view(self.theta, slot)
        if slot.member.masked:
            state["mask"] = self.words(slot)
        if slot.member.scored:
            state["scores"] = self._view(self.scores, slot)
            if self.score_momentum is not None:
                state["score_momentum"] = self._view(self.score_momentum, slot)
        elif slot.member.pruned:
            state = self.units.state_of(slot.member.unit_set) | state
        return state

    def mask_of(self, slot: Slot) -> Tensor:
        """A new bool tensor shaped like the parameter, with its strides."""
        return unpack_mask(self.words(slot), slot.numel).as_strided(slot.shape, slot.stride)

    def scores_of(self, slot: Slot) -> Tensor:
        """A new tensor shaped like the parameter, with its strides: the score of every entry, or of its unit."""
        if isinstance(slot.member.division, Blocks):
            scores = self.units.state_of(slot.member.unit_set)["scores"]
            return reference.expand(scores, slot.member.division).as_strided(slot.shape, slot.stride)
        return self.state_of(slot)["scores"].clone()

    def saved_state_of(self, slot: Slot) -> dict[str, Tensor]:
        """`state_of`, but the mask words are in index order (row-major), so that they do not depend on anyone's layout."""
        state = self.state_of(slot)
        return state | {"mask": pack_mask(self.mask_of(slot).flatten())} if slot.member.masked else state

    def kept(self) -> Tensor:
        """Number of ones in all masks."""
        return unpack_mask(self.mask, 32 * self.mask.numel()).sum()

    # --- values ----------------------------------------------------------------------------------------------------------------------

    def ensure_score_momentum(self) -> None:
        """Make the arrays of score momenta, zero, if there are none yet."""
        self.units.ensure_score_momentum()
        if self.score_momentum is None:
            self.score_momentum = torch.zeros_like(self.scores)

    def start(self, slot: Slot) -> None:
        """Start of BiP: theta is the parameter, momenta are 0, scores as `reference.start_scores` says, for units as `start_units` does.
        The mask follows from the first projection."""
        theta = in_memory_order(slot.member.param).float()
        if slot.has_theta:
            self.theta[slot.start :][: slot.numel] = theta
        if slot.member.scored:
            self.scores[slot.start :][: slot.numel] = reference.start_scores(theta)
        if slot.member.masked:
            slot.member.param.detach().zero_()  # as the mask words are: the projection writes what it turns on

    def start_units(self, number: int) -> None:
        """Start scores of a set whose tensors have begun."""
        slots = [self.slots[part.slot] for part in self.units.sets[number].parts if part.counts]
        self.units.start(number, [self.theta[slot.start :][: slot.numel].abs() for slot in slots])

    def rescore(self, slot: Slot, scores: Mapping[Tensor, Tensor]) -> None:
        """Take the scores of a parameter whose entries have one each."""
        if slot.member.scored and slot.member.param in scores:
            self._view(self.scores, slot).copy_(scores[slot.member.param])

    def rescore_units(self, number: int, scores: Mapping[Tensor, Tensor]) -> None:
        """Take the scores of a set of units, each the mean over its weights, if all tensors that count in it have some."""
        slots = [self.slots[part.slot] for part in self.units.sets[number].parts if part.counts]
        if all(slot.member.param in scores for slot in slots):
            given = [torch.empty_strided(slot.shape, slot.stride, device=self.device).copy_(scores[slot.member.param]) for slot in slots]
            self.units.start(number, [in_memory_order(x) for x in given])

    def load(self, slot: Slot, state: dict[str, Tensor]) -> None:
        """Copy a state such as `saved_state_of` gives, from any layout, device and dtype, and rewrite z = m*theta."""
        if slot.member.masked:
            mask = unpack_mask(state["mask"].to(self.device), slot.numel).view(slot.shape)
            in_order = in_memory_order(torch.empty_strided(slot.shape, slot.stride, dtype=torch.bool, device=self.device).copy_(mask))
            self.words(slot).copy_(pack_mask(in_order))
            if isinstance(slot.member.division, Blocks):
                own = slot.member.division
                units = in_order.view(own.rows, own.cols)[:: own.block_rows, :: own.block_cols]  # one entry speaks for its unit
                self.units.state_of(slot.member.unit_set)["mask"].copy_(pack_mask(units.flatten()))
        if "score_momentum" in state:
            self.ensure_score_momentum()
        for name, view in self.state_of(slot).items():
            if name in state and name != "mask":
                view.copy_(state[name])
            elif name != "mask":
                view.zero_()
        if slot.has_theta:
            theta = self._view(self.theta, slot)
            z = torch.where(self.mask_of(slot), theta, 0.0) if slot.member.masked else theta
            slot.member.param.detach().copy_(z)

    # --- foreign writes --------------------------------------------------------------------------------------------------------------

    def _storage(self, p: Tensor) -> tuple[Any, ...]:
        return p.data_ptr(), p.dtype, p.device, p.shape, p.stride()

    def record(self) -> None:
        """Remember where the parameters are and that what they hold is ours."""
        self._storages = [self._storage(slot.member.param) for slot in self.slots]
        self._versions = [slot.member.param._version for slot in self.slots]

    def mark_written(self) -> None:
        """Tell autograd that the kernels wrote the parameters, as an in-place operation of torch would."""
        for slot in self.slots:
            torch.autograd.graph.increment_version(slot.member.param)
        self._versions = [slot.member.param._version for slot in self.slots]

    def check_place(self) -> None:
        """RuntimeError when a parameter has moved."""
        for slot, storage in zip(self.slots, self._storages, strict=True):
            p = slot.member.param
            if self._storage(p) != storage:
                if self._storage(p)[1:] == storage[1:]:
                    raise RuntimeError(
                        f"the memory of {slot.member.label} was replaced by someone else (.data = ..., share_memory_(), a new load with "
                        "assign). Do that before you make FastBiP, or make a new FastBiP and load the state_dict() of this one"
                    )
                now = f"{p.dtype} of shape {tuple(p.shape)} and strides {p.stride()} on {p.device}"
                before = f"{slot.dtype} of shape {tuple(slot.shape)} and strides {slot.stride} on {self.device}"
                raise RuntimeError(
                    f"{slot.member.label} was moved by someone else: it is now {now}, was {before}. Move or convert the model "
                    "before you make FastBiP, or make a new FastBiP and load the state_dict() of this one"
                )

    def check_untouched(self) -> None:
        """RuntimeError when a parameter has moved, or when another than this optimizer wrote into one that has a theta of its own."""
        self.check_place()
        for slot, version in zip(self.slots, self._versions, strict=True):
            if slot.has_theta and slot.member.param._version != version:
                raise RuntimeError(
                    f"{slot.member.label} was written by someone else since the last step; FastBiP keeps its weight in weight_of() and "
                    "would overwrite the new value. Load or change weights before you make FastBiP; to go on from a checkpoint, load the "
                    "model first, then call load_state_dict() of the optimizer again"
                )

    # --- tables for the kernels ------------------------------------------------------------------------------------------------------

    def _rivals(self) -> list[tuple[int, Slot, int]]:
        """What competes, in the order of ties: (row of the kernels' table, tensor, number of units); of a set of units its first tensor.

        Rows: tensors with scores of their own, sets of units, all other tensors.
        """
        singles = [(i, slot, slot.numel) for i, slot in enumerate(self.slots[: self.num_scored]) if slot.member.division is None]
        sets = [(self.num_scored + i, self.slots[own.parts[0].slot], own.numel) for i, own in enumerate(self.units.sets)]
        return singles + sets

    def selection(self, groups: Sequence[dict[str, Any]]) -> list[SelectionGroup]:
        """Which pruned tensors compete for how many places, under the options of their parameter groups."""
        budgets = []
        for _, slot, units in self._rivals():
            group = groups[slot.member.row]
            least = min(int(group["min_kept"]), units) if isinstance(slot.member.division, Blocks) else 0
            kind = group["pattern"]
            budgets.append(Budget(tuple(slot.shape), units, float(group["sparsity"]), group["scope"], least, kind))
        return selection_groups(budgets)

    def label_of(self, group: SelectionGroup) -> str:
        """What competes in a group, in words."""
        members = [self._rivals()[i][1].member.label for i in group.members]
        return members[0] + (f" and {len(members) - 1} more" if len(members) > 1 else "")

    def plan(self, groups: Sequence[SelectionGroup], hypers: np.ndarray, min_kept: Sequence[int]) -> StepPlan:
        """Launch recipe for a `selection`; ``min_kept``: of every parameter group."""
        rivals, first_set = self._rivals(), self.num_scored
        table = np.zeros(len(self.slots) + len(self.units.sets), dtype=kernels().tensor_dtype)
        table["group"] = -1
        least = [0] * len(self.units.sets)
        for number, group in enumerate(groups):
            index = 0
            for i in group.members:
                row, slot, units = rivals[i]
                table["group"][row], table["index"][row] = number, index
                index += units
                if row >= first_set and len(group.members) > 1:  # alone, a set keeps what its budget says
                    least[row - first_set] = min(min_kept[slot.member.row], units)
        rows = self.rows_of_slots()
        for slot, at in zip(self.slots, rows, strict=True):
            tensor, p = table[at], slot.member.param
            tensor["param"] = tensor["theta"] = p.data_ptr()
            tensor["numel"], tensor["hyper"], tensor["dtype"] = slot.numel, slot.member.row, DTYPES[slot.dtype]
            for name, view in self.state_of(slot).items():
                if slot.member.scored or name not in ("scores", "score_momentum"):
                    tensor[name] = view.data_ptr()
            if isinstance(slot.member.division, NofM):
                tensor["keep"], tensor["of"] = slot.member.division
        units_table = self.units.tables(table, first_set, rows, least)
        budgets = np.zeros(len(groups), dtype=kernels().group_dtype)
        budgets["numel"], budgets["kept"] = [group.numel for group in groups], [group.kept for group in groups]
        return StepPlan(self.device, table, budgets, hypers, units_table)

    def rows_of_slots(self) -> list[int]:
        """Where every slot stands in the table of the kernels, which has the sets of units in its middle."""
        return [i if i < self.num_scored else i + len(self.units.sets) for i in range(len(self.slots))]

    def no_gradients(self) -> np.ndarray:
        """A table without any gradient."""
        return np.zeros(len(self.slots) + len(self.units.sets), dtype=kernels().gradient_dtype)

    def gradients(self) -> tuple[np.ndarray, list[Tensor]]:
        """A row for every tensor of the plan, and what must stay alive until the kernels ran. Gradients of another layout are copied.

        Raises:
            RuntimeError: a gradient is sparse, on another device or of another dtype than the kernels know.
        """
        table = self.no_gradients()
        pointers, dtypes, alive = [0] * len(table), [0] * len(table), []
        for i, slot in zip(self.rows_of_slots(), self.slots, strict=True):
            g = slot.member.param.grad
            if g is None:
                continue
            if g.layout != torch.strided or g.device != self.device or g.dtype not in DTYPES:
                kind = "sparse" if g.layout != torch.strided else "dense"
                raise RuntimeError(
                    f"the gradient of {slot.member.label} must be dense, on {self.device}, and float32, bfloat16 or float16, "
                    f"got a {kind} one of {g.dtype} on {g.device}"
                )
            if not _same_layout(g, slot.shape, slot.stride) or g.is_neg():
                g = torch.empty_strided(slot.shape, slot.stride, dtype=g.dtype, device=self.device).copy_(g)
            alive.append(g)
            pointers[i], dtypes[i] = g.data_ptr(), DTYPES[g.dtype]
        table["data"], table["dtype"] = pointers, dtypes
        return table, alive

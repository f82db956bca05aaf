"""The flat storage: which parameter lives where, views of it, and the tables of pointers that the kernels read.

theta, momentum, scores and mask of all parameters lie in one array each. A parameter has the same offset in all of them, a multiple of
`ALIGN` entries; pruned parameters come first, then dense ones that need an fp32 theta, then dense fp32 ones, whose theta is the parameter
itself. So each array is as long as its last user needs. Parameters stay in their own storage, so files of the model keep their size, and
entry i of a slot is entry i of the parameter's memory, whatever its layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .ops import DTYPES, StepPlan, kernels
from .patterns import Budget, SelectionGroup, selection_groups

__all__ = ["Arena", "Member", "unpack_mask"]


class Member(NamedTuple):
    """A parameter as the optimizer sees it: ``row`` is its parameter group."""

    param: Tensor
    label: str
    pruned: bool
    row: int


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
        return self.member.pruned or self.dtype != torch.float32


def unpack_mask(words: Tensor, numel: int) -> Tensor:
    """Bool tensor [numel] of mask words: bit i%32 of word i/32."""
    bits = torch.arange(32, dtype=torch.int32, device=words.device)
    return (words.unsqueeze(1).bitwise_right_shift(bits) & 1).flatten()[:numel].bool()


def pack_mask(mask: Tensor) -> Tensor:
    """Mask words, int32 [ceil(numel/32)], of a flat bool tensor; bits past its end are 0."""
    padded = torch.nn.functional.pad(mask, (0, -mask.numel() % 32)).view(-1, 32).to(torch.int32)
    bits = torch.arange(32, dtype=torch.int32, device=mask.device)
    return padded.bitwise_left_shift(bits).sum(1, dtype=torch.int64).to(torch.int32)


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
        order = sorted(members, key=lambda m: 0 if m.pruned else 1 if m.param.dtype != torch.float32 else 2)
        self.device = device
        self.slots: list[Slot] = []
        start = pruned_end = theta_end = 0
        for member in order:
            p = member.param
            slot = Slot(member, start, p.numel(), p.shape, p.stride(), p.dtype)
            self.slots.append(slot)
            start += -(-slot.numel // align) * align
            pruned_end = start if member.pruned else pruned_end
            theta_end = start if slot.has_theta else theta_end
        self.slot_of = {slot.member.param: slot for slot in self.slots}
        self.pruned = [slot for slot in self.slots if slot.member.pruned]
        self.momentum = torch.zeros(start, dtype=torch.float32, device=device)
        self.theta = torch.zeros(theta_end, dtype=torch.float32, device=device)
        self.scores = torch.zeros(pruned_end, dtype=torch.float32, device=device)
        self.mask = torch.zeros(pruned_end // 32, dtype=torch.int32, device=device)
        self.score_momentum: Tensor | None = None  # made when a mask_momentum asks for it
        self.num_nonfinite = torch.zeros((), dtype=torch.int64, device=device)
        self.record()

    # --- views -----------------------------------------------------------------------------------------------------------------------

    def _view(self, flat: Tensor, slot: Slot) -> Tensor:
        return flat.as_strided(slot.shape, slot.stride, slot.start)

    def words(self, slot: Slot) -> Tensor:
        """Mask words of a pruned parameter, int32."""
        return self.mask[slot.start // 32 :][: -(-slot.numel // 32)]

    def state_of(self, slot: Slot) -> dict[str, Tensor]:
        """The slot's state as views: shaped like the parameter and with its strides, but for ``mask``, the words in memory order."""
        state = {"momentum": self._view(self.momentum, slot)}
        if slot.has_theta:
            state["theta"] = self._view(self.theta, slot)
        if slot.member.pruned:
            state |= {"scores": self._view(self.scores, slot), "mask": self.words(slot)}
            if self.score_momentum is not None:
                state["score_momentum"] = self._view(self.score_momentum, slot)
        return state

    def mask_of(self, slot: Slot) -> Tensor:
        """A new bool tensor shaped like the parameter, with its strides."""
        return unpack_mask(self.words(slot), slot.numel).as_strided(slot.shape, slot.stride)

    def saved_state_of(self, slot: Slot) -> dict[str, Tensor]:
        """`state_of`, but the mask words are in index order (row-major), so that they do not depend on anyone's layout."""
        state = self.state_of(slot)
        return state | {"mask": pack_mask(self.mask_of(slot).flatten())} if slot.member.pruned else state

    def kept(self) -> Tensor:
        """Number of ones in all masks."""
        return unpack_mask(self.mask, 32 * self.mask.numel()).sum()

    # --- values ----------------------------------------------------------------------------------------------------------------------

    def ensure_score_momentum(self) -> None:
        """Make the array of score momenta, zero, if there is none yet."""
        if self.score_momentum is None:
            self.score_momentum = torch.zeros_like(self.scores)

    def start(self, slot: Slot) -> None:
        """Start of BiP: theta is the parameter, s = min(abs(theta), 1), momenta are 0. The mask follows from the first projection."""
        theta = in_memory_order(slot.member.param).float()
        if slot.has_theta:
            self.theta[slot.start :][: slot.numel] = theta
        if slot.member.pruned:
            self.scores[slot.start :][: slot.numel] = theta.abs().clamp_(max=1)
            slot.member.param.detach().zero_()  # as the mask words are: the projection writes what it turns on

    def load(self, slot: Slot, state: dict[str, Tensor]) -> None:
        """Copy a state such as `saved_state_of` gives, from any layout, device and dtype, and rewrite z = m*theta."""
        if slot.member.pruned:
            mask = unpack_mask(state["mask"].to(self.device), slot.numel).view(slot.shape)
            in_order = torch.empty_strided(slot.shape, slot.stride, dtype=torch.bool, device=self.device).copy_(mask)
            self.words(slot).copy_(pack_mask(in_memory_order(in_order)))
        if "score_momentum" in state:
            self.ensure_score_momentum()
        for name, view in self.state_of(slot).items():
            if name in state and name != "mask":
                view.copy_(state[name])
            elif name != "mask":
                view.zero_()
        if slot.has_theta:
            theta = self._view(self.theta, slot)
            z = torch.where(self.mask_of(slot), theta, 0.0) if slot.member.pruned else theta
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

    def selection(self, options: Sequence[tuple[float, str]]) -> list[SelectionGroup]:
        """Which pruned tensors compete for how many places, under the (sparsity, scope) of every parameter group."""
        return selection_groups([Budget(tuple(slot.shape), *options[slot.member.row]) for slot in self.pruned])

    def plan(self, groups: Sequence[SelectionGroup], hypers: np.ndarray) -> StepPlan:
        """Launch recipe for a `selection`."""
        table = np.zeros(len(self.slots), dtype=kernels().tensor_dtype)
        table["group"] = -1
        for number, group in enumerate(groups):
            index = 0
            for i in group.members:  # pruned slots come first, so a position among them is a row of the table
                table["group"][i], table["index"][i] = number, index
                index += self.pruned[i].numel
        for i, slot in enumerate(self.slots):
            row, p = table[i], slot.member.param
            row["param"] = row["theta"] = p.data_ptr()
            row["numel"], row["hyper"], row["dtype"] = slot.numel, slot.member.row, DTYPES[slot.dtype]
            for name, view in self.state_of(slot).items():
                row[name] = view.data_ptr()
        budgets = np.zeros(len(groups), dtype=kernels().group_dtype)
        budgets["numel"], budgets["kept"] = [group.numel for group in groups], [group.kept for group in groups]
        return StepPlan(self.device, table, budgets, hypers)

    def no_gradients(self) -> np.ndarray:
        """A table without any gradient."""
        return np.zeros(len(self.slots), dtype=kernels().gradient_dtype)

    def gradients(self) -> tuple[np.ndarray, list[Tensor]]:
        """One row per slot, and what must stay alive until the kernels ran. Gradients of another layout are copied.

        Raises:
            RuntimeError: a gradient is sparse, on another device or of another dtype than the kernels know.
        """
        table, pointers, dtypes, alive = self.no_gradients(), [0] * len(self.slots), [0] * len(self.slots), []
        for i, slot in enumerate(self.slots):
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

"""Scores of units: filters, channels, blocks, each the score of many weights; one for the same filters of coupled layers.

The weights themselves stay with `bip_fast.engine.arena`, where every entry has its mask bit; the kernels keep both in agreement.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import reference
from ..reference import Blocks
from .native import kernels

__all__ = ["Part", "UnitSet", "Units", "pack_mask", "unpack_mask"]


def unpack_mask(words: Tensor, numel: int) -> Tensor:
    """Bool tensor [numel] of mask words: bit i%32 of word i/32."""
    bits = torch.arange(32, dtype=torch.int32, device=words.device)
    return (words.unsqueeze(1).bitwise_right_shift(bits) & 1).flatten()[:numel].bool()


def pack_mask(mask: Tensor) -> Tensor:
    """Mask words, int32 [ceil(numel/32)], of a flat bool tensor; bits past its end are 0."""
    padded = torch.nn.functional.pad(mask, (0, -mask.numel() % 32)).view(-1, 32).to(torch.int32)
    bits = torch.arange(32, dtype=torch.int32, device=mask.device)
    return padded.bitwise_left_shift(bits).sum(1, dtype=torch.int64).to(torch.int32)


class Part(NamedTuple):
    """A tensor of a set: the number of its slot, its units, and whether it has a say in their scores (a vector that follows has not)."""

    slot: int
    blocks: Blocks
    counts: bool


class UnitSet(NamedTuple):
    """Units that are kept or dropped over all tensors of a set: ``numel`` of them, at ``start`` in the arrays of `Units`."""

    parts: tuple[Part, ...]
    start: int
    numel: int


class Units:
    """Scores, masks and score momenta of the units of one optimizer.

    Args:
        sets: the parts of every set; those that count come first in each.
        device: where they are.
    """

    def __init__(self, sets: Sequence[Sequence[Part]], device: torch.device) -> None:
        align = kernels().ALIGN
        self.sets: list[UnitSet] = []
        start = 0
        for parts in sets:
            numel = parts[0].blocks.units
            self.sets.append(UnitSet(tuple(parts), start, numel))
            start += -(-numel // align) * align
        self._scores = torch.zeros(start, dtype=torch.float32, device=device)
        self._mask = torch.zeros(start // 32, dtype=torch.int32, device=device)
        self._score_momentum: Tensor | None = None

    def ensure_score_momentum(self) -> None:
        """Make the array of score momenta, zero, if there is none yet."""
        if self._score_momentum is None:
            self._score_momentum = torch.zeros_like(self._scores)

    def state_of(self, number: int) -> dict[str, Tensor]:
        """Views ``scores``, ``mask`` (words) and, if there is one, ``score_momentum`` of a set."""
        unit_set = self.sets[number]
        state = {
            "scores": self._scores[unit_set.start :][: unit_set.numel],
            "mask": self._mask[unit_set.start // 32 :][: -(-unit_set.numel // 32)],
        }
        if self._score_momentum is not None:
            state["score_momentum"] = self._score_momentum[unit_set.start :][: unit_set.numel]
        return state

    def kept(self, number: int) -> tuple[int, int]:
        """How many units of a set are kept, and of how many. Waits for the device."""
        return int(unpack_mask(self.state_of(number)["mask"], self.sets[number].numel).sum()), self.sets[number].numel

    def start(self, number: int, magnitudes: Sequence[Tensor]) -> None:
        """Start scores of a set from ``abs(theta)`` of its tensors that count, in memory order."""
        parts = [part.blocks for part in self.sets[number].parts if part.counts]
        self.state_of(number)["scores"].copy_(reference.unit_means(magnitudes, parts))

    def mask_of_entries(self, number: int, part: Part) -> Tensor:
        """Bool, one for every entry of a part in memory order."""
        return reference.expand(unpack_mask(self.state_of(number)["mask"], self.sets[number].numel), part.blocks)

    def tables(self, tensors: np.ndarray, first_row: int, row_of_slot: Sequence[int], least: Sequence[int]) -> UnitTables:
        """What the kernels need of the units, beside their rows in ``tensors``, which are filled in.

        Args:
            tensors: rows of ``tensor_dtype``; those of the sets begin at ``first_row``, and the weights are there already.
            row_of_slot: where every slot stands.
            least: how many units of every set the selection keeps in any case.
        """
        sets = np.zeros(len(self.sets), dtype=kernels().unit_set_dtype)
        parts = np.zeros(sum(len(unit_set.parts) for unit_set in self.sets), dtype=kernels().part_dtype)
        strips = [[_strips(part.blocks) if part.counts else 0 for part in unit_set.parts] for unit_set in self.sets]
        scratch = _Scratch(self._scores.device)
        places: list[tuple[np.void, str, int]] = []  # where the address of which piece of the scratch belongs
        at = items = 0
        for number, unit_set in enumerate(self.sets):
            row, tensor, state, numel = sets[number], tensors[first_row + number], self.state_of(number), unit_set.numel
            first = unit_set.parts[0]
            tensor["numel"], tensor["mask"] = numel, state["mask"].data_ptr()
            tensor["hyper"] = row["hyper"] = tensors[row_of_slot[first.slot]]["hyper"]
            row["scores"] = state["scores"].data_ptr()
            row["score_momentum"] = state["score_momentum"].data_ptr() if "score_momentum" in state else 0
            row["tensor"], row["min_kept"], row["strips"] = first_row + number, least[number], sum(strips[number])
            row["part_begin"], row["part_end"] = at, at + len(unit_set.parts)
            places += [(tensor, "scores", scratch.take(4 * numel)), (row, "before", scratch.take(4 * -(-numel // 32)))]
            places += [(row, "best", scratch.take(8 * -(-numel // kernels().TILE))), (row, "seen", scratch.take(4))]
            sums = scratch.take(4 * numel * sum(strips[number]))
            places.append((row, "sums", sums))
            for part, own in zip(unit_set.parts, strips[number], strict=True):
                out = parts[at]
                out["rows"], out["cols"], out["block_rows"], out["block_cols"] = part.blocks
                out["tensor"], out["set"], out["first_item"] = row_of_slot[part.slot], number, items
                if part.counts:
                    items += kernels().num_items(*part.blocks)
                    places.append((out, "sums", sums))
                    sums += 4 * numel * own
                at += 1
        memory = scratch.allocate()
        for place, name, offset in places:
            place[name] = memory.data_ptr() + offset
        return UnitTables(sets, parts, items, first_row, memory)


class UnitTables(NamedTuple):
    """Rows of ``unit_set_dtype`` and ``part_dtype``, the number of items of all parts, the row of the first set in the tensor table, and
    memory for one step's sums, counters, and scores as the selection sees them: zero before the first step."""

    sets: np.ndarray
    parts: np.ndarray
    num_items: int
    first_row: int
    scratch: Tensor


def _strips(blocks: Blocks) -> int:
    return -(-min(blocks.block_rows, blocks.rows) // kernels().STRIP)


class _Scratch:
    """Pieces of one allocation, each aligned for any access."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._size = device, 0

    def take(self, size: int) -> int:
        """Offset of the next piece."""
        offset = self._size
        self._size += -(-size // 128) * 128
        return offset

    def allocate(self) -> Tensor:
        return torch.zeros(max(self._size, 1), dtype=torch.uint8, device=self._device)

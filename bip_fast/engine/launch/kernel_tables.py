"""The tables of a plan: what competes, where it lies in memory, and where its units are summed.

Rows of the table of tensors: matrices of parameters with scores of their own, sets of units, matrices of all other parameters. The dtypes
of all tables are those of `csrc/bip.h`. They live on the device as long as the plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...reference import Blocks
from ..arena import Arena
from ..budgets import SelectionGroup
from ..native import DTYPES, MAX_GROUP, kernels, not_capturing
from ..patterns import NofM
from ..units import UnitSet, blocks_of

__all__ = ["DeviceTable", "UnitTables", "check_own_part", "group_table", "least_kept", "num_tiles", "tensor_table", "unit_tables"]


class DeviceTable:
    """A numpy table in ``device`` memory, at one address for good: kernels in a captured graph see what `update` writes."""

    def __init__(self, table: np.ndarray, device: torch.device) -> None:
        self._host, self._device = table.tobytes(), device
        self._memory = self._staged().to(device, non_blocking=True)

    def _staged(self) -> Tensor:
        """The bytes, where a copy to the device does not wait. At least one, so that there is an address."""
        data = torch.from_numpy(np.frombuffer(self._host or b"\0", dtype=np.uint8).copy())
        return data if self._device.type == "cpu" else data.pin_memory()

    def update(self, table: np.ndarray) -> None:
        """Write a table of the same size, in order with the work on the current stream; nothing where it has not changed.

        Raises:
            RuntimeError: it has changed, and the current stream is being captured in a graph.
        """
        host = table.tobytes()
        if host != self._host:
            not_capturing(self._device, "options of the optimizer changed")
            self._host = host
            self._memory.copy_(self._staged(), non_blocking=True)

    @property
    def memory(self) -> Tensor:
        return self._memory

    @property
    def address(self) -> int:
        return self._memory.data_ptr()


def tensor_table(arena: Arena, selection: Sequence[SelectionGroup]) -> np.ndarray:
    """Rows of ``tensor_dtype``: pointers, sizes, and for what competes its selection group and its first index there."""
    table = np.zeros(arena.num_rows, dtype=kernels().tensor_dtype)
    table["group"] = -1
    for number, group in enumerate(selection):
        index = 0
        for i in group.members:
            rival = arena.rivals[i]
            place, length, stride = rival.places
            table["group"][rival.row], table["index"][rival.row] = number, index + place
            table["row_length"][rival.row], table["row_stride"][rival.row] = length, stride
            index += rival.total
    for param in (part for whole in arena.parameters for part in whole.parts):
        row = table[param.row]
        local = param.local
        row["param"] = row["theta"] = local.data_ptr() + param.offset * local.element_size()
        row["elsewhere"], row["numel"], row["hyper"], row["dtype"] = param.elsewhere, param.numel, param.group, DTYPES[param.dtype]
        state = arena.state_of(param)
        for name in ("theta", "mask", "scores", "score_momentum"):
            if name in state and (param.scored or name not in ("scores", "score_momentum")):  # those of units are in the row of their set
                row[name] = state[name].data_ptr()
        for name, view in zip(("momentum", "square"), arena.moments_of(param), strict=False):
            row[name] = view.data_ptr()
        if (steps := arena.steps_of(param)) is not None:
            row["steps"] = steps.data_ptr()
        if isinstance(param.division, NofM):
            row["keep"], row["of"] = param.division
            row["index"], row["row_length"], row["row_stride"] = param.places
    for number, units in enumerate(arena.units.sets):  # their scores, as the selection sees them, are in the scratch
        row = table[units.row]
        row["numel"], row["hyper"], row["mask"] = units.numel, units.group, arena.units.state_of(number)["mask"].data_ptr()
        row["elsewhere"] = units.elsewhere
    tiles = num_tiles(table)
    table["first_tile"] = np.cumsum(tiles) - tiles
    return table


def num_tiles(tensors: np.ndarray) -> np.ndarray:
    """Of every row of the table of tensors: each begins with a tile of its own."""
    tile = kernels().TILE
    return (tensors["numel"] + tile - 1) // tile


def group_table(tensors: np.ndarray, selection: Sequence[SelectionGroup]) -> np.ndarray:
    """Rows of ``group_dtype``: sizes, numbers of kept, and the tiles between which a group lies."""
    table = np.zeros(len(selection), dtype=kernels().group_dtype)
    table["numel"], table["kept"] = [group.numel for group in selection], [group.kept for group in selection]
    ends = tensors["first_tile"] + num_tiles(tensors)
    for number, row in enumerate(table):
        members = np.flatnonzero(tensors["group"] == number)
        row["tile_begin"], row["tile_end"] = tensors["first_tile"][members].min(), ends[members].max()
        row["entries"] = tensors["numel"][members].sum()
    table["first"] = np.cumsum(table["entries"]) - table["entries"]
    return table


class _Scratch:
    """One allocation for many pieces, each aligned for any access. It knows which fields of the tables get the address of which piece."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._size = device, 0
        self._places: list[tuple[np.void, str, int]] = []

    def take(self, row: np.void, name: str, size: int) -> int:
        """The next piece, whose address goes to ``row[name]``; returns its offset."""
        offset = self._size
        self._size += -(-size // 128) * 128
        self.point(row, name, offset)
        return offset

    def point(self, row: np.void, name: str, offset: int) -> None:
        self._places.append((row, name, offset))

    def allocate(self) -> Tensor:
        """The memory, zero; writes all addresses."""
        memory = torch.zeros(max(self._size, 1), dtype=torch.uint8, device=self._device)
        for row, name, offset in self._places:
            row[name] = memory.data_ptr() + offset
        return memory


class UnitTables(NamedTuple):
    """Rows of ``unit_set_dtype`` and ``part_dtype`` (a part is a parameter of a set), the number of items of all parts, and memory for one
    step's sums, counters, and scores as the selection sees them: zero before the first step."""

    sets: np.ndarray
    parts: np.ndarray
    num_items: int
    scratch: Tensor


def least_kept(arena: Arena, selection: Sequence[SelectionGroup], min_kept: Sequence[int]) -> dict[UnitSet, int]:
    """How many units of every set the selection keeps in any case; 0 for a set that competes with no other, whose budget says it all."""
    least: dict[UnitSet, int] = dict.fromkeys(arena.units.sets, 0)
    for group in selection:
        rivals = [arena.rivals[i] for i in group.members]
        least |= {param: min(min_kept[param.group], param.total) for param in rivals if isinstance(param, UnitSet) and len(rivals) > 1}
    return least


def unit_tables(arena: Arena, tensors: np.ndarray, least: dict[UnitSet, int]) -> UnitTables:
    """What the kernels need of the units. Writes the addresses of their scores into the rows of the sets in ``tensors``."""
    sets = np.zeros(len(arena.units.sets), dtype=kernels().unit_set_dtype)
    parts = np.zeros(sum(len(units.parameters) for units in arena.units.sets), dtype=kernels().part_dtype)
    scratch = _Scratch(arena.device)
    at = items = 0
    for number, units in enumerate(arena.units.sets):
        row, state, numel = sets[number], arena.units.state_of(number), units.numel
        strips = sum(_strips(blocks_of(param)) for param in units.scoring)
        row["hyper"], row["tensor"], row["min_kept"], row["strips"] = units.group, units.row, least[units], strips
        row["scores"] = state["scores"].data_ptr()
        row["score_momentum"] = state["score_momentum"].data_ptr() if "score_momentum" in state else 0
        row["part_begin"], row["part_end"] = at, at + len(units.parameters)
        scratch.take(tensors[units.row], "scores", 4 * numel)
        scratch.take(row, "before", 4 * -(-numel // 32))
        scratch.take(row, "best", 8 * -(-numel // kernels().TILE))
        scratch.take(row, "seen", 4)
        sums = scratch.take(row, "sums", 4 * numel * strips)
        for param in units.parameters:
            part, blocks = parts[at], blocks_of(param)
            part["rows"], part["cols"], part["block_rows"], part["block_cols"] = blocks
            part["tensor"], part["set"], part["first_item"] = param.row, number, items
            if param.pruned:
                items += kernels().num_items(*blocks)
                scratch.point(part, "sums", sums)
                sums += 4 * numel * _strips(blocks)
            at += 1
    return UnitTables(sets, parts, items, scratch.allocate())


def _strips(blocks: Blocks) -> int:
    return -(-min(blocks.block_rows, blocks.rows) // kernels().STRIP)


def check_own_part(tensors: np.ndarray) -> None:
    """ValueError where this rank has more of a selection group than it can count."""
    for number in np.unique(tensors["group"][tensors["group"] >= 0]):
        own = int(tensors["numel"][tensors["group"] == number].sum())
        if own >= MAX_GROUP:
            raise ValueError(f"a selection group must have fewer than 2**32 weights on a rank, got {own}; use more ranks")

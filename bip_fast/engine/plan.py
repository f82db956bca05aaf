"""One launch recipe: the tables that the kernels read, made here and nowhere else, and the call that starts a step.

Rows of the table of tensors: matrices of parameters with scores of their own, sets of units, matrices of all other parameters. The dtypes
of all tables are those of `csrc/bip.h`; the gradients' table is made anew for every step, all others live on the device as long as the
plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..reference import Blocks
from .arena import Arena
from .budgets import SelectionGroup
from .native import DTYPES, MAX_GROUP, PHASES, backend, kernels, launch_guard, launch_where, not_capturing, shard_kernels
from .parameter import Parameter
from .patterns import NofM
from .shards import gradient_of
from .units import UnitSet, blocks_of

__all__ = ["StepPlan", "gradient_table", "no_gradients"]


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


# --- gradients -----------------------------------------------------------------------------------------------------------------------


def no_gradients(arena: Arena) -> np.ndarray:
    """A table without any gradient."""
    return np.zeros(arena.num_rows, dtype=kernels().gradient_dtype)


def _same_layout(x: Tensor, param: Parameter) -> bool:
    """Whether ``x``, which has the parameter's shape, has its entries in the same order in memory."""
    return x.stride() == param.stride or all(size == 1 or a == b for size, a, b in zip(param.shape, x.stride(), param.stride, strict=True))


def gradient_table(arena: Arena) -> tuple[np.ndarray, list[Tensor]]:
    """Address and dtype of every parameter's ``grad``, and the tensors that must stay alive until the kernels ran.

    A gradient of another memory layout than the parameter's is copied.

    Raises:
        RuntimeError: a gradient is sparse, on another device or of another dtype than the kernels know.
    """
    table = no_gradients(arena)
    pointers, dtypes, alive = [0] * len(table), [0] * len(table), []
    for param in arena.parameters:
        g = param.tensor.grad
        if g is None:
            continue
        g = gradient_of(param.tensor, g)
        if g.layout != torch.strided or g.device != arena.device or g.dtype not in DTYPES:
            kind = "sparse" if g.layout != torch.strided else "dense"
            raise RuntimeError(
                f"the gradient of {param.name} must be dense, on {arena.device}, and float32, bfloat16 or float16, "
                f"got a {kind} one of {g.dtype} on {g.device}"
            )
        if not _same_layout(g, param) or g.is_neg():
            g = torch.empty_strided(param.shape, param.stride, dtype=g.dtype, device=arena.device).copy_(g)
        alive.append(g)
        for part in param.parts:
            pointers[part.row], dtypes[part.row] = g.data_ptr() + part.offset * g.element_size(), DTYPES[g.dtype]
    table["data"], table["dtype"] = pointers, dtypes
    return table, alive


# --- tensors, groups, units ----------------------------------------------------------------------------------------------------------


def _tensor_table(arena: Arena, selection: Sequence[SelectionGroup]) -> np.ndarray:
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
    tiles = _tiles(table)
    table["first_tile"] = np.cumsum(tiles) - tiles
    return table


def _tiles(tensors: np.ndarray) -> np.ndarray:
    tile = kernels().TILE
    return (tensors["numel"] + tile - 1) // tile


def _group_table(tensors: np.ndarray, selection: Sequence[SelectionGroup]) -> np.ndarray:
    """Rows of ``group_dtype``: sizes, numbers of kept, and the tiles between which a group lies."""
    table = np.zeros(len(selection), dtype=kernels().group_dtype)
    table["numel"], table["kept"] = [group.numel for group in selection], [group.kept for group in selection]
    ends = tensors["first_tile"] + _tiles(tensors)
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


class _UnitTables(NamedTuple):
    """Rows of ``unit_set_dtype`` and ``part_dtype`` (a part is a parameter of a set), the number of items of all parts, and memory for one
    step's sums, counters, and scores as the selection sees them: zero before the first step."""

    sets: np.ndarray
    parts: np.ndarray
    num_items: int
    scratch: Tensor


def _least_kept(arena: Arena, selection: Sequence[SelectionGroup], min_kept: Sequence[int]) -> dict[UnitSet, int]:
    """How many units of every set the selection keeps in any case; 0 for a set that competes with no other, whose budget says it all."""
    least: dict[UnitSet, int] = dict.fromkeys(arena.units.sets, 0)
    for group in selection:
        rivals = [arena.rivals[i] for i in group.members]
        least |= {param: min(min_kept[param.group], param.total) for param in rivals if isinstance(param, UnitSet) and len(rivals) > 1}
    return least


def _unit_tables(arena: Arena, tensors: np.ndarray, least: dict[UnitSet, int]) -> _UnitTables:
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
    return _UnitTables(sets, parts, items, scratch.allocate())


def _strips(blocks: Blocks) -> int:
    return -(-min(blocks.block_rows, blocks.rows) // kernels().STRIP)


def _check_own_part(tensors: np.ndarray) -> None:
    """ValueError where this rank has more of a selection group than it can count."""
    for number in np.unique(tensors["group"][tensors["group"] >= 0]):
        own = int(tensors["numel"][tensors["group"] == number].sum())
        if own >= MAX_GROUP:
            raise ValueError(f"a selection group must have fewer than 2**32 weights on a rank, got {own}; use more ranks")


# --- the plan ------------------------------------------------------------------------------------------------------------------------


class StepPlan:
    """One launch recipe: tables at fixed addresses, the workspace, and the counters of the selection.

    Args:
        arena: parameters and state, whose memory stays where it is as long as the plan is used.
        selection: who competes with whom.
        hypers: rows of ``hyper_dtype``, one per parameter group.
        min_kept: units that every set keeps, by parameter group.

    Raises:
        RuntimeError: the current stream is being captured in a graph.
    """

    def __init__(self, arena: Arena, selection: Sequence[SelectionGroup], hypers: np.ndarray, min_kept: Sequence[int]) -> None:
        not_capturing(arena.device, "the optimizer needs new tables")
        tensors = _tensor_table(arena, selection)
        units = _unit_tables(arena, tensors, _least_kept(arena, selection, min_kept))
        groups = _group_table(tensors, selection)
        tiles = _tiles(tensors)
        unit_rows = slice(arena.num_scored, arena.num_scored + len(units.sets))
        self.device = device = arena.device
        self.backend = backend(device)
        self.num_tensors, self.num_groups, self.num_tiles = len(tensors), len(groups), int(tiles.sum())
        self.num_scored_tiles = int(tiles[: unit_rows.stop].sum())
        self._unit_counts = {
            "num_unit_sets": len(units.sets),
            "num_parts": len(units.parts),
            "num_items": units.num_items,
            "unit_tile_begin": self.num_scored_tiles - int(tiles[unit_rows].sum()),
            "unit_tile_end": self.num_scored_tiles,
        }
        self._tensors = DeviceTable(tensors, device)
        self._tile_tensor = DeviceTable(np.repeat(np.arange(len(tensors), dtype=np.int32), tiles), device)
        self._group_rows, self._groups = groups, DeviceTable(groups, device)
        self._unit_sets, self._parts = DeviceTable(units.sets, device), DeviceTable(units.parts, device)
        self._hypers = DeviceTable(hypers, device)
        self._ranks = arena.ranks
        if self._ranks.groups:
            _check_own_part(tensors)
            self._shards = shard_kernels(device)
            size = self._shards.workspace_bytes(self.num_tensors, self.num_groups, self.num_scored_tiles)
            self._most_needed = int(units.sets["min_kept"].max(initial=0))
            self._keys = torch.zeros(len(units.sets), dtype=torch.int64, device=device)
            self._sums = torch.zeros(self.num_groups, self._shards.sums(self.num_groups), dtype=torch.int64, device=device)
            told = [self._keys, self._sums]
        else:
            told = []
            size = self.backend.step_workspace_bytes(self.num_tensors, self.num_groups, self.num_scored_tiles)
        self._workspace = torch.zeros(max(size, 1), dtype=torch.uint8, device=device)
        self._unit_scratch = units.scratch
        self._counters = torch.zeros(max(self.num_groups, 1) * kernels().counters_dtype.itemsize, dtype=torch.uint8, device=device)
        tables = self._tensors, self._tile_tensor, self._groups, self._unit_sets, self._parts, self._hypers
        self._memory = [*(table.memory for table in tables), self._workspace, self._unit_scratch, self._counters, *told]
        self._streams = {launch_where(device)}  # that torch knows to use the memory: at first the one it was allocated on

    def hold(self) -> None:
        """Let the memory of this plan, once it is replaced, be given to nothing else before the current stream is done with it.

        Torch sees to that for the stream that the memory was allocated on. `run` calls this, and so must a replay of a graph.
        """
        if self.device.type != "cuda":
            return
        stream = torch.cuda.current_stream(self.device)
        # Once for each stream: what counts is how far it has come when the memory is freed. In a capture nothing runs, and torch forgets.
        if stream.cuda_stream not in self._streams and not torch.cuda.is_current_stream_capturing():
            for x in self._memory:
                x.record_stream(stream)
            self._streams.add(stream.cuda_stream)

    def set_kept(self, kept: list[int]) -> None:
        """How many entries of every selection group are kept from the next upper or joint step on."""
        rows = self._group_rows.copy()
        rows["kept"] = kept
        self._groups.update(rows)

    def set_hypers(self, hypers: np.ndarray) -> None:
        """Hyper-parameters of every parameter group from the next step on."""
        self._hypers.update(hypers)

    def counters(self) -> np.ndarray:
        """Rows of ``counters_dtype``, one per selection group. Waits for the device."""
        return self.counters_and(torch.zeros(0, dtype=torch.int64, device=self.device))[0]

    def flips(self) -> Tensor:
        """Of every selection group, how many mask entries of this rank have changed: int64, on the device."""
        dtype = kernels().counters_dtype
        rows = self._counters.view(torch.int64).view(-1, dtype.itemsize // 8)
        return rows[: self.num_groups, dtype.fields["flips"][1] // 8]

    def counters_and(self, x: Tensor) -> tuple[np.ndarray, list[int]]:
        """`counters`, and the values of an int64 vector, in one copy from the device."""
        both = torch.cat([self._counters.view(torch.int64), x]).cpu().numpy()
        rows, values = both[: len(both) - len(x)], both[len(both) - len(x) :]
        return np.frombuffer(rows.tobytes(), dtype=kernels().counters_dtype)[: self.num_groups], values.tolist()

    def run(
        self,
        phase: str,
        rule: int,
        gradients: np.ndarray,
        num_nonfinite: Tensor,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        """One step of the kernels. Mutates parameters, theta, v, s, u and masks behind the pointers of the plan, and ``num_nonfinite``.

        Args:
            phase: "lower", "upper" or "joint".
            rule: what moves theta in a lower or joint step (`rules`).
            gradients: one row of ``gradient_dtype`` per tensor.
            num_nonfinite: int64 scalar.
            grad_scale, found_inf: fp32 scalars on the device, as a GradScaler sets them.
        """
        try:
            with launch_guard(self.device):
                self.hold()
                self._launch(phase, rule, gradients, num_nonfinite, grad_scale, found_inf)
        except BaseException:
            with suppress(RuntimeError):  # a step that was only launched in part must not be gone on with
                self._workspace.zero_()
                self._unit_scratch.zero_()
            raise

    def stay_away(self) -> None:
        """Instead of an upper or joint step that an error keeps this rank from: what the others wait for, with word that it is absent."""
        if not self._ranks.groups or (self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            return
        with launch_guard(self.device):
            self.hold()
            self._keys.fill_(torch.iinfo(torch.int64).min)
            for _ in range(self._most_needed):
                self._ranks.maximum(self._keys)
            for _ in range(self._shards.rounds(self.num_groups)):
                self._sums.zero_()
                self._sums[:, self._shards.ABSENT] = 1
                self._ranks.add(self._sums)

    def _launch(
        self, phase: str, rule: int, gradients: np.ndarray, num_nonfinite: Tensor, grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        arguments: dict[str, Any] = dict(
            phase=PHASES[phase],
            rule=rule,
            tensors=self._tensors.address,
            num_tensors=self.num_tensors,
            tile_tensor=self._tile_tensor.address,
            num_tiles=self.num_tiles,
            groups=self._groups.address,
            num_groups=self.num_groups,
            unit_sets=self._unit_sets.address,
            parts=self._parts.address,
            **self._unit_counts,
            num_scored_tiles=self.num_scored_tiles,
            hypers=self._hypers.address,
            gradients=gradients,
            grad_scale=grad_scale.data_ptr() if grad_scale is not None else 0,
            found_inf=found_inf.data_ptr() if found_inf is not None else 0,
            num_nonfinite=num_nonfinite.data_ptr(),
            counters=self._counters.data_ptr(),
            workspace=self._workspace.data_ptr(),
            where=launch_where(self.device),
        )
        if phase == "lower" or not self._ranks.groups:
            self.backend.step(**arguments)
        else:
            self._select_over_ranks(arguments)

    def _select_over_ranks(self, arguments: dict[str, Any]) -> None:
        """An upper or joint step whose groups have entries on several ranks: a pass, sums until all windows are narrow enough, an end.

        On a GPU nothing is read back: kernels and collectives are enqueued for the worst case.
        """
        self._shards.score(**arguments)
        for lifted in range(self._most_needed):
            keys = arguments | {"sums": self._keys.data_ptr()}
            self._shards.offer(**keys, turn=lifted)
            self._ranks.maximum(self._keys)
            self._shards.lift(**keys)
        arguments["sums"] = self._sums.data_ptr()
        self._shards.begin(**arguments)
        self._ranks.add(self._sums)
        absent = self._shards.rounds(self.num_groups) == 1 and bool(self._sums[:, self._shards.ABSENT].any())
        rounds = 0
        while self._shards.narrow(**arguments, turn=rounds):
            self._ranks.add(self._sums)
            rounds += 1
        self._shards.end(**arguments)
        if absent:  # not before the end, where weights get the mask of their units
            raise RuntimeError(
                "an error, which is reported there, keeps another rank from this step. Scores, and weights in a joint step, have moved on "
                "this rank all the same: go on from a checkpoint"
            )

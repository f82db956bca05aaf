"""One launch recipe: the tables that the kernels read at fixed addresses, their workspace, and the call that starts a step."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..arena import Arena
from ..budgets import SelectionGroup
from ..native import PHASES, backend, kernels, launch_guard, launch_where, not_capturing, shard_kernels
from .kernel_tables import DeviceTable, check_own_part, group_table, least_kept, num_tiles, tensor_table, unit_tables

__all__ = ["StepPlan"]


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
        tensors = tensor_table(arena, selection)
        units = unit_tables(arena, tensors, least_kept(arena, selection, min_kept))
        groups = group_table(tensors, selection)
        tiles = num_tiles(tensors)
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
            check_own_part(tensors)
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

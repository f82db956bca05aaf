"""Tensors in, checks, pointers and streams out: the only room that calls the kernels.

A backend is a submodule of `bip_fast._C` with ``step`` and ``topk``: `BACKENDS` maps a device type to it. Kernels take raw pointers, so
everything they trust is checked here or in `bip_fast.engine.arena`. All memory is allocated by torch, workspaces too.
"""

from __future__ import annotations

import operator
from contextlib import AbstractContextManager, nullcontext, suppress
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from .units import UnitTables

try:
    from .. import _C
except ImportError as error:  # let `bip-fast doctor` say what is wrong
    _C = None  # type: ignore[assignment]
    _C_ERROR: ImportError | None = error
else:
    _C_ERROR = None

__all__ = ["BACKENDS", "DTYPES", "PHASES", "StepPlan", "backend", "build_info", "is_ordinary", "kernels", "topk_mask"]

BACKENDS: dict[str, Any] = {name: getattr(_C, name) for name in ("cpu", "cuda") if hasattr(_C, name)}
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # bip::DType
PHASES = {"lower": 0, "upper": 1, "joint": 2}  # bip::Phase
MAX_GROUP = 2**32  # a tie key has 32 bits


def kernels() -> ModuleType:
    """The compiled module, or an ImportError that says how to build it."""
    if _C is None:
        raise ImportError(
            f"the kernels of bip_fast are not built ({_C_ERROR}); run `python3 -m pip install -e .` in its source tree, "
            "or install bip_fast and start Python outside of that tree"
        ) from _C_ERROR
    return _C


def build_info() -> dict[str, Any]:
    """How the kernels were built: compiler, SIMD set chosen on this machine, CUDA toolkit and GPU architectures."""
    return dict(kernels().build_info())


def backend(device: torch.device) -> Any:
    """Kernels for ``device``; RuntimeError when this build has none."""
    module = kernels()
    found = BACKENDS.get(device.type)
    if found is not None:
        return found
    if device.type == "cuda" and not hasattr(module, "cuda"):
        raise RuntimeError(
            f"tensors are on {device}, but bip_fast was built without CUDA; install the CUDA toolkit and run "
            "`BIP_FAST_CUDA=1 python3 -m pip install --force-reinstall --no-deps` on its source, or move the model to the CPU"
        )
    raise RuntimeError(f"bip_fast has kernels for {sorted(BACKENDS)}, got tensors on {device}")


def launch_guard(device: torch.device) -> AbstractContextManager[Any]:
    """Makes ``device`` current; CUDA launches go to its current stream."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def launch_where(device: torch.device) -> int:
    """Stream handle on CUDA, number of threads on the CPU."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else torch.get_num_threads()


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
        """Write a table of the same size, in order with the work on the current stream; nothing where it has not changed."""
        host = table.tobytes()
        if host != self._host:
            self._host = host
            self._memory.copy_(self._staged(), non_blocking=True)

    @property
    def address(self) -> int:
        return self._memory.data_ptr()


class StepPlan:
    """One launch recipe: tables at fixed addresses, the workspace, and the counters of the selection.

    Args:
        device: where parameters, state and tables live.
        tensors: rows of ``tensor_dtype``, whose pointers stay valid as long as the plan: first those with scores, units after all others
            of them, then the rest.
        groups: rows of ``group_dtype``, one per selection group.
        hypers: rows of ``hyper_dtype``, one per parameter group.
        units: sets of units and their parts.
    """

    def __init__(self, device: torch.device, tensors: np.ndarray, groups: np.ndarray, hypers: np.ndarray, units: UnitTables) -> None:
        tile = kernels().TILE
        tiles = (tensors["numel"] + tile - 1) // tile
        tensors["first_tile"] = np.cumsum(tiles) - tiles
        groups["first"] = np.cumsum(groups["numel"]) - groups["numel"]
        for number, group in enumerate(groups):
            members = np.flatnonzero(tensors["group"] == number)
            group["tile_begin"] = tensors["first_tile"][members].min()
            group["tile_end"] = (tensors["first_tile"] + tiles)[members].max()
        self.device = device
        self.backend = backend(device)
        self.num_tensors, self.num_groups, self.num_tiles = len(tensors), len(groups), int(tiles.sum())
        unit_rows = slice(units.first_row, units.first_row + len(units.sets))
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
        size = self.backend.step_workspace_bytes(self.num_tensors, self.num_groups, self.num_scored_tiles)
        self._workspace = torch.zeros(max(size, 1), dtype=torch.uint8, device=device)
        self._unit_scratch = units.scratch
        self._counters = torch.zeros(max(self.num_groups, 1) * kernels().counters_dtype.itemsize, dtype=torch.uint8, device=device)

    def set_kept(self, kept: list[int]) -> None:
        """How many entries of every selection group are kept from the next upper or joint step on."""
        self._group_rows["kept"] = kept
        self._groups.update(self._group_rows)

    def set_hypers(self, hypers: np.ndarray) -> None:
        """Hyper-parameters of every parameter group from the next step on."""
        self._hypers.update(hypers)

    def counters(self) -> np.ndarray:
        """Rows of ``counters_dtype``, one per selection group. Waits for the device."""
        return np.frombuffer(self._counters.cpu().numpy().tobytes(), dtype=kernels().counters_dtype)[: self.num_groups]

    def run(
        self,
        phase: str,
        gradients: np.ndarray,
        num_nonfinite: Tensor,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        """One step of the kernels. Mutates parameters, theta, v, s, u and masks behind the pointers of the plan, and ``num_nonfinite``.

        Args:
            phase: "lower", "upper" or "joint".
            gradients: one row of ``gradient_dtype`` per tensor.
            num_nonfinite: int64 scalar.
            grad_scale, found_inf: fp32 scalars on the device, as a GradScaler sets them.
        """
        try:
            with launch_guard(self.device):
                self._launch(phase, gradients, num_nonfinite, grad_scale, found_inf)
        except BaseException:
            with suppress(RuntimeError):  # a step that was only launched in part must not be gone on with
                self._workspace.zero_()
                self._unit_scratch.zero_()
            raise

    def _launch(
        self, phase: str, gradients: np.ndarray, num_nonfinite: Tensor, grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        self.backend.step(
            phase=PHASES[phase],
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


def is_ordinary(x: Tensor) -> bool:
    """False for a tensor without memory of its own to point at: fake, sharded, or another subclass that redefines every operation."""
    return type(x).__torch_dispatch__ is Tensor.__torch_dispatch__


@torch._disable_dynamo  # type: ignore[attr-defined]  # as torch.optim does: a compiled graph calls this as it is
def topk_mask(scores: Tensor, k: int) -> Tensor:
    """Mask of the ``k`` largest scores: exactly ``k`` ones, the same on every device.

    Larger score first; equal scores by ``(i * 2654435761) mod 2**32``, lowest first, with ``i`` the position in ``scores.flatten()``.
    NaN is smaller than every number, and -0 equals +0. Nothing is synchronised.

    Args:
        scores: float32, bfloat16 or float16 of any shape with fewer than 2**32 entries, on the CPU or a CUDA device.
        k: number of ones, 0 <= k <= scores.numel().

    Returns:
        bool tensor of the shape of ``scores``.

    Raises:
        TypeError: ``scores`` is not a dense tensor of a supported dtype, or ``k`` is not an integer.
        ValueError: ``k`` or the number of scores is out of range.

    Example:
        >>> topk_mask(torch.tensor([0.3, 0.9, 0.1]), 2)
        tensor([ True,  True, False])
    """
    if not isinstance(scores, Tensor) or scores.layout != torch.strided or scores.dtype not in DTYPES or not is_ordinary(scores):
        got = f"{type(scores).__name__} of {scores.dtype}, {scores.layout}" if isinstance(scores, Tensor) else type(scores).__name__
        raise TypeError(f"scores must be a dense tensor of float32, bfloat16 or float16, got {got}")
    try:
        k = operator.index(k)
    except TypeError:
        raise TypeError(f"k must be an integer, got {type(k).__name__}") from None
    n = scores.numel()
    if not 0 <= k <= n:
        raise ValueError(f"k must be in [0, {n}], the number of scores, got {k}")
    if n >= MAX_GROUP:
        raise ValueError(f"scores must have fewer than 2**32 entries, got {n}")
    kernel = backend(scores.device)
    flat = scores.detach().resolve_neg().to(torch.float32).contiguous()
    mask = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    workspace = torch.empty(max(kernel.topk_workspace_bytes(n), 1), dtype=torch.uint8, device=scores.device)
    with launch_guard(scores.device):
        kernel.topk(
            scores=flat.data_ptr(), n=n, k=k, mask=mask.data_ptr(), workspace=workspace.data_ptr(), where=launch_where(scores.device)
        )
    return mask

"""Energy that a device has used, where it tells: NVIDIA GPUs through `pynvml`, CPUs through Linux's powercap files if they can be read."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import torch

__all__ = ["Meter", "joules"]

RAPL = Path("/sys/class/powercap")


def joules(device: torch.device) -> float | None:
    """A counter in joules, of all that runs on the device; None if it does not tell. It may start again from 0."""
    return _gpu(device) if device.type == "cuda" else _cpu()


class Meter:
    """What a device uses from one look to the next.

    Args:
        counts: whether its counter measures one run alone.
    """

    def __init__(self, device: torch.device, *, counts: bool) -> None:
        self._device, self._counts = device, counts
        self._last = self._look()

    def _look(self) -> float | None:
        return joules(self._device) if self._counts else None

    def add(self, totals: dict[str, float | None], name: str) -> None:
        """Add the joules since the last look to the total of that name, which is None once any part of it was not counted."""
        before, self._last = self._last, self._look()
        so_far = totals.get(name, 0.0)
        if before is None or self._last is None or self._last < before or so_far is None:
            totals[name] = None
        else:
            totals[name] = so_far + self._last - before


def _gpu(device: torch.device) -> float | None:
    if importlib.util.find_spec("pynvml") is None:
        return None
    nvml: Any = importlib.import_module("pynvml")
    try:
        nvml.nvmlInit()
        handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        return nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3
    except nvml.NVMLError:
        return None


def _cpu() -> float | None:
    try:  # one file for each processor package; their parts, "intel-rapl:0:1", are counted in them
        found = [int((zone / "energy_uj").read_text()) for zone in RAPL.glob("intel-rapl:?")]
    except (OSError, ValueError):
        return None
    return sum(found) / 1e6 if found else None

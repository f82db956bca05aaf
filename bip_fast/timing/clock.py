"""The clock: median times of calls on any device, and of a copy of as many bytes, which they are compared with."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import torch

MAX_COPY = {"cpu": 5e8, "cuda": 2e9}  # bytes of the largest copy that is measured; time for more is in proportion


def synchronize(device: torch.device) -> None:
    """Wait for the work on ``device``."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def calls_in(seconds: float, device: torch.device) -> int:
    """How many calls of ``seconds`` make one round: on a GPU so many that the time of one synchronisation does not matter."""
    return 1 if device.type == "cpu" else max(1, min(20, int(2e-3 / max(seconds, 1e-6))))


def median_seconds(call: Callable[[], object], device: torch.device, budget: float = 1.0, least: int = 3) -> float:
    """Median time of ``call``, over at least ``least`` and at most 30 rounds in about ``budget`` seconds."""

    def timed(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            call()
        synchronize(device)
        return (time.perf_counter() - start) / calls

    synchronize(device)
    timed(1)
    one = timed(1)
    calls = calls_in(one, device)
    rounds = max(least, min(30, int(budget / max(one * calls, 1e-6))))
    return statistics.median(timed(calls) for _ in range(rounds))


def cache_bytes(device: torch.device) -> int:
    """Bytes that may stay in the cache between two calls: the L2 of a GPU; on the CPU 64 MiB, a usual last level."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 64 << 20


def copy_call(num_bytes: float, device: torch.device) -> tuple[Callable[[], object], float]:
    """A function that copies, and how many times it must run to move ``num_bytes``, half of them read and half written.

    Arrays take turns, so that the memory is as cold as that of the steps.
    """
    moved = min(num_bytes, MAX_COPY.get(device.type, 5e8))
    entries = max(1, int(moved / 8))
    count = 2 + min(62, int(2 * cache_bytes(device) / moved))
    pairs = cycle([(torch.zeros(entries, device=device), torch.ones(entries, device=device)) for _ in range(count)])

    def call() -> None:
        target, source = next(pairs)
        target.copy_(source)

    for _ in range(count):
        call()
    return call, num_bytes / moved


def copy_seconds(num_bytes: float, device: torch.device, budget: float = 0.15) -> float:
    """Median time of a copy that moves ``num_bytes``."""
    call, times = copy_call(num_bytes, device)
    return times * median_seconds(call, device, budget, least=7)


def too_large(n: int, device: torch.device, bytes_each: int = 72) -> str | None:
    """Why ``n`` weights do not fit, or None. 72 bytes a weight: 12 to 20 of weights and gradients, 20 of state, 32 for torch.topk."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        file = Path("/proc/meminfo")
        lines = file.read_text().splitlines() if file.exists() else []
        free = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), 8 << 30)
    need = n * bytes_each
    return f"needs {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free" if need > free else None

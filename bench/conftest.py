"""Options, the device, and `measure`: one timed row beside the copy bandwidth of the same minute."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench import gpu_clock
from bench.workload import DEFAULT_SIZES, SIZES, processor_name
from bip_fast.timing.clock import calls_in, synchronize

Call = Callable[[], object]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="cpu or cuda")
    parser.addoption("--sizes", default="default", help="numbers of weights, as 0.27e6,25.6e6; or all")
    parser.addoption("--networks", default="default", help="networks of the iterations, as resnet20,resnet18; or all")
    parser.addoption("--bench-threads", type=int, default=None, help="CPU threads; default: torch.get_num_threads()")
    parser.addoption("--compile", action="store_true", help="on the CPU also time torch.compile of the plain steps; it takes minutes")


def sizes_of(config: pytest.Config) -> tuple[int, ...]:
    text, kind = config.getoption("--sizes"), torch.device(config.getoption("--device")).type
    if text in ("default", "all"):
        return SIZES if text == "all" else DEFAULT_SIZES[kind]
    try:
        sizes = tuple(sorted({int(float(part)) for part in text.split(",")}))
    except ValueError:
        sizes = (0,)
    if not all(1 <= n < 2**32 for n in sizes):
        raise pytest.UsageError(f"--sizes must be all or numbers of weights like 0.27e6,25.6e6, got {text!r}")
    return sizes


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--device").startswith("cuda") and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda needs a CUDA device and a torch that sees it")
    sizes_of(config)
    if threads := config.getoption("--bench-threads"):
        torch.set_num_threads(threads)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Events are the clock of a GPU. The profiler comes last: what it leaves behind must not be timed."""
    items.sort(key=lambda item: "launches" in item.name)
    if config.getoption("--device").startswith("cuda"):
        for item in items:
            item.add_marker(pytest.mark.benchmark(timer=gpu_clock.event_timer))


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Only what explains a number: no host names, no paths."""
    import bip_fast

    device = torch.device(config.getoption("--device"))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU {processor_name()}, {torch.get_num_threads()} threads"
    machine_info.clear()
    machine_info.update(device=name, torch=torch.__version__, python=platform.python_version(), **bip_fast.build_info())


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    device = torch.device(request.config.getoption("--device"))
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    return device


@pytest.fixture(scope="session")
def compiling(request: pytest.FixtureRequest, device: torch.device) -> bool:
    return device.type == "cuda" or request.config.getoption("--compile")


class Clock:
    """Calls of one row: warmed up, and how many of them make a round."""

    def __init__(self, call: Call, device: torch.device, budget: float, before: Call | None) -> None:
        self.call, self.device = call, device
        self.gpu = device.type == "cuda"
        for warm in range(5):  # the first may compile, tune and allocate
            start = time.perf_counter()
            call()
            synchronize(device)
            seconds = time.perf_counter() - start
            if seconds > 0.15 and (warm or not self.gpu):
                break
        self.host = gpu_clock.host_seconds(call, 5 if seconds < 0.05 else 2) if self.gpu else seconds
        self.calls = 1 if before else calls_in(seconds, device)
        self.rounds = max(3, min(30, int(budget / (seconds * self.calls))))

    def round(self) -> None:
        for _ in range(self.calls):
            self.call()
        if not self.gpu:
            synchronize(self.device)  # on a GPU the timer waits for its own event


@pytest.fixture
def measure(benchmark: Any, device: torch.device) -> Callable[..., None]:
    """measure(call, group=..., implementation=..., n=..., bytes_per_weight=..., **labels)

    Times `call()`, which does the work of `each` calls, and runs `before()` ahead of each one, outside of the time. On a GPU a round is up
    to 20 calls; the row keeps the time of one. With `device_only` the device is busy until the host has enqueued the round, so that the
    time is the device's alone; the host's is in the row beside it. Without `bytes_per_weight` no copy is timed.
    """

    def run(
        call: Call,
        *,
        group: str,
        implementation: str,
        n: int,
        bytes_per_weight: float | None = None,
        each: int = 1,
        before: Call | None = None,
        device_only: bool = True,
        budget: float | None = None,
        allocated: int | None = None,
        **labels: object,
    ) -> None:
        gpu = device.type == "cuda"
        first_copy = gpu_clock.copy_seconds(n * bytes_per_weight, device) if bytes_per_weight else math.inf
        allocated = torch.cuda.memory_allocated(device) if gpu and allocated is None else allocated
        if gpu:
            torch.cuda.reset_peak_memory_stats(device)
        timed = Clock(call, device, budget or (0.15 if gpu else 0.8), before)

        def setup() -> None:
            if before:
                before()
            if gpu and device_only:
                gpu_clock.hide_host(1.5 * timed.host * timed.calls + 1e-4)

        benchmark.group = group
        benchmark.pedantic(timed.round, setup=setup, rounds=timed.rounds, iterations=1)
        # Neighbours on the machine come and go, so the copy is measured on both sides of the row; the faster one is the yardstick.
        if bytes_per_weight:
            labels["bytes_per_weight"] = round(bytes_per_weight, 2)
            labels["copy_seconds"] = min(first_copy, gpu_clock.copy_seconds(n * bytes_per_weight, device))
        if gpu:
            labels["host_seconds"] = timed.host / each
            labels["peak_bytes"] = torch.cuda.max_memory_allocated(device) - (allocated or 0)
        benchmark.extra_info.update(implementation=implementation, n=n, calls=timed.calls * each, **labels)

    return run

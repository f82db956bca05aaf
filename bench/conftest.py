"""Options, the device, and `measure`: one timed row beside the copy bandwidth of the same minute."""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench.workload import DENSITY, copy_seconds, processor_name, synchronize


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="cpu or cuda")
    parser.addoption("--numel", type=int, default=None, help="size of the flat tensor and of the top-k; default: 11.2 million")
    parser.addoption("--bench-threads", type=int, default=None, help="CPU threads; default: torch.get_num_threads()")
    parser.addoption("--compile", action="store_true", help="also time torch.compile of the plain steps; compiling takes minutes")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--device").startswith("cuda") and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda needs a CUDA device and a torch that sees it")
    if threads := config.getoption("--bench-threads"):
        torch.set_num_threads(threads)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Only what explains a number: no host names, no paths."""
    import bip_fast

    device = torch.device(config.getoption("--device"))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU {processor_name()}, {torch.get_num_threads()} threads"
    machine_info.clear()
    machine_info.update(device=name, torch=torch.__version__, python=platform.python_version(), **bip_fast.build_info())


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(scope="session")
def numel(request: pytest.FixtureRequest) -> int | None:
    return request.config.getoption("--numel")


@pytest.fixture
def measure(benchmark: Any, device: torch.device) -> Callable[..., None]:
    """measure(call, group=..., implementation=..., n=..., bytes_per_weight=..., rounds=..., **labels)

    Times `call()`. On a GPU a round is 20 calls and one synchronisation; the row keeps the time of one call.
    """

    def run(
        call: Callable[[], object], *, group: str, implementation: str, n: int, bytes_per_weight: float, rounds: int, **labels: object
    ) -> None:
        calls = 1 if device.type == "cpu" else 20

        def one_round() -> None:
            for _ in range(calls):
                call()
            synchronize(device)

        before = copy_seconds(n * bytes_per_weight, device)
        benchmark.group = group
        benchmark.pedantic(one_round, rounds=rounds, warmup_rounds=min(3, rounds), iterations=1)
        # Neighbours on the machine come and go, so the copy is measured on both sides of the row; the faster one is the yardstick.
        copy = min(before, copy_seconds(n * bytes_per_weight, device))
        benchmark.extra_info.update(
            implementation=implementation, n=n, density=DENSITY, calls=calls, bytes_per_weight=bytes_per_weight, copy_seconds=copy, **labels
        )

    return run

"""Lower, upper and joint steps of `FastBiP` against the same steps in torch, and against torch.optim.SGD, which does not prune at all."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import torch

from bench import gpu_clock
from bench.conftest import sizes_of
from bench.peers import PEERS, Row
from bench.workload import DENSE_BYTES, Case, forget_workloads, size_name, step_cases, workload_of
from bip_fast.timing.clock import too_large


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    config = metafunc.config
    cases = step_cases(torch.device(config.getoption("--device")).type, sizes_of(config))
    if "launches" in metafunc.function.__name__:
        most = max((case.n for case in cases if case.n <= 30e6), default=0)
        cases = [case for case in cases if case.n == most and case.plain]
    pairs = [(case, name) for case in cases for name, (_, wanted) in PEERS.items() if wanted(case)]
    metafunc.parametrize(("case", "implementation"), pairs, ids=[f"{case}-{name}" for case, name in pairs])


@lru_cache(maxsize=1)
def lack_of_room(n: int, device: torch.device) -> str | None:
    """Why ``n`` weights do not fit, asked after the workload of another size is gone."""
    forget_workloads(device)
    return too_large(n, device)


def row_of(case: Case, implementation: str, device: torch.device, compiling: bool) -> Row:
    if implementation == "torch.compile" and not compiling:
        pytest.skip("torch.compile on the CPU needs --compile")
    if why := lack_of_room(case.n, device):
        pytest.skip(f"{size_name(case.n)} weights: {why}")
    return PEERS[implementation][0](workload_of(case, device), case)


def test_step(case: Case, implementation: str, measure: Callable[..., None], device: torch.device, compiling: bool, benchmark: Any) -> None:
    row = row_of(case, implementation, device, compiling)
    measure(
        row.call,
        each=row.each,
        before=row.before,
        group=case.group,
        implementation=implementation,
        n=case.n,
        bytes_per_weight=DENSE_BYTES[case.rule] if implementation.endswith("no pruning") else case.bytes_per_weight,
        density=case.density,
        step=case.step,
        rule=case.rule,
        state=case.state,
    )
    benchmark.extra_info.update(row.after())


def test_launches(case: Case, implementation: str, device: torch.device, compiling: bool, benchmark: Any) -> None:
    """What the device is asked to do in one step."""
    if device.type != "cuda":
        pytest.skip("launches are counted on a GPU")
    row = row_of(case, implementation, device, compiling)
    benchmark.group = case.group
    counted = benchmark.pedantic(lambda: gpu_clock.launches(row.call), rounds=1)
    benchmark.extra_info.update(
        implementation=implementation, calls=row.each, launches={key: value / row.each for key, value in counted.items()}
    )

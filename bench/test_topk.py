"""`topk_mask` against the ways torch has of making a mask, and against bare selections, which make none.

The size is an axis, and what is hard for a selection is one. "bare" rows only select: values, or values and indices, and no mask.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle

import pytest
import torch

from bench import cub, peers
from bench.conftest import sizes_of
from bench.workload import AXES_AT, DENSITY, DISTRIBUTIONS, forget_workloads, scores_of, size_name
from bip_fast import topk_mask
from bip_fast.timing.clock import cache_bytes, too_large
from bip_fast.timing.steps import TOPK_BYTES

BARE = {"torch.topk, bare": True, "torch.topk(sorted=False), bare": False}
CUB = "CUB DeviceTopK, bare"
SLOW = ("torch.kthvalue", "torch.sort", "torch.topk")  # seconds a call at a thousand million scores


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    config = metafunc.config
    kind, sizes = torch.device(config.getoption("--device")).type, sizes_of(config)
    axes = [n for n in AXES_AT[kind][:1] if n in sizes] or [sizes[-1]]
    places = [(n, DISTRIBUTIONS[0]) for n in sizes if n not in axes] + [(n, name) for n in axes for name in DISTRIBUTIONS]
    rows = []
    for n, distribution in places:
        names = ["bip_fast", *peers.MASKS]
        if distribution == DISTRIBUTIONS[0]:
            names += [*BARE, CUB] if kind == "cuda" else [*BARE]
        else:
            names.remove("torch.sort")  # the same time for all
        rows += [(n, distribution, name) for name in names if n < 5e8 or name not in SLOW]
    ids = [f"{size_name(n)}-{distribution}-{name}".replace(" ", "") for n, distribution, name in rows]
    metafunc.parametrize(("n", "distribution", "implementation"), rows, ids=ids)


@pytest.fixture
def pool(n: int, distribution: str, device: torch.device) -> list[torch.Tensor]:
    """The same scores, so often that they do not stay in the cache."""
    forget_workloads(device)
    if why := too_large(n, device, 56):
        pytest.skip(why)
    scores = scores_of(distribution, n, device)
    return [scores, *(scores.clone() for _ in range(min(63, int(2 * cache_bytes(device) / (4 * n)))))]


def test_topk(
    implementation: str, n: int, distribution: str, pool: list[torch.Tensor], measure: Callable[..., None], device: torch.device
) -> None:
    k = n - round((1 - DENSITY) * n)
    if implementation == CUB:
        found = cub.device_topk(n, k, device)
        if isinstance(found, str):
            pytest.skip(f"CUB DeviceTopK: {found}")
        select = found
        assert torch.equal(select(pool[0]).sort().values, torch.topk(pool[0], k).values.flip(0))
    elif implementation in BARE:

        def select(scores: torch.Tensor) -> object:
            return torch.topk(scores, k, sorted=BARE[implementation])
    else:
        mask_of = topk_mask if implementation == "bip_fast" else peers.MASKS[implementation]

        def select(scores: torch.Tensor) -> torch.Tensor:
            return mask_of(scores, k)

        if implementation != "torch.kthvalue" and n < 1e8:
            assert int(select(pool[0]).sum()) == k
    turn = cycle(pool)
    measure(
        lambda: select(next(turn)),
        group=f"top-k, {distribution} {size_name(n)}",
        implementation=implementation,
        n=n,
        bytes_per_weight=TOPK_BYTES,
        density=DENSITY,
        step="top-k",
        state=distribution,
    )

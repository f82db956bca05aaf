"""`topk_mask` against the ways torch has of making a mask; what is hard for a selection is the axis."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from bench import peers
from bench.workload import DENSITY, DISTRIBUTIONS, TOPK_BYTES, scores_of, shapes_of


@pytest.fixture(scope="module", params=DISTRIBUTIONS)
def distribution(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def scores(distribution: str, numel: int | None, device: torch.device) -> torch.Tensor:
    return scores_of(distribution, torch.Size(shapes_of("flat", numel)[0]).numel(), device)


@pytest.mark.parametrize("implementation", ["bip_fast", *peers.MASKS])
def test_topk(implementation: str, distribution: str, scores: torch.Tensor, measure: Callable[..., None], device: torch.device) -> None:
    from bip_fast import topk_mask

    n = scores.numel()
    k = n - round((1 - DENSITY) * n)
    mask_of = topk_mask if implementation == "bip_fast" else peers.MASKS[implementation]
    measure(
        lambda: mask_of(scores, k),
        group=f"top-k, {distribution}",
        implementation=implementation,
        n=n,
        bytes_per_weight=TOPK_BYTES,
        rounds=20 if implementation == "bip_fast" or device.type == "cuda" else 3,
    )
    if implementation != "torch.kthvalue":
        assert int(mask_of(scores, k).sum()) == k

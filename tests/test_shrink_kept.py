"""What shrink leaves, and the reasons that it gives."""

from __future__ import annotations

import pytest
import torch
from pruned_networks import assert_same, drop, lively
from torch import nn

pytest.importorskip("torch_pruning", reason="needs the package torch-pruning: pip install 'bip-fast[test]'")

from bip_fast.export.shrink import shrink

X = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("padding", "kernel", "left"), [("valid", 3, 6), ("same", 1, 6), ("same", 3, 8), (0, 3, 6), ((0, 1), 3, 8)])
def test_constants_are_folded_where_nothing_is_padded(padding, kernel, left):
    model = lively(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, kernel, padding=padding), nn.ReLU(),
                                 nn.Conv2d(4, 2, 1)))  # fmt: skip
    with torch.no_grad():
        model[0].weight[:2] = 0
    result = shrink(model, X)
    assert result.model[0].out_channels == left
    assert_same(model, result.model, X)

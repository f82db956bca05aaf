"""What shrink leaves, and the reasons that it gives."""

from __future__ import annotations

import pytest
import torch
from pruned_networks import assert_same, drop, lively
from torch import nn

pytest.importorskip("torch_pruning", reason="needs the package torch-pruning: pip install 'bip-fast[test]'")

from bip_fast.export.coupling import coupled_filters
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


class Viewed(nn.Module):
    """Knows the width that it had."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        x = self.a(x)
        return self.b(x.view(len(x), 8, 64).view(len(x), 8, 8, 8))


def test_what_the_model_raises_without_channels_is_the_reason():
    model = Viewed().eval()
    drop(model.a, [0, 1])
    result = shrink(model, X)
    assert [(row.name, row.channels) for row in result.kept] == [("a", 2)]
    assert "without them the model fails: shape '[3, 8, 64]' is invalid" in result.kept[0].reason
    assert_same(model, result.model, X)


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError])
@pytest.mark.parametrize("width", [7, 8])
def test_too_little_memory_is_no_reason(error, width):
    class Large(nn.Sequential):
        def forward(self, x):
            if self[0].out_channels <= width:
                raise error("too large")
            return super().forward(x)

    model = Large(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)).eval()
    drop(model[0], [0, 1])
    with pytest.raises(error, match="too large"):
        shrink(model, X)


@pytest.mark.parametrize("slopes", [1, 8])
def test_parametric_relus_let_channels_go(slopes):
    model = lively(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.PReLU(slopes), nn.Conv2d(8, 4, 3, padding=1))).eval()
    with torch.no_grad():
        model[2].weight.copy_(torch.rand(slopes))
    assert ["0.weight", "0.bias", "1.weight", "1.bias"] in coupled_filters(model, X)
    drop(model[0], [0, 5], model[1])
    result = shrink(model, X)
    assert result.model[0].out_channels == 6
    assert not result.kept
    assert_same(model, result.model, X)


class Joined(nn.Module):
    def __init__(self, join) -> None:
        super().__init__()
        self.a, self.b, self.h, self.join = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 4), join

    def forward(self, x):
        return self.h(self.join(self.a(x), self.b(x)))


@pytest.mark.parametrize(
    ("join", "word"),
    [
        (torch.add, "added to"),
        (torch.sub, "added to"),
        (torch.mul, "multiplied with"),
        (lambda a, b: a * torch.sigmoid(b) + b * 2, "added to and multiplied with"),
        (torch.maximum, "joined with"),
    ],
)
def test_what_joins_channels_is_told(join, word):
    model = Joined(join).eval()
    drop(model.a, [0, 1])
    result = shrink(model, torch.randn(5, 6))
    assert [(row.name, row.channels) for row in result.kept] == [("a", 2)]
    assert result.kept[0].reason == f"they are {word} those of b, which are not pruned"

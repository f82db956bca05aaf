"""What is a unit, by the coordinates of the weight, and which units the first mask keeps."""

import pytest
import torch
from helpers import flat_like, params_of
from torch import nn

from bip_fast import FastBiP, reference
from bip_fast.engine.layers import Layer
from bip_fast.engine.patterns import parse


def assert_constant_along(mask, dims):
    """Entries that differ only in ``dims`` are kept or dropped together."""
    first = mask
    for dim in dims:
        first = first.narrow(dim, 0, 1)
    assert torch.equal(mask, first.expand_as(mask))
    assert 0 < int(mask.sum()) < mask.numel(), "a test of nothing"


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("pattern", ["filter", "channel"])
def test_units_of_convolutions(backend, pattern, memory_format):
    model = nn.Sequential(nn.Conv2d(3, 12, 3), nn.Conv2d(12, 10, 3), nn.ConvTranspose2d(10, 8, 2), nn.Conv2d(8, 4, 1))
    model = model.to(backend.device, memory_format=memory_format)
    opt = FastBiP(model, sparsity=0.5, pattern=pattern, scope="layer")
    for i in (1, 2):
        outputs = 1 if i == 2 else 0  # a transposed convolution has its outputs in dimension 1
        along = outputs if pattern == "filter" else 1 - outputs
        mask = opt.mask_of(model[i].weight)
        assert_constant_along(mask, [d for d in range(4) if d != along])
        units = model[i].weight.shape[along]
        assert int(mask.sum()) == mask.numel() * reference.kept(units, 0.5) // units


def test_units_of_grouped_convolutions(backend):
    """Channel c of a convolution with groups is read by the filters of its group only; depthwise ones have one filter for each channel."""
    model = nn.Sequential(nn.Conv2d(3, 12, 3), nn.Conv2d(12, 8, 3, groups=4), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1))
    model = model.to(backend.device)
    opt = FastBiP(model, sparsity=0.5, pattern="channel", scope="layer")
    mask = opt.mask_of(model[1].weight).view(4, 2, 3, 9)  # group, filter, channel of the group, kernel
    assert_constant_along(mask, [1, 3])
    assert int(mask[:, 0, :, 0].sum()) == 6
    assert_constant_along(opt.mask_of(model[2].weight).view(8, 9), [1])
    transposed = nn.Sequential(nn.Conv2d(3, 12, 1), nn.ConvTranspose2d(12, 8, 2, groups=4), nn.Conv2d(8, 4, 1)).to(backend.device)
    opt = FastBiP(transposed, sparsity=0.5, pattern="filter", scope="layer")
    mask = opt.mask_of(transposed[1].weight).view(4, 3, 2, 4)  # group, channel of the group, filter of the group, kernel
    assert_constant_along(mask, [1, 3])
    assert int(mask[:, 0, :, 0].sum()) == 4


def test_blocks_by_coordinates(backend):
    p = params_of([(10, 14)], backend.device)[0]
    opt = FastBiP([p], sparsity=0.5, pattern="block:4x5")
    mask = opt.mask_of(p)
    kept = 0
    for row in range(0, 10, 4):
        for col in range(0, 14, 5):
            block = mask[row : row + 4, col : col + 5]
            assert bool(block.all()) or not bool(block.any())
            kept += bool(block.all())
    assert kept == reference.kept(9, 0.5)


@pytest.mark.parametrize("pattern", ["filter", "channel", "block:3x4"])
def test_the_first_mask_is_group_magnitude(backend, pattern):
    params = params_of([(20, 9), (15, 6, 2, 2)], backend.device)
    before = [p.detach().clone() for p in params]
    opt = FastBiP(params, sparsity=0.6, pattern=pattern)
    means, masks = [], []
    for p, x in zip(params, before, strict=True):
        blocks = parse(pattern).divide(p.shape, p.stride(), Layer())
        members = reference.expand(torch.arange(blocks.units), blocks)
        flat = flat_like(p, x).abs().double()
        sums = torch.zeros(blocks.units, dtype=torch.float64).index_add(0, members, flat)
        means.append(sums / torch.bincount(members))
        masks.append(flat_like(p, opt.mask_of(p)).double())
        masks[-1] = torch.zeros_like(means[-1]).index_add(0, members, masks[-1]) / torch.bincount(members)
    means, kept = torch.cat(means), torch.cat(masks).bool()
    assert int(kept.sum()) == reference.kept(len(means), 0.6)
    assert means[kept].min() > means[~kept].max()


def test_two_of_four_keeps_the_largest(backend):
    x = torch.tensor([[0.1, -0.4, 0.3, 0.2, 0.5, 0.5, 0.5, 0.5]])
    p = nn.Parameter(x.to(backend.device))
    opt = FastBiP([p], pattern="2:4")
    tie = sorted(range(4, 8), key=lambda i: i * 2654435761 % 2**32)[:2]
    assert opt.mask_of(p)[0].nonzero().flatten().tolist() == sorted([1, 2, *tie])

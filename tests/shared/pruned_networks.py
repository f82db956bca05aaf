"""Shared by the tests of shrunk networks: batch-norms as after training, filters pruned by hand, and that two networks compute the same."""

from __future__ import annotations

import torch
from torch import nn


def lively(model: nn.Module, seed: int = 0) -> nn.Module:
    """Batch-norms as after training, so that their constants are not 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                for x in (module.weight, module.bias, module.running_mean):
                    x.copy_(torch.randn(x.shape, generator=generator) * 0.5 + 0.1)
                module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
    return model.eval()


@torch.no_grad()
def drop(layer: nn.Module, channels: list[int], *norms: nn.Module) -> None:
    """Prune filters, and their entries in the bias and in batch-norms."""
    weight = layer.weight.transpose(0, 1) if getattr(layer, "transposed", False) else layer.weight
    weight[channels] = 0
    for owner in (layer, *norms):
        for x in (owner.bias, None if owner is layer else owner.weight):
            if x is not None:
                x[channels] = 0


def assert_same(model: nn.Module, small: nn.Module, *inputs: torch.Tensor) -> None:
    with torch.no_grad():
        expected, given = model(*inputs), small(*inputs)
    assert given.shape == expected.shape
    torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))

"""Modules that torch does not have, and the rules that say what they hold."""

from __future__ import annotations

import torch
from torch import nn

import bip_fast
from bip_fast.engine import layers


class Experts(nn.Module):
    def __init__(self, count: int, outputs: int, inputs: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(count, outputs, inputs))


class Below(nn.Module):
    """Two matrices in one parameter of two dimensions, and a vector with an entry for each of its rows."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.parts = 2
        self.both, self.shift = nn.Parameter(torch.randn(2 * outputs, inputs)), nn.Parameter(torch.randn(2 * outputs))


class Turned(nn.Module):
    """Stored as inputs by outputs."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.randn(outputs))


def register(monkeypatch) -> None:
    """The modules above, in a table of layers that the test may go on changing."""
    monkeypatch.setattr(layers, "PRUNABLE", list(layers.PRUNABLE))
    bip_fast.register_layer(Experts, "up", experts=True)
    bip_fast.register_layer("own_layers.Below", "both", matrices="parts", bias="shift")
    bip_fast.register_layer(Turned, transposed=True, bias="bias")

"""Layers whose weights can be pruned: the one place that says which modules these are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

__all__ = ["PRUNABLE", "Layer", "layer_of", "prunable_layers", "weights"]

PRUNABLE = (_ConvNd, nn.Linear)  # the weight of each is pruned, everything else stays dense


class Layer(NamedTuple):
    """What a pattern asks about the layer of a weight: which dimension holds the outputs, and in how many groups inputs fall."""

    transposed: bool = False
    groups: int = 1


def layer_of(module: nn.Module) -> Layer:
    return Layer(bool(getattr(module, "transposed", False)), int(getattr(module, "groups", 1)))


def prunable_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Names and modules, in the order in which the model made them."""
    return ((name, layer) for name, layer in model.named_modules() if isinstance(layer, PRUNABLE))


def weights(source: nn.Module | Mapping[str, Any]) -> list[tuple[str, Tensor]]:
    """Names and tensors that a report counts. A weight that several layers share appears once, under its first name."""
    if isinstance(source, nn.Module):
        found = [(f"{name}.weight".lstrip("."), layer.weight) for name, layer in prunable_layers(source)]
    else:
        found = [(name, x) for name, x in source.items() if isinstance(x, Tensor) and x.is_floating_point() and x.dim() >= 2]
    first: dict[Any, tuple[str, Tensor]] = {}
    for name, x in found:
        storage = (
            (x.data_ptr(), tuple(x.shape), tuple(x.stride()))
            if x.numel() and x.layout == torch.strided and x.device.type != "meta"
            else name
        )
        first.setdefault(storage, (name, x))
    return list(first.values())

"""2:4 Linear weights as torch's semi-structured tensors, which sparse tensor cores multiply; and why a layer is not one."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

__all__ = ["Conversion", "Converted", "refusal", "to_semi_structured", "violations"]

# What torch's kernels take: rows and columns of the weight must be multiples of these. Source: torch.sparse.semi_structured.
MULTIPLES = {torch.float16: (32, 64), torch.bfloat16: (32, 64), torch.int8: (32, 128)}
OLDEST = (8, 0)


class Conversion(NamedTuple):
    """One layer: converted if ``reason`` is None."""

    name: str
    shape: tuple[int, ...]
    reason: str | None


@dataclass
class Converted:
    """Result of `to_semi_structured`; ``print`` shows every layer."""

    model: nn.Module
    layers: list[Conversion]

    def __str__(self) -> str:
        return "\n".join(f"{row.name} {tuple(row.shape)}: {row.reason or 'converted'}" for row in self.layers)


def violations(weight: Tensor, n: int = 2, m: int = 4) -> int:
    """How many groups of ``m`` entries that follow each other in a row of a matrix [rows, cols] have more than ``n`` that are not 0.

    Raises:
        ValueError: cols is not a multiple of ``m``.
    """
    if weight.dim() != 2 or weight.shape[1] % m:
        raise ValueError(f"weight must be a matrix whose columns are a multiple of {m}, got shape {tuple(weight.shape)}")
    return int(((weight.detach().reshape(-1, m) != 0).sum(1) > n).sum())


def refusal(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, capability: tuple[int, int] | None) -> str | None:
    """Why torch cannot multiply a 2:4 weight of this kind faster, None if it can.

    Args:
        capability: compute capability of the CUDA device.
    """
    if device.type != "cuda":
        return f"it is on {device.type}: semi-structured kernels need an NVIDIA GPU of compute capability 8.0 or newer"
    if capability is not None and capability < OLDEST:
        return f"its GPU has compute capability {capability[0]}.{capability[1]}, 8.0 is needed"
    if dtype not in MULTIPLES:
        return f"it is {str(dtype).removeprefix('torch.')}: float16, bfloat16 or int8 is needed"
    rows, cols = MULTIPLES[dtype]
    if shape[0] % rows or shape[1] % cols:
        return f"its shape {shape[0]}x{shape[1]} is not in multiples of {rows}x{cols}"
    return None


def to_semi_structured(model: nn.Module) -> Converted:
    """A copy of a model whose 2:4 Linear weights are semi-structured where device, dtype and shape allow.

    Args:
        model: not changed. For inference: the new weights take no gradients.

    Returns:
        the copy, and for every Linear and Conv layer whether it was converted, or why not.
    """
    new = copy.deepcopy(model)
    rows = []
    for name, layer in new.named_modules():
        if isinstance(layer, _ConvNd):
            rows.append(Conversion(name, tuple(layer.weight.shape), "torch has no semi-structured convolution"))
        elif isinstance(layer, nn.Linear):
            rows.append(Conversion(name, tuple(layer.weight.shape), _convert(layer)))
    return Converted(new, rows)


def _convert(layer: nn.Linear) -> str | None:
    """Convert the weight of a layer in place; the reason if that cannot be."""
    weight = layer.weight.detach()
    if weight.shape[1] % 4:
        return f"its {weight.shape[1]} inputs are not a multiple of 4"
    broken = violations(weight)
    if broken:
        return f"it is not 2:4: {broken:,} of {weight.numel() // 4:,} groups keep more than two weights"
    capability = torch.cuda.get_device_capability(weight.device) if weight.is_cuda else None
    reason = refusal(tuple(weight.shape), weight.dtype, weight.device, capability)
    if reason is not None:
        return reason
    try:
        layer.weight = nn.Parameter(torch.sparse.to_sparse_semi_structured(weight.contiguous()), requires_grad=False)
    except (RuntimeError, NotImplementedError, ValueError) as error:  # what this build of torch cannot do
        return f"torch refused it: {' '.join(str(error).split())[:120]}"
    return None

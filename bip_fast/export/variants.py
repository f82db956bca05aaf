"""The networks that `measure` compares: dense, masked, shrunk and 2:4; or why one of them cannot be had."""

from __future__ import annotations

import copy
import math
from collections import Counter
from typing import Any

import torch
from torch import nn

from ..engine.layers import weights
from ..errors import one_line
from .measurement import Variant
from .semi_structured import OLDEST, Converted, to_semi_structured
from .shrinking import Shrunk, shrink

__all__ = ["device_of", "variants_of"]

STAND_IN = "What the others are compared with: the same network, zeros replaced by random numbers, as no dense one was given."


def device_of(model: nn.Module) -> torch.device:
    return next((x.device for part in (model.parameters(), model.buffers()) for x in part), torch.device("cpu"))


def variants_of(model: nn.Module, dense: nn.Module | None, inputs: tuple[Any, ...]) -> tuple[dict[str, nn.Module], dict[str, Variant]]:
    """The networks that can run, and a row for every variant, with a note where it needs one."""
    networks = {"dense": _filled(model) if dense is None else _in_format_of(model, dense), "masked": model}
    rows = {"dense": Variant("dense", note="" if dense is not None else STAND_IN), "masked": Variant("masked")}
    shrunk = _shrunk(model, inputs)
    if isinstance(shrunk, str):
        rows["shrunk"] = Variant("shrunk", note=shrunk)
    else:
        networks["shrunk"] = shrunk.model
        rows["shrunk"] = Variant("shrunk", doubt=shrunk.note)
    converted = _converted(model)
    if isinstance(converted, Converted):
        networks["2:4"] = converted.model
        rows["2:4"] = Variant("2:4", note=_share(converted))
    else:
        rows["2:4"] = Variant("2:4", note=converted)
    return networks, rows


def _in_format_of(model: nn.Module, other: nn.Module) -> nn.Module:
    """``other``, or a copy in the memory format of ``model``, which makes convolutions slower or faster by itself."""

    def channels_last(network: nn.Module) -> bool:
        maps = (p for p in network.parameters() if p.dim() == 4 and not p.is_contiguous())
        return any(p.is_contiguous(memory_format=torch.channels_last) for p in maps)

    own = channels_last(model)
    if own == channels_last(other):
        return other
    format_ = torch.channels_last if own else torch.contiguous_format
    return copy.deepcopy(other).to(memory_format=format_)  # type: ignore[call-overload]


@torch.no_grad()
def _filled(model: nn.Module) -> nn.Module:
    """Copy with random numbers, as large as the kept weights, in place of zeros: multiplying zeros draws less power on some devices."""
    new = copy.deepcopy(model)
    for _, p in weights(new):
        if p.is_floating_point() and p.numel():
            generator = torch.Generator(p.device).manual_seed(0)
            noise = torch.empty(p.shape, device=p.device).normal_(0, max(float(p.float().std(correction=0)), 1e-3), generator=generator)
            p.copy_(torch.where(p == 0, noise.to(p.dtype), p))
    return new


def _shrunk(model: nn.Module, inputs: tuple[Any, ...]) -> Shrunk | str:
    """The network without dead channels, or why there is none."""
    try:
        small = shrink(model, inputs)
    except ImportError as error:  # it needs an optional package
        return str(error).rstrip(".")
    except Exception as error:  # a model that cannot be followed may raise anything, and the others can still be measured
        return f"the network cannot be shrunk: {one_line(error)}"
    if sum(p.numel() for p in small.model.parameters()) == sum(p.numel() for p in model.parameters()):
        return "no filter or channel can be removed, as none that may go is all zero"
    return small


def _converted(model: nn.Module) -> Converted | str:
    """The network with 2:4 layers, or why there is none."""
    device = device_of(model)
    if device.type != "cuda":
        return f"2:4 needs an NVIDIA GPU of compute capability {OLDEST[0]}.{OLDEST[1]} or newer, this is a {device.type.upper()}"
    found = to_semi_structured(model)
    if found.count:
        return found
    if not found.layers:
        return "it has no Linear layer, and torch has nothing else that is 2:4"
    reason, count = Counter(row.reason for row in found.layers).most_common(1)[0]
    return f"no layer can be 2:4; {count} of {len(found.layers)}: {reason}"


def _share(converted: Converted) -> str:
    total = sum(math.prod(row.shape) for row in converted.layers)
    own = sum(math.prod(row.shape) for row in converted.layers if row.converted)
    layers = f"{converted.count} of {len(converted.layers)} layers, with {100 * own / max(total, 1):.3g} % of their weights"
    return f"{layers}, are multiplied by sparse tensor cores"

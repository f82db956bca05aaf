"""Whether channels are where the graph says: if those of a set are silent, nothing of the input arrives at their places in the readers.

Torch-Pruning sees no order: for it a channel shuffle is a reshape, and channel i behind it still channel i. Two inputs that differ show the
truth: half of the channels of every set are set to 0, and what their readers get at their places must be the same for both. Then the other
half. That takes four forward passes, whatever the number of sets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from .channels import Channels, weight_of
from .probes import fresh

__all__ = ["mixed"]


@torch.no_grad()
def mixed(sets: Sequence[Channels], model: nn.Module, probes: Sequence[tuple[Any, ...]]) -> dict[str, str]:
    """Sets, by their roots, whose places get something of other channels, and what that is in words.

    Args:
        sets: of this model or of one that it is a copy of; those that the graph has refused, whose places may be wrong, are left out.
        model: in eval mode.
        probes: arguments of the model; only the first two are used, and with one nothing can be found out.
    """
    sets = [channels for channels in sets if channels.refused is None]
    layers = dict(model.named_modules())
    found: dict[str, str] = {}
    for half in (0, 1):
        silent = [_half(channels.count, half) for channels in sets]
        try:
            first, second = (_arriving(sets, silent, layers, model, probe) for probe in probes[:2])
        except Exception:  # too few probes, or code of the model that cannot have it: shrink checks what it does by itself
            return {}
        for channels, own in zip(sets, silent, strict=True):
            wrong = (reader.name for reader in channels.readers if _differs(first, second, reader.name, reader.inputs, own))
            if (name := next(wrong, None)) is not None:
                found[channels.root] = f"a shuffle, a slice or a norm mixes them with others before {name}"
    return found


def _half(count: int, half: int) -> list[int]:
    """A random half of the channels, or the other one."""
    order = torch.randperm(count, generator=Generator().manual_seed(count)).tolist()
    return order[: count // 2] if half == 0 else order[count // 2 :]


def _differs(
    first: dict[str, list[Tensor]], second: dict[str, list[Tensor]], name: str, inputs: dict[int, list[int]], own: list[int]
) -> bool:
    """Whether a reader gets different numbers at the places of its own silent channels."""
    places = [place for channel in own for place in inputs.get(channel, ())]
    if not places:
        return False
    for a, b in zip(first[name], second[name], strict=True):
        x, y = a[places], b[places]
        if not bool(((x == y) | (x.isnan() & y.isnan())).all()):
            return True
    return False


def _arriving(
    sets: Sequence[Channels], silent: Sequence[list[int]], layers: dict[str, nn.Module], model: nn.Module, probe: tuple[Any, ...]
) -> dict[str, list[Tensor]]:
    """What readers get in every call, channels first, while channels of every set are silent."""
    seen: dict[str, list[Tensor]] = {}
    handles: list[Any] = []
    try:
        for channels, own in zip(sets, silent, strict=True):
            handles += [layers[name].register_forward_hook(_silencing(own)) for name in channels.makers | channels.passes]
            for reader in channels.readers:
                if reader.name not in seen:
                    seen[reader.name] = []
                    handles.append(layers[reader.name].register_forward_pre_hook(_noting(seen[reader.name])))
        model(*fresh(probe))
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _silencing(own: list[int]) -> Any:
    def hook(layer: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        return out.index_fill(_dim(layer, out), torch.tensor(own, dtype=torch.long, device=out.device), 0)

    return hook


def _noting(seen: list[Tensor]) -> Any:
    def hook(layer: nn.Module, args: tuple[Any, ...]) -> None:
        if args:  # not called by keyword
            seen.append(args[0].detach().movedim(_dim(layer, args[0]), 0).clone())

    return hook


def _dim(layer: nn.Module, x: Tensor) -> int:
    """The dimension of the channels of what goes into or comes out of a layer."""
    if isinstance(layer, _ConvNd):
        return x.dim() - (weight_of(layer).dim() - 1)
    return 1 if isinstance(layer, _BatchNorm) else x.dim() - 1

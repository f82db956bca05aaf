"""Take channels out of a copy of a network, and keep it only if it computes what the network computes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..errors import MEMORY, one_line
from .channels import Channels, weight_of
from .patience import followed
from .probes import fresh
from .same import same
from .silence import mixed

__all__ = ["Removal", "checked", "restore"]

# Sums of fewer terms round differently: see `near`.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
CHANGES = "removing them changes what the model computes"


class _Untied(Exception):
    """A shared parameter cannot be shared any more."""


@dataclass(eq=False)
class Removal:
    """Channels of one set that are removed, and the constants that are folded into their readers before: (reader, its input, number)."""

    channels: Channels
    places: list[int]
    folds: list[tuple[str, int, float]]


def checked(
    model: nn.Module, removals: list[Removal], probes: Sequence[tuple[Any, ...]]
) -> tuple[nn.Module, list[Removal], list[tuple[Removal, str]]]:
    """The model without all channels that can be removed. If removing all together changes its outputs, those that nothing mixes with
    others are tried together, and then each set by itself.

    Returns:
        a copy in eval mode, what was removed from it, and what was not, with the reason.
    """
    with torch.no_grad():
        reference = copy.deepcopy(model).eval()
        expected = [tree_leaves(reference(*fresh(probe))) for probe in probes]
    whole = _attempt(model, removals, probes, expected)
    if not isinstance(whole, str):
        return whole, removals, []
    small = reference
    done: list[Removal] = []
    refused: list[tuple[Removal, str]] = []
    apart = mixed([removal.channels for removal in removals], reference, probes)
    units = _units(model, removals)
    unsure = [unit for unit in units if any(removal.channels.root in apart for removal in unit)]
    sound = [removal for unit in units if unit not in unsure for removal in unit]
    if 1 < len(sound) < len(removals) and not isinstance(tried := _attempt(model, sound, probes, expected), str):
        small, done, units = tried, sound, unsure
    for unit in followed(units, "shrink: set {} of {} of channels is tried by itself"):
        together = _attempt(model, [*done, *unit], probes, expected)
        if not isinstance(together, str):
            small, done = together, [*done, *unit]
            continue
        for removal in unit:
            tried = together if len(unit) == 1 else _attempt(model, [*done, removal], probes, expected)
            if isinstance(tried, str):
                why = apart.get(removal.channels.root) if tried == CHANGES else None
                refused.append((removal, f"{tried}: {why}" if why else tried))
            else:
                small, done = tried, [*done, removal]
    return small, done, refused


def _ties(model: nn.Module) -> list[list[tuple[str, str]]]:
    """Parameters that several modules share: (name of the module, its name for it)."""
    places: dict[nn.Parameter, list[tuple[str, str]]] = {}
    for name, module in model.named_modules():
        for key, p in module._parameters.items():
            if p is not None:
                places.setdefault(p, []).append((name, key))
    return [own for own in places.values() if len(own) > 1]


def _units(model: nn.Module, removals: Sequence[Removal]) -> list[list[Removal]]:
    """Removals in groups: those from layers that share a parameter together, as only that may be possible; every other one alone."""
    units = [[removal] for removal in removals]
    for tie in _ties(model):
        names = {name for name, _ in tie}
        linked = [unit for unit in units if any(names & removal.channels.layers for removal in unit)]
        if len(linked) > 1:
            units = [unit for unit in units if unit not in linked] + [[removal for unit in linked for removal in unit]]
    return units


def _attempt(
    model: nn.Module, removals: Sequence[Removal], probes: Sequence[tuple[Any, ...]], expected: Sequence[list[Any]]
) -> nn.Module | str:
    """The model without these channels if it computes the same, else why not."""
    try:
        small = _removed_from(model, removals)
        with torch.no_grad():
            equal = all(same(tree_leaves(small(*fresh(probe))), leaves, TOLERANCE) for probe, leaves in zip(probes, expected, strict=True))
    except MEMORY:
        raise
    except _Untied as error:
        return str(error)
    except Exception as error:  # shapes that do not fit any more, in whatever way the model or the graph says so
        return f"without them the model fails: {one_line(error)}"
    return small if equal else CHANGES


def _removed_from(model: nn.Module, removals: Sequence[Removal]) -> nn.Module:
    """A copy of the model, in eval mode, without these channels; parameters that were shared still are, or `_Untied`."""
    small = copy.deepcopy(model).eval()
    layers = dict(small.named_modules())
    with torch.no_grad():
        for removal in removals:
            for name, i, number in removal.folds:
                _fold(layers[name], i, number)
    taken: dict[tuple[str, Any], set[int]] = {}  # one layer may read several sets, as behind a concatenation
    for removal in removals:
        for cut in removal.channels.cuts:
            own = taken.setdefault((cut.name, cut.take), set())
            own.update(place for channel in removal.places for place in cut.places.get(channel, ()))
    for (name, take), places in taken.items():
        take(layers[name], sorted(places))
    for tie in _ties(model):
        first, *others = (layers[name]._parameters[key] for name, key in tie)
        assert first is not None
        if not all(other is first or (other is not None and torch.equal(first, other)) for other in others):
            raise _Untied(f"{' and '.join(name for name, _ in tie)} share their {tie[0][1]}, of which they need different parts then")
        for name, key in tie[1:]:
            layers[name]._parameters[key] = first
    return small


def _fold(layer: nn.Module, i: int, number: float) -> None:
    """Add what input i contributes when it is ``number`` everywhere to the bias."""
    weight = weight_of(layer)
    contribution = (weight[:, i].flatten(1).sum(1) if weight.dim() > 2 else weight[:, i]) * number
    bias = layer._parameters["bias"]
    if bias is None:
        bias = nn.Parameter(torch.zeros_like(contribution), requires_grad=weight.requires_grad)
        layer._parameters["bias"] = bias
    bias.add_(contribution)


def restore(model: nn.Module, small: nn.Module) -> None:
    """Modes, `requires_grad` and memory formats as in the model."""
    for name, module in small.named_modules():
        module.training = model.get_submodule(name).training
    before = dict(model.named_parameters())
    for name, p in small.named_parameters():
        if name in before:  # a bias may be new
            p.requires_grad_(before[name].requires_grad)
            if (format_ := _channels_last(before[name])) is not None:
                p.data = torch.empty_like(p, memory_format=format_).copy_(p.detach())


def _channels_last(x: Tensor) -> torch.memory_format | None:
    """The channels-last format, if the strides of ``x`` say so and could not be those of another format as well."""
    format_ = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    if format_ is None:
        return None
    last, first = (torch.empty(x.shape, device="meta", memory_format=f).stride() for f in (format_, torch.contiguous_format))
    return format_ if x.stride() == last != first else None

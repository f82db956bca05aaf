"""Remove pruned filters and channels for good: a smaller network of ordinary layers that computes the same.

A channel is removed when no layer reads it, or when its filters are all zero. What is read of such a channel is the same number for every
input, made by biases and batch-norms alone: a 0 needs nothing, another number is folded into the biases of the layers that read it, where
that is exact. Whatever the graph says, the result is compared with the model before it is returned.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_leaves

from ..engine.layers import uses
from .channels import (
    Channels,
    Reader,
    as_inputs,
    channels_of,
    depthwise,
    matrices_of,
    outputs,
    traced_copy,
    weight_of,
    zero_inputs,
    zero_outputs,
)
from .probes import fresh, probes_of
from .removal import Removal, checked, restore

__all__ = ["Kept", "Removed", "Shrunk", "shrink"]


JOINS = {"Add": "added to", "Sub": "added to", "Mul": "multiplied with", "Div": "multiplied with"}
LOST = "the graph does not follow them to a layer that reads them"
ONLY_HERE = "only example_input shows that what reaches their readers is the same everywhere"


class Removed(NamedTuple):
    """A layer that has fewer output channels now: its ``name``, and how many it had ``before`` and has ``after``."""

    name: str
    before: int
    after: int


class Kept(NamedTuple):
    """Channels of a layer that are pruned but still there, with the ``reason``: its outputs, or its inputs if ``inputs`` is True."""

    name: str
    channels: int
    reason: str
    inputs: bool = False


@dataclass
class Shrunk:
    """The result of `shrink`. ``print`` shows what was removed, and what could not be removed and why.

    Attributes:
        model: the smaller model.
        removed: the layers that have fewer output channels now.
        kept: pruned channels that are still there, with the reason.
        note: what the check could not show; empty if nothing.
    """

    model: nn.Module
    removed: list[Removed] = field(default_factory=list)
    kept: list[Kept] = field(default_factory=list)
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        """All but the model, for JSON."""
        return {"removed": [row._asdict() for row in self.removed], "kept": [row._asdict() for row in self.kept], "note": self.note}

    def __str__(self) -> str:
        lines = [f"{row.name}: {row.before} -> {row.after} channels" for row in self.removed] or ["nothing removed"]
        lines += [f"{row.name}: {row.channels} pruned {'input ' * row.inputs}channels stay: {row.reason}" for row in self.kept]
        return "\n".join([*lines, self.note] if self.note else lines)


def shrink(model: nn.Module, example_input: Any) -> Shrunk:
    """Make a smaller copy of a pruned model, without the channels that are zero.

    Channels are removed through residual joins, concatenations, flattening, batch-norm and depthwise convolutions, as far as
    Torch-Pruning's dependency graph follows them. Every layer keeps at least one channel.

    In eval mode the copy computes what the model computed. This is checked on ``example_input`` and on random inputs, with a tolerance of
    1e-4 in float32, because sums of fewer terms round differently. Channels whose removal would change the outputs stay, and are listed
    with the reason.

    Args:
        model: a model with exact zeros, as after `FastBiP.finalize`; not changed.
        example_input: one input of the model, or a tuple of its arguments; on the model's device.

    Returns:
        The new model, with the modes, dtypes, memory formats and `requires_grad` of the old one, and what was removed and what was not.

    Raises:
        ImportError: Torch-Pruning is not installed.
        TypeError: the model is a TorchScript module.
        ValueError: the input is empty, the model does not take it, or cannot be traced.

    Examples:
        >>> opt.finalize()
        >>> small = shrink(model, x).model
    """
    inputs = as_inputs(example_input)
    if (tensors := [x for x in tree_leaves(inputs) if isinstance(x, Tensor)]) and not any(x.numel() for x in tensors):
        raise ValueError(f"example_input must have at least one sample, got shape {tuple(tensors[0].shape)}")
    twin, graph = traced_copy(model, inputs)
    probes = probes_of(twin, inputs)
    sets = channels_of(graph, twin)
    kept: list[Kept] = []
    arriving = _arriving([channels for channels in sets if not channels.refused], twin, probes.inputs)
    removals = [removal for channels in sets if (removal := _removal_of(channels, arriving, probes.doubt, kept)) is not None]
    kept += _outside(sets, twin)
    small, done, refused = checked(model, removals, probes.inputs)
    kept += [Kept(removal.channels.root, len(removal.places), reason) for removal, reason in refused]
    restore(model, small)
    layers = dict(small.named_modules())
    removed = [
        Removed(name, removal.channels.count, outputs(layers[name]))
        for removal in done
        for name, layer in (removal.channels.makers | removal.channels.passes).items()
        if isinstance(layer, (_ConvNd, nn.Linear))
    ]
    return Shrunk(small, removed, kept, probes.doubt)


# --- what can go ---------------------------------------------------------------------------------------------------------------------


class _Zeros(NamedTuple):
    """For every channel of a set, by layer: is its filter all zero (layers that make or filter it), is it read (readers)."""

    makers: dict[str, Tensor]
    between: dict[str, Tensor]
    readers: dict[str, Tensor]


def _zeros_of(channels: Channels) -> _Zeros:
    makers = {name: zero_outputs(layer).cpu() for name, layer in channels.makers.items()}
    between = {name: zero_outputs(layer).cpu() for name, layer in channels.passes.items() if depthwise(layer)}
    readers = {reader.name: torch.zeros(channels.count, dtype=torch.bool) for reader in channels.readers}
    for reader in channels.readers:  # one layer may be several, if it is called several times
        read = (~zero_inputs(reader.layer)).tolist()
        readers[reader.name] |= torch.tensor([any(read[i] for i in reader.inputs.get(c, ())) for c in range(channels.count)])
    return _Zeros(makers, between, readers)


def _removal_of(channels: Channels, arriving: Mapping[str, Sequence[float]], doubt: str, kept: list[Kept]) -> Removal | None:
    """Channels of a set that can be removed; adds pruned ones that cannot to ``kept``. With ``doubt``, constants do not count."""
    if channels.refused:
        kept += _all_of(channels, channels.refused)
        return None
    zeros = _zeros_of(channels)
    followed = torch.tensor([any(reader.inputs.get(c) for reader in channels.readers) for c in range(channels.count)])
    unread = ~torch.stack(list(zeros.readers.values())).any(0) & followed
    silent = torch.stack(list(zeros.makers.values())).all(0)
    constant = torch.stack([silent, *zeros.between.values()]).any(0) & ~unread & followed
    places: list[int] = []
    folds: list[tuple[str, int, float]] = []
    reasons: Counter[tuple[str, str]] = Counter()
    for channel in range(channels.count):
        numbers = []
        if constant[channel]:
            numbers = [(reader, i, arriving[reader.name][i]) for reader in channels.readers for i in reader.inputs.get(channel, ())]
            whys = (why for reader, _, number in numbers if (why := ONLY_HERE if doubt else _not_foldable(reader, number)))
            if why := next(whys, ""):
                pruned = channels.root if silent[channel] else next(name for name, own in zeros.between.items() if own[channel])
                reasons[pruned, why] += 1
                continue
        elif not unread[channel]:
            continue
        places.append(channel)
        folds += [(reader.name, i, number) for reader, i, number in numbers if number]
    kept += [Kept(name, count, why) for (name, why), count in reasons.items()]
    going = torch.zeros(channels.count, dtype=torch.bool)
    going[places] = True
    kept += [Kept(name, int((own & ~followed).sum()), LOST) for name, own in zeros.makers.items() if (own & ~followed).any()]
    kept += _partly(channels, zeros, going | constant | ~followed)
    if len(places) == channels.count:
        kept.append(Kept(channels.root, 1, "a layer keeps at least one channel"))
        gone = places.pop()
        mine = {(reader.name, i) for reader in channels.readers for i in reader.inputs.get(gone, ())}
        folds = [fold for fold in folds if fold[:2] not in mine]
    return Removal(channels, places, folds) if places else None


def _all_of(channels: Channels, why: str) -> list[Kept]:
    """All pruned channels of a set, kept for the reason ``why``."""
    layers = channels.makers | {name: layer for name, layer in channels.passes.items() if depthwise(layer)}
    made = [Kept(name, int(zero_outputs(layer).sum()), why) for name, layer in layers.items()]
    readers = {reader.name: reader.layer for reader in channels.readers}
    return [row for row in made + [Kept(name, int(zero_inputs(layer).sum()), why, True) for name, layer in readers.items()] if row.channels]


def _partly(channels: Channels, zeros: _Zeros, told: Tensor) -> list[Kept]:
    """Channels that are pruned in only some layers of a set, except those that were ``told`` of already."""
    kept = []
    for name, own in zeros.makers.items():
        if count := int((own & ~told).sum()):
            others = ", ".join(other for other in channels.makers if other != name)
            kept.append(Kept(name, count, f"they are {_joined(channels)} those of {others}, which are not pruned"))
    for name, own in zeros.readers.items():
        if count := int((idle := ~own & ~told).sum()):
            others = ", ".join(other for other, its in zeros.readers.items() if (its & idle).any())
            kept.append(Kept(name, count, f"they are read by {others} too", inputs=True))
    return kept


def _outside(sets: Sequence[Channels], twin: nn.Module) -> list[Kept]:
    """Pruned channels of layers that are in no set."""
    makers = {name for channels in sets for name in channels.makers | channels.passes}
    readers = {reader.name for channels in sets for reader in channels.readers}
    kept = []
    for name, layer in twin.named_modules():
        if not isinstance(layer, (_ConvNd, nn.Linear)):
            continue
        if name not in makers and (count := int(zero_outputs(layer).sum())):
            kept.append(Kept(name, count, "they are outputs of the model, or go where the graph does not follow"))
        if name not in readers and not depthwise(layer) and (count := int(zero_inputs(layer).sum())):
            kept.append(Kept(name, count, "they are inputs of the model, or come from where the graph does not follow", inputs=True))
    return kept + _not_cut(twin)


def _not_cut(twin: nn.Module) -> list[Kept]:
    """Pruned channels of layers of other kinds than convolutions and Linear ones, over all their matrices."""
    name_of: dict[Tensor, str] = {p: name for name, p in twin.named_parameters()}
    kept = []
    for use in uses(twin):
        if use.dense is None and use.parameter.numel() and not isinstance(use.module, (_ConvNd, nn.Linear)):
            zero, why = matrices_of(use) == 0, f"shrink does not cut {type(use.module).__name__}"
            rows = [Kept(name_of[use.parameter], int(zero.all(dim).sum()), why, dim == 1) for dim in (2, 1)]
            kept += [row for row in rows if row.channels]
    return kept


def _joined(channels: Channels) -> str:
    """What happens to the outputs of several layers that are one channel."""
    words = {JOINS.get(operation, "joined with") for operation in channels.joins} or {"joined with"}
    return " and ".join(sorted(words))


def _not_foldable(reader: Reader, number: float) -> str | None:
    """Why a number cannot go into the bias of a layer, None if it can."""
    layer = reader.layer
    if number != number:
        return f"what reaches {reader.name} is not the same everywhere"
    if number == 0:
        return None
    if isinstance(layer, _ConvNd) and layer.transposed:
        return f"a constant from a bias or batch-norm reaches {reader.name}, a transposed convolution"
    if isinstance(layer, _ConvNd) and layer.padding_mode == "zeros" and _pads(layer):
        return f"a constant from a bias or batch-norm reaches {reader.name}, whose zero padding makes its border differ"
    return None


def _pads(layer: _ConvNd) -> bool:
    if isinstance(layer.padding, str):
        return layer.padding == "same" and any(size > 1 for size in layer.kernel_size)
    return any(layer.padding)


def _arriving(sets: Sequence[Channels], twin: nn.Module, probes: Sequence[tuple[Any, ...]]) -> dict[str, list[float]]:
    """The constant of every input channel of the readers, over all probes, samples and places; NaN if it is not constant."""
    layers = {reader.name: reader.layer for channels in sets for reader in channels.readers}
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in layers}

    def note(name: str, layer: nn.Module) -> Any:
        dims = weight_of(layer).dim() - 1  # of an input without a batch

        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if not args or not args[0].numel():  # called by keyword: not seen, so not known
                return
            x = args[0].detach()
            x = x.reshape(-1, x.shape[-1]).T if isinstance(layer, nn.Linear) else x.transpose(0, x.dim() - dims)
            seen[name].append(x.flatten(1).float().aminmax(dim=1))

        return layer.register_forward_pre_hook(hook)

    handles = [note(name, layer) for name, layer in layers.items()]
    try:
        with torch.no_grad():
            for probe in probes:
                twin(*fresh(probe))
    finally:
        for handle in handles:
            handle.remove()
    numbers = {}
    for name, ranges in seen.items():
        if not ranges:
            numbers[name] = [float("nan")] * len(zero_inputs(layers[name]))
            continue
        low = torch.stack([low for low, _ in ranges]).amin(0)
        high = torch.stack([high for _, high in ranges]).amax(0)
        numbers[name] = torch.where(low == high, low, torch.nan).tolist()
    return numbers

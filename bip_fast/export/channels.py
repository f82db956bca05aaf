"""Which layers make, pass on and read the same channels: Torch-Pruning's dependency graph, in the words of this package.

A set of channels is what can only be removed together: the outputs of one layer, of several where they are added, and with them the
batch-norms and depthwise convolutions in between and the inputs of all layers that read them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_leaves

from ..engine.layers import Use
from ..errors import MEMORY, one_line
from .following import Reached, follow, map_again, tolerant
from .patience import followed
from .probes import fresh

__all__ = ["Channels", "Cut", "Reader", "as_inputs", "channels_of", "depthwise", "matrices_of", "torch_pruning", "zero_filters"]


LEAST = 1024  # places in a node that a walk may reach in any network


def torch_pruning() -> Any:
    """The optional package, or an ImportError that says how to get it."""
    try:
        import torch_pruning
    except ImportError as error:
        raise ImportError("this needs Torch-Pruning: pip install 'bip_fast[export]'") from error
    return torch_pruning


def as_inputs(example_input: Any) -> tuple[Any, ...]:
    """Arguments of the model: a tuple is several, anything else one."""
    return example_input if isinstance(example_input, tuple) else (example_input,)


def depthwise(layer: object) -> bool:
    """Whether it is a convolution with one filter for each channel: output i is input i, filtered."""
    return isinstance(layer, _ConvNd) and layer.groups > 1 and layer.groups == layer.in_channels == layer.out_channels


@dataclass
class Reader:
    """A layer that reads channels: channel i of the set is its inputs ``inputs[i]``, several behind a flatten."""

    name: str
    layer: nn.Module
    inputs: dict[int, list[int]]


class Cut(NamedTuple):
    """A layer that loses entries with the channels: its name, the function of Torch-Pruning that takes them, and its places of channels."""

    name: str
    take: Callable[[nn.Module, list[int]], object]
    places: dict[int, list[int]]


@dataclass
class Channels:
    """One set of channels, numbered as the outputs of the layer ``root``.

    Args:
        makers: names of layers whose output i is channel i, or is added to it.
        passes: names of batch-norms and depthwise convolutions whose channel i is channel i.
        readers: layers that read them.
        cuts: all layers that lose entries with them, these and others such as a PReLU.
        joins: names of operations that combine the outputs of two makers, such as "Add" and "Mul".
        refused: why they cannot be removed, if the graph already says so.
    """

    root: str
    count: int
    makers: dict[str, nn.Module] = field(default_factory=dict)
    passes: dict[str, nn.Module] = field(default_factory=dict)
    readers: list[Reader] = field(default_factory=list)
    cuts: list[Cut] = field(default_factory=list)
    joins: set[str] = field(default_factory=set)
    refused: str | None = None

    @property
    def layers(self) -> set[str]:
        """Names of all of them."""
        return {*self.makers, *self.passes, *(reader.name for reader in self.readers)}


@contextmanager
def _traceable(model: nn.Module) -> Iterator[None]:
    """Torch-Pruning follows autograd, so that every parameter must take part."""
    grads = [p.requires_grad for p in model.parameters()]
    for p in model.parameters():
        p.requires_grad_(p.is_floating_point())
    try:
        with torch.enable_grad(), tolerant():
            yield
    finally:
        for p, grad in zip(model.parameters(), grads, strict=False):
            p.requires_grad_(grad)


def graph_of(model: nn.Module, inputs: tuple[Any, ...]) -> Any:
    """Torch-Pruning's graph of a model in eval mode.

    Raises:
        ValueError: the model does not run on these inputs, or cannot be traced.
    """
    graph = torch_pruning().DependencyGraph()
    try:
        with _traceable(model):
            graph.build_dependency(model, inputs, lambda m, x: m(*fresh(x)), _tensors, verbose=False)
            map_again(graph)
            return graph
    except MEMORY:
        raise
    except Exception as error:  # the model's own code, or whatever the tracing meets in it
        raise ValueError(_why_not(model, inputs, error)) from error


def _tensors(returned: Any) -> Any:
    """Those that a model returns; Torch-Pruning takes nothing else."""
    return [x for x in tree_leaves(returned) if isinstance(x, Tensor)] or returned


@torch.no_grad()
def _why_not(model: nn.Module, inputs: tuple[Any, ...], error: Exception) -> str:
    """Whether it is the model that does not take the inputs, or Torch-Pruning that does not take the model."""
    try:
        model(*fresh(inputs))
    except Exception as own:  # in whatever way the model says so
        return f"example_input must be what the model takes, got: {one_line(own)}"
    told = one_line(error, named=True)
    return f'Torch-Pruning cannot follow the model, got: {told}; pattern="filter" without coupled prunes it, without making it smaller'


def channels_of(graph: Any, model: nn.Module) -> list[Channels]:
    """All sets of channels that the graph follows from the layers that make them to layers that read them."""
    names = {layer: name for name, layer in model.named_modules()}
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    layers: list[nn.Module] = [layer for layer in graph.module2node if isinstance(layer, kinds)]
    widest = max((count for layer in layers for count in (outputs(layer), inputs(layer))), default=0)
    found: list[Channels] = []
    made: set[nn.Module] = set()
    for layer in followed(layers, "layer {} of {}: where its channels go"):
        if layer in made or depthwise(layer):
            continue
        try:
            reached, ended = follow(graph, layer, max(widest, LEAST))
        except MEMORY:
            raise
        except Exception:  # it meets an operation that it cannot index through; these channels are not known then
            continue
        channels = _channels(reached, graph, names, names[layer], outputs(layer))
        if not ended:
            channels.refused = f"the graph loses the order of the channels of {names[layer]}"
        made |= set(channels.makers.values())
        if channels.readers:
            found.append(channels)
    return found


def _channels(group: Sequence[Reached], graph: Any, names: Mapping[nn.Module, str], root: str, count: int) -> Channels:
    channels = Channels(root, count)
    for node, handler, places in group:
        layer = node.module
        if layer not in names:
            if isinstance(layer, nn.Parameter):
                channels.refused = f"a parameter of shape {tuple(layer.shape)} goes with these channels"
            elif len(node.inputs) > 1 and (operation := getattr(layer, "_grad_fn", "")):  # an elementwise operation of two
                channels.joins.add(operation.split("Backward")[0])
            continue
        name = names[layer]
        channels.cuts.append(Cut(name, handler, places))
        if isinstance(layer, (_ConvNd, nn.Linear)) and not depthwise(layer):
            if getattr(layer, "groups", 1) > 1:
                channels.refused = f"{name} is a grouped convolution"
            if graph.is_out_channel_pruning_fn(handler):
                channels.makers[name] = layer
                _check_aligned(channels, name, places, len(zero_outputs(layer)))
            else:
                channels.readers.append(Reader(name, layer, places))
                if max(place for own in places.values() for place in own) >= len(zero_inputs(layer)):
                    channels.refused = f"{name} reads them in another order than the graph follows"
        elif isinstance(layer, _BatchNorm) or depthwise(layer):
            channels.passes[name] = layer
            _check_aligned(channels, name, places, layer.num_features if isinstance(layer, _BatchNorm) else layer.out_channels)
        elif isinstance(layer, nn.PReLU):  # it makes 0 of 0
            if layer.num_parameters > 1:
                _check_aligned(channels, name, places, layer.num_parameters)
        elif any(True for _ in layer.parameters(recurse=False)):
            channels.refused = f"{name}, a {type(layer).__name__}, goes over these channels"
    return channels


def _check_aligned(channels: Channels, name: str, places: Mapping[int, list[int]], size: int) -> None:
    """Whether the channels are exactly those of the layer. If not, a slice or a padding lies between."""
    if size == channels.count == len(places) and all(own == [channel] for channel, own in places.items()):
        return
    channels.refused = f"the {size} channels of {name} are not one to one the {channels.count} of {channels.root}"
    if name == channels.root:
        channels.refused = f"several of the {size} channels of {name} go together, as queries, keys and values do"


def traced_copy(model: nn.Module, inputs: tuple[Any, ...]) -> tuple[nn.Module, Any]:
    """A copy of a model in eval mode, and its graph.

    Raises:
        TypeError: the model is a TorchScript module, which has no layers that could be cut.
        ValueError: the model does not run on these inputs, or cannot be traced.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            f"model must be made of ordinary layers, got a {type(model).__name__} of torch.jit: give the module it was made from"
        )
    twin = copy.deepcopy(model).eval()
    return twin, graph_of(twin, inputs)


def outputs(layer: nn.Module) -> int:
    """Output channels of a Conv or Linear layer."""
    return int(layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels)  # type: ignore[arg-type]


def inputs(layer: nn.Module) -> int:
    """Input channels of a Conv or Linear layer."""
    return int(layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels)  # type: ignore[arg-type]


def weight_of(layer: nn.Module) -> Tensor:
    """The weight of a Conv or Linear layer."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.detach()


def zero_outputs(layer: nn.Module) -> Tensor:
    """Bool, for every output channel: all weights that make it are 0."""
    return _zero(layer).all(1).flatten()


def zero_inputs(layer: nn.Module) -> Tensor:
    """Bool, for every input channel: all weights that read it are 0."""
    return _zero(layer).all(2).flatten()


def matrices_of(use: Use) -> Tensor:
    """(matrices, outputs, inputs) of a weight that is none of a convolution."""
    weight, layer = use.parameter.detach(), use.layer
    rows = weight.shape[1] if layer.experts else weight.shape[0] // layer.matrices
    stack = weight.reshape(layer.matrices, rows, -1)
    return stack.transpose(1, 2) if layer.transposed else stack


def zero_filters(use: Use) -> Tensor:
    """Bool, for every output of every matrix of a weight: all weights that make it are 0."""
    return zero_outputs(use.module) if isinstance(use.module, (_ConvNd, nn.Linear)) else (matrices_of(use) == 0).all(2).flatten()


def _zero(layer: nn.Module) -> Tensor:
    """Bool (groups, inputs, outputs), each a group's own: no weight from this input to this output."""
    weight, groups = weight_of(layer), getattr(layer, "groups", 1)
    zero = (weight == 0).flatten(2).all(2) if weight.dim() > 2 else weight == 0
    own = zero.reshape(groups, len(zero) // groups, zero.shape[1])
    return own if getattr(layer, "transposed", False) else own.transpose(1, 2)

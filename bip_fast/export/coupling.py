"""Which filters can only be removed together: the argument ``coupled`` of `FastBiP(model, pattern="filter", coupled=...)`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..engine.layers import uses
from ..engine.param_groups import OUTPUTS
from .channels import Channels, as_inputs, channels_of, traced_copy
from .probes import fresh, probes_of
from .silence import mixed

__all__ = ["coupled_filters"]


def coupled_filters(model: nn.Module, example_input: Any) -> list[list[str]]:
    """Find the filters that can only be removed together, for the argument ``coupled`` of `FastBiP`.

    Returns lists of parameter names. The parameters in a list belong to the same channels: the weights of the layers that make these
    channels (several if their outputs are added, and depthwise convolutions that follow), and the vectors that go with them, which are
    biases and the weights and biases of batch-norms. Without the vectors, a removed filter would still give a constant.

    If the model returns the channels of a list, the list ends with ``"<outputs>"``, and `FastBiP` leaves them alone. These are the channels
    of all layers that are the last on some path to a returned tensor, even if other layers read them too. Channels that a slice, a padding
    or a shuffle mixes with others are left out.

    Args:
        model: not changed.
        example_input: one input of the model, or a tuple of its arguments.

    Raises:
        ImportError: Torch-Pruning is not installed.
        ValueError: the model does not take this input, or cannot be traced.

    Examples:
        >>> opt = FastBiP(model, sparsity=0.5, pattern="filter", coupled=coupled_filters(model, x))
    """
    inputs = as_inputs(example_input)
    twin, graph = traced_copy(model, inputs)
    last = _last_layers(twin, inputs)
    lists, known = [], set()
    sets = channels_of(graph, twin)
    apart = mixed(sets, twin, probes_of(twin, inputs, seeds=1, sizes=False).inputs)
    for channels in sets:
        layers = channels.makers.keys() | channels.passes.keys()
        if channels.refused is None and channels.root not in apart:
            lists.append(_names(channels) + [OUTPUTS] * bool(layers & last))
            known |= layers
    modules = dict(model.named_modules())
    lists += [[*(f"{name}.{key}".lstrip(".") for key in modules[name]._parameters), OUTPUTS] for name in sorted(last - known)]
    own = {name: p.dim() for name, p in model.named_parameters()} | {OUTPUTS: 0}
    lists = [[name for name in names if name in own] for names in lists]
    return [names for names in lists if any(own[name] > 1 for name in names)]  # a parametrization hides weights


def _last_layers(twin: nn.Module, inputs: tuple[Any, ...]) -> set[str]:
    """Names of the layers that are the last with a matrix on some path to a tensor that the model returns."""
    name_of: dict[Tensor | None, str] = {use.parameter: use.name for use in uses(twin)}
    for weight in twin.parameters():
        weight.requires_grad_(weight.is_floating_point())
    with torch.enable_grad():
        returned = [x.grad_fn for x in tree_leaves(twin(*fresh(inputs))) if isinstance(x, Tensor)]
    last: set[str] = set()
    seen: set[Any] = set()
    while returned:
        node = returned.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        sources = [source for source, _ in node.next_functions]
        own = {name_of[p] for p in map(_parameter, sources) if p in name_of}
        last |= own
        returned += [] if own else sources
    return last


def _parameter(node: Any) -> Tensor | None:
    """The parameter that a node of autograd's graph hands on, transposed or as it is."""
    while node is not None and not hasattr(node, "variable"):
        node = node.next_functions[0][0] if len(node.next_functions) == 1 else None
    return getattr(node, "variable", None)


def _names(channels: Channels) -> list[str]:
    weights = [f"{name}.weight" for name in channels.makers]
    vectors = [f"{name}.bias" for name in channels.makers]
    for name, layer in channels.passes.items():
        (vectors if isinstance(layer, nn.modules.batchnorm._BatchNorm) else weights).append(f"{name}.weight")
        vectors.append(f"{name}.bias")
    return weights + vectors

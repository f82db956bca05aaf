"""Which filters can only be removed together: what `FastBiP(model, pattern="filter", coupled=...)` should know of a network."""

from __future__ import annotations

from typing import Any

from torch import nn

from .channels import Channels, as_inputs, channels_of, traced_copy

__all__ = ["coupled_filters"]


def coupled_filters(model: nn.Module, example_input: Any) -> list[list[str]]:
    """Lists of names of parameters that belong to the same channels.

    Each has the weights of the layers that make them (several where their outputs are added, and depthwise convolutions behind them), and
    the vectors that go with them: biases, and the weights and biases of batch-norms, whose constants would otherwise outlive their filter.
    Channels that are outputs of the model, and those that a slice or a padding mixes with others, are left out.

    Args:
        model: not changed.
        example_input: one input of the model, or a tuple of its arguments.

    Raises:
        ImportError: Torch-Pruning is not installed.
        ValueError: the model does not take this input, or cannot be traced.

    Example:
        >>> opt = FastBiP(model, sparsity=0.5, pattern="filter", coupled=coupled_filters(model, x))
    """
    twin, graph = traced_copy(model, as_inputs(example_input))
    own = dict(model.named_parameters())
    lists = [_names(channels) for channels in channels_of(graph, twin) if channels.refused is None]
    return [kept for names in lists if (kept := [name for name in names if name in own])]


def _names(channels: Channels) -> list[str]:
    weights = [f"{name}.weight" for name in channels.makers]
    vectors = [f"{name}.bias" for name in channels.makers]
    for name, layer in channels.passes.items():
        (vectors if isinstance(layer, nn.modules.batchnorm._BatchNorm) else weights).append(f"{name}.weight")
        vectors.append(f"{name}.bias")
    return weights + vectors

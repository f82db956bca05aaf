"""Where the output channels of a layer go: a walk through Torch-Pruning's graph that ends in any network.

Torch-Pruning's own walk takes a node up again whenever the list of its places differs. Through slices, rolls and windows, whose sizes it
infers wrongly, these lists grow without end; and where two channels come to one place, it forgets the second. This one hands on what is new
to a node, keeps both, and gives up where a node has more places than any layer has channels: none of these channels can be removed.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

from torch import nn

__all__ = ["Reached", "follow", "map_again", "tolerant"]


class Reached(NamedTuple):
    """A node of the graph that the channels reach, how they are removed there, and the places of each."""

    node: Any
    handler: Any
    places: dict[int, list[int]]


class _Place(NamedTuple):
    """What the index mappings of Torch-Pruning read: a place in a node, and the channel that goes there."""

    idx: int
    root_idx: int


def follow(graph: Any, layer: nn.Module, most: int) -> tuple[list[Reached], bool]:
    """Walk from the outputs of a layer.

    Args:
        most: channels of the widest layer.

    Returns:
        all that is reached, the layer first; and whether the walk came to an end. If not, that is what it had reached until then.
    """
    pruner = graph.get_pruner_of_module(layer)
    start = [_Place(i, i) for i in range(pruner.get_out_channels(layer))]
    key = graph.module2node[layer], pruner.prune_out_channels
    reached: dict[tuple[Any, Any], dict[Any, None]] = {key: dict.fromkeys(start)}
    to_do: list[tuple[tuple[Any, Any], Sequence[Any]]] = [(key, start)]
    ended = True
    while to_do and ended:
        (node, handler), places = to_do.pop()
        for dependency in node.dependencies:
            if not dependency.is_triggered_by(handler):
                continue
            handed = places
            for mapping in dependency.index_mapping:
                handed = handed if mapping is None else mapping(handed)
            if not len(handed):
                continue
            key = dependency.target, dependency.handler
            known = reached.setdefault(key, {})
            new = [place for place in dict.fromkeys(handed) if place not in known]
            known.update(dict.fromkeys(new))
            ended = ended and len(known) <= most
            if new:
                to_do.append((key, new))
    return [Reached(*key, _by_channel(known)) for key, known in reached.items()], ended


def _by_channel(places: Iterator[Any] | dict[Any, None]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for place in places:
        found.setdefault(place.root_idx, []).append(place.idx)
    return {channel: sorted(own) for channel, own in found.items()}


def _mappings() -> Any:
    return importlib.import_module("torch_pruning.dependency.index_mapping")


def map_again(graph: Any) -> None:
    """Infer the index mappings a second time: those of some operations need what the first time has found of others."""
    _mappings().update_index_mapping(graph)


@contextmanager
def tolerant() -> Iterator[None]:
    """Lets Torch-Pruning go on without the mapping of an operation where it reckons with a number of channels that it could not infer, as
    behind a channel shuffle or a roll, and silences its warnings of what it does not know. All of it is checked here, and said where
    channels stay."""
    room = _mappings()
    own = {name: function for name, function in vars(room).items() if name.startswith("update_") and name != "update_index_mapping"}

    def careful(function: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
        def update(graph: Any, node: Any) -> None:
            with suppress(ArithmeticError, LookupError, TypeError):
                function(graph, node)

        return update

    try:
        for name, function in own.items():
            setattr(room, name, careful(function))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"torch_pruning(\.|$)")
            yield
    finally:
        for name, function in own.items():
            setattr(room, name, function)

"""Parameters that are shared out over several ranks (DTensors of FSDP2 and tensor parallelism): which entries this rank has, and sums over
the ranks.

The kernels see the local tensor of a DTensor as a tensor of its own whose entries know their places in the whole (`Shard`). Everything else
that depends on the whole is here: `Ranks` adds up what the ranks count in a selection, and wraps local state as DTensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..reference import Blocks
from .native import is_ordinary

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = ["Ranks", "Shard", "Span", "gradient_of", "is_sharded", "like", "like_units", "local_of", "point_at", "shard_of", "units_of"]


def is_sharded(p: Any) -> bool:
    """Whether ``p`` is a DTensor."""
    if not isinstance(p, Tensor) or is_ordinary(p) or not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(p, DTensor)


@torch.no_grad()
def local_of(p: Tensor) -> Tensor:
    """The entries of ``p`` that this rank has; mutations are seen in ``p``."""
    return p.to_local() if is_sharded(p) else p  # type: ignore[attr-defined]


def like(p: Tensor, x: Tensor, shape: Sequence[int] | None = None, placements: Sequence[Any] | None = None) -> Tensor:
    """``x``, a tensor of this rank, as ``p`` is: itself, or part of a DTensor of the shape and placements of ``p`` (or those given)."""
    if not is_sharded(p):
        return x
    from torch.distributed.tensor import DTensor

    whole: DTensor = p  # type: ignore[assignment]
    size = torch.Size(p.shape if shape is None else shape)
    stride = tuple(math.prod(size[d + 1 :]) for d in range(len(size)))
    placements = whole.placements if placements is None else placements
    # Made of nothing, and then pointed at x: what is made of a view in the middle of an array keeps its offset, and deepcopy fails at that.
    made = DTensor.from_local(x.new_empty(0), whole.device_mesh, placements, run_check=False, shape=size, stride=stride)
    point_at(made, x)
    return made


def point_at(p: Tensor, memory: Tensor) -> None:
    """Let ``p`` have its entries, those of this rank, in ``memory``."""
    if is_sharded(p):
        p._local_tensor = memory  # type: ignore[attr-defined]  # as FSDP2 does when it moves shards
    else:
        p.data = memory


def gradient_of(p: Tensor, g: Tensor) -> Tensor:
    """What this rank has of the gradient of ``p``, brought to the placements of ``p`` if it has others."""
    if not is_sharded(g):
        return g
    whole: DTensor = p  # type: ignore[assignment]
    given: DTensor = g  # type: ignore[assignment]
    return local_of(given if given.placements == whole.placements else given.redistribute(placements=whole.placements))


def like_units(p: Tensor, x: Tensor, blocks: Blocks) -> Tensor:
    """``x``, a value for every unit that this rank has, as a DTensor of all units of ``p``, which are those of ``blocks``.

    Its shape is (units,), or (units down, units across) where units are blocks."""
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor import Shard as ShardPlacement
    from torch.distributed.tensor.placement_types import _StridedShard

    whole: DTensor = p  # type: ignore[assignment]
    flat = blocks.down == 1
    placements: list[Any] = []
    for placement in whole.placements:
        dim, factor = getattr(placement, "dim", None), getattr(placement, "split_factor", None)
        if dim is None:
            placements.append(Replicate())
        else:
            dim = 0 if flat else dim
            placements.append(ShardPlacement(dim) if factor is None else _StridedShard(dim, split_factor=factor))
    across = -(-local_of(p).shape[1:].numel() // blocks.block_cols)
    shape = (blocks.units,) if flat else (blocks.down, blocks.across)
    return like(p, x if flat else x.view(-1, across), shape, placements)


class Span(NamedTuple):
    """The places that this rank has along one dimension.

    Args:
        start, length: the places.
        size: of the whole dimension.
        step: every rank's part begins at a multiple of it.
    """

    start: int
    length: int
    size: int
    step: int


class Shard(NamedTuple):
    """Where the entries of this rank lie in the whole parameter, which is row-major.

    Args:
        spans: by dimension.
        elsewhere: another rank has the same entries, and counts them.
    """

    spans: tuple[Span, ...]
    elsewhere: bool = False

    @property
    def whole(self) -> torch.Size:
        return torch.Size(span.size for span in self.spans)

    def matrix(self, cut: int) -> tuple[Span, Span] | None:
        """Rows and columns, where dimensions before ``cut`` make the rows and the others the columns; None where they are no stretch."""

        def joined(spans: Sequence[Span]) -> Span | None:
            inner = math.prod(span.size for span in spans[1:])
            if any(span.length != span.size for span in spans[1:]):
                return None
            first = spans[0] if spans else Span(0, 1, 1, 1)
            return Span(first.start * inner, first.length * inner, first.size * inner, first.step * inner)

        rows, cols = joined(self.spans[:cut]), joined(self.spans[cut:])
        return None if rows is None or cols is None else (rows, cols)

    def places(self) -> tuple[int, int, int]:
        """``index``, ``row_length`` and ``row_stride`` of the kernels' table (bip.h).

        Raises:
            ValueError: the entries are not some columns of consecutive rows.
        """
        for cut in range(len(self.spans)):
            found = self.matrix(cut)
            if found is not None:
                return _strided(*found)
        dimensions = [d for d, span in enumerate(self.spans) if span.length != span.size]
        raise ValueError(f"must be sharded along dimension 0 and at most one other, got dimensions {dimensions}")


def _strided(rows: Span, cols: Span) -> tuple[int, int, int]:
    index = rows.start * cols.size + cols.start
    return (index, 0, 0) if cols.length in (0, cols.size) else (index, cols.length, cols.size)


def units_of(shard: Shard, blocks: Blocks) -> tuple[Blocks, tuple[int, int, int]]:
    """The units of a shard, of those of the whole parameter, and their places among these, as `Shard.places`.

    Raises:
        ValueError: units are split over the ranks; the message says along what.
    """
    sizes = [math.prod(shard.whole[:cut]) for cut in range(len(shard.whole) + 1)]
    found = [shard.matrix(cut) for cut, size in enumerate(sizes) if size == blocks.rows]
    spans = next((spans for spans in found if spans is not None), None)
    if spans is None:
        raise ValueError("its units are split over the ranks")
    for span, block in zip(spans, (blocks.block_rows, blocks.block_cols), strict=True):
        if span.step < span.size and span.step % block:
            raise ValueError(f"its units of {block} rows or columns are split over the ranks, which have {span.step} each")
    rows, cols = spans
    own = Blocks(rows.length, cols.length, blocks.block_rows, blocks.block_cols)
    units = [
        Span(span.start // block, -(-span.length // block), -(-span.size // block), 1)
        for span, block in zip(spans, (blocks.block_rows, blocks.block_cols), strict=True)
    ]
    return own, _strided(units[0], units[1])


def _spans(p: DTensor) -> tuple[Span, ...]:
    """The places of this rank along every dimension, cut as `torch.chunk` cuts, one mesh dimension after the other."""
    mesh, placements = p.device_mesh, p.placements
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise ValueError("must be on a mesh that this rank is part of")
    # FSDP2 cuts what tensor parallelism has cut, although its mesh dimension comes first: a strided placement cuts last.
    order = sorted(range(len(placements)), key=lambda i: hasattr(placements[i], "split_factor"))
    spans = []
    for d, size in enumerate(p.shape):
        start, length, step, lengths = 0, size, 0, {size}  # the lengths that ranks have
        for i in order:
            if getattr(placements[i], "dim", None) == d:
                chunks = {n: -(-n // mesh.size(i)) for n in lengths if n}
                step = math.gcd(step, *(chunk for n, chunk in chunks.items() if chunk < n))
                lengths = {part for n, chunk in chunks.items() for part in (chunk, n % chunk)}
                own = -(-length // mesh.size(i))
                first = min(coordinate[i] * own, length)
                start, length = start + first, min(own, length - first)
        spans.append(Span(start, length, size, step or size))
    return tuple(spans)


def shard_of(p: Tensor, ranks: Ranks) -> Shard | None:
    """The part of ``p`` that this rank has; None if it has all of it and counts it.

    Raises:
        ValueError: the kernels cannot work on such a part; the message goes on from the parameter's name.
    """
    if not ranks.groups:
        return None
    if not is_sharded(p):
        return Shard(tuple(Span(0, size, size, size) for size in p.shape), ranks.repeats(()))
    whole: DTensor = p  # type: ignore[assignment]
    if any(placement.is_partial() for placement in whole.placements):
        raise ValueError("must be sharded or replicated, got partial sums of it")
    shard = Shard(_spans(whole), ranks.repeats(_groups_of(whole)))
    local = local_of(p)
    if tuple(local.shape) != tuple(span.length for span in shard.spans):
        raise ValueError(
            f"must be cut as torch.chunk does, got {tuple(local.shape)} on this rank of {tuple(p.shape)} as {whole.placements}"
        )
    shard.places()
    return shard


def _groups_of(p: DTensor) -> list[Any]:
    """The process groups over which it is sharded."""
    mesh = p.device_mesh
    return [mesh.get_group(i) for i, placement in enumerate(p.placements) if not placement.is_replicate() and mesh.size(i) > 1]


def _all_groups_of(p: DTensor) -> list[Any]:
    """The process groups of its mesh."""
    mesh = p.device_mesh
    return [mesh.get_group(i) for i in range(mesh.ndim) if mesh.size(i) > 1]


def _add_new(groups: list[Any], more: Iterable[Any]) -> None:
    """Add those of other members than any of ``groups`` has."""
    for group in more:
        if _members(group) not in map(_members, groups):
            groups.append(group)


def _members(group: Any) -> list[int]:
    """What tells groups apart: meshes that are equal may have groups of their own, and torch takes one such mesh for the other."""
    return torch.distributed.get_process_group_ranks(group)


class Ranks:
    """The ranks over which the weights of one optimizer are shared out: process groups, one for each mesh dimension that shards any.

    Sums go over one group after the other, so HSDP replicas never talk to each other.

    Args:
        params: of the optimizer, in its order, which is the same on every rank.

    Attributes:
        groups: the process groups.
        everyone: the same and those of replicas, for what all ranks must do alike.
        device: where these tell each other something.
    """

    def __init__(self, params: Iterable[Tensor]) -> None:
        self.groups: list[Any] = []
        self.everyone: list[Any] = []
        self.device = torch.device("cpu")
        for p in params:
            if is_sharded(p):
                _add_new(self.groups, _groups_of(p))  # type: ignore[arg-type]
                _add_new(self.everyone, _all_groups_of(p))  # type: ignore[arg-type]
                self.device = torch.device(p.device_mesh.device_type) if p.is_meta else p.device  # type: ignore[attr-defined]

    def repeats(self, sharded: Sequence[Any]) -> bool:
        """Whether what is sharded over some of the groups only is counted by another rank."""
        own = [_members(group) for group in sharded]
        others = (group for group in self.groups if _members(group) not in own)
        return any(torch.distributed.get_rank(group) for group in others)

    def add(self, x: Tensor) -> None:
        """Sum ``x`` over the ranks, in place."""
        for group in self.groups if x.numel() else ():
            torch.distributed.all_reduce(x, group=group)

    def added(self, counts: Sequence[int], device: torch.device) -> list[int]:
        """Counts of this rank, summed over the ranks."""
        if not self.groups or not counts:
            return list(counts)
        total = torch.tensor(counts, dtype=torch.int64, device=device)
        self.add(total)
        return [int(count) for count in total.tolist()]

    def anywhere(self, found_inf: Any) -> Any:
        """A GradScaler's ``found_inf``, which is that of this rank's gradients, for all ranks: all skip a step or none does."""
        if not self.groups or not isinstance(found_inf, Tensor):
            return found_inf
        found = found_inf.clone()
        self.maximum(found)
        return found

    def maximum(self, x: Tensor) -> None:
        """Maximum of ``x`` over the ranks, in place."""
        for group in self.groups:
            torch.distributed.all_reduce(x, torch.distributed.ReduceOp.MAX, group=group)

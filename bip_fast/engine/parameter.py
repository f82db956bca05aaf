"""What is known of a parameter: everything that was decided about it is in one record, `Parameter`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from ..reference import Blocks
from .layers import Layer
from .native import kernels
from .patterns import NofM
from .report import Decision
from .shards import Shard, Span, local_of

__all__ = ["Parameter", "Seen", "matrix_shape"]


@dataclass(frozen=True, eq=False)
class Parameter:
    """One parameter of the optimizer. The record grows in three stages, each of which returns a fuller copy.

    A parameter may hold several matrices (`layers`). Units, budgets and the kernels know single ones: each has a record of its own in
    `parts`, made of this one.

    Args:
        tensor: the parameter itself.

        name: (seen, in `param_groups`) for errors and reports; "" until it is decided if it came without one.
        layer: what a pattern asks about the layer of this weight.
        dense: the reason why it is not pruned; None: it is pruned, or so far nothing speaks against it.
        ends: reasons why its units must stay, by kind of pattern: filters of the model's last layer, input channels of its first.

        group: (decided, in `decide`) number of its parameter group.
        pattern: that of the group.
        shape, stride, dtype: those of the tensor when this was decided; of what this rank has, if it is sharded.
        whole: the shape over all ranks.
        shard: what this rank has of it; None: all, and no other rank counts it.
        split: what the ranks do to its matrices, if it has several: "cut" them, so that `parts` are what this rank has of each; or "mixed",
            they cut where the flat arrays cannot, and all entries count as one matrix; None: each rank has all of them.
        places: of its entries, or of its units if it is in a set, among those of the whole matrix (`Shard.places`).
        division: how the entries of each of its matrices form units; None: every entry is one, or the parameter is dense.
        whole_division: of a sharded parameter whose `division` is in units of several weights: that over all ranks.
        unit_set: number of the set to which units of its first matrix belong, together with those of coupled parameters; -1: none. Those of
            the next matrix belong to the next set.

        start: (placed, in `arena`) its first entry in the flat arrays.
        row: the row of its first matrix in the kernels' table of tensors.
        offset: (in `parts`) entries of the tensor before this matrix.
    """

    tensor: Tensor
    name: str = ""
    layer: Layer = field(default_factory=Layer)
    dense: str | None = None
    ends: Mapping[str, str] = field(default_factory=dict)
    group: int = -1
    pattern: str = ""
    shape: torch.Size = field(default_factory=torch.Size)
    stride: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32
    whole: torch.Size = field(default_factory=torch.Size)
    shard: Shard | None = None
    split: str | None = None
    places: tuple[int, int, int] = (0, 0, 0)
    whole_division: Blocks | None = None
    division: Blocks | NofM | None = None
    unit_set: int = -1
    start: int = -1
    row: int = -1
    offset: int = 0

    @property
    def numel(self) -> int:
        return self.shape.numel()

    @property
    def total(self) -> int:
        """Entries over all ranks."""
        return self.whole.numel()

    @property
    def local(self) -> Tensor:
        """The tensor that the kernels see: the parameter, or what this rank has of it."""
        return local_of(self.tensor)

    @property
    def elsewhere(self) -> bool:
        """Another rank has the same entries and counts them."""
        return self.shard is not None and self.shard.elsewhere

    @property
    def pruned(self) -> bool:
        """It has scores, of its own or shared with others."""
        return self.dense is None

    @property
    def masked(self) -> bool:
        """It has a mask: pruned, or a vector whose entries go with the filters of a layer."""
        return self.pruned or self.unit_set >= 0

    @property
    def scored(self) -> bool:
        """Every entry has a score of its own."""
        return self.pruned and self.unit_set < 0

    @property
    def has_theta(self) -> bool:
        """False for a dense fp32 parameter, which is its own theta."""
        return self.masked or self.dtype != torch.float32

    # --- matrices ---

    @property
    def matrices(self) -> int:
        """How many there are; a dense parameter is one."""
        return self.layer.matrices if self.masked else 1

    @property
    def matrix_shape(self) -> torch.Size:
        return matrix_shape(self.shape, self.layer) if self.masked else self.shape

    @property
    def room(self) -> int:
        """Entries of the flat arrays that it takes."""
        align = kernels().ALIGN
        return -(-self.numel // align) * align if self.split == "cut" else self.matrices * self.pitch

    @property
    def words(self) -> int:
        """Mask words, up to the last that has an entry."""
        if self.split == "cut":  # one part behind the other
            return -(-self.numel // 32)
        return (self.matrices - 1) * self.pitch // 32 + -(-self.parts[0].numel // 32)

    @property
    def pitch(self) -> int:
        """Entries of the flat arrays from one matrix to the next: each begins where tensors may."""
        return -(-self.matrix_shape.numel() // kernels().ALIGN) * kernels().ALIGN

    @property
    def place(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shape and stride in the flat arrays: those of the parameter, or (matrices, *matrix) where there is room between matrices."""
        if self.split == "cut" or self.matrices == 1 or self.pitch == self.matrix_shape.numel():
            return self.shape, self.stride
        return (self.matrices, *self.matrix_shape), (self.pitch, *self.stride[len(self.stride) - len(self.matrix_shape) :])

    @cached_property
    def parts(self) -> tuple[Parameter, ...]:
        """Records of the single matrices."""
        if self.matrices == 1 and not (self.masked and self.layer.experts):
            return (self,)
        if self.split == "cut":
            return tuple(self._cut_parts())
        shape = self.matrix_shape
        return tuple(
            replace(
                self,
                name=f"{self.name}[{i}]",
                layer=self.layer._replace(matrices=1, experts=False),
                shape=shape,
                whole=shape,
                stride=self.stride[len(self.stride) - len(shape) :],
                unit_set=self.unit_set + i if self.unit_set >= 0 else -1,
                start=self.start + i * self.pitch,
                row=self.row + i,
                offset=i * shape.numel(),
            )
            for i in range(self.matrices)
        )

    def _cut_parts(self) -> Iterator[Parameter]:
        """What this rank has of each matrix, which may be nothing: all its entries, one part behind the other."""
        assert self.shard is not None
        rows, *others = self.shard.spans
        size = 1 if self.layer.experts else rows.size // self.layer.matrices  # of a matrix, along dimension 0
        offset = 0
        for i in range(self.matrices):
            first, last = (min(max(place, rows.start), rows.start + rows.length) for place in (i * size, (i + 1) * size))
            spans = [Span(max(first - i * size, 0), last - first, size, 1), *others]
            if self.layer.experts:
                spans = others if last > first else [others[0]._replace(length=0), *others[1:]]
            shard = Shard(tuple(spans), self.elsewhere)
            part = replace(
                self,
                name=f"{self.name}[{i}]",
                layer=self.layer._replace(matrices=1, experts=False),
                split=None,
                shape=torch.Size(span.length for span in spans),
                whole=shard.whole,
                stride=self.stride[len(self.stride) - len(spans) :],
                shard=shard,
                places=shard.places(),
                start=self.start + offset,
                row=self.row + i,
                offset=offset,
            )
            offset += part.numel
            yield part


@dataclass(frozen=True)
class Seen:
    """What the optimizer was told about parameters, besides their groups.

    Args:
        parameters: what is known of each; a parameter that is not in it came without a name, and nothing is known.
        coupled: weights whose filters are kept or dropped together, and the vectors that belong to these filters, as the user says.
        biases: (weight, bias) of every layer that no list in ``coupled`` names.
        left_out: decisions on parameters of a Module that are not in any group.
    """

    parameters: dict[Tensor, Parameter] = field(default_factory=dict)
    coupled: Sequence[Sequence[Tensor]] = ()
    biases: Sequence[tuple[Tensor, Tensor]] = ()
    left_out: Sequence[Decision] = ()

    def of(self, p: Tensor) -> Parameter:
        return self.parameters.get(p) or Parameter(p)

    def updated(self, parameters: Iterable[Parameter]) -> Seen:
        """A copy in which these records replace those of the same tensors."""
        return replace(self, parameters=self.parameters | {param.tensor: param for param in parameters})


def matrix_shape(shape: torch.Size, layer: Layer) -> torch.Size:
    """Of one of the matrices of a parameter."""
    return shape[1:] if layer.experts else torch.Size((shape[0] // layer.matrices, *shape[1:]))

"""Which parameters are pruned, and why the others are not. Everything that is decided about a parameter is in one record, `Parameter`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from ..reference import Blocks
from .layers import Layer
from .native import DTYPES, is_ordinary, kernels
from .patterns import SINGLE, NofM, Refused, memory_order, parse
from .report import Decision
from .shards import Ranks, Shard, local_of, shard_of, units_of

__all__ = ["Parameter", "Seen", "decide", "frozen", "would_prune"]


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
        return _matrix_shape(self.shape, self.layer) if self.masked else self.shape

    @property
    def pitch(self) -> int:
        """Entries of the flat arrays from one matrix to the next: each begins where tensors may."""
        return -(-self.matrix_shape.numel() // kernels().ALIGN) * kernels().ALIGN

    @property
    def place(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shape and stride in the flat arrays: those of the parameter, or (matrices, *matrix) where there is room between matrices."""
        if self.matrices == 1 or self.pitch == self.matrix_shape.numel():
            return self.shape, self.stride
        return (self.matrices, *self.matrix_shape), (self.pitch, *self.stride[len(self.stride) - len(self.matrix_shape) :])

    @cached_property
    def parts(self) -> tuple[Parameter, ...]:
        """Records of the single matrices."""
        if self.matrices == 1 and not (self.masked and self.layer.experts):
            return (self,)
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


def _matrix_shape(shape: torch.Size, layer: Layer) -> torch.Size:
    """Of one of the matrices of a parameter."""
    return shape[1:] if layer.experts else torch.Size((shape[0] // layer.matrices, *shape[1:]))


def frozen(p: Tensor) -> str | None:
    """The reason why a parameter that does not learn stays dense; None if it learns."""
    return "it is frozen" if p.is_leaf and not p.requires_grad else None


# --- the rule ------------------------------------------------------------------------------------------------------------------------


def _divided(param: Parameter, group: Mapping[str, Any]) -> Blocks | NofM | None:
    """How the entries of a pruned parameter form units.

    Raises:
        Refused: it is not pruned; the message is the reason.
    """
    if param.dense is not None:
        raise Refused(param.dense)
    if not group["prune"]:
        raise Refused("its parameter group is not pruned")
    if param.tensor.dim() < 2:
        raise Refused("it has fewer than two dimensions")
    pattern = parse(group["pattern"])
    if pattern.kind in param.ends:
        raise Refused(param.ends[pattern.kind])
    shape, stride, layer = param.tensor.shape, param.tensor.stride(), param.layer
    if layer.matrices == 1 and not layer.experts:
        return pattern.divide(shape, stride, layer)
    if not param.tensor.numel():
        raise Refused("it has no entries")
    if shape[0] % layer.matrices:
        raise Refused(f"its first dimension of {shape[0]} does not divide into {layer.matrices} matrices")
    if memory_order(shape, stride)[0] != 0:
        raise Refused("its matrices do not lie behind each other in memory")
    one = _matrix_shape(shape, layer)
    return pattern.divide(one, stride[len(stride) - len(one) :], layer)


def would_prune(param: Parameter, group: Mapping[str, Any]) -> bool:
    """Whether a parameter is pruned in a group: two or more dimensions, and nothing that speaks against it."""
    try:
        _divided(param, group)
    except Refused:
        return False
    return True


def decide(param_groups: Sequence[Mapping[str, Any]], seen: Seen) -> tuple[list[Parameter], tuple[Decision, ...], Ranks]:
    """Decide about all parameters of the groups.

    Returns:
        a record for every parameter, each once, in the order of the groups; for reports what became of those of two or more dimensions; and
        the ranks over which the weights are shared out.

    Raises:
        ValueError: the kernels cannot work on a parameter, or coupled parameters do not fit each other; the message names them.
    """
    given = [(number, group, p) for number, group in enumerate(param_groups) for p in group["params"]]
    ranks = Ranks(p for _, _, p in given)
    decided: dict[Tensor, Parameter] = {}
    for position, (number, group, p) in enumerate(given):
        param = seen.of(p)
        name = param.name or f"parameter {position} of shape {'?' if is_lazy(p) else tuple(p.shape)}"
        local = local_of(p)
        _check_param(local, name, local_of(given[0][2]).device)
        if p in decided:
            continue
        param = replace(param, name=name, group=number, pattern=str(group["pattern"]), whole=p.shape, dtype=p.dtype)
        param = _sharded(replace(param, shape=local.shape, stride=local.stride()), group, ranks)
        try:
            decided[p] = replace(param, division=_divided(param, group))
        except Refused as refused:
            decided[p] = replace(param, dense=str(refused))
    _check_apart(decided.values())
    _check_effect(decided, seen)
    outliving = _join_units(decided, seen)
    if ranks.groups:
        decided = {p: _placed(param) for p, param in decided.items()}
        _check_sets(decided.values())
    decisions = [
        Decision(param.name, tuple(param.whole), param.pattern if param.pruned else None, param.dense)
        for p, param in decided.items()
        if p.dim() >= 2
    ]
    staying = [Decision(seen.of(p).name, tuple(p.shape), None, "it is frozen, and outlives the filters it belongs to") for p in outliving]
    return list(decided.values()), (*decisions, *seen.left_out, *staying), ranks


# --- what this rank has ------------------------------------------------------------------------------------------------------------------


def _sharded(param: Parameter, group: Mapping[str, Any], ranks: Ranks) -> Parameter:
    """With what this rank has of it; ValueError if the kernels cannot work on that."""
    try:
        shard = shard_of(param.tensor, ranks)
    except ValueError as error:
        raise ValueError(f"{param.name} {error}") from error
    layer = param.layer
    if param.shape != param.whole and (layer.matrices > 1 or layer.experts):
        if group["pattern"] != SINGLE or group["scope"] != "global":
            raise ValueError(
                f"{param.name} holds several matrices, and is sharded over ranks: it must have pattern {SINGLE!r} and scope 'global', got "
                f"{group['pattern']!r} and {group['scope']!r}"
            )
        layer = layer._replace(matrices=1, experts=False)  # its entries compete in the same order, wherever the ranks cut
    return replace(param, shard=shard, layer=layer)


def _placed(param: Parameter) -> Parameter:
    """With the units that this rank has, and their places among all; ValueError where units are split over the ranks."""
    if param.shard is None or not param.masked:
        return param
    if param.shape == param.whole:  # repeated on every rank
        return replace(param, whole_division=param.division if isinstance(param.division, Blocks) else None)
    try:
        if isinstance(param.division, Blocks):
            own, places = units_of(param.shard, param.division)
            return replace(param, division=own, places=places, whole_division=param.division)
        if isinstance(param.division, NofM):
            units_of(param.shard, Blocks(param.whole[0], param.whole[1:].numel(), 1, param.division.of))
    except ValueError as error:
        raise ValueError(f"{param.name} cannot have pattern {param.pattern!r} as it is sharded, {error}") from error
    return replace(param, places=param.shard.places())


def _check_sets(decided: Iterable[Parameter]) -> None:
    """ValueError unless a rank has the same units of all parameters of a set."""
    first: dict[int, Parameter] = {}
    for param in (param for param in decided if param.unit_set >= 0):
        other = first.setdefault(param.unit_set, param)
        if (param.places, _units_of(param), param.elsewhere) != (other.places, _units_of(other), other.elsewhere):
            raise ValueError(f"{param.name} and {other.name} share their filters and must be sharded alike, along these")


# --- units of several parameters -----------------------------------------------------------------------------------------------------


def _join_units(decided: dict[Tensor, Parameter], seen: Seen) -> list[Tensor]:
    """Give every set of units a number, in place: one set for coupled parameters and the vectors that follow their filters.

    Returns:
        vectors that should follow, but are frozen.
    """
    count, outliving = 0, []
    for tensors in [*seen.coupled, *seen.biases]:
        weights = [decided[p] for p in tensors if p in decided and p.dim() >= 2]
        structured = [param for param in weights if param.pruned and param.pattern == "filter"]
        if not structured:
            continue
        apart = next((f"{param.name}, which stays dense: {param.dense}" for param in weights if not param.pruned), None)
        if any(p not in decided and p.dim() >= 2 for p in tensors):
            apart = "a layer that is frozen"
        if apart is not None:  # one of them must stay, so none can be removed and pruning them would win nothing
            for param in structured:
                decided[param.tensor] = replace(param, dense=f"its filters are coupled with those of {apart}", division=None)
            continue
        _check_coupled(weights)
        units, matrices = _units_of(weights[0]), weights[0].matrices
        for param in weights:
            decided[param.tensor] = replace(param, unit_set=count)
        for p in tensors:
            if p.dim() < 2 and (p not in decided or seen.of(p).dense is not None):
                outliving.append(p)
            elif p.dim() < 2:
                if p.numel() != units * matrices:
                    own = f"{weights[0].name} of {units * matrices} filters"
                    raise ValueError(f"coupled has {decided[p].name} of {p.numel()} entries beside {own}")
                stack = Layer(matrices=matrices)  # it has a stretch for every matrix
                decided[p] = replace(decided[p], layer=stack, division=Blocks(1, units, 1, 1), unit_set=count)
        count += matrices
    for p, param in decided.items():
        if param.pruned and isinstance(param.division, Blocks) and param.unit_set < 0:
            decided[p] = replace(param, unit_set=count)
            count += param.matrices
    return outliving


def _units_of(param: Parameter) -> int:
    return param.division.units if isinstance(param.division, Blocks) else -1


def _check_coupled(weights: Sequence[Parameter]) -> None:
    first = weights[0]
    for param in weights:
        if param.pattern != "filter" or param.group != first.group:
            raise ValueError(f'coupled weights must be in one parameter group of pattern "filter", got {first.name} and {param.name}')
        found = [(own.matrices, _units_of(own)) for own in (first, param)]
        if found[0] != found[1]:
            counts = [f"{units}" if matrices == 1 else f"{matrices} times {units}" for matrices, units in found]
            raise ValueError(
                f"coupled weights must have the same number of filters, got {first.name} with {counts[0]} and {param.name} with {counts[1]}"
            )


def _check_effect(decided: Mapping[Tensor, Parameter], seen: Seen) -> None:
    """ValueError when lists couple pruned weights, but none of these by filters. One list may hold weights of other patterns, as
    ``overrides`` can make them, if another list has filters."""
    pruned = [decided[p] for tensors in seen.coupled for p in tensors if p in decided and decided[p].pruned]
    if pruned and all(param.pattern != "filter" for param in pruned):
        raise ValueError(f'coupled must hold weights of pattern "filter", got {pruned[0].name} of pattern {pruned[0].pattern!r}')


# --- what the kernels can work on ----------------------------------------------------------------------------------------------------


def _fills_its_memory(p: Tensor) -> bool:
    """True when the entries fill one stretch of memory, in whatever order of dimensions."""
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(p.stride(), p.shape, strict=True) if size != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _check_param(p: Tensor, name: str, device: torch.device) -> None:
    """Raise ValueError unless the kernels can work on ``p`` where it lies."""
    if is_lazy(p):
        raise ValueError(f"{name} has no shape yet; run the model once on an example before you make the optimizer")
    if not is_ordinary(p):
        raise ValueError(f"{name} must be an ordinary tensor or a DTensor, got {type(p).__name__}")
    if p.layout != torch.strided or p.dtype not in DTYPES:
        raise ValueError(f"{name} must be a dense tensor of float32, bfloat16 or float16, got {p.layout} of {p.dtype}")
    if p.device != device:
        raise ValueError(f"all parameters must be on one device, got {name} on {p.device} and others on {device}")
    if p.is_inference():
        raise ValueError(f"{name} was made in inference mode and cannot be trained; make the model outside of it")
    if p.numel() and not _fills_its_memory(p):
        raise ValueError(f"{name} must fill its memory densely, got shape {tuple(p.shape)} with strides {p.stride()}; use .contiguous()")


def _check_apart(decided: Iterable[Parameter]) -> None:
    """ValueError when two parameters share memory: each would be pruned as if the other did not exist."""
    placed = sorted((x.data_ptr(), x.data_ptr() + x.numel() * x.element_size(), param.name) for param in decided for x in [param.local])
    placed = [place for place in placed if place[0] < place[1] and place[0]]
    for (_, end, first), (begin, _, second) in pairwise(placed):
        if begin < end:
            raise ValueError(f"{first} and {second} share memory; tie them as one parameter (`a.weight = b.weight`)")

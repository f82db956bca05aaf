"""Scores of units. A filter, channel or block has one score for all its weights; the same filters of coupled layers share one.

The weights themselves are in `arena`, where every entry has its own mask bit. The kernels keep the masks of units and of entries equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import reference
from ..reference import Blocks
from .native import kernels
from .parameter import Parameter

__all__ = ["UnitScores", "UnitSet", "blocks_of", "ones_in", "pack_mask", "unpack_mask"]


def unpack_mask(words: Tensor, numel: int) -> Tensor:
    """Bool tensor [numel] of mask words: bit i%32 of word i/32."""
    bits = torch.arange(32, dtype=torch.int32, device=words.device)
    return (words.unsqueeze(1).bitwise_right_shift(bits) & 1).flatten()[:numel].bool()


def pack_mask(mask: Tensor) -> Tensor:
    """Mask words, int32 [ceil(numel/32)], of a flat bool tensor; bits past its end are 0."""
    padded = torch.nn.functional.pad(mask, (0, -mask.numel() % 32)).view(-1, 32).to(torch.int32)
    bits = torch.arange(32, dtype=torch.int32, device=mask.device)
    return padded.bitwise_left_shift(bits).sum(1, dtype=torch.int64).to(torch.int32)


def ones_in(words: Tensor) -> Tensor:
    """How many bits are set in each of some mask words: uint8, [4 * words], one number a byte."""
    x = words - (words.bitwise_right_shift(1) & 0x55555555)  # pairs of bits, then fours, then bytes
    x = (x & 0x33333333) + (x.bitwise_right_shift(2) & 0x33333333)
    return ((x + x.bitwise_right_shift(4)) & 0x0F0F0F0F).view(torch.uint8)


def blocks_of(param: Parameter) -> Blocks:
    """The units of a parameter that is in a set."""
    assert isinstance(param.division, Blocks)
    return param.division


@dataclass(frozen=True, eq=False)
class UnitSet:
    """Units that are kept or dropped over all parameters of a set: ``numel`` of them.

    Args:
        parameters: first those whose weights make the scores, then the vectors that follow.
        row: its row in the kernels' table of tensors, which has one for the whole set.
        start: its first unit in the arrays of `UnitScores`.
    """

    parameters: tuple[Parameter, ...]
    row: int
    start: int

    @property
    def numel(self) -> int:
        return blocks_of(self.parameters[0]).units

    @property
    def total(self) -> int:
        """Units over all ranks."""
        whole = self.parameters[0].whole_division
        return self.numel if whole is None else whole.units

    @property
    def whole(self) -> torch.Size:
        return self.parameters[0].whole

    @property
    def places(self) -> tuple[int, int, int]:
        return self.parameters[0].places

    @property
    def elsewhere(self) -> bool:
        return self.parameters[0].elsewhere

    @property
    def group(self) -> int:
        return self.parameters[0].group

    @property
    def pattern(self) -> str:
        return self.parameters[0].pattern

    @property
    def name(self) -> str:
        return self.parameters[0].name

    @property
    def scoring(self) -> list[Parameter]:
        """The parameters whose weights make the scores."""
        return [param for param in self.parameters if param.pruned]


class UnitScores:
    """Scores, masks and score momenta of the units of one optimizer.

    Args:
        sets: the parameters of every set, in the order of their places.
        first_row: of the sets in the kernels' table of tensors.
        device: where they are.
    """

    def __init__(self, sets: Sequence[Sequence[Parameter]], first_row: int, device: torch.device) -> None:
        align = kernels().ALIGN
        self.sets: list[UnitSet] = []
        start = 0
        for number, parameters in enumerate(sets):
            self.sets.append(UnitSet(tuple(sorted(parameters, key=lambda param: not param.pruned)), first_row + number, start))
            start += -(-self.sets[-1].numel // align) * align
        self._scores = torch.zeros(start, dtype=torch.float32, device=device)
        self._mask = torch.zeros(start // 32, dtype=torch.int32, device=device)
        self._score_momentum: Tensor | None = None

    def ensure_score_momentum(self) -> None:
        """Make the array of score momenta, zero, if there is none yet."""
        if self._score_momentum is None:
            self._score_momentum = torch.zeros_like(self._scores)

    def state_of(self, number: int, count: int = 1) -> dict[str, Tensor]:
        """Views ``scores``, ``mask`` (words) and, if there is one, ``score_momentum`` of a set. Of ``count`` sets of one size that follow
        each other: scores and momenta, [count, numel]."""
        first = self.sets[number]
        arrays = {"scores": self._scores}
        if self._score_momentum is not None:
            arrays["score_momentum"] = self._score_momentum
        if count == 1:
            words = self._mask[first.start // 32 :][: -(-first.numel // 32)]
            return {name: flat[first.start :][: first.numel] for name, flat in arrays.items()} | {"mask": words}
        pitch = self.sets[number + 1].start - first.start
        return {name: flat.as_strided((count, first.numel), (pitch, 1), first.start) for name, flat in arrays.items()}

    def kept(self, number: int) -> int:
        """How many units of a set are kept, of those that this rank has. Waits for the device."""
        return int(unpack_mask(self.state_of(number)["mask"], self.sets[number].numel).sum())

    def start(self, number: int, values: Sequence[Tensor]) -> None:
        """Start scores of a set: means of ``values``, in memory order of each of its `scoring` parameters."""
        blocks = [blocks_of(param) for param in self.sets[number].scoring]
        if not self.sets[number].numel:
            return
        self.state_of(number)["scores"].copy_(reference.unit_means(values, blocks))

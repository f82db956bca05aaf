"""The flat storage: where each parameter's state lives, views of it, and whether someone else wrote into the parameters.

theta, moments, scores and mask of all parameters lie in one array each. A parameter has the same offset in all of them, a multiple of
`ALIGN` entries; parameters with a score for every entry come first, then those with a mask only (their scores are those of units,
`units`), then dense ones that need an fp32 theta, then dense fp32 ones, whose theta is the parameter itself. So each array is as long as
its last user needs. Parameters stay in their own storage, so files of the model keep their size, and entry i of a place is entry i of the
parameter's memory, whatever its layout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..reference import Blocks
from .coverage import Parameter
from .native import kernels
from .rules import Rule
from .units import UnitScores, UnitSet, pack_mask, unpack_mask

__all__ = ["Arena", "in_memory_order"]


def in_memory_order(p: Tensor) -> Tensor:
    """The memory of a dense tensor as a flat view."""
    return p.detach().as_strided((p.numel(),), (1,), p.storage_offset())


class Arena:
    """State of all parameters of one optimizer, on one device.

    Args:
        decided: every parameter once; pruned ones compete in this order.
        device: that of all parameters.
        rule: of the lower level; says which moments there are.

    Attributes:
        parameters: the records with their places, in the order of the places.
        rivals: what competes for places in the mask, in the order that ties follow: parameters whose entries compete, then sets of units.
    """

    def __init__(self, decided: Sequence[Parameter], device: torch.device, rule: Rule) -> None:
        align = kernels().ALIGN
        num_sets = 1 + max((param.unit_set for param in decided), default=-1)
        self.device, self.rule = device, rule
        self.parameters: list[Parameter] = []
        start = scored_end = masked_end = theta_end = 0
        for param in sorted(decided, key=lambda param: 0 if param.scored else 1 if param.masked else 2 if param.has_theta else 3):
            row = len(self.parameters) + (0 if param.scored else num_sets)  # the rows of unit sets stand between
            self.parameters.append(replace(param, start=start, row=row))
            start += -(-param.numel // align) * align
            scored_end = start if param.scored else scored_end
            masked_end = start if param.masked else masked_end
            theta_end = start if param.has_theta else theta_end
        self.place_of = {param.tensor: param for param in self.parameters}
        self._number = {param.tensor: number for number, param in enumerate(self.parameters)}
        self.pruned = [self.place_of[param.tensor] for param in decided if param.pruned]
        self.num_scored = sum(param.scored for param in self.parameters)
        self._moments = [torch.zeros(start, dtype=torch.float32, device=device) for _ in range(len(rule.moments) + rule.gradient)]
        self._steps = torch.zeros(len(self.parameters) if rule.counts else 0, dtype=torch.int64, device=device)
        self.theta = torch.zeros(theta_end, dtype=torch.float32, device=device)
        self.scores = torch.zeros(scored_end, dtype=torch.float32, device=device)
        self.mask = torch.zeros(masked_end // 32, dtype=torch.int32, device=device)
        self.score_momentum: Tensor | None = None  # made when a mask_momentum asks for it
        self.num_nonfinite = torch.zeros((), dtype=torch.int64, device=device)
        sets = [[param for param in self.parameters if param.unit_set == number] for number in range(num_sets)]
        self.units = UnitScores(sets, self.num_scored, device)
        singles = [param for param in self.parameters if param.scored and param.division is None]  # N:M entries compete in place
        self.rivals: list[Parameter | UnitSet] = [*singles, *self.units.sets]
        self.record()

    def masked(self, p: Tensor) -> Parameter:
        """The record of a parameter that has a mask; TypeError or ValueError if ``p`` is none."""
        if not isinstance(p, Tensor):
            raise TypeError(f"p must be a parameter, got {type(p).__name__}")
        param = self.place_of.get(p)
        if param is None or not param.masked:
            what = param.name if param else f"a parameter of shape {tuple(p.shape)}, which this optimizer does not have"
            raise ValueError(f"p must be a parameter that is pruned, got {what}")
        return param

    # --- views -----------------------------------------------------------------------------------------------------------------------

    def _view(self, flat: Tensor, param: Parameter) -> Tensor:
        return flat.as_strided(param.shape, param.stride, param.start)

    def words(self, param: Parameter) -> Tensor:
        """Mask words of a pruned parameter, int32."""
        return self.mask[param.start // 32 :][: -(-param.numel // 32)]

    def theta_of(self, param: Parameter) -> Tensor:
        """View of theta, shaped like the parameter: of its own, or the parameter itself where that is its theta."""
        return self._view(self.theta, param) if param.has_theta else param.tensor.detach()

    def moments_of(self, param: Parameter) -> list[Tensor]:
        """Views of the moments that the rule has, or of the array for ``m*g``."""
        return [self._view(flat, param) for flat in self._moments]

    def steps_of(self, param: Parameter) -> Tensor | None:
        """Number of steps that the parameter has taken, int64 [], where the rule counts them."""
        return self._steps[self._number[param.tensor]] if self.rule.counts else None

    def state_of(self, param: Parameter) -> dict[str, Tensor]:
        """Views of the state, shaped like the parameter and with its strides; but ``mask`` is the words in memory order, units have a
        score each, and ``step`` is a number."""
        state = dict(zip(self.rule.moments, self.moments_of(param), strict=False))
        steps = self.steps_of(param)
        if steps is not None:
            state["step"] = steps
        if param.has_theta:
            state["theta"] = self._view(self.theta, param)
        if param.masked:
            state["mask"] = self.words(param)
        if param.scored:
            state["scores"] = self._view(self.scores, param)
            if self.score_momentum is not None:
                state["score_momentum"] = self._view(self.score_momentum, param)
        elif param.pruned:
            state = self.units.state_of(param.unit_set) | state
        return state

    def mask_of(self, param: Parameter) -> Tensor:
        """A new bool tensor shaped like the parameter, with its strides."""
        return unpack_mask(self.words(param), param.numel).as_strided(param.shape, param.stride)

    def scores_of(self, param: Parameter) -> Tensor:
        """A new tensor shaped like the parameter, with its strides: the score of every entry, or of its unit."""
        if isinstance(param.division, Blocks):
            scores = self.units.state_of(param.unit_set)["scores"]
            return reference.expand(scores, param.division).as_strided(param.shape, param.stride)
        return self.state_of(param)["scores"].clone()

    def saved_state_of(self, param: Parameter) -> dict[str, Tensor]:
        """`state_of`, with the mask words in index order (row-major), so that they do not depend on the memory layout."""
        state = self.state_of(param)
        return state | {"mask": pack_mask(self.mask_of(param).flatten())} if param.masked else state

    def kept(self) -> Tensor:
        """Number of ones in all masks."""
        return unpack_mask(self.mask, 32 * self.mask.numel()).sum()

    # --- values ----------------------------------------------------------------------------------------------------------------------

    def ensure_score_momentum(self) -> None:
        """Make the arrays of score momenta, zero, if there are none yet."""
        self.units.ensure_score_momentum()
        if self.score_momentum is None:
            self.score_momentum = torch.zeros_like(self.scores)

    def start(self, param: Parameter, score_start: str) -> None:
        """Start of BiP: theta is the parameter, momenta are 0, scores are `reference.start_scores`; those of units are made by
        `start_units`. The first projection makes the mask."""
        theta = in_memory_order(param.tensor).float()
        if param.has_theta:
            self.theta[param.start :][: param.numel] = theta
        if param.scored:
            self.scores[param.start :][: param.numel] = reference.start_scores(theta, score_start)
        if param.masked:
            param.tensor.detach().zero_()  # as the mask words are: the projection writes what it turns on

    def start_units(self, number: int, score_start: str) -> None:
        """Start scores of a set whose parameters have begun."""
        thetas = [self.theta[param.start :][: param.numel] for param in self.units.sets[number].scoring]
        self.units.start(number, [reference.start_values(theta, score_start) for theta in thetas])

    def rescore(self, param: Parameter, scores: Mapping[Tensor, Tensor]) -> None:
        """Take new scores of a parameter whose entries have one each, if there are some."""
        if param.scored and param.tensor in scores:
            self._view(self.scores, param).copy_(scores[param.tensor])

    def rescore_units(self, number: int, scores: Mapping[Tensor, Tensor]) -> None:
        """Take new scores of a set of units, each the mean over its weights, if there are some for all its `scoring` parameters."""
        scoring = self.units.sets[number].scoring
        if all(param.tensor in scores for param in scoring):
            given = [torch.empty_strided(param.shape, param.stride, device=self.device).copy_(scores[param.tensor]) for param in scoring]
            self.units.start(number, [in_memory_order(x) for x in given])

    def load(self, param: Parameter, state: dict[str, Tensor]) -> None:
        """Copy a state such as `saved_state_of` gives, from any layout, device and dtype, and rewrite z = m*theta."""
        if param.masked:
            mask = unpack_mask(state["mask"].to(self.device), param.numel).view(param.shape)
            in_order = in_memory_order(torch.empty_strided(param.shape, param.stride, dtype=torch.bool, device=self.device).copy_(mask))
            self.words(param).copy_(pack_mask(in_order))
            if isinstance(blocks := param.division, Blocks):
                units = in_order.view(blocks.rows, blocks.cols)[:: blocks.block_rows, :: blocks.block_cols]  # one entry speaks for its unit
                self.units.state_of(param.unit_set)["mask"].copy_(pack_mask(units.flatten()))
        if "score_momentum" in state:
            self.ensure_score_momentum()
        for name, view in self.state_of(param).items():
            if name in state and name != "mask":
                view.copy_(state[name])
            elif name != "mask":
                view.zero_()
        if param.has_theta:
            theta = self._view(self.theta, param)
            z = torch.where(self.mask_of(param), theta, 0.0) if param.masked else theta
            param.tensor.detach().copy_(z)

    # --- foreign writes --------------------------------------------------------------------------------------------------------------

    def _storage(self, p: Tensor) -> tuple[Any, ...]:
        return p.data_ptr(), p.dtype, p.device, p.shape, p.stride()

    def record(self) -> None:
        """Remember where the parameters are, and that their present contents are ours."""
        self._storages = [self._storage(param.tensor) for param in self.parameters]
        self._versions = [param.tensor._version for param in self.parameters]

    def mark_written(self) -> None:
        """Tell autograd that the kernels wrote the parameters, as an in-place operation of torch would."""
        for param in self.parameters:
            torch.autograd.graph.increment_version(param.tensor)
        self._versions = [param.tensor._version for param in self.parameters]

    def check_place(self) -> None:
        """RuntimeError when a parameter has moved."""
        for param, storage in zip(self.parameters, self._storages, strict=True):
            p = param.tensor
            if self._storage(p) != storage:
                if self._storage(p)[1:] == storage[1:]:
                    raise RuntimeError(
                        f"the memory of {param.name} was replaced by someone else (.data = ..., share_memory_(), a new load with "
                        "assign). Do that before you make FastBiP, or make a new FastBiP and load the state_dict() of this one"
                    )
                now = f"{p.dtype} of shape {tuple(p.shape)} and strides {p.stride()} on {p.device}"
                before = f"{param.dtype} of shape {tuple(param.shape)} and strides {param.stride} on {self.device}"
                raise RuntimeError(
                    f"{param.name} was moved by someone else: it is now {now}, was {before}. Move or convert the model "
                    "before you make FastBiP, or make a new FastBiP and load the state_dict() of this one"
                )

    def check_untouched(self) -> None:
        """RuntimeError when a parameter has moved, or when someone else wrote into one that has a theta of its own."""
        self.check_place()
        for param, version in zip(self.parameters, self._versions, strict=True):
            if param.has_theta and param.tensor._version != version:
                raise RuntimeError(
                    f"{param.name} was written by someone else since the last step; FastBiP keeps its weight in weight_of() and "
                    "would overwrite the new value. Load or change weights before you make FastBiP; to go on from a checkpoint, load the "
                    "model first, then call load_state_dict() of the optimizer again"
                )

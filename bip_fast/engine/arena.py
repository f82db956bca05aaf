"""The flat storage: where each parameter's state lives, views of it, and whether someone else wrote into the parameters.

theta, moments, scores and mask of all parameters lie in one array each. A parameter has the same offset in all of them, a multiple of
`ALIGN` entries; parameters with a score for every entry come first, then those with a mask only (their scores are those of units,
`units`), then dense ones that need an fp32 theta, then dense fp32 ones, whose theta is the parameter itself. So each array is as long as
its last user needs. Each matrix of a parameter that has several (`layers`) begins at a multiple of `ALIGN` too. Parameters stay in their
own storage, so files of the model keep their size, and entry i of a place is entry i of the parameter's (or matrix's) memory, whatever its
layout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..reference import Blocks
from .native import kernels
from .parameter import Parameter
from .rules import Rule
from .shards import Ranks, is_sharded, like, like_units, local_of
from .units import UnitScores, UnitSet, ones_in, pack_mask, unpack_mask

__all__ = ["Arena", "in_memory_order"]


def in_memory_order(p: Tensor) -> Tensor:
    """The memory of a dense tensor as a flat view."""
    return p.detach().as_strided((p.numel(),), (1,), p.storage_offset())


def _laid_out_like(p: Tensor, x: Tensor) -> Tensor:
    """``x``, which has the shape of ``p``, with its strides and on its device."""
    return x if (x.stride(), x.device) == (p.stride(), p.device) else torch.empty_like(p, dtype=torch.float32).copy_(x)


class Arena:
    """State of all parameters of one optimizer, on one device.

    Args:
        decided: every parameter once; pruned ones compete in this order.
        device: that of all parameters.
        rule: of the lower level; says which moments there are.
        ranks: over which the parameters are shared out. Everything here is about what this rank has, but for what `mask_of`, `weight_of`,
            `scores_of`, `shared` and `kept` give.

    Attributes:
        parameters: the records with their places, in the order of the places.
        rivals: what competes for places in the mask, in the order that ties follow: matrices whose entries compete, then sets of units.
        num_rows: of the kernels' table of tensors: matrices and sets of units.
    """

    def __init__(self, decided: Sequence[Parameter], device: torch.device, rule: Rule, ranks: Ranks) -> None:
        num_sets = max((param.unit_set + param.matrices for param in decided if param.unit_set >= 0), default=0)
        self.device, self.rule, self.ranks = device, rule, ranks
        self.parameters: list[Parameter] = []
        start = scored_end = masked_end = theta_end = self.num_rows = self.num_scored = 0
        for param in sorted(decided, key=lambda param: 0 if param.scored else 1 if param.masked else 2 if param.has_theta else 3):
            row = self.num_rows + (0 if param.scored else num_sets)  # the rows of unit sets stand between
            self.parameters.append(replace(param, start=start, row=row))
            self.num_rows += param.matrices
            self.num_scored += param.matrices if param.scored else 0
            start += param.room
            scored_end = start if param.scored else scored_end
            masked_end = start if param.masked else masked_end
            theta_end = start if param.has_theta else theta_end
        self.place_of = {param.tensor: param for param in self.parameters}
        self.pruned = [self.place_of[param.tensor] for param in decided if param.pruned]
        self.num_rows += num_sets
        self._moments = [torch.zeros(start, dtype=torch.float32, device=device) for _ in range(len(rule.moments) + rule.gradient)]
        self._steps = torch.zeros(self.num_rows if rule.counts else 0, dtype=torch.int64, device=device)  # by row
        self.theta = torch.zeros(theta_end, dtype=torch.float32, device=device)
        self.scores = torch.zeros(scored_end, dtype=torch.float32, device=device)
        self.mask = torch.zeros(masked_end // 32, dtype=torch.int32, device=device)
        self.score_momentum: Tensor | None = None  # made when a mask_momentum asks for it
        self.num_nonfinite = torch.zeros((), dtype=torch.int64, device=device)
        sets: list[list[Parameter]] = [[] for _ in range(num_sets)]
        for part in (part for param in self.parameters if param.unit_set >= 0 for part in param.parts):
            sets[part.unit_set].append(part)
        self.units = UnitScores(sets, self.num_scored, device)
        # N:M entries compete in place.
        singles = [part for param in self.parameters if param.scored and param.division is None for part in param.parts]
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
        return flat.as_strided(*param.place, param.start)

    def _gathered(self, flat: Tensor, param: Parameter) -> Tensor:
        """A copy of what a flat array has for a parameter, shaped like it, with its strides."""
        own = torch.cat([flat[part.start :][: part.numel] for part in param.parts])
        return own.as_strided(param.shape, param.stride)

    def words(self, param: Parameter) -> Tensor:
        """Mask words of a pruned parameter of one matrix, int32."""
        return self.mask[param.start // 32 :][: -(-param.numel // 32)]

    def theta_of(self, param: Parameter) -> Tensor:
        """View of theta, as those of `state_of`: of its own, or the parameter itself where that is its theta."""
        return self._view(self.theta, param) if param.has_theta else param.local.detach()

    def moments_of(self, param: Parameter) -> list[Tensor]:
        """Views of the moments that the rule has, or of the array for ``m*g``."""
        return [self._view(flat, param) for flat in self._moments]

    def steps_of(self, param: Parameter) -> Tensor | None:
        """Number of steps that the parameter has taken, int64 [], where the rule counts them: each matrix counts its own, all alike."""
        return self._steps[param.row] if self.rule.counts else None

    def state_of(self, param: Parameter) -> dict[str, Tensor]:
        """Views of the state, shaped like the parameter and with its strides; but ``mask`` is the words in memory order, of each matrix
        from a word of its own, units have a score each, and ``step`` is a number. Of stacked matrices between which the flat arrays have
        room, as their size is no multiple of `ALIGN`, the shape is (matrices, rows, columns); units of several have (matrices, units)."""
        state = dict(zip(self.rule.moments, self.moments_of(param), strict=False))
        steps = self.steps_of(param)
        if steps is not None:
            state["step"] = steps
        if param.has_theta:
            state["theta"] = self._view(self.theta, param)
        if param.masked:
            state["mask"] = self.mask[param.start // 32 :][: param.words]
        if param.scored:
            state["scores"] = self._view(self.scores, param)
            if self.score_momentum is not None:
                state["score_momentum"] = self._view(self.score_momentum, param)
        elif param.pruned:
            state = self.units.state_of(param.unit_set, param.matrices) | state
        return state

    def mask_of(self, param: Parameter) -> Tensor:
        """A new bool tensor shaped like the parameter, with its strides."""
        return like(param.tensor, self._mask_of(param))

    def _mask_of(self, param: Parameter) -> Tensor:
        own = torch.cat([unpack_mask(self.words(part), part.numel) for part in param.parts])
        return own.as_strided(param.shape, param.stride)

    def weight_of(self, param: Parameter) -> Tensor:
        """A new tensor shaped like the parameter, with its strides."""
        return like(param.tensor, self._gathered(self.theta, param))

    def scores_of(self, param: Parameter) -> Tensor:
        """A new tensor shaped like the parameter, with its strides: the score of every entry, or of its unit."""
        if isinstance(param.division, Blocks):
            scores = [self.units.state_of(part.unit_set)["scores"] for part in param.parts]
            own = torch.cat([reference.expand(x, param.division) for x in scores])
            return like(param.tensor, own.as_strided(param.shape, param.stride))
        return like(param.tensor, self._gathered(self.scores, param))

    def saved_shapes(self, param: Parameter) -> dict[str, tuple[int, ...]]:
        """Of `saved_state_of`."""
        return {name: tuple(x.shape) for name, x in self.saved_state_of(param).items()}

    def saved_state_of(self, param: Parameter) -> dict[str, Tensor]:
        """`state_of`, with the mask words in index order (row-major), so that they do not depend on the memory layout, and what has the
        entries of the parameter in its shape. Of a sharded parameter the mask is bool, shaped like it, and all are DTensors."""
        state = {name: x.reshape(param.shape) if x.shape == param.place[0] else x for name, x in self.state_of(param).items()}
        if param.masked:
            mask = self._mask_of(param)
            state["mask"] = mask if is_sharded(param.tensor) else pack_mask(mask.flatten())
        return self.shared(param, state)

    def shared(self, param: Parameter, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A state with DTensors for what the ranks share out as they do the parameter: its entries, and scores of its units."""
        if not is_sharded(param.tensor):
            return state
        units = param.whole_division or param.division  # a mesh of one rank divides nothing
        shared = {}
        for name, x in state.items():
            if x.shape == param.shape and name != "step":
                x = like(param.tensor, x)
            elif isinstance(units, Blocks) and name in ("scores", "score_momentum"):
                x = like_units(param.tensor, x, units)
            shared[name] = x
        return shared

    def total_nonfinite(self) -> int:
        """`num_nonfinite` of all ranks. Waits for the device."""
        return self.ranks.added([int(self.num_nonfinite)], self.device)[0]

    def set_nonfinite(self, total: int) -> None:
        """Go on from so many, over all ranks."""
        self.num_nonfinite.fill_(0 if self.ranks.repeats(()) else total)

    def kept(self) -> Tensor:
        """Number of ones in all masks, over all ranks."""
        kept = [self._mask_of(param).sum() for param in self.parameters if param.masked and not param.elsewhere]
        total = torch.stack(kept).sum() if kept else torch.zeros((), dtype=torch.int64, device=self.device)
        self.ranks.add(total)
        return total

    def kept_of_pruned(self) -> Tensor:
        """Number of ones in the mask of every parameter of `pruned`: int64, 0 where another rank counts them. Reads the masks alone."""
        align = kernels().ALIGN  # where every place begins and ends
        before = torch.nn.functional.pad(ones_in(self.mask).view(-1, align // 8).sum(1, dtype=torch.int64).cumsum(0), (1, 0))
        places = [(param.start // align, (param.start + param.room) // align) for param in self.pruned]
        counted = [not param.elsewhere for param in self.pruned]
        first, last = torch.tensor(places, device=self.device).unbind(1)
        return (before[last] - before[first]) * torch.tensor(counted, device=self.device)

    # --- values ----------------------------------------------------------------------------------------------------------------------

    def ensure_score_momentum(self) -> None:
        """Make the arrays of score momenta, zero, if there are none yet."""
        self.units.ensure_score_momentum()
        if self.score_momentum is None:
            self.score_momentum = torch.zeros_like(self.scores)

    def start(self, param: Parameter, score_start: str) -> None:
        """Start of BiP: theta is the parameter, momenta are 0, scores are `reference.start_scores`; those of units are made by
        `start_units`. The first projection makes the mask."""
        for part in param.parts:
            theta = in_memory_order(param.local)[part.offset :][: part.numel].float()
            if param.has_theta:
                self.theta[part.start :][: part.numel] = theta
            if param.scored:
                self.scores[part.start :][: part.numel] = reference.start_scores(theta, score_start)
        if param.masked:
            param.local.detach().zero_()  # as the mask words are: the projection writes what it turns on

    def start_units(self, number: int, score_start: str) -> None:
        """Start scores of a set whose parameters have begun."""
        thetas = [self.theta[param.start :][: param.numel] for param in self.units.sets[number].scoring]
        self.units.start(number, [reference.start_values(theta, score_start) for theta in thetas])

    def rescore(self, param: Parameter, scores: Mapping[Tensor, Tensor]) -> None:
        """Take new scores of a parameter whose entries have one each, if there are some."""
        if param.scored and param.tensor in scores:
            view = self._view(self.scores, param)
            view.copy_(self.own_part(param, scores[param.tensor]).reshape(view.shape))

    def rescore_units(self, number: int, scores: Mapping[Tensor, Tensor]) -> None:
        """Take new scores of a set of units, each the mean over its weights, if there are some for all its `scoring` parameters."""
        scoring = self.units.sets[number].scoring
        if all(param.tensor in scores for param in scoring):
            own = [self.own_part(param, scores[param.tensor]) for param in scoring]
            given = [in_memory_order(_laid_out_like(param.local, x))[param.offset :] for param, x in zip(scoring, own, strict=True)]
            self.units.start(number, [x[: param.numel].float() for x, param in zip(given, scoring, strict=True)])

    def load(self, param: Parameter, state: dict[str, Tensor]) -> None:
        """Copy a state such as `saved_state_of` gives, from any layout, device and dtype, and rewrite z = m*theta."""
        if param.masked:
            mask = self.mask_in(param, state).to(self.device)
            in_order = in_memory_order(torch.empty_strided(param.shape, param.stride, dtype=torch.bool, device=self.device).copy_(mask))
            for part in param.parts:
                own = in_order[part.offset :][: part.numel]
                self.words(part).copy_(pack_mask(own))
                if isinstance(blocks := part.division, Blocks):
                    units = own.view(blocks.rows, blocks.cols)[:: blocks.block_rows, :: blocks.block_cols]  # one entry speaks for its unit
                    self.units.state_of(part.unit_set)["mask"].copy_(pack_mask(units.flatten()))
        if "score_momentum" in state:
            self.ensure_score_momentum()
        for name, view in self.state_of(param).items():
            if name in state and name != "mask":
                view.copy_(self.own_part(param, state[name]).reshape(view.shape))
            elif name != "mask":
                view.zero_()
        if self.rule.counts:
            self._steps[param.row :][: param.matrices] = self._steps[param.row]
        if param.has_theta:
            theta = self._gathered(self.theta, param)
            z = torch.where(self._mask_of(param), theta, 0.0) if param.masked else theta
            param.local.detach().copy_(z)

    def mask_in(self, param: Parameter, state: Mapping[str, Tensor]) -> Tensor:
        """The mask of a saved state, bool, shaped like what this rank has of the parameter."""
        mask = self.own_part(param, state["mask"])
        return mask if mask.dtype == torch.bool else unpack_mask(mask, param.numel).view(param.shape)

    def own_part(self, param: Parameter, x: Tensor) -> Tensor:
        """What this rank has of a state that may be of the whole parameter, or of all its units."""
        if is_sharded(x) or param.shard is None or param.shape == param.whole:
            return local_of(x)
        if x.shape == param.whole:
            for d, span in enumerate(param.shard.spans):
                x = x.narrow(d, span.start, span.length)
        elif isinstance(param.division, Blocks) and param.whole_division is not None and x.numel() == param.whole_division.units:
            first, length, stride = param.places
            length = length or param.division.units
            rows = param.division.units // max(length, 1)
            x = x.contiguous().as_strided((rows, length), (stride, 1), first).reshape(-1)
        return x

    # --- foreign writes --------------------------------------------------------------------------------------------------------------

    def _storage(self, p: Tensor) -> tuple[Any, ...]:
        return p.data_ptr(), p.dtype, p.device, p.shape, p.stride()

    def record(self) -> None:
        """Remember where the parameters are, and that their present contents are ours."""
        self._storages = [self._storage(param.local) for param in self.parameters]
        self._versions = [param.local._version for param in self.parameters]

    def mark_written(self) -> None:
        """Tell autograd that the kernels wrote the parameters, as an in-place operation of torch would."""
        for param in self.parameters:
            torch.autograd.graph.increment_version(param.local)
        self._versions = [param.local._version for param in self.parameters]

    def check_place(self) -> None:
        """RuntimeError when a parameter has moved."""
        for param, storage in zip(self.parameters, self._storages, strict=True):
            p = param.local
            if self._storage(p) != storage:
                if self._storage(p)[1:] == storage[1:]:
                    raise RuntimeError(
                        f"the memory of {param.name} was replaced by other code (.data = ..., share_memory_(), loading with "
                        "assign=True). Do that before you make FastBiP, or make a new FastBiP and load the state_dict() of this one"
                    )
                now = f"{p.dtype} of shape {tuple(p.shape)} and strides {p.stride()} on {p.device}"
                before = f"{param.dtype} of shape {tuple(param.shape)} and strides {param.stride} on {self.device}"
                raise RuntimeError(
                    f"{param.name} was moved by other code: it is now {now}, and was {before}. Move or convert the model "
                    "before you make FastBiP, or make a new FastBiP and load the state_dict() of this one"
                )

    def check_untouched(self) -> None:
        """RuntimeError when a parameter has moved, or when other code wrote into one that has a theta of its own."""
        self.check_place()
        for param, version in zip(self.parameters, self._versions, strict=True):
            if param.has_theta and param.local._version != version:
                raise RuntimeError(
                    f"{param.name} was written by other code since the last step. FastBiP has the dense weights (weight_of()) and "
                    "would overwrite the new value. Load or change weights before you make FastBiP. To continue from a checkpoint, load "
                    "the model first, then call the optimizer's load_state_dict() again"
                )

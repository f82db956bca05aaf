"""What runs the steps of one optimizer. It holds the arena and the launch plan, and keeps both in agreement with the options."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .agreement import together
from .arena import Arena
from .budgets import SelectionGroup, budget_of, selection_groups
from .coverage import check_split, decide
from .launch.gradients import gradient_table, no_gradients
from .launch.plan import StepPlan
from .native import MAX_GROUP, MAX_SHARDED_GROUP, backend, not_capturing
from .options import check_group, group_keys, hyper_table
from .parameter import Parameter, Seen
from .patterns import NofM
from .report import Decision, Report, Row, Selection, UnitCount, flat_metrics, layer_row
from .rules import NONE, Rule
from .shards import Ranks, local_of

__all__ = ["Engine"]


def _value(option: Any) -> Any:
    """A tensor's value at this moment, so that a change in place is seen."""
    return option.tolist() if isinstance(option, Tensor) and option.device.type != "meta" else option


def _need_sparsity(decided: Sequence[Parameter]) -> list[Parameter]:
    return [param for param in decided if param.pruned and not isinstance(param.division, NofM)]


def _check_sparsity(param_groups: Sequence[dict[str, Any]], needing: Sequence[Parameter]) -> None:
    for param in needing:
        if param_groups[param.group]["sparsity"] is None:
            raise ValueError(f"give one of sparsity and density, got neither, for {param.name}")


class Engine:
    """The steps of one optimizer, over the parameters of its groups.

    Args:
        param_groups: of the optimizer; looked at again in every step, so that schedulers are followed.
        seen: what is known of the parameters besides their groups.
        states: saved states of parameters that were trained before; all others start from their magnitudes.
        project: whether to select the masks anew from all scores.
        rule: of the lower level.
        score_start: what the scores of other parameters are at first (`reference.start_scores`).

    Raises:
        ValueError: a parameter or an option cannot be used. Nothing was written then.
    """

    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(
        self,
        param_groups: Sequence[dict[str, Any]],
        seen: Seen,
        states: Mapping[Tensor, dict[str, Tensor]],
        project: bool,
        rule: Rule,
        score_start: str,
    ) -> None:
        self._groups, self._rule = param_groups, rule
        self._checked: Any = None  # the options that were last found valid
        with together(Ranks(p for group in param_groups for p in group["params"]), "binding parameters"):
            decided, self.decisions, ranks = self.check(param_groups, seen, rule)
            self._fixed = [(group["pattern"], bool(group["prune"])) for group in param_groups]
            self._need_sparsity, self._decided = _need_sparsity(decided), decided
            device = decided[0].local.device
            backend(device)
            self._check_options()
            self.arena = Arena(decided, device, rule, ranks)
            self._use(*self._new_plan())
        # Nothing is written before all memory is there, on all ranks.
        for param in self.arena.parameters:
            if param.tensor in states:
                self.arena.load(param, states[param.tensor])
            else:
                self.arena.start(param, score_start)
        for number, units in enumerate(self.arena.units.sets):
            if not any(param.tensor in states for param in units.scoring):
                self.arena.start_units(number, score_start)
        self.arena.record()
        if project:
            self._project()

    @staticmethod
    def check(param_groups: Sequence[dict[str, Any]], seen: Seen, rule: Rule) -> tuple[list[Parameter], tuple[Decision, ...], Ranks]:
        """`decide`; ValueError where nothing would be pruned, or a weight has no sparsity."""
        decided, decisions, ranks = decide(param_groups, seen)
        if not any(param.pruned and param.total for param in decided):
            why = "; ".join(f"{row.name}: {row.reason or 'it has no entries'}" for row in decisions[:5])
            raise ValueError(
                "nothing to prune: params must hold matrices of layers, or parameters of two or more dimensions" + (why and f" ({why})")
            )
        for group in param_groups:
            check_group(group, rule)
        _check_sparsity(param_groups, _need_sparsity(decided))
        check_split(decided, param_groups)
        return decided, decisions, ranks

    def _project(self) -> None:
        """Masks from the scores as they are."""
        self.plan.run("upper", NONE, no_gradients(self.arena), self.arena.num_nonfinite)
        self.arena.mark_written()

    @torch.no_grad()
    def rescore(self, scores: Mapping[Tensor, Tensor]) -> bool:
        """Take ``scores`` of parameters, shaped like them, and select the masks anew; True when that needed a new plan.

        Raises:
            ValueError: a key is not pruned, or its scores have another shape or leave [0, 1]. Nothing has changed then.
            RuntimeError: other code has moved or written to a parameter.
        """
        with together(self.arena.ranks, "set_scores()"):
            self._check_scores(scores)
            self.arena.check_untouched()
        new = self.refresh("upper")
        for param in self.arena.pruned:
            self.arena.rescore(param, scores)
        for number in range(len(self.arena.units.sets)):
            self.arena.rescore_units(number, scores)
        self._project()
        return new

    def _check_scores(self, scores: Any) -> None:
        """TypeError or ValueError unless scores can be those of parameters, as far as this rank has them."""
        if not isinstance(scores, Mapping):
            raise TypeError(f"scores must be a dict of tensors by parameter, got {type(scores).__name__}")
        for p, given in scores.items():
            param = self.arena.masked(p)
            if not param.pruned:
                raise ValueError(f"scores must be of parameters that have their own, got {param.name}, which goes with others")
            if not isinstance(given, Tensor) or given.shape != p.shape:
                found = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
                raise ValueError(f"scores of {param.name} must have the shape {tuple(p.shape)}, got {found}")
            own = local_of(given)
            if own.layout != torch.strided or own.is_meta or own.is_complex() or (own.is_floating_point() and own.element_size() == 1):
                kind = f"{own.layout} of {own.dtype} on {own.device}"
                raise ValueError(f"scores of {param.name} must be a dense tensor of real numbers of 16 bits or more, got {kind}")
            if not ((own >= 0) & (own <= 1)).all():
                raise ValueError(f"scores of {param.name} must be in [0, 1], got {float(own.min()):g} to {float(own.max()):g}")

    def load(self, states: Sequence[dict[str, Tensor]], num_nonfinite: int) -> None:
        """Take a saved state for every parameter of the arena, and make the plan for the options as they are now. No collectives."""
        for param, state in zip(self.arena.parameters, states, strict=True):
            self.arena.load(param, state)
        self.arena.record()
        self._use(*self._new_plan())
        self.arena.set_nonfinite(num_nonfinite)

    # --- options and the plan --------------------------------------------------------------------------------------------------------

    def _options(self) -> list[tuple[Any, ...]]:
        """What the selection depends on, of every parameter group."""
        return [(group["sparsity"], group["scope"], group["min_kept"]) for group in self._groups]

    @property
    def waits(self) -> bool:
        """Whether the masks are not yet those of the options, which count from the next upper or joint step."""
        return self._planned != self._options()

    def _select(self) -> list[SelectionGroup]:
        """What competes for how many places, under the options as they are now."""
        most = MAX_SHARDED_GROUP if self.arena.ranks.groups else MAX_GROUP
        return selection_groups([budget_of(rival, self._groups[rival.group]) for rival in self.arena.rivals], most)

    def replan(self) -> None:
        """Make the plan for the options as they are now, on all ranks.

        Raises:
            ValueError: a rank has too many weights for it. All keep the plan they have.
            RuntimeError: the current stream is being captured in a graph. Nothing has changed then.
        """
        not_capturing(self.arena.device, "the optimizer needs new tables")  # nothing can be told in a capture
        with together(self.arena.ranks, "making a new plan"):
            new = self._new_plan()
        self._use(*new)

    def _new_plan(self) -> tuple[list[SelectionGroup], StepPlan]:
        """What competes, and the plan for that, of this rank alone."""
        if any(group["mask_momentum"] > 0 for group in self._groups):
            self.arena.ensure_score_momentum()
        selection = self._select()
        least = [int(group["min_kept"]) for group in self._groups]
        return selection, StepPlan(self.arena, selection, hyper_table(self._groups, self._rule), least)

    def _use(self, selection: list[SelectionGroup], plan: StepPlan) -> None:
        """Go on with a new plan."""
        self._planned, self._selection, self.plan = self._options(), selection, plan
        self._with_score_momentum = self.arena.score_momentum is not None

    def refresh(self, phase: str) -> bool:
        """Bring the plan up to date with the options, before a step of ``phase``; True when it is a new one.

        Step sizes and numbers of kept weights are written where the plan has them. A new plan is needed only when other tensors compete
        with each other, or when a mask momentum needs memory.
        """
        self._check_options()
        new = False
        if phase != "lower":
            if not self._with_score_momentum and any(group["mask_momentum"] > 0 for group in self._groups):
                new = True
            elif self._planned != self._options():
                selection = self._select()
                new = [group.members for group in selection] != [group.members for group in self._selection]
                new = new or [options[2] for options in self._planned] != [options[2] for options in self._options()]
                if not new:
                    self.plan.set_kept([group.kept for group in selection])
                    self._planned, self._selection = self._options(), selection
        if new:
            self.replan()
        else:
            self.plan.set_hypers(hyper_table(self._groups, self._rule))
        return new

    def _check_options(self) -> None:
        """Check the options of all groups if they have changed since the last time."""
        values = [tuple(_value(group.get(key)) for key in (*group_keys(self._rule), "density")) for group in self._groups]
        if values == self._checked:
            return
        for group in self._groups:
            check_group(group, self._rule)
        for group, (pattern, prune) in zip(self._groups, self._fixed, strict=True):
            if group["pattern"] != pattern:
                raise ValueError(f"pattern of a parameter group cannot change any more, was {pattern!r}, got {group['pattern']!r}")
            if bool(group["prune"]) != prune:
                raise ValueError(f"prune of a parameter group cannot change any more, got {group['prune']!r}")
        _check_sparsity(self._groups, self._need_sparsity)
        check_split(self._decided, self._groups)
        self._checked = values

    # --- a step ----------------------------------------------------------------------------------------------------------------------

    def kernels(self, phase: str, grad_scale: Any = None, found_inf: Any = None) -> Callable[[StepPlan], None]:
        """What starts the kernels of a step of ``phase``, once, with the gradients that the parameters have at this moment.

        Args:
            grad_scale, found_inf: scalars as a GradScaler sets them; anything but a tensor counts as None.

        Raises:
            RuntimeError: a gradient cannot be used.
        """
        gradients, alive = gradient_table(self.arena)
        scalars = [x.to(device=self.arena.device, dtype=torch.float32) if isinstance(x, Tensor) else None for x in (grad_scale, found_inf)]

        def launch(plan: StepPlan) -> None:
            plan.run(phase, self._rule.number, gradients, self.arena.num_nonfinite, *scalars)
            alive.clear()  # the kernels are launched; memory freed now is reused behind them on the stream

        return launch

    @contextmanager
    def awaited(self, phase: str) -> Iterator[None]:
        """Where an error inside keeps this rank from a step of ``phase``, the others do not wait for it: they learn of it from the sums of
        the selection."""
        try:
            yield
        except Exception:
            if phase != "lower":
                self.plan.stay_away()
            raise

    def write_masked(self) -> None:
        """z = m*theta, after an optimizer of the user's has moved theta."""
        self.plan.run("lower", NONE, no_gradients(self.arena), self.arena.num_nonfinite)

    # --- what there is to see --------------------------------------------------------------------------------------------------------

    def selections(self, counters: Any = None) -> tuple[Selection, ...]:
        """How the selection of every group went; waits for the device, unless the ``counters`` of the plan are given."""
        rows = []
        for group, own in zip(self._selection, self.plan.counters() if counters is None else counters, strict=True):
            counts = {key: own[key].item() for key in Selection._fields if key in (own.dtype.names or ())}
            rivals = [self.arena.rivals[i] for i in group.members]
            name = rivals[0].name + (f" and {len(rivals) - 1} more" if len(rivals) > 1 else "")
            rows.append(Selection(name=name, numel=group.numel, kept=group.kept, **counts))
        return tuple(rows)

    def report(self) -> Report:
        """The layers, and how their masks came about; waits for the device."""
        sets, ranks = self.arena.units.sets, self.arena.ranks
        counts = ranks.added([0 if own.elsewhere else self.arena.units.kept(number) for number, own in enumerate(sets)], self.arena.device)
        kept = list(zip(counts, (own.total for own in sets), strict=True))
        nonzero = ranks.added(
            [0 if param.elsewhere else layer_row(param.name, param.local).kept for param in self.arena.pruned], self.arena.device
        )

        def row(param: Parameter, nonzero: int) -> Row:
            own = [kept[part.unit_set] for part in param.parts if not part.scored]
            units = (sum(count for count, _ in own), sum(total for _, total in own)) if own else None
            return Row(param.name, tuple(param.whole), nonzero, param.total, pattern=param.pattern, units=units)

        totals: dict[str, UnitCount] = {}
        for units, (count, total) in zip(sets, kept, strict=True):
            before = totals.get(units.pattern, UnitCount(units.pattern, 0, 0))
            totals[units.pattern] = UnitCount(units.pattern, before.kept + count, before.total + total)
        return Report(tuple(map(row, self.arena.pruned, nonzero)), self.selections(), self.decisions, tuple(totals.values()))

    def metrics(self) -> dict[str, float]:
        """`flat_metrics` of this moment; one sum over the ranks, one copy from the device."""
        counts = torch.cat([self.arena.kept_of_pruned(), self.arena.num_nonfinite.view(1), self.plan.flips()])
        self.arena.ranks.add(counts)
        counters, values = self.plan.counters_and(counts)
        kept, (nonfinite, *flips) = values[: len(self.arena.pruned)], values[len(self.arena.pruned) :]
        selections = [own._replace(flips=count) for own, count in zip(self.selections(counters), flips, strict=True)]
        rows = [Row(param.name, tuple(param.whole), own, param.total) for param, own in zip(self.arena.pruned, kept, strict=True)]
        return flat_metrics(rows, selections, nonfinite)

    def state(self) -> dict[Tensor, dict[str, Tensor]]:
        """Views of every parameter's state."""
        return {param.tensor: self.arena.shared(param, self.arena.state_of(param)) for param in self.arena.parameters}

    def saved_state(self) -> dict[Tensor, dict[str, Tensor]]:
        """`state`, in the form that a checkpoint has."""
        return {param.tensor: self.arena.saved_state_of(param) for param in self.arena.parameters}

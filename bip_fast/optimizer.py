"""`FastBiP`: the optimizer. Validation, state and phases; the arithmetic is in the kernels, the storage in `engine.arena`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from .binding import Origin, check_agreement, check_memory, check_place, members_of, place_of, replacements, same_members, with_tensors
from .engine.agreement import check_same, together
from .engine.arena import Arena
from .engine.checkpoint import fitting_groups
from .engine.coverage import would_prune
from .engine.engine import Engine
from .engine.inner import InnerOptimizer
from .engine.launch.plan import StepPlan
from .engine.options import (
    check_group,
    check_levels,
    check_lower_steps,
    check_score_start,
    refuse_count,
    resolve_defaults,
    resolve_density,
    resolve_mask_lr,
    resolve_pattern,
)
from .engine.param_groups import param_groups_of, seen_in_group, split_names
from .engine.parameter import Seen
from .engine.phases import Phases
from .engine.report import Report
from .engine.rules import rule_of
from .engine.shards import Ranks
from .presets import preset_options, ramp_steps
from .saving import compact_states, load_options, load_states, saved_states, shown_states, whole_state
from .schedule import SparsitySchedule

__all__ = ["FastBiP"]


class FastBiP(torch.optim.Optimizer):
    """Train the weights and the mask of a network by bi-level optimization (BiP; Zhang et al., NeurIPS 2022), on an unmodified model.

    ``theta`` are the weights, ``s`` the scores, ``m`` the mask, and ``g = dloss/d(m*theta)`` is what ``backward()`` leaves in
    ``param.grad``:

        lower step (A3)      v = momentum*v + m*g + weight_decay*theta;   theta = theta - lr*v
        upper step (A4, A5)  s = clip(s - mask_lr*(theta - m*g/gamma)*g, 0, 1);   m = top-k(s)

    Creating the optimizer prunes the model by magnitude (``s = min(abs(theta), 1)``; a NaN counts as the smallest weight). After every
    `step`, each pruned parameter equals ``m*theta`` bit for bit, with exact zeros. Parameters that are not pruned take plain steps of the
    same kind in lower and joint steps. An entry whose gradient is not finite stays as it is and is counted in `num_nonfinite`; an optimizer
    of your own sees a gradient of 0 there.

    Args:
        params: a Module, ``parameters()``, ``named_parameters()``, or parameter groups. Of a Module the matrices of its layers are pruned,
            as `engine.layers` says; embeddings and all other trainable parameters are trained but stay dense. In a list everything with two
            or more dimensions is pruned, embeddings too, as one matrix with dimension 0 for its outputs and dimension 1 for its inputs. So
            pass the Module if there is attention, a recurrent layer, experts, or a transposed or grouped convolution. float32, bfloat16 or
            float16, all on one device. Tied parameters count once.
        sparsity: fraction of zeros, in [0, 1). Of ``n`` weights, ``n - round(sparsity*n)`` are kept. With filters, channels or blocks it is
            the fraction of these units that is pruned, and coupled units count once; the fraction of zeros among the weights can then
            differ. `report` shows both.
        density: ``1 - sparsity``. Give one of the two.
        preset: the defaults of all options that are not given (`bip_fast.presets`). "paper": the steps and the start of the paper, with lr
            0.01, mask_lr 0.1, gamma 1, momentum 0.9 and weight_decay 1e-4. "joint": what did best in our own comparisons. It expects
            a schedule that takes lr down, such as a cosine, because lr starts high under "sgd" (0.2).
        optimizer: what makes the lower step. "sgd", as `torch.optim.SGD`; "adamw", as `torch.optim.AdamW`; or a function that takes a list
            of parameter groups of theta (fp32, shaped like the parameters) and returns one torch optimizer over them, or several:
            ``lambda groups: torch.optim.Adagrad(groups, lr=0.01)``. Its options appear in the parameter groups here, where schedulers
            can change them, and its state appears in `state_dict`. It steps once for every lower or joint step, and never under found_inf.
        lr: step size of theta.
        mask_lr: step size of the scores.
        mask_lr_per_lr: in place of ``mask_lr``: the step size of the scores as a multiple of lr, so that it follows the schedule of lr.
        gamma: weight of the proximal term of the lower level. A larger one weakens the implicit gradient; ``inf`` switches it off.
        momentum: of theta under "sgd".
        betas: decay rates of the two running means under "adamw".
        eps: added to the root of the second of them under "adamw"; greater than 0.
        mask_momentum: momentum of the scores. 0, as in the paper, needs no memory.
        weight_decay: of theta; an L2 penalty under "sgd", decoupled under "adamw".
        nesterov: Nesterov momentum for theta under "sgd".
        score_start: how scores start: "magnitude", ``min(abs(theta), 1)``, or "square", ``min(theta^2 / 2, 1)``.
        steps: the number of steps of the whole run, for a preset whose sparsity grows. In the first part of the run the optimizer then
            raises the sparsity of each group from 0 to the one it was given, along the cubic curve of `SparsitySchedule`.
        pattern: what is kept or pruned as one: "unstructured", single weights; "filter", output channels, along with the bias of a layer;
            "channel", input channels; "block:RxC"; or "N:M" such as "2:4", which has a sparsity of its own (`engine.patterns`). A unit of
            several weights has one score, which starts as the mean of abs(theta) and moves by the sum of the gradients of its weights. A
            weight that the pattern does not fit stays dense, and `report` gives the reason. With "filter" the last layer of a Module stays
            dense too, because its filters are taken for the outputs of the model, and with "channel" the first one; the order is that in
            which the layers were created, including embeddings and tied output layers. If a model returns the outputs of several layers,
            such as an encoder with a pooler, use ``exclude`` or ``coupled`` for the others.
        scope: "global": all units of the same sparsity compete; "layer": every matrix keeps its own fraction; "erk": every matrix has a
            budget of its own, larger for small layers (Erdos-Renyi-Kernel), and these budgets add up to the sparsity.
        min_kept: the number of filters, channels or blocks that every layer keeps, even if that is more than the sparsity allows.
        levels: "alternating": ``lower_steps`` lower steps, then an upper one, each on its own batch; "joint": both from every backward.
        lower_steps: lower steps per upper step.
        exclude: what stays dense: one or several names, `fnmatch` patterns, modules or parameters.
        overrides: a sparsity, or a dict of options, by name: ``{"layer1.*": 0.5, "head": {"pattern": "2:4"}}``. The last match counts, and
            the weights it matches get a parameter group of their own. Options of the lower level alone, such as ``{"head": {"lr": 1e-3}}``,
            also apply to parameters that are not pruned. If ``optimizer`` is a function, its groups also get all keys that only it knows.
        coupled: for ``pattern="filter"``: lists of names of parameters whose filters are kept or pruned together: weights whose outputs are
            added in a residual join, and vectors (batch-norm, biases) that are masked with them. A list with ``"<outputs>"`` names
            filters that the model returns, which are never pruned; if there is such a list, the last layer is no longer taken for the
            outputs. `bip_fast.export.coupled_filters` finds all of them.

    Options that concern weights are also keys of parameter groups: those of the lower and upper step, ``sparsity``, ``pattern``, ``scope``
    and ``min_kept``. A group with ``prune=False`` stays dense, and so do frozen parameters. Schedulers or your own code may change
    hyper-parameters at any time. A new sparsity or scope takes effect at the next upper or joint step. A density is turned into a sparsity
    once, when the group is made.

    Creating the optimizer also binds it: it takes hold of the parameters and prunes them. This waits (see `bind`) while the parameters
    may not be final: on the meta device, or in a job of several ranks as plain tensors that did not come through DistributedDataParallel,
    since they may yet be sharded. If other parameters take their place before the first step (``fully_shard``, accelerate, ``to_empty``),
    it binds to those, by position, or by name if it was given the Module. Under DistributedDataParallel every rank finds the same masks
    by itself.

    Raises:
        ValueError: an argument is out of range, there is nothing to prune, or the ranks of a job were given different arguments.
        RuntimeError: (from `step`) other code has moved or written to a parameter or, after a step, replaced one. Writes through
            ``param.data`` cannot be seen.

    Examples:
        >>> opt = FastBiP(model, sparsity=0.95)
        >>> for x, y in loader:
        ...     loss_fn(model(x), y).backward()
        ...     opt.step()
        ...     opt.zero_grad()
        >>> opt.finalize()
    """

    _step_supports_amp_scaling = True  # a GradScaler hands over grad_scale and found_inf; the kernels unscale before they square
    _launch: Callable[[StepPlan], None] | None = None  # set by `bip_fast.graphs` for the time of a step: starts its kernels another way

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        *,
        sparsity: float | None = None,
        density: float | None = None,
        preset: str = "paper",
        optimizer: str | Callable[[list[dict[str, Any]]], Any] = "sgd",
        lr: float | None = None,
        mask_lr: float | None = None,
        mask_lr_per_lr: float | None = None,
        gamma: float | None = None,
        momentum: float | None = None,
        betas: tuple[float, float] | None = None,
        eps: float | None = None,
        mask_momentum: float | None = None,
        weight_decay: float | None = None,
        nesterov: bool | None = None,
        score_start: str | None = None,
        steps: int | None = None,
        pattern: str = "unstructured",
        scope: str = "global",
        min_kept: int = 1,
        levels: str | None = None,
        lower_steps: int = 1,
        exclude: str | nn.Module | Tensor | Iterable[str | nn.Module | Tensor] = (),
        overrides: Mapping[str, Any] | None = None,
        coupled: Iterable[Iterable[str]] = (),
        **unknown: Any,
    ) -> None:
        self._rule = rule_of(optimizer)
        given = {
            "lr": lr, "momentum": momentum, "nesterov": nesterov, "betas": betas, "eps": eps, "weight_decay": weight_decay,
            "mask_lr": mask_lr, "mask_lr_per_lr": mask_lr_per_lr, "gamma": gamma, "mask_momentum": mask_momentum,
            "score_start": score_start, "levels": levels,
        }  # fmt: skip
        chosen = preset_options(preset, self._rule, given)
        self._score_start = check_score_start(chosen.pop("score_start"))
        self._phases = Phases(check_levels(chosen.pop("levels")), check_lower_steps(lower_steps))
        ramp = ramp_steps(preset, chosen.pop("ramp"), steps)
        defaults: dict[str, Any] = {
            "sparsity": sparsity,
            "density": density,
            "pattern": pattern,
            "scope": scope,
            "min_kept": min_kept,
            "prune": True,
            **chosen,
        }
        resolve_defaults(defaults, unknown, self._rule)
        groups, self._seen = param_groups_of(params, exclude, overrides, coupled, inner=callable(optimizer))
        for group in groups:
            refuse_count(group)
        self._origin = Origin(params)
        named = all(self._seen.of(p).name for group in groups for p in group["params"]) and not isinstance(params, nn.Module)
        self._inner: InnerOptimizer | None = None
        if callable(optimizer):
            self._inner = InnerOptimizer(optimizer, groups)
            self._rule = self._rule._replace(name=self._inner.name)
            defaults |= self._inner.defaults
        self._reset()
        if named:  # torch keeps the names that named_parameters() gives
            groups = [{**group, "params": [(self._seen.of(p).name, p) for p in group["params"]]} for group in groups]
        super().__init__(groups, defaults)
        self._ramp = SparsitySchedule(self, "cubic", steps=ramp) if ramp else None
        self._building = False
        self._members = members_of(self.param_groups)
        self._late = not self._origin.final(self.param_groups)
        if self._late:
            Engine.check(self.param_groups, self._seen, self._rule)
        else:
            self.bind()

    def _reset(self) -> None:
        self._building = True  # add_param_group only collects
        self._engine: Engine | None = None  # None: not yet bound, or finalized
        self._finished: Report | None = None
        self._last_metrics: dict[str, float] = {}  # once finalized
        self._stepped = False

    # --- the parameters --------------------------------------------------------------------------------------------------------------

    @property
    def state(self) -> Any:
        """Views of the state, by parameter, as in any torch optimizer. Reading it binds the optimizer (see `bind`)."""
        if not self._building and self._engine is None and self._finished is None:
            self.bind()
        return self._state

    @state.setter
    def state(self, state: Any) -> None:
        self._state = state

    def bind(self) -> None:
        """Take hold of the parameters that the groups have now, and prune them. If that is already done, nothing happens.

        The constructor does this, except where parameters may not be final yet (see the class). Then the first `step` does it, or the first
        call that asks for masks, weights or a report.

        Raises:
            RuntimeError: parameters are on the meta device; or, after a step, other parameters are in the place of those that the
                optimizer knows; or their number or shapes differ. Nothing has changed then.
            ValueError: the ranks of a job were given different arguments.
        """
        if (itself := _itself(self)) is not self:
            itself.bind()
            return
        if self._finished is not None:
            raise RuntimeError("cannot bind: finalize() was called, the optimizer has let go of the model")
        if self._engine is None or not same_members(self._members, self.param_groups):
            self._take(self._origin.replaced())

    def _take(self, moved: Mapping[Tensor, Tensor]) -> None:
        """Bind to the parameters of the groups, where those in ``moved`` have others in their place."""
        groups = [{**group, "params": [moved.get(p, p) for p in group["params"]]} for group in self.param_groups]
        with together(Ranks(p for group in groups for p in group["params"]), "bind()"):
            new = {**moved, **replacements(self._members, groups, self._seen)}
            if new and self._stepped:
                name = self._seen.of(next(iter(new))).name or f"a parameter of shape {tuple(next(iter(new)).shape)}"
                raise RuntimeError(
                    f"{name} was replaced by another parameter after a step was taken. Wrap or shard the model before the first step, or "
                    "make a new FastBiP and load the state_dict() of this one"
                )
            seen = with_tensors(self._seen, new)
            check_memory(groups, seen)
        check_agreement(self._origin, groups, seen, self._rule.name, (self._phases.levels, self._phases.lower_steps))
        old = self._engine
        states = {new.get(p, p): whole_state(p, own, new.get(p, p)) for p, own in (old.saved_state() if old else {}).items()}
        before = [group["params"] for group in self.param_groups]
        for group, now in zip(self.param_groups, groups, strict=True):
            group["params"] = now["params"]
        try:
            self._build(states, project=old is None, seen=seen, new=new)
        except BaseException:
            for group, params in zip(self.param_groups, before, strict=True):
                group["params"] = params
            raise
        self._origin.follow(new)

    # --- parameter groups ------------------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group.

        Its pruned parameters start with scores from their magnitudes, and compete at once with those of the same sparsity.
        """
        if not isinstance(param_group, dict) or "params" not in param_group:
            raise TypeError(f'a parameter group must be a dict with "params", got {param_group!r}')
        group = dict(param_group)
        group["params"], names = split_names(group["params"])
        if not self._building:  # else __init__ has looked, before an inner optimizer added its options
            refuse_count(group)
        resolve_density(group)
        resolve_mask_lr(group)
        resolve_pattern(group)
        check_group(self.defaults | group, self._rule)
        if self._building:  # __init__ builds once for all groups
            super().add_param_group(_with_names(group, names))
            return
        waits = self._engine is None and self._finished is None
        if not waits:
            arena = self._arena_of("add a parameter group")
            with together(arena.ranks, "add_param_group()"):
                arena.check_untouched()
        seen = seen_in_group(self._seen, group["params"], names)
        if self._phases.frozen and any(would_prune(seen.of(p), self.defaults | group) for p in group["params"]):
            raise RuntimeError("masks are frozen since freeze_masks(), so a new parameter group must have prune=False")
        count, before, self._seen = len(self.param_groups), self._seen, seen
        try:
            if self._inner is not None:
                self._inner.add(group)
            named = all("param_names" in own for own in self.param_groups)
            super().add_param_group(_with_names(group, names) if named else group)
            if waits:
                self._members = members_of(self.param_groups)
                return
            assert self._engine is not None
            self._build(self._engine.saved_state(), project=not self._phases.frozen)
        except BaseException:
            del self.param_groups[count:]  # as it was
            if self._inner is not None:
                self._inner.keep(count)
            self._seen = before
            raise

    def _build(
        self,
        states: Mapping[Tensor, dict[str, Tensor]],
        project: bool,
        seen: Seen | None = None,
        new: Mapping[Tensor, Tensor] | None = None,
    ) -> None:
        """The engine for the groups as they are now; ``new`` are parameters in the place of others, of which ``seen`` knows."""
        old = self._engine
        engine = Engine(self.param_groups, seen or self._seen, states, project, self._rule, self._score_start)
        if old is not None:
            engine.arena.num_nonfinite.copy_(old.arena.num_nonfinite)
        self._engine, self._seen, self._members = engine, seen or self._seen, members_of(self.param_groups)
        if self._inner is not None:
            self._inner.replace(new or {})
            self._inner.bind(engine.arena)
        self._state.clear()
        self._state.update(shown_states(engine, self._inner))

    def _running(self, what: str) -> Engine:
        if self._finished is not None:
            raise RuntimeError(f"cannot {what}: finalize() was called, the optimizer has let go of the model")
        self.bind()
        assert self._engine is not None
        return self._engine

    def _arena_of(self, what: str) -> Arena:
        return self._running(what).arena

    # --- steps -----------------------------------------------------------------------------------------------------------------------

    @property
    def phase(self) -> str:
        """The kind of the next step: "lower", "upper" or "joint"."""
        return self._phases.current

    def lower(self) -> AbstractContextManager[None]:
        """Context manager: steps inside it are lower steps, whatever `phase` says, and do not advance the cycle of phases."""
        return self._phases.force("lower")

    def upper(self) -> AbstractContextManager[None]:
        """Context manager: steps inside it are upper steps, whatever `phase` says, and do not advance the cycle of phases."""
        return self._phases.force("upper")

    def joint(self) -> AbstractContextManager[None]:
        """Context manager: steps inside it are joint steps, whatever `phase` says, and do not advance the cycle of phases."""
        return self._phases.force("joint")

    @torch._disable_dynamo  # type: ignore[attr-defined]  # as torch.optim does: a compiled loop calls the step as it is
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the current `phase`; mutates parameters, theta, momenta, scores and masks.

        Args:
            closure: evaluates the model with gradients and returns the loss.

        Returns:
            The loss of the closure, or None.

        Raises:
            RuntimeError: other code has moved or written to a parameter; masks are frozen and the phase would move them; a gradient is
                sparse; or `finalize` was called. No parameter and no state has changed then. If an optimizer of your own raises an error,
                scores and masks have moved already, and parameters are m*theta all the same.
        """
        self._running("step")
        self._phases.check()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        engine, phase = self._running("step"), self._phases.check()
        if not any(p.grad is not None for group in self.param_groups for p in group["params"]):
            engine = self._without_gradients()
        # grad_scale and found_inf: set by torch.amp.GradScaler for the time of the step
        found_inf = engine.arena.ranks.anywhere(getattr(self, "found_inf", None))
        with engine.awaited(phase):
            if engine.refresh(phase):  # first: all ranks make a new plan together, also one that cannot make the step
                self._state.update(shown_states(engine, self._inner))
            engine.arena.check_untouched()
            launch = self._launch or engine.kernels(phase, getattr(self, "grad_scale", None), found_inf)
        self._stepped = True
        launch(engine.plan)
        inner = self._inner if phase != "upper" and not (found_inf is not None and bool(found_inf)) else None
        try:
            if inner is not None:
                inner.step(self.param_groups)
        finally:
            if inner is not None:
                engine.write_masked()
            engine.arena.mark_written()
        self._phases.advance()
        if self._ramp is not None:
            self._ramp.step()
        return loss

    def _without_gradients(self) -> Engine:
        """Before a step in which no parameter has a gradient: that is how it looks when the model has others by now."""
        moved = self._origin.replaced()
        if moved:
            self._take(moved)
        elif self._late and not self._stepped:
            first = self.param_groups[0]["params"][0]
            name = self._seen.of(first).name or f"a parameter of shape {tuple(first.shape)}"
            raise RuntimeError(
                f"no parameter has a gradient in the first step, as {name}: if the model was wrapped or sharded since the optimizer was "
                "made, it has other parameters now. Give FastBiP the Module, or make it afterwards"
            )
        return self._running("step")

    @property
    def inner_optimizers(self) -> Sequence[torch.optim.Optimizer]:
        """The optimizers that ``optimizer=`` made, if it is a function.

        Their options are in `param_groups` here, their state in `state_dict`.
        """
        return () if self._inner is None else tuple(self._inner.optimizers)

    # --- what a user looks at --------------------------------------------------------------------------------------------------------

    @property
    def pruned_params(self) -> list[Tensor]:
        """The parameters that are pruned, in the order in which they compete."""
        return [param.tensor for param in self._arena_of("list parameters").pruned]

    def mask_of(self, p: Tensor) -> Tensor:
        """Copy of the mask ``m`` of a pruned parameter: bool, with the shape and strides of ``p``. ValueError if it is not pruned.

        Like `weight_of` and `scores_of`, it also takes vectors that are masked along with the filters of a layer (biases, batch-norm).
        """
        arena = self._arena_of("look at a mask")
        return arena.mask_of(arena.masked(p))

    def weight_of(self, p: Tensor) -> Tensor:
        """Copy of the dense weights ``theta`` of a pruned parameter: float32, with the shape and strides of ``p``.

        ValueError if it is not pruned.
        """
        arena = self._arena_of("look at a weight")
        return arena.weight_of(arena.masked(p))

    def scores_of(self, p: Tensor) -> Tensor:
        """Copy of the scores ``s`` of a pruned parameter, each weight with the score of its unit: float32, shape and strides of ``p``.

        ValueError if it is not pruned.
        """
        arena = self._arena_of("look at scores")
        return arena.scores_of(arena.masked(p))

    @property
    def num_nonfinite(self) -> int:
        """Number of entries skipped so far because their gradient was not finite.

        Reading it waits for the device. If parameters are sharded, all ranks must read it together.
        """
        return self._arena_of("count").total_nonfinite()

    def report(self) -> Report:
        """What each layer has kept, as a table to print.

        It has each pruned parameter with its name, shape, number of weights kept, and sparsity (and its pattern and units where these
        differ between layers), how the selections went, and which parameters stay dense and why.
        After `finalize` it is the table of that moment. Waits for the device.
        """
        if self._finished is not None:
            return self._finished
        return self._running("report").report()

    def metrics(self, *, layers: bool = False) -> dict[str, float]:
        """Plain Python numbers for any logger.

        - ``sparsity``: fraction of zeros in the masks of all pruned parameters; ``kept``: number of ones in them.
        - ``nonfinite``: entries skipped so far because their gradient was not finite.
        - ``threshold``: kept scores are at or above it, the others at or below. In [0, 1]; of several groups of weights that compete, the
          mean by their sizes. Missing before the first selection.
        - ``flips``: mask entries that have changed, the first masks included; ``selections``: upper and joint steps of all groups;
          ``candidates`` and ``fallbacks``: what these cost, as in `report`. All four count from the present plan: from a new optimizer, a
          load, a new parameter group, or when groups part because their sparsities do. N:M has no selection, so it is not in these.

        Reads the masks (1/8 byte for each weight) and waits for the device: call it every so many steps. Where parameters are sharded all
        ranks must call it, and get the same numbers. After `finalize`, the numbers of that moment.

        Args:
            layers: also ``layer_sparsity/NAME`` of every pruned parameter, and ``group_threshold/NAME`` of every group, if there are
                several, under the name of its first member.
        """
        found = self._last_metrics if self._finished is not None else self._running("measure").metrics()
        return {name: value for name, value in found.items() if layers or "/" not in name}

    # --- scores from elsewhere -------------------------------------------------------------------------------------------------------

    def set_scores(self, scores: Mapping[Tensor, Tensor]) -> None:
        """Replace scores and select the masks anew: ``m = top-k(s)`` at the present sparsity, ``z = m*theta``.

        Use it to start from something other than magnitudes: SNIP, movement, or a mask of your own as 0 and 1. Weights, momenta and the
        phase stay as they are. Waits for the device.

        Args:
            scores: for each pruned parameter a tensor of its shape, with numbers in [0, 1]. The score of a filter, channel or block is the
                mean over its weights. Parameters that are not given keep their scores.

        Raises:
            ValueError: a key is not pruned, or its scores have another shape or leave [0, 1]. Nothing has changed then.
            RuntimeError: masks are frozen, or other code has moved or written to a parameter.
        """
        engine = self._running("set scores")
        if self._phases.frozen:
            raise RuntimeError("cannot set scores: masks are frozen since freeze_masks()")
        if engine.rescore(scores):
            self._state.update(shown_states(engine, self._inner))

    # --- modes of an optimizer of the user's -----------------------------------------------------------------------------------------

    def train(self) -> None:
        """Call ``train()`` of the `inner_optimizers` that have one, as schedule-free optimizers do. It moves theta; parameters follow."""
        self._switch("train")

    def eval(self) -> None:
        """Call ``eval()`` of the `inner_optimizers` that have one, before you evaluate or save a model. Parameters follow theta."""
        self._switch("eval")

    def _switch(self, mode: str) -> None:
        if self._inner is None:  # trainers call this at every step, and after the end too
            return
        engine = self._running(mode)
        engine.arena.check_untouched()
        for inner in self.inner_optimizers:
            if callable(switch := getattr(inner, mode, None)):
                switch()
        self._rewrite(engine)

    def _rewrite(self, engine: Engine) -> None:
        """Parameters are m*theta again, after an optimizer of the user's has moved theta outside of a step."""
        if self._inner is not None:
            self._inner.settle(self.param_groups)
            engine.write_masked()
            engine.arena.mark_written()

    # --- the end of a run ------------------------------------------------------------------------------------------------------------

    def freeze_masks(self) -> None:
        """Stop moving the masks: from here on all steps are lower steps, which fine-tune the weights that are kept."""
        self._phases.frozen = True

    def finalize(self) -> None:
        """Leave plain parameters with exact zeros, and let go of the model and of all state. From here on a step is an error.

        Warns if the run had fewer steps than ``steps`` said, so that the sparsity has not reached its end.

        Raises:
            RuntimeError: other code has moved or written to a parameter, so its zeros are not certain. Nothing has changed then.
        """
        if (itself := _itself(self)) is not self:
            itself.finalize()
            return
        if self._finished is not None:
            return
        engine = self._running("finish")
        with together(engine.arena.ranks, "finalize()"):
            engine.arena.check_untouched()
            self._rewrite(engine)
        self._last_metrics, self._finished = engine.metrics(), self.report()
        if self._ramp is not None and (self._ramp.left or engine.waits):
            what = f"finalize() came {self._ramp.left + 1} steps before the sparsity had grown to its end, at {self._finished.sparsity:.4f}"
            warnings.warn(f"{what}: steps must be the number of optimizer steps that the run has", stacklevel=2)
        self._engine = self._inner = None
        self._state.clear()
        self._members, self._origin = [], Origin(None)
        for group in self.param_groups:
            group["params"] = []
        self._seen = Seen()

    # --- saving and loading ----------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The state and the options, as in any torch optimizer. Tensors are views of the state: save or copy them before the next step.

        Each pruned parameter has ``theta``, ``scores``, the moments of the lower level (``momentum``; or ``exp_avg``, ``exp_avg_sq`` and
        the number of steps in ``step``; or what an optimizer of your own keeps), ``mask`` (int32 words: bit i%32 of word i/32 is entry i
        of the flattened parameter), and ``score_momentum`` if there is one. The first are fp32 and shaped like the parameter. Under "bip"
        every parameter has the phase and other values of the whole optimizer, because `torch.distributed.checkpoint` keeps only states
        and groups. Of a sharded parameter all are DTensors, and the mask is a bool one of its shape; then every rank must call this.

        Before the optimizer is bound, the state is empty, like that of other optimizers before their first step: trainers call this while
        they prepare a model. With an optimizer of your own, parameters are first rewritten as m*theta.
        """
        if self._finished is None and self._engine is None:
            self._building = True  # nothing binds
            try:
                return super().state_dict()
            finally:
                self._building = False
        engine = self._running("save")
        self._rewrite(engine)
        state = super().state_dict()
        number = {p: i for i, p in enumerate(p for group in self.param_groups for p in group["params"])}
        states = saved_states(engine, self._phases, self._ramp, self._inner)
        return state | {"state": {number[p]: own for p, own in states.items()}}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue bit for bit from where ``state_dict`` was taken.

        Rewrites pruned parameters as m*theta, so load the model's own file first. Files of version 0.1 load too. A state from before the
        optimizer was bound holds options only.

        Raises:
            TypeError: ``state_dict`` is not a dict.
            ValueError: it belongs to other parameters or groups, or to another optimizer. Nothing has changed then.
            RuntimeError: other code has moved a parameter.
        """
        if self._finished is not None:
            self._running("load")
        ranks = self._engine.arena.ranks if self._engine is not None else Ranks(())
        with together(ranks, "load_state_dict()"):
            if not isinstance(state_dict, Mapping):
                raise TypeError(f"state_dict must be a dict, got {type(state_dict).__name__}")
            state_dict = dict(state_dict)
            for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
                changed = pre_hook(self, state_dict)
                state_dict = dict(changed) if changed is not None else state_dict
            unbound = not self._stepped and state_dict.get("state") == {} and state_dict.keys() == {"state", "param_groups"}
            groups = fitting_groups(self._rule, self.param_groups, state_dict) if unbound else None
        check_same(ranks, "what a state_dict holds, options only or states too,", unbound)
        if groups is not None:
            load_options(self.param_groups, groups)
        else:
            engine = self._running("load")
            load_states(engine, self._phases, self._ramp, self._inner, self.param_groups, state_dict)
            self._state.update(shown_states(engine, self._inner))
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        """For copy and pickle. A copy trains copies of the parameters, so copy model and optimizer together: ``deepcopy((model, opt))``.

        Of sharded parameters each rank has its part in its pickle, which only the same rank of a job of as many can load. (A model under
        ``fully_shard`` refuses to be copied.)
        """
        arena = self._arena_of("copy")
        arena.check_untouched()  # the copy makes its parameters from the state
        names = ("_rule", "_score_start", "_phases", "_ramp", "_seen", "_inner", "_stepped")
        own = {name: getattr(self, name) for name in names}
        states = compact_states(self._running("copy").saved_state())
        place = place_of(self.param_groups)
        return super().__getstate__() | own | {"state": states, "num_nonfinite": arena.num_nonfinite, "place": place}

    @torch.no_grad()
    def __setstate__(self, state: dict[str, Any]) -> None:
        check_place(state.pop("place", None))
        num_nonfinite, states, stepped = state.pop("num_nonfinite"), state.pop("state"), state.pop("_stepped")
        self._reset()
        self._state = {}
        super().__setstate__(state)
        self._building, self._late, self._stepped, self._origin = False, False, stepped, Origin(None)
        self._build(states, project=False)
        self._arena_of("copy").num_nonfinite.copy_(num_nonfinite)


def _itself(optimizer: FastBiP) -> FastBiP:
    """The optimizer behind a wrapper that has taken on its class, as Lightning's does: what methods set must not stay on the wrapper."""
    inner: FastBiP = getattr(optimizer, "optimizer", optimizer)
    return inner


def _with_names(group: dict[str, Any], names: Mapping[Tensor, str]) -> dict[str, Any]:
    """The group as torch takes it: with the names of its parameters if they all have one, which it keeps since version 2.6."""
    if torch.__version__ < "2.6" or not group["params"] or not all(isinstance(p, Tensor) and p in names for p in group["params"]):
        return group
    return {**group, "params": [(names[p], p) for p in group["params"]]}

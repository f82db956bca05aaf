"""`FastBiP`: the optimizer. Validation, state and phases; the arithmetic is in the kernels, the storage in `bip_fast.arena`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from .arena import Arena, Member, Slot
from .ops import StepPlan, backend, kernels
from .options import HYPER_KEYS, check_group, check_levels, check_lower_steps, resolve_density
from .prunable import check_param, members_of, split_names

if TYPE_CHECKING:
    from .report import Report

__all__ = ["FastBiP"]

_KEY = "bip"  # in state_dict(): what belongs to no parameter


class FastBiP(torch.optim.Optimizer):
    """BiP (Zhang et al., NeurIPS 2022): trains the weights and their mask by bi-level optimisation, on an unmodified model.

    With ``theta`` the weights, ``s`` the scores, ``m`` the mask and ``g = dloss/d(m*theta)``, which is what ``backward()`` leaves in
    ``param.grad``::

        lower step (A3)      v = momentum*v + m*g + weight_decay*theta;   theta = theta - lr*v
        upper step (A4, A5)  s = clip(s - mask_lr*(theta - m*g/gamma)*g, 0, 1);   m = top-k(s)

    Making the optimizer prunes the model (``s = min(abs(theta), 1)``: magnitude pruning); after every `step` each pruned parameter equals
    ``m*theta`` bit for bit, with exact zeros. Parameters that are not pruned take plain SGD in lower and joint steps. Entries whose
    gradient is not finite stay as they are and are counted in `num_nonfinite`.

    Args:
        params: a Module (its Conv and Linear weights are pruned, all its other trainable parameters learn), or ``parameters()``,
            ``named_parameters()`` or parameter groups (what has two or more dimensions is pruned). float32, bfloat16 or float16, on one
            device. Tied parameters count once.
        sparsity: fraction of zeros, in [0, 1). Of ``n`` weights, ``n - round(sparsity*n)`` are kept.
        density: ``1 - sparsity``, instead of it.
        lr: step size of theta.
        mask_lr: step size of the scores.
        gamma: weight of the proximal term of the lower level; a larger one weakens the implicit gradient, ``inf`` switches it off.
        momentum: of theta, as in `torch.optim.SGD`.
        mask_momentum: of the scores; 0, as in the paper, needs no memory.
        weight_decay: L2 penalty of theta.
        nesterov: Nesterov momentum for theta.
        pattern: "unstructured".
        scope: "global": all weights of the same sparsity compete; "layer": every tensor keeps its own fraction.
        levels: "alternating": ``lower_steps`` lower steps, then an upper one, each on its own batch; "joint": both from every backward.
        lower_steps: lower steps per upper step.
        exclude: names, `fnmatch` patterns, modules or parameters that stay dense; one or many.

    All but the last three are keys of parameter groups too, and ``prune=False`` makes a group dense. Hyper-parameters may change at any
    time, by schedulers or by hand; a new sparsity or scope counts from the next upper or joint step.

    Raises:
        ValueError: an argument is out of range, or nothing is there to prune.
        RuntimeError: (from `step`) a parameter was moved or written by someone else. Writes through ``param.data`` cannot be seen.

    Example:
        >>> opt = FastBiP(model, sparsity=0.95)
        >>> for x, y in loader:
        ...     loss_fn(model(x), y).backward()
        ...     opt.step()
        ...     opt.zero_grad()
        >>> opt.finalize()
    """

    _step_supports_amp_scaling = True  # a GradScaler hands over grad_scale and found_inf; the kernels unscale before they square

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        *,
        sparsity: float | None = None,
        density: float | None = None,
        lr: float = 1e-2,
        mask_lr: float = 1e-1,
        gamma: float = 1.0,
        momentum: float = 0.9,
        mask_momentum: float = 0.0,
        weight_decay: float = 1e-4,
        nesterov: bool = False,
        pattern: str = "unstructured",
        scope: str = "global",
        levels: str = "alternating",
        lower_steps: int = 1,
        exclude: str | nn.Module | Tensor | Iterable[str | nn.Module | Tensor] = (),
        **unknown: Any,
    ) -> None:
        defaults = {"sparsity": sparsity, "lr": lr, "mask_lr": mask_lr, "gamma": gamma, "momentum": momentum, "mask_momentum": mask_momentum}
        defaults |= {"weight_decay": weight_decay, "nesterov": nesterov, "pattern": pattern, "scope": scope, "prune": True}
        resolve_density(options := defaults | unknown | {"density": density})
        if unknown:
            raise TypeError(f"FastBiP got unknown arguments: {', '.join(unknown)}")
        defaults["sparsity"] = options["sparsity"]
        check_group(defaults)
        self.levels, self.lower_steps = check_levels(levels), check_lower_steps(lower_steps)
        members = members_of(params, exclude)
        self._names, self._excluded = members.names, members.excluded
        self._arena: Arena | None = None
        self._set_phase(0, False)
        super().__init__(members.groups, defaults)
        self._grow(len(self.param_groups))
        if not self._arena_of("make").pruned:
            raise ValueError("nothing to prune: params must hold Conv or Linear weights, or parameters of two or more dimensions")

    def _set_phase(self, cycle: int, frozen: bool) -> None:
        self._cycle = cycle  # of this many steps in the cycle of lower_steps + 1
        self._frozen = frozen
        self._forced: list[str] = []
        self._plan: StepPlan | None = None
        self._planned: Any = None  # the options the plan was made for
        self._checked: Any = None  # the options that were last found valid
        self._finished: Report | None = None

    # --- parameter groups ------------------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters. Pruned ones start as their magnitude says, and compete at once with those of the same sparsity."""
        if not isinstance(param_group, dict) or "params" not in param_group:
            raise TypeError(f'a parameter group must be a dict with "params", got {param_group!r}')
        group = dict(param_group)
        group["params"], names = split_names(group["params"])
        resolve_density(group)
        check_group(self.defaults | group)
        super().add_param_group(group)
        if self._arena is None:  # still in __init__, which grows once for all groups
            return
        try:
            self._names |= names
            self._grow(1)
        except BaseException:
            self.param_groups.pop()  # as it was: the new group is the last
            raise

    def _is_pruned(self, group: dict[str, Any], p: Tensor) -> bool:
        return bool(group["prune"]) and p.dim() >= 2 and p not in self._excluded

    def _members(self) -> list[Member]:
        members: list[Member] = []
        seen: set[Tensor] = set()
        params = [(row, group, p) for row, group in enumerate(self.param_groups) for p in group["params"]]
        for number, (row, group, p) in enumerate(params):
            if p in seen:  # torch warns about them
                continue
            seen.add(p)
            label = self._names.get(p) or f"parameter {number} of shape {tuple(p.shape) if p.layout == torch.strided else '?'}"
            check_param(p, label, params[0][2].device)
            pruned = self._is_pruned(group, p)
            if pruned and group["sparsity"] is None:
                raise ValueError(f"give one of sparsity and density, got neither, for {label}")
            members.append(Member(p, label, pruned, row))
        return members

    @torch.no_grad()
    def _grow(self, new_groups: int) -> None:
        """Make the arena anew for the last ``new_groups`` groups too, keep the state of the others, and project."""
        members, old = self._members(), self._arena
        device = members[0].param.device if members else torch.device("cpu")
        backend(device)
        if old is not None:
            old.check_untouched()
        arena = Arena(members, device)
        for slot in arena.slots:
            if slot.member.row >= len(self.param_groups) - new_groups:
                continue
            assert old is not None
            arena.load(slot, old.state_of(old.slot_of[slot.member.param]))
        for slot in arena.slots:
            if slot.member.row >= len(self.param_groups) - new_groups:
                arena.start(slot)
        if old is not None:
            arena.num_nonfinite.copy_(old.num_nonfinite)
        self._arena, self._plan = arena, None
        self._run("upper", arena.no_gradients())

    def _arena_of(self, what: str) -> Arena:
        if self._arena is None:
            raise RuntimeError(f"cannot {what}: finalize() was called, the optimizer has let go of the model")
        return self._arena

    # --- steps -----------------------------------------------------------------------------------------------------------------------

    @property
    def phase(self) -> str:
        """What the next step will be: "lower", "upper" or "joint"."""
        if self._forced:
            return self._forced[-1]
        if self._frozen:
            return "lower"
        if self.levels == "joint":
            return "joint"
        return "lower" if self._cycle < self.lower_steps else "upper"

    @contextmanager
    def _force(self, phase: str) -> Iterator[None]:
        self._forced.append(phase)
        try:
            yield
        finally:
            self._forced.pop()

    def lower(self) -> Any:
        """Context manager: steps inside are lower ones and do not count in the cycle of phases."""
        return self._force("lower")

    def upper(self) -> Any:
        """Context manager: steps inside are upper ones and do not count in the cycle of phases."""
        return self._force("upper")

    def joint(self) -> Any:
        """Context manager: steps inside are joint ones and do not count in the cycle of phases."""
        return self._force("joint")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of the current `phase`; mutates parameters, theta, momenta, scores and masks.

        Args:
            closure: evaluates the model with gradients and returns the loss.

        Returns:
            The loss of the closure, or None.

        Raises:
            RuntimeError: a parameter was moved or written by someone else, masks are frozen and the phase would move them, a gradient is
                sparse, or `finalize` was called. Nothing has changed then.
        """
        self._arena_of("step")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        arena, phase = self._arena_of("step"), self.phase
        if self._frozen and phase != "lower":
            raise RuntimeError(f"masks are frozen since freeze_masks(), so a step must be lower, got {phase}")
        arena.check_untouched()
        gradients, alive = arena.gradients()
        self._run(phase, gradients, self._amp_scalar("grad_scale"), self._amp_scalar("found_inf"))
        del alive  # the kernels are launched; memory freed now is reused behind them on the stream
        if not self._forced and not self._frozen and self.levels == "alternating":
            self._cycle = (self._cycle + 1) % (self.lower_steps + 1)
        return loss

    def _amp_scalar(self, name: str) -> Tensor | None:
        value = getattr(self, name, None)  # set by torch.amp.GradScaler for the time of the step
        if not isinstance(value, Tensor):
            return None
        return value.to(device=self._arena_of("step").device, dtype=torch.float32)

    def _run(self, phase: str, gradients: np.ndarray, grad_scale: Tensor | None = None, found_inf: Tensor | None = None) -> None:
        arena = self._arena_of("step")
        hypers = self._hypers()
        options = [(group["sparsity"], group["scope"]) for group in self.param_groups]
        with_momentum = any(group["mask_momentum"] > 0 for group in self.param_groups)
        if self._plan is None or (phase != "lower" and self._planned != (options, with_momentum)):
            if with_momentum:
                arena.ensure_score_momentum()
            self._plan, self._planned = arena.plan(options), (options, with_momentum)
            self.state.update({slot.member.param: arena.state_of(slot) for slot in arena.slots})
        self._plan.run(phase, hypers, gradients, arena.num_nonfinite, grad_scale, found_inf)
        arena.mark_written()

    def _hypers(self) -> np.ndarray:
        """Hyper-parameters of all groups for the kernels, checked when they have changed."""
        seen = [tuple(group.items()) for group in ({**group, "params": None} for group in self.param_groups)]
        if seen != self._checked:
            for group in self.param_groups:
                check_group(group)
            self._checked = seen
        table = np.zeros(len(self.param_groups), dtype=kernels().hyper_dtype)
        for key in HYPER_KEYS:
            if key != "gamma":
                table[key] = [float(group[key]) for group in self.param_groups]
        table["inv_gamma"] = [1 / float(group["gamma"]) for group in self.param_groups]
        return table

    # --- what a user looks at --------------------------------------------------------------------------------------------------------

    def _slot(self, p: Tensor) -> Slot:
        slot = self._arena_of("look at a parameter").slot_of.get(p)
        if slot is None or not slot.member.pruned:
            what = slot.member.label if slot else f"a parameter of shape {tuple(p.shape)}, which this optimizer does not have"
            raise ValueError(f"p must be a parameter that is pruned, got {what}")
        return slot

    def mask_of(self, p: Tensor) -> Tensor:
        """Copy of the mask ``m`` of a pruned parameter: bool, with the shape and strides of ``p``. ValueError if it is not pruned."""
        return self._arena_of("look at a mask").mask_of(self._slot(p))

    def weight_of(self, p: Tensor) -> Tensor:
        """Copy of the dense weights ``theta`` of a pruned parameter: float32, shape and strides of ``p``. ValueError if it is not pruned."""
        return self._arena_of("look at a weight").state_of(self._slot(p))["theta"].clone()

    def scores_of(self, p: Tensor) -> Tensor:
        """Copy of the scores ``s`` of a pruned parameter: float32, shape and strides of ``p``. ValueError if it is not pruned."""
        return self._arena_of("look at scores").state_of(self._slot(p))["scores"].clone()

    @property
    def num_nonfinite(self) -> int:
        """Entries skipped so far because their gradient was not finite. Reading it waits for the device."""
        return int(self._arena_of("count").num_nonfinite)

    def report(self) -> Report:
        """Table of the pruned parameters: name, shape, kept of total, sparsity. After `finalize`, the table of that moment."""
        from .report import layer_table

        if self._finished is not None:
            return self._finished
        return layer_table([(slot.member.label, slot.member.param) for slot in self._arena_of("report").pruned])

    # --- the end of a run ------------------------------------------------------------------------------------------------------------

    def freeze_masks(self) -> None:
        """From here only lower steps: fine-tuning under the masks as they are."""
        self._frozen = True

    def finalize(self) -> None:
        """Leave plain parameters with exact zeros, and let go of the model and of all state. Steps are errors from here.

        Raises:
            RuntimeError: a parameter was moved or written by someone else, so its zeros are not certain. Nothing has changed then.
        """
        if self._arena is None:
            return
        self._arena.check_untouched()
        self._finished = self.report()
        self._arena = self._plan = None
        self.state.clear()
        for group in self.param_groups:
            group["params"] = []
        self._names, self._excluded = {}, set()

    # --- saving and loading ----------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """As of any optimizer; tensors are views of the state, so save or copy them before the next step.

        Per pruned parameter: ``theta``, ``scores``, ``momentum`` (fp32, shaped like it), ``mask`` (int32 words: bit i%32 of word i/32 is
        entry i in memory order) and ``score_momentum`` if one is used. The key "bip" holds the phase.
        """
        arena = self._arena_of("save")
        state = super().state_dict()
        state[_KEY] = {"cycle": self._cycle, "frozen": self._frozen, "num_nonfinite": arena.num_nonfinite.clone()}
        return state

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue bit for bit where ``state_dict`` was taken. Rewrites pruned parameters as m*theta; load the model's own file first.

        Raises:
            ValueError: it belongs to other parameters, groups or another optimizer. Nothing has changed then.
            RuntimeError: a parameter was moved by someone else.
        """
        arena = self._arena_of("load")
        state_dict = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = pre_hook(self, state_dict)
            state_dict = dict(changed) if changed is not None else state_dict
        groups, states = self._fitting(arena, state_dict)
        arena.check_place()
        for group, saved in zip(self.param_groups, groups, strict=True):
            group.update({key: value for key, value in saved.items() if key != "params"})
        for slot, state in zip(arena.slots, states, strict=True):
            arena.load(slot, state)
        arena.record()
        self._set_phase(int(state_dict[_KEY]["cycle"]) % (self.lower_steps + 1), bool(state_dict[_KEY]["frozen"]))
        arena.num_nonfinite.copy_(state_dict[_KEY]["num_nonfinite"])
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _fitting(self, arena: Arena, state_dict: dict[str, Any]) -> tuple[Sequence[dict[str, Any]], list[dict[str, Tensor]]]:
        """Groups, and the state of every slot, of a ``state_dict`` that fits this optimizer; else ValueError."""
        if not {_KEY, "state", "param_groups"} <= state_dict.keys():
            raise ValueError(f'state_dict must come from FastBiP, with the keys "state", "param_groups" and "{_KEY}", got {list(state_dict)}')
        groups = state_dict["param_groups"]
        expected, given = ([len(group["params"]) for group in side] for side in (self.param_groups, groups))
        if expected != given:
            raise ValueError(f"state_dict must have parameter groups of {expected} parameters, got {given}")
        for group in groups:
            check_group(group)
        params = [p for group in self.param_groups for p in group["params"]]
        number = dict(zip(params, (i for group in groups for i in group["params"]), strict=True))
        states = []
        for slot in arena.slots:
            state, own = state_dict["state"].get(number[slot.member.param], {}), arena.state_of(slot)
            given_shapes = {name: tuple(x.shape) for name, x in state.items() if name != "score_momentum"}
            own_shapes = {name: tuple(x.shape) for name, x in own.items() if name != "score_momentum"}
            if given_shapes != own_shapes:
                raise ValueError(f"state_dict must hold {own_shapes} for {slot.member.label}, got {given_shapes}")
            states.append(state)
        return groups, states

    def __getstate__(self) -> dict[str, Any]:
        """For copy and pickle. A copy has copies of the parameters, so copy model and optimizer together: ``deepcopy((model, opt))``."""
        arena = self._arena_of("copy")
        state = super().__getstate__() | {"levels": self.levels, "lower_steps": self.lower_steps}
        names = [self._names.get(p) for group in self.param_groups for p in group["params"]]
        excluded = [p in self._excluded for group in self.param_groups for p in group["params"]]
        phase = {"cycle": self._cycle, "frozen": self._frozen, "num_nonfinite": arena.num_nonfinite}
        return state | {_KEY: phase, "names": names, "excluded": excluded}

    @torch.no_grad()
    def __setstate__(self, state: dict[str, Any]) -> None:
        phase, names, excluded = (state.pop(key) for key in (_KEY, "names", "excluded"))
        super().__setstate__(state)
        params = [p for group in self.param_groups for p in group["params"]]
        self._names = {p: name for p, name in zip(params, names, strict=True) if name is not None}
        self._excluded = {p for p, out in zip(params, excluded, strict=True) if out}
        saved = dict(self.state)
        members = self._members()
        arena = Arena(members, members[0].param.device)
        for slot in arena.slots:
            arena.load(slot, saved[slot.member.param])
        arena.num_nonfinite.copy_(phase["num_nonfinite"])
        arena.record()
        self._arena = arena
        self._set_phase(phase["cycle"], phase["frozen"])
        self.state.update({slot.member.param: arena.state_of(slot) for slot in arena.slots})

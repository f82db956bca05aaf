"""`FastBiP` beside `bip_fast.reference`, step by step, equal bit for bit.

The reference side is written here from the design: one `State` per parameter, selection over the parameters of a group in order, each
in its own memory order. Gradients are whatever stands in `param.grad` when `step()` is called, converted to fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import contextmanager, nullcontext
from fractions import Fraction

import torch
from helpers import assert_bits, fill_gradients, flat_like, pruned_of
from torch import Tensor

from bip_fast import FastBiP, reference
from bip_fast.engine.layers import Layer
from bip_fast.engine.patterns import parse
from bip_fast.reference import Blocks, Hyper, State

UPPER_KEYS = ("mask_lr", "gamma", "mask_momentum")
LOWER_KEYS = {"sgd": ("lr", "momentum", "weight_decay", "nesterov"), "adamw": ("lr", "betas", "eps", "weight_decay")}
MOMENTS = {"sgd": ("momentum",), "adamw": ("exp_avg", "exp_avg_sq")}


# rates at which masks move, scores reach 0 and 1, and no factor is a power of two
MOVING = {"sparsity": 0.8, "lr": 0.05, "mask_lr": 0.3, "gamma": 0.7, "weight_decay": 0.013}


@contextmanager
def one_thread():
    """For the reference, whose small operations do not gain from more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def hyper_of(group: dict) -> Hyper:
    hyper = Hyper(**{key: group[key] for key in (*LOWER_KEYS[rule_of(group)], *UPPER_KEYS)})
    return hyper._replace(mask_lr=group["mask_lr_per_lr"] * group["lr"]) if hyper.mask_lr is None else hyper


def rule_of(group: dict) -> str:
    return "adamw" if "betas" in group else "sgd"


def erk_budgets(params: list[Tensor], sparsity: float, units: list[int], least: list[int]) -> list[int]:
    """Erdos-Renyi-Kernel, from its definition: densities in proportion to sum over product of the dimensions, none above 1; of the units
    that are left when each has its least."""
    free = [n - some for n, some in zip(units, least, strict=True)]
    total = max(reference.kept(sum(units), sparsity) - sum(least), 0)
    raw = [Fraction(sum(p.shape), p.numel()) * n / max(room, 1) for p, n, room in zip(params, units, free, strict=True)]
    dense: set[int] = set()
    while True:
        rest = total - sum(free[i] for i in dense)
        weight = sum(raw[i] * free[i] for i in range(len(params)) if i not in dense)
        density = [Fraction(1) if i in dense or not weight else raw[i] * rest / weight for i in range(len(params))]
        more = {i for i, d in enumerate(density) if d >= 1} - dense
        if not more:
            break
        dense |= more
    exact = [some + d * room for some, d, room in zip(least, density, free, strict=True)]
    floors = [int(x) for x in exact]
    largest = sorted(range(len(params)), key=lambda i: (floors[i] - exact[i], i))
    for i in largest[: max(total, 0) + sum(least) - sum(floors)]:
        floors[i] += 1
    return floors


class UnitState:
    """Scores, momentum and mask of the units of some tensors: ``parts`` count, ``follow`` only have the mask."""

    def __init__(self, parts: dict[Tensor, Blocks], follow: dict[Tensor, Blocks]):
        self.parts, self.follow = parts, follow
        self.numel = next(iter(parts.values())).units

    def start(self, states: dict[Tensor, State]) -> None:
        self.s = reference.unit_means([states[p].theta.abs() for p in self.parts], list(self.parts.values()))
        self.u = torch.zeros_like(self.s)
        self.m = torch.zeros_like(self.s, dtype=torch.bool)

    def set_mask(self, m: Tensor, states: dict[Tensor, State]) -> None:
        self.m = m
        for p, blocks in (self.parts | self.follow).items():
            states[p] = states[p]._replace(m=reference.expand(m, blocks))

    def move(self, states: dict[Tensor, State], gradients: dict[Tensor, Tensor | None], hyper: dict[Tensor, Hyper]) -> None:
        """One upper step of the scores, at the old states. A tensor without a gradient leaves them."""
        if any(gradients[p] is None for p in self.parts):
            return
        total = None
        for p, blocks in self.parts.items():
            total = reference.unit_gradient(states[p].theta, states[p].m, gradients[p], hyper[p].gamma, blocks, total)
        self.s, self.u = reference.upper_units(self.s, self.u, total, hyper[next(iter(self.parts))])


class Lockstep:
    """Remember the weights, build the optimizer, then keep both sides in step.

    Args:
        pruned: what is to be pruned.
        layers: the layers of weights whose patterns ask for them.
        coupled: lists of parameters that share their filters; vectors among them follow.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        build: Callable[[], torch.optim.Optimizer],
        pruned: Iterable[Tensor] | None = None,
        layers: dict[Tensor, Layer] | None = None,
        coupled: Iterable[list[Tensor]] = (),
    ):
        self.states: dict[Tensor, State] = {}
        params = list(params)
        self.pruned = {p for p in params if p.dim() >= 2} if pruned is None else set(pruned)
        self.layers, self.coupled = layers or {}, [list(members) for members in coupled]
        self.sets: list[UnitState] = []
        before = {p: flat_like(p, p).float() for p in params}
        self.opt = build()
        self._start(before)

    def _start(self, before: dict[Tensor, Tensor]) -> None:
        self._rule = rule_of(self.opt.param_groups[0])
        self.states |= {p: reference.start(theta, theta.numel()) for p, theta in before.items()}
        new = []
        for group in self.opt.param_groups:
            for p in group["params"]:
                if p in before and p in self.pruned and not any(p in unit_set.parts for unit_set in self.sets + new):
                    new += self._unit_set(p, group["pattern"])
        for unit_set in new:
            unit_set.start(self.states)
        self.sets += new
        self._select()
        self.check("at the start")

    def _unit_set(self, p: Tensor, name: str) -> list[UnitState]:
        def divided(x: Tensor) -> Blocks:
            return parse(name).divide(x.shape, x.stride(), self.layers.get(x, Layer()))

        if parse(name).units == "weights":
            return []
        members = next((members for members in self.coupled if any(p is x for x in members)), [p])
        follow = {x: Blocks(1, x.numel(), 1, 1) for x in members if x.dim() < 2}
        return [UnitState({x: divided(x) for x in members if x.dim() >= 2}, follow)]

    def add_param_group(self, group: dict) -> None:
        before = {p: flat_like(p, p).float() for p in group["params"]}
        self.pruned |= {p for p in group["params"] if p.dim() >= 2 and group.get("prune", True)}
        self.opt.add_param_group(group)
        self._start(before)

    # --- the selection groups ---

    def _rivals(self) -> list[tuple[dict, Tensor, UnitState | None]]:
        """(options, tensor, units): single weights first, a set of units once."""
        found, seen = [], set()
        for group in self.opt.param_groups:
            for p in group["params"]:
                unit_set = next((unit_set for unit_set in self.sets if p in unit_set.parts), None)
                if p in self.pruned and (unit_set is None or id(unit_set) not in seen):
                    found.append((group, p, unit_set))
                    seen.add(id(unit_set))
        return sorted(found, key=lambda rival: rival[2] is not None)

    def _selection_groups(self) -> list[tuple[int, list[tuple[dict, Tensor, UnitState | None]]]]:
        """(kept, rivals): one per sparsity and pattern where the scope is global, one per rival where it is layer or erk."""
        together: dict[object, list] = {}
        erk: dict[object, list] = {}
        for rival in self._rivals():
            group = rival[0]
            if parse(group["pattern"]).kind == "N:M":
                continue
            key = (group["sparsity"], group["pattern"])
            together.setdefault((*key, None if group["scope"] == "global" else len(together)), []).append(rival)
            if group["scope"] == "erk":
                erk.setdefault(key, []).append(rival)
        budgets = {}
        for (sparsity, _), rivals in erk.items():
            sizes = [self._size(rival) for rival in rivals]
            keeps = erk_budgets([p for _, p, _ in rivals], sparsity, sizes, [self._least(rival) for rival in rivals])
            budgets |= {p: k for (_, p, _), k in zip(rivals, keeps, strict=True)}
        kept = []
        for key, rivals in together.items():
            k = max(reference.kept(sum(self._size(rival) for rival in rivals), key[0]), sum(self._least(rival) for rival in rivals))
            kept.append((budgets.get(rivals[0][1], k), rivals))
        return kept

    def _size(self, rival) -> int:
        return rival[2].numel if rival[2] else rival[1].numel()

    def _least(self, rival) -> int:
        return min(rival[0]["min_kept"], rival[2].numel) if rival[2] else 0

    def _select(self) -> None:
        for kept, rivals in self._selection_groups():
            scores = [unit_set.s if unit_set else self.states[p].s for _, p, unit_set in rivals]
            masks = reference.topk_of_sets(scores, kept, [self._least(rival) for rival in rivals])
            for (_, p, unit_set), m in zip(rivals, masks, strict=True):
                if unit_set:
                    unit_set.set_mask(m, self.states)
                else:
                    self.states[p] = self.states[p]._replace(m=m)
        for group, p, _ in self._rivals():
            pattern = parse(group["pattern"])
            if pattern.kind == "N:M":
                self.states[p] = self.states[p]._replace(m=reference.nm_mask(self.states[p].s, *pattern.sizes))

    # --- one step ---

    def _gradient(self, p: Tensor, scale: float) -> Tensor | None:
        if p.grad is None:
            return None
        inverse = torch.ones(()) / torch.tensor(scale, dtype=torch.float32)
        return flat_like(p, p.grad).float() * inverse

    def _advance(self, phase: str, scale: float) -> None:
        hyper = {p: hyper_of(group) for group in self.opt.param_groups for p in group["params"]}
        gradients = {p: self._gradient(p, scale) for p in hyper}
        followers = {p for unit_set in self.sets for p in unit_set.follow}
        alone = self.pruned - {p for unit_set in self.sets for p in unit_set.parts}
        if phase != "lower":
            for unit_set in self.sets:
                unit_set.move(self.states, gradients, hyper)
        for p, g in gradients.items():
            if g is None:
                continue
            state = self.states[p]
            moved = state
            if phase != "upper":
                dense = p not in self.pruned and p not in followers
                mask = torch.ones_like(state.m) if dense else state.m
                moved = reference.lower(state._replace(m=mask), g, hyper[p], self._rule)
            if phase != "lower" and p in alone:
                above = reference.upper(state, g, hyper[p], 0)  # the selection is over all parameters, below
                moved = moved._replace(s=above.s, u=above.u)
            self.states[p] = moved
        if phase != "lower":
            self._select()

    def step(self, phase: str | None = None, *, scale: float = 1.0, skipped: bool = False, run: Callable[[], object] | None = None):
        """One step of both.

        ``phase``: say it yourself; ``scale``: the gradients are this much too large; ``run``: instead of `opt.step`; ``skipped``: nothing
        is to happen.
        """
        expected_phase = phase or self.opt.phase
        context = getattr(self.opt, phase)() if phase else nullcontext()
        if not skipped:
            with one_thread():
                self._advance(expected_phase, scale)  # first: `run` may clear the gradients
        with context:
            (run or self.opt.step)()
        with one_thread():
            self.check(f"after a step of phase {expected_phase}")

    def random_steps(self, steps: int, seed: int = 0, phase: str | None = None, **gradients) -> None:
        """``gradients``: dtype and scale of `fill_gradients`."""
        for i in range(steps):
            fill_gradients(self.states, seed * 1000 + i, **gradients)
            self.step(phase)

    # --- comparison ---

    def check(self, when: str) -> None:
        scores = {p: reference.expand(own.s, blocks) for own in self.sets for p, blocks in own.parts.items()}
        followers = {p for unit_set in self.sets for p in unit_set.follow}
        for i, (p, state) in enumerate(self.states.items()):
            what = f"{when}, parameter {i} of shape {tuple(p.shape)}: "
            if p in self.pruned:
                assert_bits(flat_like(p, self.opt.mask_of(p)), state.m, what + "mask")
                assert_bits(flat_like(p, self.opt.scores_of(p)), scores.get(p, state.s), what + "scores")
                assert_bits(flat_like(p, self.opt.weight_of(p)), state.theta, what + "weight")
            own = self.opt.state[p]
            for name, moment in zip(MOMENTS[self._rule], (state.v, state.b), strict=False):
                assert_bits(flat_like(p, own[name]), moment, what + name)
            assert int(own.get("step", state.t)) == state.t, what + "step"
            masked = p in self.pruned or p in followers
            expected = (reference.masked(state.m, state.theta) if masked else state.theta).to(p.dtype)
            assert_bits(flat_like(p, p), expected, what + "value")
        assert all(p.grad is None or p.grad.shape == p.shape for p in self.states)


def run_of(model: torch.nn.Module, **options) -> Lockstep:
    """A Module in lock-step, at rates that move masks."""
    return Lockstep(model.parameters(), lambda: FastBiP(model, **(MOVING | options)), pruned_of(model))


def after_steps(params: list[Tensor], steps: int = 3, **options) -> FastBiP:
    """An optimizer some steps into its run."""
    opt = FastBiP(params, **(MOVING | options))
    for i in range(steps):
        fill_gradients([p for group in opt.param_groups for p in group["params"]], i)
        opt.step()
    return opt

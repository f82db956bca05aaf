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
from bip_fast.reference import Hyper, State

HYPER_KEYS = ("lr", "mask_lr", "gamma", "momentum", "mask_momentum", "weight_decay", "nesterov")


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
    return Hyper(**{key: group[key] for key in HYPER_KEYS})


def erk_budgets(params: list[Tensor], sparsity: float) -> list[int]:
    """Erdos-Renyi-Kernel, from its definition: densities in proportion to sum over product of the dimensions, none above 1."""
    total = reference.kept(sum(p.numel() for p in params), sparsity)
    raw = [Fraction(sum(p.shape), p.numel()) for p in params]
    dense: set[int] = set()
    while True:
        rest = total - sum(params[i].numel() for i in dense)
        weight = sum(raw[i] * p.numel() for i, p in enumerate(params) if i not in dense)
        density = [Fraction(1) if i in dense else raw[i] * rest / weight for i in range(len(params))]
        more = {i for i, d in enumerate(density) if d >= 1} - dense
        if not more:
            break
        dense |= more
    exact = [d * p.numel() for d, p in zip(density, params, strict=True)]
    floors = [int(x) for x in exact]
    largest = sorted(range(len(params)), key=lambda i: (floors[i] - exact[i], i))
    for i in largest[: total - sum(floors)]:
        floors[i] += 1
    return floors


class Lockstep:
    """Remember the weights, build the optimizer, then keep both sides in step."""

    def __init__(self, params: Iterable[Tensor], build: Callable[[], torch.optim.Optimizer], pruned: Iterable[Tensor] | None = None):
        self.states: dict[Tensor, State] = {}
        params = list(params)
        self.pruned = {p for p in params if p.dim() >= 2} if pruned is None else set(pruned)
        before = {p: flat_like(p, p).float() for p in params}
        self.opt = build()
        self._start(before)

    def _start(self, before: dict[Tensor, Tensor]) -> None:
        self.states |= {p: reference.start(theta, theta.numel()) for p, theta in before.items()}
        self._select()
        self.check("at the start")

    def add_param_group(self, group: dict) -> None:
        before = {p: flat_like(p, p).float() for p in group["params"]}
        self.pruned |= {p for p in group["params"] if p.dim() >= 2 and group.get("prune", True)}
        self.opt.add_param_group(group)
        self._start(before)

    # --- the selection groups ---

    def _selection_groups(self) -> list[tuple[int, list[Tensor]]]:
        """(kept, parameters): one per sparsity where the scope is global, one per parameter where it is layer or erk."""
        together: dict[object, list[Tensor]] = {}
        erk: dict[float, list[Tensor]] = {}
        for group in self.opt.param_groups:
            for p in group["params"]:
                if p in self.pruned:
                    key = (group["sparsity"], None if group["scope"] == "global" else len(together))
                    together.setdefault(key, []).append(p)
                    if group["scope"] == "erk":
                        erk.setdefault(group["sparsity"], []).append(p)
        budgets = {p: k for sparsity, params in erk.items() for p, k in zip(params, erk_budgets(params, sparsity), strict=True)}
        return [
            (budgets.get(params[0], reference.kept(sum(p.numel() for p in params), key[0])), params) for key, params in together.items()
        ]

    def _select(self) -> None:
        for kept, params in self._selection_groups():
            scores = torch.cat([self.states[p].s for p in params])
            mask = reference.topk_mask(scores, kept)
            for p, m in zip(params, mask.split([p.numel() for p in params]), strict=True):
                self.states[p] = self.states[p]._replace(m=m)

    # --- one step ---

    def _gradient(self, p: Tensor, scale: float) -> Tensor | None:
        if p.grad is None:
            return None
        inverse = torch.ones(()) / torch.tensor(scale, dtype=torch.float32)
        return flat_like(p, p.grad).float() * inverse

    def _advance(self, phase: str, scale: float) -> None:
        for group in self.opt.param_groups:
            hyper = hyper_of(group)
            for p in group["params"]:
                g = self._gradient(p, scale)
                if g is None:
                    continue
                state = self.states[p]
                moved = state
                if phase != "upper":
                    moved = reference.lower(state, g, hyper)
                if phase != "lower" and p in self.pruned:
                    above = reference.upper(state, g, hyper, 0)  # the selection is over all parameters, below
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
        for i, (p, state) in enumerate(self.states.items()):
            what = f"{when}, parameter {i} of shape {tuple(p.shape)}: "
            if p in self.pruned:
                for name, given in (("mask", self.opt.mask_of(p)), ("scores", self.opt.scores_of(p)), ("weight", self.opt.weight_of(p))):
                    field = {"mask": state.m, "scores": state.s, "weight": state.theta}[name]
                    assert_bits(flat_like(p, given), field, what + name)
                expected = reference.masked(state.m, state.theta).to(p.dtype)
            else:
                expected = state.theta.to(p.dtype)
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

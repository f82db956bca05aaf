"""Who is compared: FastBiP's steps and the same steps in torch, each as a function of (workload, case) that returns what to call.

`bip_fast.timing.plain` has the steps in plain torch. Here they are once more with foreach operations, and compiled: one fused kernel before
the selection and one after it, the threshold by torch.topk, all in a CUDA graph. The compiled one keeps everything that ties with the
threshold, so not exactly k: the strongest that torch offers, not the same contract.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import cycle
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.workload import Case, Workload
from bip_fast import FastBiP
from bip_fast.timing.plain import GAMMA, LR, MASK_LR, MOMENTUM, STEPS, WEIGHT_DECAY, PlainState, plain_state, select

Step = Callable[[PlainState, list[Tensor]], None]


class Row(NamedTuple):
    """What `measure` needs: a call, the number of steps in it, what to run before it, and what to run afterwards, which checks the call and
    returns more columns of its row."""

    call: Callable[[], object]
    each: int = 1
    before: Callable[[], object] | None = None
    after: Callable[[], dict[str, object]] = dict


def turns(steps: list[Callable[[list[Tensor]], object]], pool: list[list[Tensor]]) -> Callable[[], object]:
    """A call that takes the next instance and the next gradients."""
    instance, gradients = cycle(steps), cycle(pool)
    return lambda: next(instance)(next(gradients))


def graphed(call: Callable[[], object], times: int) -> Callable[[], object] | None:
    """``times`` calls in one CUDA graph, or None where something in them cannot be captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2 * times):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for _ in range(times):
                call()
    except RuntimeError:
        return None
    return graph.replay


# --- bip_fast ------------------------------------------------------------------------------------------------------------------------


def forget_window(opt: FastBiP) -> None:
    """Erase what the selection remembers of earlier steps, so that the next step has no window."""
    engine: Any = opt._engine
    engine.plan._workspace.zero_()


def counters(opts: list[FastBiP]) -> dict[str, int]:
    """Steps of all optimizers, and how many of them had no window or one that did not serve."""
    rows = [row for opt in opts for row in opt._engine.plan.counters()]  # type: ignore[union-attr]
    return {
        "steps": sum(int(row["steps"]) for row in rows),
        "slow": sum(int(row[name]) for row in rows for name in ("first", "missed", "crowded")),
    }


def fastbip(work: Workload, case: Case) -> Row:
    options = {"lr": LR, "mask_lr": 0.0 if case.state == "all equal" else MASK_LR, "weight_decay": WEIGHT_DECAY, "optimizer": case.rule}
    opts, steps, params = [], [], []
    for _ in range(work.instances):
        mine = [torch.nn.Parameter(weight.to(case.dtype, copy=True)) for weight in work.weights]
        opt = FastBiP(mine, density=case.density, scope=case.scope, **options)
        phase = getattr(opt, case.step)

        def step(gradients: list[Tensor], opt: FastBiP = opt, mine: list[Any] = mine, phase: Any = phase) -> None:
            for p, g in zip(mine, gradients, strict=True):
                p.grad = g
            with phase():
                opt.step()

        opts.append(opt)
        steps.append(step)
        params.append(mine)
    call = turns(steps, work.pool)
    for _ in range(2 * work.instances):
        call()
    start, begun = [opts[0].mask_of(p) for p in params[0]], counters(opts)

    def after() -> dict[str, object]:
        """Check that the steps moved the mask as such a step does; otherwise something else was timed."""
        kept = sum(int(opts[0].mask_of(p).sum()) for p in params[0])
        flips = sum(int((opts[0].mask_of(p) != m).sum()) for p, m in zip(params[0], start, strict=True))
        if case.scope == "global":
            assert kept == case.kept
        assert flips == 0 if case.step == "lower" or case.state == "all equal" else 0 < flips < 0.2 * case.n
        if case.step == "lower":
            return {}
        ended = counters(opts)
        return {"slow_steps": round((ended["slow"] - begun["slow"]) / max(1, ended["steps"] - begun["steps"]), 4)}

    def before() -> None:
        for opt in opts:
            forget_window(opt)

    return Row(call, before=before if case.state == "no window" else None, after=after)


# --- torch ---------------------------------------------------------------------------------------------------------------------------


def with_plain_state(step: Step, work: Workload, case: Case, sorted: bool = True, graph: bool = False) -> Row:
    steps = []
    for _ in range(work.instances):
        state = plain_state(work.weights, case.density, case.scope, [w.to(case.dtype, copy=True) for w in work.weights])
        state.sorted = sorted
        steps.append(partial(step, state))
    call = turns(steps, work.pool)
    replay = graphed(call, len(work.pool)) if graph else None
    if replay is None:
        return Row(call, after=lambda: {"cuda_graph": False} if graph else {})
    return Row(replay, each=len(work.pool), after=lambda: {"cuda_graph": True})


def plain(work: Workload, case: Case, sorted: bool = True) -> Row:
    return with_plain_state(STEPS[case.step], work, case, sorted)


def foreach_step(phase: str, state: PlainState, gradients: list[Tensor]) -> None:
    """The plain step with one operation for all tensors."""
    if phase != "lower":
        h = torch._foreach_mul(state.m, gradients)
        torch._foreach_mul_(h, -1 / GAMMA)
        torch._foreach_add_(h, state.theta)
        torch._foreach_mul_(h, gradients)
        torch._foreach_add_(state.s, h, alpha=-MASK_LR)
        torch._foreach_clamp_min_(state.s, 0)
        torch._foreach_clamp_max_(state.s, 1)
    if phase != "upper":
        torch._foreach_mul_(state.v, MOMENTUM)
        torch._foreach_addcmul_(state.v, state.m, gradients)
        torch._foreach_add_(state.v, state.theta, alpha=WEIGHT_DECAY)
        torch._foreach_add_(state.theta, state.v, alpha=-LR)
    if phase == "lower":
        torch._foreach_copy_(state.z, state.m)
        torch._foreach_mul_(state.z, state.theta)
    else:
        select(state)


def foreach(work: Workload, case: Case) -> Row:
    return with_plain_state(partial(foreach_step, case.step), work, case)


def _move(phase: str, theta: Tensor, v: Tensor, s: Tensor, m: Tensor, z: Tensor, g: Tensor) -> None:
    """What comes before the selection; for a lower step, all of it."""
    g = g.float()
    new_s = (s - MASK_LR * (theta - m * g / GAMMA) * g).clamp(0, 1)
    if phase != "upper":
        v.copy_(MOMENTUM * v + (m * g + WEIGHT_DECAY * theta))
        theta.copy_(theta - LR * v)
    if phase == "lower":
        z.copy_(m * theta)
    else:
        s.copy_(new_s)


def _apply(threshold: Tensor, theta: Tensor, s: Tensor, m: Tensor, z: Tensor) -> None:
    m.copy_(s >= threshold)
    z.copy_(m * theta)


def compiled(work: Workload, case: Case) -> Row:
    """One tensor. The mask is a comparison with the k-th largest score."""
    torch.compiler.reset()

    @torch.compile(dynamic=False)
    def move(theta: Tensor, v: Tensor, s: Tensor, m: Tensor, z: Tensor, g: Tensor) -> None:
        _move(case.step, theta, v, s, m, z, g)

    apply = torch.compile(_apply, dynamic=False)

    def step(state: PlainState, gradients: list[Tensor]) -> None:
        (theta,), (v,), (s,), (m,), (z,), (g,) = state.theta, state.v, state.s, state.m, state.z, gradients
        move(theta, v, s, m, z, g)
        if case.step != "lower":
            apply(torch.topk(s.view(-1), state.kept[0], sorted=False).values.min(), theta, s, m, z)

    return with_plain_state(step, work, case, graph=work.weights[0].is_cuda)


def dense(work: Workload, case: Case, kind: str) -> Row:
    """torch.optim.SGD with momentum, or AdamW, and weight decay: the price of training without pruning."""
    steps = []
    for _ in range(work.instances):
        mine = [torch.nn.Parameter(weight.to(case.dtype, copy=True)) for weight in work.weights]
        options: dict[str, Any] = {"lr": LR, "weight_decay": WEIGHT_DECAY, kind: True}
        opt = torch.optim.AdamW(mine, **options) if case.rule == "adamw" else torch.optim.SGD(mine, momentum=MOMENTUM, **options)

        def step(gradients: list[Tensor], opt: torch.optim.Optimizer = opt, mine: list[Any] = mine) -> None:
            for p, g in zip(mine, gradients, strict=True):
                p.grad = g
            opt.step()

        steps.append(step)
    return Row(turns(steps, work.pool))


# Who is timed where: a name, a maker of the row, and the cases that it is for.
PEERS: dict[str, tuple[Callable[[Workload, Case], Row], Callable[[Case], bool]]] = {
    "bip_fast": (fastbip, lambda case: True),
    "plain torch": (plain, lambda case: case.state == "warm" and case.rule == "sgd"),
    "plain torch, topk(sorted=False)": (
        partial(plain, sorted=False),
        lambda case: case.step != "lower" and case.rule == "sgd" and case._replace(layout="flat").plain,
    ),
    "foreach": (foreach, lambda case: case.layout == "resnet18" and case.scope == "global"),
    "torch.compile": (
        compiled,
        lambda case: case.plain and case.rule == "sgd" and case.n >= 1e7 and (case.step == "upper" or case.n <= 30e6),
    ),
    "SGD(fused=True), no pruning": (
        partial(dense, kind="fused"),
        lambda case: case.step == "lower" and case.rule == "sgd" and case._replace(layout="flat").plain,
    ),
    "AdamW(fused=True), no pruning": (partial(dense, kind="fused"), lambda case: case.step == "lower" and case.rule == "adamw"),
    "SGD(foreach=True), no pruning": (
        partial(dense, kind="foreach"),
        lambda case: case.step == "lower" and case.layout == "resnet18",
    ),
}


# --- masks ---------------------------------------------------------------------------------------------------------------------------


def mask_by_topk(scores: Tensor, k: int, sorted: bool = True) -> Tensor:
    mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    mask[torch.topk(scores, k, sorted=sorted).indices] = True
    return mask


def mask_by_kthvalue(scores: Tensor, k: int) -> Tensor:
    """Not exactly k: everything that ties with the k-th largest is kept as well."""
    return scores >= torch.kthvalue(scores, scores.numel() - k + 1).values


def mask_by_sort(scores: Tensor, k: int) -> Tensor:
    mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    mask[torch.sort(scores, descending=True).indices[:k]] = True
    return mask


MASKS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "torch.topk": mask_by_topk,
    "torch.topk(sorted=False)": partial(mask_by_topk, sorted=False),
    "torch.kthvalue": mask_by_kthvalue,
    "torch.sort": mask_by_sort,
}

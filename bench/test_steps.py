"""Lower, upper and joint steps of `FastBiP` against plain torch and against torch.optim.SGD, which does not prune at all."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from bench import peers
from bench.workload import DENSITY, SGD_BYTES, STEP_BYTES, Workload, make_workload

LAYOUTS = ("flat", "resnet18")


@pytest.fixture(scope="module", params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def workload(layout: str, numel: int | None, device: torch.device) -> Workload:
    return make_workload(layout, numel, device)


def group_of(step: str, layout: str, scope: str) -> str:
    return f"{step}, {layout}, {scope}"


def scopes_of(step: str, layout: str) -> tuple[str, ...]:
    """A lower step selects nothing, and of one tensor the only layer is all of it."""
    return ("global",) if step == "lower" or layout == "flat" else ("global", "layer")


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("step", ["lower", "upper", "joint"])
def test_fastbip(step: str, scope: str, layout: str, workload: Workload, measure: Callable[..., None]) -> None:
    if scope not in scopes_of(step, layout):
        pytest.skip("the same work as another row")
    from bip_fast import FastBiP

    params = [torch.nn.Parameter(weight.clone()) for weight in workload.weights]
    opt = FastBiP(params, density=DENSITY, scope=scope, lr=peers.LR, mask_lr=peers.MASK_LR, weight_decay=peers.WEIGHT_DECAY)
    phase, gradients, start = getattr(opt, step), workload.gradients(), [opt.mask_of(p).clone() for p in params]
    calls = 0

    def call() -> None:
        nonlocal calls
        calls += 1
        for p, g in zip(params, next(gradients), strict=True):
            p.grad = g
        with phase():
            opt.step()

    measure(
        call, group=group_of(step, layout, scope), implementation="bip_fast", n=workload.numel, bytes_per_weight=STEP_BYTES[step], rounds=30
    )
    flips = sum(int((opt.mask_of(p) != m).sum()) for p, m in zip(params, start, strict=True))
    kept = sum(int(opt.mask_of(p).sum()) for p in params)
    # Otherwise something else than the step was timed.
    assert (flips == 0) if step == "lower" else (0 < flips < 0.05 * workload.numel)
    if scope == "global":
        assert kept == workload.kept


@pytest.mark.parametrize("kind", ["plain torch", "plain torch, topk(sorted=False)", "torch.compile"])
@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("step", ["lower", "upper", "joint"])
def test_plain_torch(
    step: str,
    scope: str,
    kind: str,
    layout: str,
    workload: Workload,
    measure: Callable[..., None],
    device: torch.device,
    request: pytest.FixtureRequest,
) -> None:
    if scope not in scopes_of(step, layout) or (step == "lower" and "sorted" in kind):
        pytest.skip("the same work as another row")
    if kind == "torch.compile" and not request.config.getoption("--compile"):
        pytest.skip("needs --compile")
    state, gradients, run = peers.plain_state(workload.weights, DENSITY, scope), workload.gradients(), peers.STEPS[step]
    state.sorted = kind == "plain torch"
    if kind == "torch.compile":
        torch.compiler.reset()
        run = torch.compile(run)
    measure(
        lambda: run(state, next(gradients)),
        group=group_of(step, layout, scope),
        implementation=kind,
        n=workload.numel,
        bytes_per_weight=STEP_BYTES[step],
        rounds=15 if step == "lower" or device.type == "cuda" else 4,
    )


@pytest.mark.parametrize("kind", ["fused", "foreach"])
def test_sgd(kind: str, layout: str, workload: Workload, measure: Callable[..., None]) -> None:
    """torch.optim.SGD with momentum and weight decay: the price of training without pruning."""
    params = [torch.nn.Parameter(weight.clone()) for weight in workload.weights]
    opt = torch.optim.SGD(params, lr=peers.LR, momentum=peers.MOMENTUM, weight_decay=peers.WEIGHT_DECAY, **{kind: True})
    gradients = workload.gradients()

    def call() -> None:
        for p, g in zip(params, next(gradients), strict=True):
            p.grad = g
        opt.step()

    measure(
        call,
        group=group_of("lower", layout, "global"),
        implementation=f"SGD({kind}=True), no pruning",
        n=workload.numel,
        bytes_per_weight=SGD_BYTES,
        rounds=30,
    )

"""Whole iterations: forward, backward and step, of dense training, of BiP in plain torch, and of `FastBiP`.

"iteration": two batches; lower and upper step, against two dense steps. "joint iteration": one batch; one step of each. Time is the wall
clock's, so an eager row that waits for the host says so; with "CUDA graph" the host starts each batch's work at once.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from itertools import cycle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import gpu_clock
from bench.networks import DEFAULT_NETWORKS, NETWORKS, missing
from bench.workload import DENSITY
from bip_fast import FastBiP
from bip_fast.timing.plain import LR, MASK_LR, MOMENTUM, STEPS, WEIGHT_DECAY, plain_state

PHASES = {"iteration": ("lower", "upper"), "joint iteration": ("joint",)}
GRAPH = ", CUDA graph"
IMPLEMENTATIONS = ("bip_fast", "bip_fast" + GRAPH, "dense SGD(fused=True)", "dense SGD(fused=True)" + GRAPH, "plain torch")
Batch = tuple[Tensor, Tensor]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    config = metafunc.config
    names, kind = config.getoption("--networks"), torch.device(config.getoption("--device")).type
    chosen = DEFAULT_NETWORKS[kind] if names == "default" else tuple(NETWORKS) if names == "all" else tuple(names.split(","))
    if unknown := set(chosen) - set(NETWORKS):
        raise pytest.UsageError(f"--networks must be of {', '.join(NETWORKS)}, got {', '.join(sorted(unknown))}")
    kinds = [name for name in PHASES if name == "iteration" or "launches" not in metafunc.function.__name__]
    rows = [
        (network, phases, name) for network in chosen for phases in kinds for name in IMPLEMENTATIONS if kind == "cuda" or GRAPH not in name
    ]
    metafunc.parametrize(("network", "kind", "implementation"), rows, ids=["-".join(row).replace(" ", "") for row in rows])


def gradient_of(weight: Tensor) -> Tensor:
    """In the memory order of the weight, which autograd does not promise."""
    g = weight.grad
    assert g is not None
    return g if g.stride() == weight.stride() else torch.empty_like(weight).copy_(g)


class Training:
    """One network with one implementation: `batch` trains on one batch in a phase."""

    def __init__(self, network: str, implementation: str, phases: tuple[str, ...], device: torch.device) -> None:
        torch.manual_seed(0)
        self.network, self.device = NETWORKS[network], device
        self.model = self.network.build().to(device).to(memory_format=torch.channels_last).train()
        self.pool = cycle([self.network.batch(device) for _ in range(2)])
        weights = [m.weight for m in self.model.modules() if isinstance(m, (nn.modules.conv._ConvNd, nn.Linear))]
        self.n, self.phases = sum(weight.numel() for weight in weights), phases
        self.step = getattr(self, implementation.split()[0].replace("plain", "plain_torch"))(weights)
        self.batch = self.eager
        if implementation.endswith(GRAPH):
            self.batch = self.bip_fast_graph() if implementation.startswith("bip_fast") else self.dense_graph()

    @property
    def autocast(self) -> torch.dtype | None:
        return self.network.autocast if self.device.type == "cuda" else None

    def forward_backward(self, x: Tensor, y: Tensor) -> None:
        with torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast is not None, cache_enabled=False):
            loss = F.cross_entropy(self.model(x), y)
        loss.backward()

    def eager(self, x: Tensor, y: Tensor, phase: str) -> None:
        self.forward_backward(x, y)
        self.step(phase)
        for p in self.model.parameters():
            p.grad = None

    def call(self) -> None:
        for phase in self.phases:
            self.batch(*next(self.pool), phase)

    # --- steps -----------------------------------------------------------------------------------------------------------------------

    def bip_fast(self, weights: list[Tensor]) -> Callable[[str], object]:
        self.opt: Any = FastBiP(
            self.model, density=DENSITY, lr=LR, mask_lr=MASK_LR, levels="joint" if self.phases == ("joint",) else "alternating"
        )

        def step(phase: str) -> None:
            assert self.opt.phase == phase
            self.opt.step()

        return step

    def dense(self, weights: list[Tensor]) -> Callable[[str], object]:
        self.opt = torch.optim.SGD(self.model.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, fused=True)
        return lambda phase: self.opt.step()

    def plain_torch(self, weights: list[Tensor]) -> Callable[[str], object]:
        """Masked weights by `bip_fast.timing.plain`, everything else by SGD."""
        others = [p for p in self.model.parameters() if not any(p is weight for weight in weights)]
        sgd = torch.optim.SGD(others, lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, foreach=True)
        # Flat in memory order, as channels_last weights are not contiguous in theirs.
        views = [weight.detach().as_strided((weight.numel(),), (1,)) for weight in weights]
        with torch.no_grad():
            state = plain_state(views, DENSITY, z=views)

        @torch.no_grad()
        def step(phase: str) -> None:
            STEPS[phase](state, [gradient_of(w).as_strided((w.numel(),), (1,)) for w in weights])
            if phase != "upper":
                sgd.step()

        return step

    # --- in a CUDA graph ---------------------------------------------------------------------------------------------------------------

    def bip_fast_graph(self) -> Callable[[Tensor, Tensor, str], object]:
        graphs = pytest.importorskip("bip_fast.graphs", reason="bip_fast.graphs is not there: no row for GraphedIteration")
        iteration = graphs.GraphedIteration(self.model, self.opt, F.cross_entropy, autocast=self.autocast)
        for _ in range(5):
            for _ in self.phases:
                iteration(*next(self.pool))
        if getattr(iteration, "reason", None):
            pytest.skip(f"GraphedIteration runs eagerly: {iteration.reason}")
        return lambda x, y, phase: iteration(x, y)

    def dense_graph(self) -> Callable[[Tensor, Tensor, str], object]:
        """Forward, backward and fused SGD in one graph that copies its batch, as GraphedIteration does."""
        x, y = (t.clone() for t in next(self.pool))
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.eager(x, y, "")
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.eager(x, y, "")

        def batch(new_x: Tensor, new_y: Tensor, phase: str) -> None:
            x.copy_(new_x, non_blocking=True)
            y.copy_(new_y, non_blocking=True)
            graph.replay()

        return batch


def training(network: str, kind: str, implementation: str, device: torch.device) -> tuple[Training, int]:
    """With the bytes that were allocated before it."""
    if why := missing(network):
        pytest.skip(why)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    allocated = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    return Training(network, implementation, PHASES[kind], device), allocated


def test_iteration(
    network: str, kind: str, implementation: str, measure: Callable[..., None], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    run, allocated = training(network, kind, implementation, device)
    measure(
        run.call,
        group=f"{kind}, {network}",
        implementation=implementation,
        n=run.n,
        allocated=allocated,
        device_only=False,
        budget=0.6 if device.type == "cuda" else 1.5,
        density=DENSITY,
        step=kind,
        state=network,
        batch=run.network.batch_size[device.type],
        precision="bf16 autocast" if run.autocast else "fp32",
    )


def test_launches(
    network: str, kind: str, implementation: str, device: torch.device, benchmark: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the device is asked to do in one iteration."""
    if device.type != "cuda":
        pytest.skip("launches are counted on a GPU")
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    run, _ = training(network, kind, implementation, device)
    for _ in range(2):
        run.call()
    benchmark.group = f"{kind}, {network}"
    counted = benchmark.pedantic(lambda: gpu_clock.launches(run.call), rounds=1)
    benchmark.extra_info.update(implementation=implementation, calls=1, launches=counted)

"""What is timed: the cases, and the weights, gradients and scores that every implementation gets.

Nothing stays in a cache between two calls: gradients come from a rotating pool, and a workload that is smaller than the cache is
there several times ("instances", each with its own state), so that what a step reads was last touched two caches ago.
"""

from __future__ import annotations

import gc
import math
import platform
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import bip_fast
from bip_fast.timing.clock import cache_bytes
from bip_fast.timing.steps import step_bytes

DENSITY = 0.1
RESNET18 = 11_164_352  # Conv and Linear weights of ResNet-18 in its CIFAR form
SIZES = (270_000, RESNET18, 25_600_000, 138_000_000, 1_000_000_000)  # ResNet-20, ResNet-18, ResNet-50, VGG-16, a language model
DEFAULT_SIZES = {"cpu": SIZES[:2], "cuda": SIZES}
AXES_AT = {"cpu": (RESNET18,), "cuda": (25_600_000, 138_000_000)}  # where states are looked at; density and dtype at the first
DENSE_BYTES = {"sgd": 20.0, "adamw": 28.0}  # of torch's: read the gradient, read and write the weight and its moments
STATES = {"warm": "", "no window": ", no window", "all equal": ", all equal"}
DISTRIBUTIONS = ("trained-like", "uniform", "atoms 0 and 1", "all equal", "neighbouring bits")


def size_name(n: int) -> str:
    return f"{n / 1e9:.3g}G" if n >= 999_500_000 else f"{n / 1e6:.3g}M" if n >= 1e5 else str(n)


class Case(NamedTuple):
    """A step on one workload. ``state``: "warm", with a window from the step before; "no window", without; "all equal" scores."""

    step: str
    n: int
    layout: str = "flat"  # one tensor; "resnet18": its 21
    scope: str = "global"
    density: float = DENSITY
    dtype: torch.dtype = torch.float32
    state: str = "warm"
    rule: str = "sgd"

    @property
    def group(self) -> str:
        """The name of what is compared, in results and tables."""
        what = self.step + (" adamw" if self.rule == "adamw" else "") + f", {self.layout} {size_name(self.n)}, {self.scope}"
        if self.density != DENSITY:
            what += f", density {100 * self.density:g} %"
        return what + (", bf16" if self.dtype == torch.bfloat16 else "") + STATES[self.state]

    @property
    def plain(self) -> bool:
        """At the default of every axis but the step, its rule and the size."""
        return self[2:-1] == Case("", 0)[2:-1]

    @property
    def kept(self) -> int:
        return self.n - round((1 - self.density) * self.n)

    @property
    def bytes_per_weight(self) -> float:
        return step_bytes(self.step, self.density, self.dtype.itemsize, self.rule)

    def __str__(self) -> str:
        return self.group.replace(", ", "-").replace(" ", "")


def step_cases(kind: str, sizes: tuple[int, ...]) -> list[Case]:
    """Boundary lists and not a product: every size at the default of the other axes, every other axis at one or two sizes."""
    cases = [Case(step, n) for n in sizes for step in ("lower", "upper", "joint")]
    cases += [Case(step, n, rule="adamw") for n in sizes for step in ("lower", "joint")]
    axes = [n for n in AXES_AT[kind] if n in sizes] or [sizes[-1]]
    for n in axes:
        cases += [Case("upper", n, state=state) for state in ("no window", "all equal")]
    n = axes[0]
    cases += [Case("upper", n, density=density) for density in (0.5, 0.01, 0.005)]
    cases += [Case(step, n, density=0.01) for step in ("lower", "joint")]
    cases += [Case(step, n, dtype=torch.bfloat16) for step in ("lower", "upper", "joint")]
    if RESNET18 in sizes:
        scopes = [("lower", "global"), ("upper", "global"), ("upper", "layer"), ("joint", "global"), ("joint", "layer")]
        cases += [Case(step, RESNET18, "resnet18", scope) for step, scope in scopes]
    return sorted(
        cases, key=lambda case: (case.n, case.layout, case.dtype == torch.bfloat16, case.state == "all equal")
    )  # as `workload` likes


def machine(device: torch.device) -> dict[str, Any]:
    """Only what explains a number: no host names, no paths."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU {processor_name()}, {torch.get_num_threads()} threads"
    return {"device": name, "torch": torch.__version__, "python": platform.python_version(), **bip_fast.build_info()}


def processor_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip().removesuffix(" Processor")
    return platform.processor() or platform.machine()


def resnet18_shapes() -> list[tuple[int, ...]]:
    """Convolutions and the classifier of ResNet-18 in its CIFAR form: 21 tensors, 11.2 million weights."""
    shapes: list[tuple[int, ...]] = [(64, 3, 3, 3)]
    width = 64
    for out in (64, 128, 256, 512):
        for block in range(2):
            shapes += [(out, width, 3, 3), (out, out, 3, 3)]
            if block == 0 and out != width:
                shapes.append((out, width, 1, 1))
            width = out
    return [*shapes, (10, 512)]


@dataclass
class Workload:
    """Dense weights as a trained network has them, and gradients."""

    weights: list[Tensor]
    pool: list[list[Tensor]]
    instances: int  # how many states are together larger than the cache


def forget_workloads(device: torch.device) -> None:
    """Give memory back before another size."""
    workload.cache_clear()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@lru_cache(maxsize=1)
def workload(layout: str, n: int, dtype: torch.dtype, equal: bool, device: torch.device) -> Workload:
    """Weights about as wide as training leaves them; each gradient moves them a thousandth, so 1e-5 to 1e-3 of a mask flips."""
    generator = torch.Generator(device).manual_seed(0)
    shapes = resnet18_shapes() if layout == "resnet18" else [(1, n)]
    instances = 1 + min(63, math.floor(2 * cache_bytes(device) / (20 * n)))
    pool = max(2 if n > 100e6 else 4, instances)

    def normal(shape: tuple[int, ...], scale: float) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).mul_(scale)

    weights = [normal(shape, min(0.05, math.prod(shape[1:]) ** -0.5)) for shape in shapes]
    if equal:
        weights = [torch.full_like(weight, 0.5) for weight in weights]
    gradients = [[normal(shape, 0.01).to(dtype) for shape in shapes] for _ in range(pool)]
    return Workload(weights, gradients, instances)


def workload_of(case: Case, device: torch.device) -> Workload:
    return workload(case.layout, case.n, case.dtype, case.state == "all equal", device)


def scores_of(distribution: str, n: int, device: torch.device) -> Tensor:
    """Scores for the top-k: what is hard for a selection is an axis of the benchmark."""
    generator = torch.Generator(device).manual_seed(0)

    def uniform() -> Tensor:
        return torch.rand(n, generator=generator, device=device)

    def atoms() -> Tensor:
        x = uniform()
        return torch.where(x < 0.45, 0.0, torch.where(x > 0.95, 1.0, x))

    def neighbours() -> Tensor:
        return (0x3F000000 + torch.randint(0, 4, (n,), generator=generator, dtype=torch.int32, device=device)).view(torch.float32)

    makers: dict[str, Callable[[], Tensor]] = {
        "uniform": uniform,
        "trained-like": lambda: torch.randn(n, generator=generator, device=device).mul_(0.02).abs_().clamp_(max=1),
        "atoms 0 and 1": atoms,
        "all equal": lambda: torch.full((n,), 0.5, device=device),
        "neighbouring bits": neighbours,
    }
    return makers[distribution]()

"""What is timed: the shapes, states and gradients that every implementation gets, and the copy that all are measured against.

Nothing stays in a cache between two rounds. A step touches at least 16 bytes of each of 11.2 million weights (180 MB), and gradients
come from a rotating pool, so what a step reads was last touched hundreds of megabytes ago.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import torch
from torch import Tensor

DENSITY = 0.1
POOL = 4  # sets of gradients

# Bytes per weight, fp32: the compulsory traffic of DESIGN section 5. Where z is written for kept weights only, it counts in full: at 10 %
# density four of five cache lines hold a kept weight. The upper step's 0.2 is what flips.
STEP_BYTES = {"lower": 24.1, "upper": 16.3, "joint": 32.3}
SGD_BYTES = 20.0  # read gradient, weight, momentum; write weight, momentum
TOPK_BYTES = 5.0  # read a score, write a mask byte


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


def shapes_of(layout: str, numel: int | None) -> list[tuple[int, ...]]:
    """`layout` "resnet18": many tensors; "flat": one of the same size, or of `numel` entries."""
    shapes = resnet18_shapes()
    if layout == "flat":
        return [(1, numel or sum(torch.Size(shape).numel() for shape in shapes))]
    return shapes


@dataclass
class Workload:
    """Dense weights as a trained network has them, and a pool of gradients."""

    weights: list[Tensor]
    pool: list[list[Tensor]]

    @property
    def numel(self) -> int:
        return sum(weight.numel() for weight in self.weights)

    @property
    def kept(self) -> int:
        return self.numel - round((1 - DENSITY) * self.numel)

    def gradients(self) -> cycle[list[Tensor]]:
        return cycle(self.pool)


def make_workload(layout: str, numel: int | None, device: torch.device) -> Workload:
    # Weights about as wide as training leaves them, a thousandth of them moved by each gradient: 1e-5 to 1e-3 of the mask flips in a step.
    generator = torch.Generator().manual_seed(0)
    shapes = shapes_of(layout, numel)
    weights = [torch.randn(shape, generator=generator) * min(0.05, torch.Size(shape[1:]).numel() ** -0.5) for shape in shapes]
    pool = [[torch.randn(shape, generator=generator) * 0.01 for shape in shapes] for _ in range(POOL)]
    return Workload([weight.to(device) for weight in weights], [[gradient.to(device) for gradient in row] for row in pool])


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def copy_seconds(num_bytes: float, device: torch.device, rounds: int = 15) -> float:
    """Median time of a copy that moves `num_bytes`, half of them read and half written; from cold memory, like the steps."""
    entries = int(num_bytes / 8)
    pairs = [(torch.zeros(entries, device=device), torch.ones(entries, device=device)) for _ in range(2)]
    calls = 1 if device.type == "cpu" else 20

    def timed(i: int) -> float:
        start = time.perf_counter()
        for j in range(calls):
            target, source = pairs[(i + j) % 2]
            target.copy_(source)
        synchronize(device)
        return (time.perf_counter() - start) / calls

    synchronize(device)
    for i in range(3):
        timed(i)
    return statistics.median(timed(i) for i in range(rounds))


def scores_of(distribution: str, n: int, device: torch.device) -> Tensor:
    """Scores for the top-k: what is hard for a selection is an axis of the benchmark."""
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(n, generator=generator)
    makers: dict[str, Callable[[], Tensor]] = {
        "uniform": lambda: uniform,
        "trained-like": lambda: (torch.randn(n, generator=generator) * 0.02).abs().clamp(max=1),
        "atoms 0 and 1": lambda: torch.where(uniform < 0.45, 0.0, torch.where(uniform > 0.95, 1.0, uniform)),
        "all equal": lambda: torch.full((n,), 0.5),
        "neighbouring bits": lambda: (0x3F000000 + torch.randint(0, 4, (n,), generator=generator, dtype=torch.int32)).view(torch.float32),
    }
    return makers[distribution]().to(device)


DISTRIBUTIONS = ("trained-like", "uniform", "atoms 0 and 1", "all equal", "neighbouring bits")

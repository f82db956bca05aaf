"""Times on this machine: lower, upper and joint steps and `topk_mask`, beside a copy of the same bytes and beside plain torch.

The short form of the project's benchmarks, behind `bip-fast bench`. It needs torch alone. The benchmarks of the source tree use the same
clock, byte counts and plain steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..engine.native import topk_mask
from ..optimizer import FastBiP
from .clock import copy_seconds, median_seconds
from .plain import LR, MASK_LR, STEPS, WEIGHT_DECAY, plain_state

TOPK_BYTES = 5.0  # read a score, write a mask byte
LINE = 128  # bytes of a cache line on a GPU


def step_bytes(phase: str, density: float, itemsize: int = 4, rule: str = "sgd") -> float:
    """Compulsory traffic of a step in bytes per weight, with parameters and gradients of ``itemsize`` bytes. AdamW has a second moment.

    A line of z is written when it holds a kept weight: at 10 % density nearly all are. 0.15 bytes are what flips cost.
    """
    g, theta, v, s, mask, flips = itemsize, 8, 8, 8, 1 / 8, 0.15  # theta, v and s: read and write
    z = itemsize * (1 - (1 - density) ** (LINE / itemsize))
    lower = g + theta + v * (2 if rule == "adamw" else 1) + mask + z
    return {"lower": lower, "upper": g + s + theta / 2 + mask + flips, "joint": lower + s + flips}[phase]


class Row(NamedTuple):
    """Seconds of one operation: a copy of its compulsory bytes, bip_fast, plain torch."""

    name: str
    copy: float
    ours: float
    plain: float


def measure(numel: int, device: torch.device, density: float = 0.1, budget: float = 2.0) -> list[Row]:
    """Times of every step and of the mask on ``numel`` fp32 weights as large as those of a trained network.

    Args:
        budget: seconds to spend on each time of plain torch, about; the others get a half or a quarter of it.
    """
    generator = torch.Generator(device).manual_seed(0)

    def normal(scale: float) -> Tensor:
        return torch.randn(1, numel, generator=generator, device=device) * scale

    weight, gradients = normal(0.02), [normal(0.01) for _ in range(3)]
    param = torch.nn.Parameter(weight.clone())
    opt = FastBiP([param], density=density, lr=LR, mask_lr=MASK_LR, weight_decay=WEIGHT_DECAY)
    state, turn = plain_state([weight], density), 0

    def gradient() -> Tensor:
        nonlocal turn
        turn += 1
        return gradients[turn % len(gradients)]

    def ours(phase: str) -> Callable[[], None]:
        def call() -> None:
            param.grad = gradient()
            with getattr(opt, phase)():
                opt.step()

        return call

    rows = []
    for phase, step in STEPS.items():
        copy = copy_seconds(numel * step_bytes(phase, density), device, budget / 4)
        mine = median_seconds(ours(phase), device, budget / 2)
        rows.append(Row(f"{phase} step", copy, mine, median_seconds(lambda step=step: step(state, [gradient()]), device, budget)))  # type: ignore[misc]
    scores, k = state.s[0].view(-1), state.kept[0]
    mine = median_seconds(lambda: topk_mask(scores, k), device, budget / 2)
    plain_time = median_seconds(
        lambda: torch.zeros_like(scores, dtype=torch.bool).scatter_(0, torch.topk(scores, k).indices, True), device, budget
    )
    return [*rows, Row("topk_mask", copy_seconds(numel * TOPK_BYTES, device, budget / 4), mine, plain_time)]


def table(rows: list[Row]) -> str:
    """Lines for a person: milliseconds, percent of copy bandwidth, and how many times faster than plain torch."""
    lines = [f"{'':<12}{'copy':>12}{'bip_fast':>12}{'plain torch':>14}{'% of copy':>12}{'faster':>10}"]
    for row in rows:
        times = f"{1e3 * row.copy:>9.3f} ms{1e3 * row.ours:>9.3f} ms{1e3 * row.plain:>11.3f} ms"
        lines.append(f"{row.name:<12}{times}{100 * row.copy / row.ours:>10.0f} %{row.plain / row.ours:>9.1f}x")
    return "\n".join(lines)

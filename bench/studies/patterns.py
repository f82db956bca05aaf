"""The upper step of every pattern beside the unstructured one, on the
weights of a ResNet-18 (11.2 million) or of a ResNet-50 (25.5 million).

    python3 -m bench.studies.patterns                     JSON under bench/results/<device>, table
    python3 -m bench.studies.patterns --device cuda --network resnet50

All patterns take turns in every round, so that their ratios are of the same minute; warm (a window from the step before), half of the units
kept, fp32, one selection over all tensors. Gradients come from a rotating pool.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from bench.report import folder_name
from bench.workload import machine, resnet18_shapes
from bip_fast import FastBiP
from bip_fast.engine.patterns import parse
from bip_fast.timing.clock import synchronize

PATTERNS = ("unstructured", "filter", "channel", "block:16x16", "block:4x4", "block:1x32", "block:1x4", "1:2", "2:4", "4:8", "16:32")


def resnet50_shapes() -> list[tuple[int, ...]]:
    """Convolutions of ResNet-50 and its classifier: 54 tensors, 25.5 million weights."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7)]
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += [(width, inputs, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            if block == 0:
                shapes.append((4 * width, inputs, 1, 1))
            inputs = 4 * width
    return [*shapes, (1000, 2048)]


SHAPES = {"resnet18": resnet18_shapes, "resnet50": resnet50_shapes}


class Contender:
    """One pattern, with parameters and gradients of its own."""

    def __init__(self, pattern: str, shapes: list[tuple[int, ...]], device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def normal(shape: tuple[int, ...], scale: float) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=device) * scale

        self.params = [torch.nn.Parameter(normal(shape, math.prod(shape[1:]) ** -0.5)) for shape in shapes]
        self.pool = [[normal(shape, 0.01) for shape in shapes] for _ in range(2)]
        sparsity = None if parse(pattern).kind == "N:M" else 0.5
        self.opt = FastBiP(self.params, pattern=pattern, sparsity=sparsity, lr=0.01, mask_lr=0.01)
        self.device, self.turn = device, 0
        self.weights = self.opt.report().total

    def step(self) -> float:
        """Seconds of one upper step."""
        self.turn += 1
        for p, g in zip(self.params, self.pool[self.turn % 2], strict=True):
            p.grad = g
        with self.opt.upper():
            if self.device.type != "cuda":
                began = time.perf_counter()
                self.opt.step()
                return time.perf_counter() - began
            torch.cuda._sleep(2_000_000)  # so that the host is ahead, and the events time the device
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            self.opt.step()
            end.record()
            synchronize(self.device)
            return start.elapsed_time(end) / 1e3


def rows_of(network: str, device: torch.device, rounds: int) -> list[dict[str, Any]]:
    shapes = SHAPES[network]()
    contenders = {pattern: Contender(pattern, shapes, device) for pattern in PATTERNS}
    seconds: dict[str, list[float]] = {pattern: [] for pattern in PATTERNS}
    for _ in range(rounds + 5):
        for pattern, contender in contenders.items():
            seconds[pattern].append(contender.step())
    medians = {pattern: statistics.median(times[5:]) for pattern, times in seconds.items()}
    rows = []
    for pattern, median in medians.items():
        row = {"network": network, "pattern": pattern, "weights": contenders[pattern].weights}
        rows.append({**row, "seconds": median, "ratio": median / medians["unstructured"]})
    return rows


def table(results: dict[str, Any]) -> str:
    """Markdown: a line for each pattern."""
    networks = list(dict.fromkeys(row["network"] for row in results["rows"]))
    lines = [
        "| upper step | " + " | ".join(f"{name} | times unstructured" for name in networks) + " |",
        "|---|" + "---|---|" * len(networks),
    ]
    for pattern in PATTERNS:
        found = {row["network"]: row for row in results["rows"] if row["pattern"] == pattern}
        cells = [f"{1e3 * row['seconds']:.3g} ms | {row['ratio']:.2f}" for row in found.values()]
        lines.append(f"| {pattern} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python3 -m bench.studies.patterns", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", metavar="NAME", help="cpu or cuda; default: cpu")
    parser.add_argument("--network", nargs="+", choices=list(SHAPES), default=["resnet18"], help="default: resnet18")
    parser.add_argument("--rounds", type=int, default=40, metavar="N", help="turns that every pattern has; default: 40")
    parser.add_argument("--results", type=Path, default=Path(__file__).parents[1] / "results", metavar="DIR", help="default: bench/results")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    results: dict[str, Any] = {"machine": machine(device), "date": datetime.date.today().isoformat()}
    results["rows"] = [row for name in options.network for row in rows_of(name, device, options.rounds)]
    target = options.results / folder_name(results["machine"]["device"]) / "patterns.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(results, indent=1) + "\n")
    print(f"{table(results)}\n\n{target}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

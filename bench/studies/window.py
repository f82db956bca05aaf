"""How the window fares in a real run: flips, threshold, candidates and fallbacks of every mask step, as numbers and as a picture.

    python3 -m bench.studies.window                            ResNet-20 on scikit-learn's digits, dense, then BiP at 95 % zeros
    python3 -m bench.studies.window --data cifar10 --data-dir DIR --levels joint --sparsity 0.9 --mask-lr 1

Written to bench/results/<device>/window.json and window.png. The whole sparsity from the first step, and step sizes at
which masks move; other settings that are not given are those of `bip-fast prune --method bip-paper`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from bench.report import folder_name
from bench.workload import machine
from bip_fast.experiments.data.sources import load
from bip_fast.experiments.methods.begin import dense_optimizer, pruner
from bip_fast.experiments.methods.table import stages
from bip_fast.experiments.models.names import build
from bip_fast.experiments.runs.resolve import resolve
from bip_fast.experiments.runs.training import Cursor, train
from bip_fast.experiments.settings import Settings

COUNTS = ("first", "missed", "crowded", "candidates", "flips")
USUAL = {"method": "bip-paper", "lr": 0.05, "mask_lr": 1.0, "weight_decay": 5e-4}
BLUE, RED, GREY = "#0055aa", "#cc3311", "#777777"


def record(settings: Settings, data_dir: Path | None, device: torch.device) -> dict[str, list[float]]:
    """Train as `bip-fast prune` does; a number for each mask step under each name."""
    data = load(settings.data, data_dir).to(device)
    torch.manual_seed(settings.seed)
    model = build(settings.model, data.channels, data.classes).to(device).to(memory_format=torch.channels_last)
    dense, sparse = (stage.recipe for stage in stages(settings))
    train(model, dense_optimizer(model, settings), data, dense, Cursor())
    optimizer = pruner(model, settings, data)
    steps: dict[str, list[float]] = {name: [] for name in (*COUNTS, "threshold")}
    (before,) = optimizer.report().selections

    def look(cursor: Cursor) -> None:
        nonlocal before
        (now,) = optimizer.report().selections
        if now.steps == before.steps:
            return
        for name in COUNTS:
            steps[name].append(getattr(now, name) - getattr(before, name))
        steps["threshold"].append(float(f"{now.threshold:.5g}"))
        before = now

    train(model, optimizer, data, sparse, Cursor(), look)
    return steps | {"numel": before.numel, "kept": before.kept}  # type: ignore[dict-item]


def summary(steps: dict[str, Any]) -> str:
    """What a reader wants to know of a run, in one line."""
    total, n = len(steps["flips"]), steps["numel"]
    fast = total - sum(sum(steps[name]) for name in ("first", "missed", "crowded"))
    flips, candidates = (statistics.median(steps[name]) for name in ("flips", "candidates"))
    passes = f"{fast} in one pass, {sum(steps['missed'])} missed the window, {sum(steps['crowded'])} found it crowded"
    medians = f"median flips {flips:g} ({flips / n:.1e} of the weights), candidates {candidates:g} ({candidates / n:.1e})"
    return f"{total} mask steps over {n:,} weights: {passes}; {medians}"


def chart(results: dict[str, Any], path: Path) -> None:
    """Three panels over the mask steps; fallbacks are marked."""
    from matplotlib.figure import Figure

    steps, n = results["steps"], results["steps"]["numel"]
    figure = Figure(figsize=(11, 3.4), layout="constrained", facecolor="white")
    panels = figure.subplots(1, 3)
    turns = range(1, len(steps["flips"]) + 1)
    fell = [i for i in turns if steps["missed"][i - 1] or steps["crowded"][i - 1]]
    titles = {"flips": "mask entries that flip, share", "threshold": "threshold (score)", "candidates": "candidates in the window, share"}
    for axes, (name, title) in zip(panels, titles.items(), strict=True):
        values = steps[name] if name == "threshold" else [value / n for value in steps[name]]
        axes.plot(turns, values, color=BLUE, linewidth=1)
        axes.plot(fell, [values[i - 1] for i in fell], "o", color=RED, markersize=4, label=f"fell back: {len(fell)} of {len(turns)} steps")
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("mask step", fontsize=9)
        axes.grid(alpha=0.25)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        if name != "threshold":
            axes.set_yscale("symlog", linthresh=1 / n)
            axes.set_ylim(bottom=0)
    panels[1].legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python3 -m bench.studies.window", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, metavar="DIR")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), metavar="NAME", help="default: cpu")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: bench/results/<device>")
    for name, kind in {"data": str, "model": str, "levels": str, "sparsity": float, "mask_lr": float, "lr": float, "epochs": int}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=argparse.SUPPRESS, metavar="X")
    options = vars(parser.parse_args(arguments))
    data_dir, device, out = (options.pop(name) for name in ("data_dir", "device", "out"))
    settings = resolve({**USUAL, **options})
    steps = record(settings, data_dir, device)
    results = {"machine": machine(device), "date": datetime.date.today().isoformat(), "settings": settings.as_dict(), "steps": steps}
    folder = out or Path(__file__).parents[1] / "results" / folder_name(results["machine"]["device"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "window.json").write_text(json.dumps(results) + "\n")
    chart(results, folder / "window.png")
    print(summary(steps))
    return 0


if __name__ == "__main__":
    sys.exit(main())

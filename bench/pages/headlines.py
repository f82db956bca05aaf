"""The three results that the README and the site begin with, from the committed files, each with the command that measured it."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from bench import report
from bench.workload import size_name

CPU, GPU = "cpu-amd-epyc-2-threads", "nvidia-h200"
STEPS = "python3 -m pytest bench --benchmark-json=raw.json --sizes all"
Row = dict[str, Any]


def near_budget(row: Row, rows: list[Row]) -> bool:
    """Whether a pruned network had as many epochs in all as those of joint BiP; a method may have a few batches more."""
    budget = next(row["epochs_total"] for row in rows if row["label"] == "BiP joint")
    return bool(row["sparsity"]) and abs(row["epochs_total"] - budget) < 0.01 * budget


def accuracies(rows: list[Row]) -> dict[str, dict[float, float]]:
    """Mean accuracy in percent over seeds, by label and sparsity, of what was pruned with as many epochs as joint BiP."""
    found: dict[str, dict[float, list[float]]] = {}
    for row in rows:
        if near_budget(row, rows):
            found.setdefault(row["label"], {}).setdefault(row["sparsity"], []).append(100 * row["accuracy"])
    return {label: {s: statistics.mean(values) for s, values in by_sparsity.items()} for label, by_sparsity in found.items()}


def _accuracy(folder: Path) -> str:
    rows = report.read(folder / CPU / "quick.json")["rows"]  # type: ignore[index]
    means = accuracies(rows)
    ours = means.pop("BiP joint")
    epochs = next(row["epochs_total"] for row in rows if row["label"] == "BiP joint")
    parts = []
    for sparsity, own in ours.items():
        label, next_best = max(((label, values[sparsity]) for label, values in means.items()), key=lambda pair: pair[1])
        parts.append(f"{own:.1f} % at {100 * sparsity:g} % zeros ({label}, the best of the others: {next_best:.1f} %)")
    return f"A small ResNet-20 on Fashion-MNIST, two seeds, {len(means) + 1} methods with {epochs:.0f} epochs each: {', '.join(parts)}"


def _step(folder: Path) -> str:
    def upper(device: str) -> dict[int, dict[str, Row]]:
        found: dict[int, dict[str, Row]] = {}
        for row in report.read(folder / device / "results.json")["rows"]:  # type: ignore[index]
            if row["group"] == f"upper, flat {size_name(row['n'])}, global" and row["density"] == 0.1:
                found.setdefault(row["n"], {})[row["implementation"]] = row
        return found

    gpu, cpu = upper(GPU), upper(CPU)
    large, small = gpu[max(gpu)]["bip_fast"], cpu[max(cpu)]
    share = 100 * large["copy_seconds"] / large["median_seconds"]
    ours, torch = small["bip_fast"]["median_seconds"], small["plain torch, topk(sorted=False)"]["median_seconds"]
    return (
        f"{large['n'] / 1e6:,.0f} million weights on an H200: {1e3 * large['median_seconds']:.2f} ms, "
        f"{share:.0f} % of the speed of a copy of the same bytes; "
        f"{max(cpu) / 1e6:.1f} million on two CPU threads: {1e3 * ours:.1f} ms, {torch / ours:.0f} times faster than plain torch"
    )


def _structured(folder: Path) -> str:
    rows = report.read(folder / CPU / "structured.json")["rows"]  # type: ignore[index]
    dense = {row["seed"]: row["accuracy"] for row in rows if row["data"] == "fashion-mnist" and row["method"] == "dense"}
    ours = [row for row in rows if row["data"] == "fashion-mnist" and row["method"] == "BiP joint"]
    lost = [100 * (dense[row["seed"]] - row["shrunk_accuracy"]) for row in ours]
    variants = [{variant["name"]: variant for variant in row["torch"]["variants"]} for row in ours]
    faster = " and ".join(dict.fromkeys(f"{own['shrunk']['speedup']['64']:.1f}" for own in variants))
    gone = 100 * (1 - variants[0]["shrunk"]["flops"] / variants[0]["dense"]["flops"])
    return (
        f"ResNet-20 on Fashion-MNIST in torch, batch 64, two seeds: {faster} times faster with {gone:.0f} % of the arithmetic gone, "
        f"{' and '.join(f'{x:.1f}' for x in lost)} points of accuracy lost"
    )


HEADLINES = (
    ("More accuracy for the same training", _accuracy, "bip-fast compare configs/quick.yaml --data-dir DIR"),
    ("An exact top-k mask step at memory speed", _step, STEPS),
    ("Half of the filters removed", _structured, "python3 -m bench.studies.structured --data-dir DIR --seeds 0 1"),
)


def table(folder: Path) -> str:
    """Markdown: a line for each result, from the files under ``folder``, which is bench/results."""
    lines = ["| result | measured | command |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| **{what}** | {measured(folder)} | `{command}` |" for what, measured, command in HEADLINES)])

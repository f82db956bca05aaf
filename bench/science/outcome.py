"""What comes out of the study: rows in a CSV file as runs end, a table and a picture beside the paper's figures, a summary, an archive."""

from __future__ import annotations

import csv
import json
import os
import statistics
import tarfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bip_fast.atomic import write_beside
from bip_fast.tables import escaped

__all__ = ["PAPER", "append_rows", "archive", "picture", "summary", "table", "unpacked"]

Row = dict[str, Any]
COLUMNS = (
    "label", "method", "levels", "lr", "mask_lr", "ramp", "sparsity", "sparsity_exact", "kept", "seed", "accuracy", "loss",
    "dense_accuracy", "dense_epochs", "epochs", "image_passes", "seconds", "device", "torch", "bip_fast", "folder",
)  # fmt: skip
# CIFAR-10 / ResNet-20: accuracy in percent at percent of zeros, read off figure 3 of the paper (arXiv 2210.04092), give or take 0.05.
PERCENT = (20.0, 36.0, 48.8, 59.0, 67.2, 73.8, 79.0, 83.2, 86.6, 89.3, 91.4, 93.1, 94.5, 95.6, 96.5)
PAPER_DENSE = 92.12
PAPER: dict[str, tuple[float | None, ...]] = {
    "BiP": (92.36, 92.39, 92.16, 92.08, 92.13, 91.99, 91.97, 91.74, 91.25, 90.96, 90.77, 90.91, 91.02, 89.98, 89.58),
    "IMP": (91.88, 91.82, 92.07, 92.26, 92.21, 92.15, None, 91.59, None, 90.84),
    "Hydra": (91.66, 92.08, 91.98, 91.89, 91.80, 91.68, 91.71, 91.45, 90.72, 90.05),
    "OMP": (91.54, 91.53, 91.29, 90.65, 90.44, 90.08, 89.28),
    "GraSP": (91.41, 91.19, 90.75, 90.39, 90.03, 89.77, 89.15),
}
COLOURS = ("#0055aa", "#cc3311", "#009988", "#ee7733", "#882255", "#33bbee")
MARKERS = "osD^vP"


def append_rows(path: Path, rows: Sequence[Row]) -> list[Row]:
    """Append the rows that are not in the file yet, and see that they are on the disk; returns these."""
    known: set[str] = set()
    if path.exists():
        with path.open(newline="") as file:
            known = {str(row["folder"]) for row in csv.DictReader(file)}
    new = [row for row in rows if row["folder"] not in known]
    if new or not path.exists():
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
            if not file.tell():
                writer.writeheader()
            writer.writerows(new)
            file.flush()
            os.fsync(file.fileno())
    return new


def summary(rows: Sequence[Row]) -> list[Row]:
    """Mean and sample standard deviation over seeds, in percent, of every method and sparsity."""
    groups: dict[tuple[str, float], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["label"], row["sparsity"]), []).append(row)
    lines = []
    for (label, sparsity), own in groups.items():
        values = [100 * row["accuracy"] for row in own]
        deviation = statistics.stdev(values) if len(values) > 1 else None
        seeds = sorted(row["seed"] for row in own)
        lines.append({"label": label, "sparsity": sparsity, "accuracy": statistics.mean(values), "deviation": deviation, "seeds": seeds})
    return lines


def of_the_paper(method: str, sparsity: float) -> float | None:
    """Accuracy of the paper in percent at the sparsity that is nearest, if it is as good as the same."""
    nearest = min(range(len(PERCENT)), key=lambda i: abs(PERCENT[i] - 100 * sparsity))
    if abs(PERCENT[nearest] - 100 * sparsity) > 0.1 or nearest >= len(PAPER[method]):
        return None
    return PAPER[method][nearest]


def table(rows: Sequence[Row], labels: Sequence[str], sparsities: Sequence[float]) -> str:
    """Markdown: a line for each of ``labels``, a column for each sparsity, mean and deviation over seeds and how many seeds.

    Then the lines of the paper, which has one network for each."""
    found = {(line["label"], line["sparsity"]): line for line in summary(rows)}
    lines = ["| | " + " | ".join(f"{100 * s:.4g} %" for s in sparsities) + " |", "|---" * (len(sparsities) + 1) + "|"]

    def cell(line: Row | None) -> str:
        if line is None:
            return ""
        deviation = "" if line["deviation"] is None else f" ± {line['deviation']:.2f}"
        return f"{line['accuracy']:.2f}{deviation} ({len(line['seeds'])})"

    for label in labels:
        cells = [cell(found.get((label, 0.0)) or found.get((label, s))) for s in sparsities]
        lines.append("| " + " | ".join([escaped(label), *cells]) + " |")
    lines.append("| " + " | ".join(["the paper: dense", *[f"{PAPER_DENSE:.2f}"] * len(sparsities)]) + " |")
    for method in PAPER:
        values = [of_the_paper(method, s) for s in sparsities]
        lines.append("| " + " | ".join([f"the paper: {method}", *("" if v is None else f"{v:.2f}" for v in values)]) + " |")
    return "\n".join(lines)


def picture(path: Path, rows: Sequence[Row], labels: Sequence[str], title: str) -> None:
    """Every run as a point and a line through the means, on the paper's curves in grey."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 5.4), layout="constrained", facecolor="white")
    axes = figure.subplots()
    for (method, values), style in zip(PAPER.items(), ("-", "--", ":", "-.", (0, (1, 3))), strict=True):
        shown = [(1 - p / 100, v) for p, v in zip(PERCENT, values, strict=False) if v is not None]
        axes.plot(*zip(*shown, strict=True), color="#999999", linestyle=style, linewidth=1.3, label=f"the paper: {method}", zorder=1)
    axes.axhline(PAPER_DENSE, color="#cccccc", linewidth=1, label=f"the paper: dense, {PAPER_DENSE:.2f} %", zorder=0)
    dense = [100 * row["accuracy"] for row in rows if not row["sparsity"]]
    if dense:
        axes.axhline(statistics.mean(dense), color="black", linewidth=1, label=f"dense, {statistics.mean(dense):.2f} %", zorder=0)
    for i, label in enumerate(label for label in labels if label != "dense"):
        own = [row for row in rows if row["label"] == label]
        look = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
        beside = 1 + 0.01 * (1.5 - i)  # so that points do not hide each other
        means = sorted(((1 - line["sparsity"]) * beside, line["accuracy"]) for line in summary(own))
        if means:
            axes.plot(*zip(*means, strict=True), color=look["color"], linewidth=1.6, zorder=2)
            points = [(1 - row["sparsity"]) * beside for row in own], [100 * row["accuracy"] for row in own]
            axes.scatter(*points, **look, s=24, edgecolor="white", linewidth=0.5, label=label, zorder=3)
    axes.set_xscale("log")
    axes.invert_xaxis()
    ticks = (20.0, 48.8, 67.2, 79.0, 89.3, 95.6)
    axes.set_xticks([1 - p / 100 for p in ticks], [f"{p:g}" for p in ticks])
    axes.minorticks_off()
    low = min([89.0, *(100 * row["accuracy"] for row in rows)])
    axes.set_ylim(max(low - 0.3, 80.0) if low > 80 else 0, 93.2)
    axes.set_xlabel("zeros among all Conv and Linear weights, % (log scale of what is kept)")
    axes.set_ylabel("test accuracy after the last epoch, %")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    write_beside(path, lambda beside: figure.savefig(beside, dpi=140))


KEPT = ("report.json", "config.json", "model.safetensors")


def archive(path: Path, work: Path, folders: Sequence[str], others: Sequence[str]) -> None:
    """Reports, settings and networks of the runs in ``folders`` of ``work``, and the files ``others`` there, in one tar.gz."""

    def pack(beside: Path) -> None:
        with tarfile.open(beside, "w:gz", compresslevel=6) as tar:
            for name in [*others, *(f"{folder}/{name}" for folder in folders for name in KEPT)]:
                if (work / name).is_file():
                    tar.add(work / name, name)

    write_beside(path, pack)


def unpacked(path: Path, work: Path) -> None:
    """Put back what `archive` has packed; runs that are there stay."""
    with tarfile.open(path) as tar:
        for member in tar:
            if not (work / member.name).exists():
                tar.extract(member, work, filter="data")


def write(path: Path, text: str) -> None:
    write_beside(path, partial(Path.write_text, data=text))


def write_json(path: Path, value: Any) -> None:
    write(path, json.dumps(value, indent=1) + "\n")

"""The picture of a run: loss, accuracy and mask changes over its epochs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["curves"]

DENSE, PRUNED, GREY = "#4477aa", "#cc3311", "#777777"


def curves(report: dict[str, Any], path: Path) -> None:
    """Draw ``report`` (the content of report.json) to ``path``: readable on a light and on a dark page."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

    figure = Figure(figsize=(11, 3.4), facecolor="white")
    margins = {"left": 0.055, "right": 0.99, "bottom": 0.14, "top": 0.91, "wspace": 0.18}  # given: to find them takes longer than to draw
    loss, accuracy, masks = figure.subplots(1, 3, gridspec_kw=margins)
    start, history = 0, {stage: rows for stage, rows in report["history"].items() if rows}
    pruned = f"pruning, {100 * report['sparsity']:.4g} % zeros"
    for stage, rows in history.items():
        dense = stage == "pretrain" or report["method"] == "dense"
        label = None if start and stage != list(history)[1] else "dense training" if dense else pruned
        colour = DENSE if dense else PRUNED
        epochs = [start + i for i in range(1, len(rows) + 1)]
        marker = "o" if len(rows) < 4 else ""  # a line through one point cannot be seen
        loss.plot(epochs, [row["loss"] for row in rows], color=colour, marker=marker, label=label)
        accuracy.plot(epochs, [100 * row["accuracy"] for row in rows], color=colour, marker=marker)
        if not dense:
            masks.plot(epochs, [100 * row["mask_changes"] for row in rows], color=colour, marker=marker)
        start += len(rows)
    part = report["evaluated_on"]
    for name, colour in (("dense", DENSE), ("pruned", PRUNED)):
        if name not in report:
            continue
        value = 100 * report[name]["accuracy"]
        accuracy.axhline(value, color=colour, linestyle="--", linewidth=1, label=f"{name}, {part}: {value:.2f} %")
    for axes, title in ((loss, "training loss"), (accuracy, "training accuracy, %"), (masks, "mask entries changed in an epoch, %")):
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("epoch", fontsize=9)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.25)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    losses = [row["loss"] for rows in history.values() for row in rows]
    if losses and 0 < 4 * min(losses) < max(losses):
        loss.set_yscale("log")
        loss.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        loss.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        loss.yaxis.set_minor_formatter(NullFormatter())
    if history:
        loss.legend(fontsize=8, frameon=False)
    shown = [100 * row["accuracy"] for rows in history.values() for row in rows] + [100 * report["pruned"]["accuracy"]]
    accuracy.set_ylim(max(0, sorted(shown)[len(shown) // 5] - 5), 100.5)
    accuracy.legend(fontsize=8, frameon=False, loc="lower right")
    masks.set_ylim(bottom=0)
    figure.savefig(path, dpi=130)

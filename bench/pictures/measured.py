"""Pictures of committed results."""

from __future__ import annotations

import statistics
from typing import Any

from matplotlib import pyplot

from bench import report
from bench.pages.headlines import CPU, GPU, near_budget
from bench.pictures.style import BLUE, GREY, LIGHT, ORANGE, TEAL, figure
from bench.readme import RESULTS
from bench.workload import size_name

# --- accuracy ----------------------------------------------------------------------------------------------------------------------


def accuracy_data() -> dict[str, Any]:
    """By sparsity and method, the accuracies in percent of all seeds, of what had the budget of joint BiP; and those of dense networks."""
    rows = report.read(RESULTS / CPU / "quick.json")["rows"]  # type: ignore[index]
    found: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        if row["sparsity"] in (0.95, 0.98) and row["label"] != "random" and near_budget(row, rows):
            found.setdefault(f"{100 * row['sparsity']:g}", {}).setdefault(row["label"], []).append(100 * row["accuracy"])
    dense: dict[str, list[float]] = {}
    for row in rows:
        if not row["sparsity"]:
            dense.setdefault(f"{row['epochs_total']:.0f}", []).append(100 * row["accuracy"])
    return {"dense": {epochs: statistics.mean(values) for epochs, values in dense.items()}, "sparsities": found}


def accuracy(data: dict[str, Any]) -> Any:
    drawn, all_axes = figure(8.2, 3.1, 2, sharey=True)
    order = sorted(data["sparsities"]["98"], key=lambda name: statistics.mean(data["sparsities"]["98"][name]))
    for axes, (sparsity, methods) in zip(all_axes, data["sparsities"].items(), strict=True):
        for y, name in enumerate(order):
            mean = statistics.mean(methods[name])
            colour = TEAL if name == "BiP joint" else GREY
            axes.plot([min(methods[name]), max(methods[name])], [y, y], color=colour, linewidth=3, alpha=0.35, solid_capstyle="round")
            axes.plot(mean, y, "o", color=colour, markersize=8)
            axes.annotate(
                f"{mean:.1f}",
                (max(methods[name]), y),
                xytext=(8, 0),
                textcoords="offset points",
                va="center",
                fontsize=9,
                color=colour,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
            )
        for style, (epochs, mean) in zip((":", "--"), data["dense"].items(), strict=True):
            axes.axvline(
                mean, color=GREY, linestyle=style, linewidth=1.2, zorder=0, label=f"dense network after {epochs} epochs: {mean:.1f}"
            )
        axes.set_yticks(range(len(order)), order)
        axes.set_title(f"{sparsity} % zeros")
        axes.set_xlabel("test accuracy, %")
        axes.set_xlim(75.5, 86.8)
        axes.set_ylim(-0.6, len(order) - 0.4)
        axes.grid(axis="x", color=LIGHT)
        axes.spines[["top", "right"]].set_visible(False)
    seeds = pyplot.Line2D([], [], color=GREY, linewidth=3, alpha=0.35)
    lines, labels = all_axes[0].get_legend_handles_labels()
    drawn.legend([seeds, *lines], ["range of the seeds", *labels], loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    all_axes[0].get_yticklabels()[order.index("BiP joint")].set_fontweight("bold")
    return drawn


# --- the upper step ------------------------------------------------------------------------------------------------------------------

NAMES = {
    "copy": "a copy of the same bytes",
    "bip_fast": "bip_fast",
    "plain torch, topk(sorted=False)": "plain torch, without a sort",
    "plain torch": "plain torch",
}


def upper_data() -> dict[str, dict[str, float]]:
    """Milliseconds of an upper step by implementation, at the largest size that all of them have, on the CPU and on the GPU."""
    found = {}
    for folder in (CPU, GPU):
        results = report.read(RESULTS / folder / "results.json")
        by_size: dict[int, dict[str, Any]] = {}
        for row in results["rows"]:  # type: ignore[index]
            if row["group"] == f"upper, flat {size_name(row['n'])}, global" and row["density"] == 0.1:
                by_size.setdefault(row["n"], {})[row["implementation"]] = row
        n = max(n for n, rows in by_size.items() if len(NAMES.keys() & rows.keys()) == len(NAMES) - 1)
        rows = by_size[n]
        times = {"copy": rows["bip_fast"]["copy_seconds"]} | {name: rows[name]["median_seconds"] for name in list(NAMES)[1:]}
        where = results["machine"]["device"].removeprefix("CPU ")  # type: ignore[index]
        found[f"{where}, {n / 1e6:.3g} million weights"] = {name: 1e3 * seconds for name, seconds in times.items()}
    return found


def upper_step(data: dict[str, dict[str, float]]) -> Any:
    drawn, all_axes = figure(8.2, 2.4, 2, sharey=True)
    colours = {"copy": LIGHT, "bip_fast": TEAL, "plain torch, topk(sorted=False)": BLUE, "plain torch": ORANGE}
    for axes, (title, times) in zip(all_axes, data.items(), strict=True):
        for y, (name, milliseconds) in enumerate(reversed(times.items())):
            axes.barh(y, milliseconds, color=colours[name], height=0.72)
            axes.annotate(f"{milliseconds:.3g} ms", (milliseconds, y), xytext=(4, 0), textcoords="offset points", va="center", fontsize=9)
        axes.set_yticks(range(len(times)), [NAMES[name] for name in reversed(times)])
        axes.set_xlim(0, 1.25 * max(times.values()))
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("milliseconds for an upper step")
        axes.spines[["top", "right"]].set_visible(False)
    return drawn


# --- shrunk networks -----------------------------------------------------------------------------------------------------------------


def zoo_data() -> dict[str, float]:
    """Percent of the parameters that are left, by network."""
    rows = report.read(RESULTS / CPU / "zoo.json")["rows"]  # type: ignore[index]
    return {row["network"]: round(100 * row["after"] / row["before"], 1) for row in rows if row.get("same")}


def zoo(data: dict[str, float]) -> Any:
    drawn, axes = figure(8.2, 0.7 + 0.155 * len(data))
    order = sorted(data, key=lambda name: data[name], reverse=True)
    axes.barh(range(len(order)), [data[name] for name in order], color=TEAL, height=0.72)
    for y, name in enumerate(order):
        axes.annotate(f"{data[name]:.0f}", (data[name], y), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_yticks(range(len(order)), order, fontsize=8)
    axes.set_ylim(-0.7, len(order) - 0.3)
    axes.set_xlim(0, 105)
    axes.set_xlabel("parameters that are left, % (half of the filters of every layer are pruned)")
    axes.spines[["top", "right"]].set_visible(False)
    return drawn


def shrunk_data() -> dict[str, dict[str, float]]:
    """Milliseconds of joint BiP's networks, dense and shrunk, mean over seeds, by data and runtime."""
    rows = report.read(RESULTS / CPU / "structured.json")["rows"]  # type: ignore[index]
    found: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        for runtime, title in (("torch", "torch"), ("onnxruntime", "ONNX Runtime")):
            if row["method"] == "BiP joint" and runtime in row:
                for variant in row[runtime]["variants"]:
                    if variant["name"] in ("dense", "masked", "shrunk"):
                        times = found.setdefault(f"{row['data']}, {title}", {})
                        times.setdefault(variant["name"], []).append(variant["milliseconds"]["64"])
    return {where: {name: round(statistics.mean(values), 3) for name, values in times.items()} for where, times in found.items()}


def shrunk(data: dict[str, dict[str, float]]) -> Any:
    drawn, all_axes = figure(8.2, 1.9, len(data), sharey=True)
    for axes, (where, times) in zip(all_axes, data.items(), strict=True):
        for y, (name, milliseconds) in enumerate(reversed(times.items())):
            axes.barh(y, milliseconds, color=TEAL if name == "shrunk" else LIGHT, height=0.72)
            axes.annotate(f"{milliseconds:.3g} ms", (milliseconds, y), xytext=(4, 0), textcoords="offset points", va="center", fontsize=9)
        axes.set_yticks(range(len(times)), list(reversed(times)))
        axes.set_xlim(0, 1.35 * max(times.values()))
        axes.set_title(where, fontsize=10)
        axes.set_xlabel("ms for a batch of 64")
        axes.spines[["top", "right"]].set_visible(False)
    return drawn


PICTURES: dict[str, tuple[str, Any, Any]] = {
    "accuracy": ("Accuracy at 95 and 98 % zeros by method, all with the same training budget", accuracy_data, accuracy),
    "shrunk": ("Time of a ResNet-20: dense, with half of its filters zero, and with these removed", shrunk_data, shrunk),
    "zoo": ("Parameters that are left when half of the filters are removed", zoo_data, zoo),
    "upper-step": ("Time of an upper step beside a copy and plain torch", upper_data, upper_step),
}

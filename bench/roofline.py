"""The picture of percent of copy bandwidth against the number of weights: one panel per operation, one line per implementation.

The percentage counts the bytes that the operation must move, whatever an implementation moves: 100 is the speed of memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.workload import size_name

Row = dict[str, Any]
PANELS = ("lower", "upper", "joint", "top-k")
TITLES = {"lower": "lower step", "upper": "upper step", "joint": "joint step", "top-k": "topk_mask"}
TICKS = [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200]
COLOURS = {
    "bip_fast": "#0055aa",
    "bip_fast, no window": "#66aadd",
    "bip_fast, all equal": "#33bbee",
    "plain torch": "#cc3311",
    "plain torch, topk(sorted=False)": "#ee7733",
    "torch.compile": "#aa4499",
    "SGD(fused=True), no pruning": "#777777",
    "CUB DeviceTopK, bare": "#117733",
    "torch.topk": "#cc3311",
    "torch.topk(sorted=False)": "#ee7733",
    "torch.topk(sorted=False), bare": "#ddaa33",
    "torch.kthvalue": "#999933",
    "torch.sort": "#882255",
}


def lines_of(rows: list[Row], panel: str) -> dict[str, list[tuple[int, float]]]:
    """(n, percent) by implementation: flat fp32 workloads at the usual density; states of the selection as lines of their own."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        usual = "flat" in row["group"] or (panel == "top-k" and row.get("state") == "trained-like")
        if row.get("step") != panel or not usual or row["density"] != 0.1 or "bf16" in row["group"]:
            continue
        state = "" if panel == "top-k" or row["state"] == "warm" else f", {row['state']}"
        name = row["implementation"] + state
        if name in COLOURS:
            lines.setdefault(name, []).append((row["n"], 100 * row["copy_seconds"] / row["median_seconds"]))
    return {name: sorted(points) for name, points in lines.items()}


def chart(results: dict[str, Any], path: Path) -> None:
    """Write the picture to ``path``; nothing when no row says which step it is, as in results of an older form."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = {panel: lines_of(results["rows"], panel) for panel in PANELS}
    if not any(panels.values()):
        return
    figure, grid = pyplot.subplots(2, 2, figsize=(10, 10), sharex=True, sharey=True, layout="constrained")
    sizes = sorted({n for lines in panels.values() for points in lines.values() for n, _ in points})
    lowest = min(percent for lines in panels.values() for points in lines.values() for _, percent in points)
    highest = max(percent for lines in panels.values() for points in lines.values() for _, percent in points)
    for axes, (panel, lines) in zip(grid.flat, panels.items(), strict=True):
        axes.axhline(100, color="black", linewidth=0.8)
        for name, points in sorted(lines.items(), key=lambda line: list(COLOURS).index(line[0])):
            ours = name.startswith("bip_fast")
            style = {"linewidth": 2.2 if name == "bip_fast" else 1.3, "linestyle": "-" if ours else "--", "marker": "o" if ours else "s"}
            axes.plot(*zip(*points, strict=True), color=COLOURS[name], label=name, markersize=4, **style)
        axes.set_title(TITLES[panel], fontsize=10)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_ylim(lowest / 1.5, max(150, 1.3 * highest))
        shown = [tick for tick in TICKS if lowest / 1.5 <= tick <= max(150, 1.3 * highest)]
        axes.set_yticks(shown, [f"{tick:g} %" for tick in shown])
        axes.set_xticks(sizes, [size_name(n) for n in sizes], fontsize=8)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        if lines:
            axes.legend(fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.07), ncols=2)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("weights", fontsize=9)
    figure.supylabel("percent of the bandwidth of a copy in the same run", fontsize=9)
    figure.suptitle(f"{results['machine']['device']}, fp32, 10 % kept", fontsize=11)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)

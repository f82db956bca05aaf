"""The architecture: the floors of the package, each above all that it imports, and the way of a gradient through them."""

from __future__ import annotations

from typing import Any

from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from bench.pictures.style import GREY, INK, ORANGE, PALE, figure, plain

SAND, GREEN, LILAC, ROSE, SKY = "#f7ecd8", "#e1ecd9", "#e7e0f0", "#f6ddd3", "#dbe8f6"
WIDTH = 16.4
# Floors from the top: rooms of a floor side by side, each with its share of the width, name, what is in it and colour.
FLOORS: list[list[tuple[float, str, str, str]]] = [
    [(1, "commands/", "the command line: prune, compare, measure, report, bench, doctor", SAND)],
    [(1, "experiments/", "whole runs on public data, for comparisons: data, models, methods, runs, compare", GREEN)],
    [
        (0.36, "integrations/", "trainers of other packages", LILAC),
        (0.40, "export/", "smaller and faster networks, mask files", LILAC),
        (0.24, "timing/", "the short benchmark", LILAC),
    ],
    [
        (0.5, "optimizer.py", "FastBiP: what a user calls", ROSE),
        (0.5, "schedule.py, presets.py, graphs.py, ...", "growing sparsity, defaults, CUDA graphs", ROSE),
    ],
    [
        (0.5, "engine/engine.py, launch/", "the tables that the kernels read, and the step", SKY),
        (0.5, "arena.py, coverage.py, budgets.py, units.py, ...", "where state lives, what is pruned, who competes", SKY),
    ],
    [(0.5, "engine/native.py", "the door to csrc", SKY), (0.5, "patterns.py, layers.py, options.py, ...", "rules and tables", SKY)],
    [
        (0.5, "csrc/bindings.cpp, bip.h", "pointers, sizes and a stream: no torch", PALE),
        (0.5, "update_rule.h, order_key.h, window.h, ...", "the arithmetic that both backends share", PALE),
    ],
    [(0.5, "csrc/cpu/", "threads and vector code", PALE), (0.5, "csrc/cuda/", "the same on a GPU, or on the simulator", PALE)],
]


def data() -> dict[str, Any]:
    return {"floors": FLOORS}


def house(drawing: dict[str, Any]) -> Any:
    drawn, axes = figure(8.2, 4.9)
    plain(axes)
    height, gap = 0.98, 0.16
    top = len(drawing["floors"]) * (height + gap)
    for number, floor in enumerate(drawing["floors"]):
        x, y = 1.9, top - (number + 1) * (height + gap)
        for share, name, what, colour in floor:
            width = share * (WIDTH - 1.9)
            shape = FancyBboxPatch(
                (x + 0.06, y),
                width - 0.12,
                height,
                boxstyle="round,pad=0,rounding_size=0.1",
                facecolor=colour,
                edgecolor=GREY,
                linewidth=0.8,
            )
            axes.add_patch(shape)
            axes.text(x + 0.28, y + 0.63, name, fontsize=8.5, fontweight="bold", va="center", color=INK)
            axes.text(x + 0.28, y + 0.28, what, fontsize=7.6, va="center", color=INK)
            x += width
    middle = [top - (number + 1) * (height + gap) + height / 2 for number in range(len(drawing["floors"]))]
    axes.text(0.05, middle[3] + 1.0, "a gradient comes\nfrom backward()", fontsize=7.6, color=ORANGE, va="bottom", linespacing=1.3)
    axes.plot([1.1, 1.1], [middle[3] + 0.9, middle[7]], color=ORANGE, linewidth=1.6)
    for number in range(3, 8):
        axes.add_patch(
            FancyArrowPatch(
                (1.1, middle[number]),
                (1.92, middle[number]),
                arrowstyle="-|>",
                mutation_scale=10,
                color=ORANGE,
                linewidth=1.6,
                shrinkA=0,
                shrinkB=0,
            )
        )
        axes.text(0.82, middle[number], str(number - 2), fontsize=8.5, color=ORANGE, va="center", ha="right")
    axes.set_xlim(0, WIDTH)
    axes.set_ylim(-0.06, top - gap + 0.06)
    return drawn


PICTURES: dict[str, tuple[str, Any, Any]] = {
    "architecture": ("The floors of the package, each above all that it imports, and the way of a gradient", data, house),
}

"""Drawings of how something works. Nothing in them is measured; curves are those of the code."""

from __future__ import annotations

import math
import random
from typing import Any

from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from bench.pictures.style import BLUE, GREY, INK, LIGHT, ORANGE, PALE, TEAL, figure, plain
from bip_fast.presets import PRESETS
from bip_fast.schedule import CURVES

ROWS, COLUMNS = 8, 16


def box(axes: Any, x: float, y: float, width: float, height: float, text: str, colour: str = PALE, size: float = 10) -> None:
    """A box with its lower left corner at (x, y), and text in the middle."""
    shape = FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=0.12", facecolor=colour, edgecolor=GREY, linewidth=1)
    axes.add_patch(shape)
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=size, linespacing=1.4)


def arrow(axes: Any, begin: tuple[float, float], end: tuple[float, float], text: str = "", colour: str = INK, shift: float = 0.16) -> None:
    """An arrow, with text above its middle."""
    axes.add_patch(FancyArrowPatch(begin, end, arrowstyle="-|>", mutation_scale=12, color=colour, linewidth=1.4, shrinkA=0, shrinkB=0))
    axes.text((begin[0] + end[0]) / 2, (begin[1] + end[1]) / 2 + shift, text, ha="center", va="bottom", fontsize=9, color=colour)


# --- patterns ----------------------------------------------------------------------------------------------------------------------


def kept_weights() -> dict[str, list[list[bool]]]:
    """Which weights of one matrix stay when half of them go, by pattern: the largest of the same random numbers."""
    draw = random.Random(3)
    size = [[abs(draw.gauss(0, 1)) for _ in range(COLUMNS)] for _ in range(ROWS)]
    cells = [(i, j) for i in range(ROWS) for j in range(COLUMNS)]

    def halves(unit: Any) -> list[list[bool]]:
        """Half of the units with the largest sums."""
        sums: dict[Any, float] = {}
        for i, j in cells:
            sums[unit(i, j)] = sums.get(unit(i, j), 0.0) + size[i][j]
        best = sorted(sums, key=lambda name: sums[name], reverse=True)[: len(sums) // 2]
        return [[unit(i, j) in best for j in range(COLUMNS)] for i in range(ROWS)]

    def two_of_four(i: int, j: int) -> bool:
        group = range(j - j % 4, j - j % 4 + 4)
        return j in sorted(group, key=lambda column: size[i][column], reverse=True)[:2]

    return {
        '"unstructured"': halves(lambda i, j: (i, j)),
        '"2:4"': [[two_of_four(i, j) for j in range(COLUMNS)] for i in range(ROWS)],
        '"block:2x4"': halves(lambda i, j: (i // 2, j // 4)),
        '"filter"': halves(lambda i, _: i),
        '"channel"': halves(lambda _, j: j),
    }


def patterns(kept: dict[str, list[list[bool]]]) -> Any:
    drawn, all_axes = figure(8.2, 4.2, 3, 2)
    notes = {
        '"unstructured"': "any weight",
        '"2:4"': "two of four neighbours",
        '"block:2x4"': "whole blocks",
        '"filter"': "whole rows: outputs",
        '"channel"': "whole columns: inputs",
    }
    for axes, (name, matrix) in zip(all_axes.flat, kept.items(), strict=False):
        plain(axes)
        for i, row in enumerate(matrix):
            for j, stays in enumerate(row):
                axes.add_patch(Rectangle((j, -i), 0.88, 0.88, facecolor=TEAL if stays else LIGHT))
        axes.set_xlim(-0.2, COLUMNS + 0.1)
        axes.set_ylim(-ROWS + 0.8, 1.1)
        axes.set_title(f"{name}\n{notes[name]}", linespacing=1.5, fontsize=10)
    last = all_axes.flat[len(kept)]
    plain(last)
    for y, colour, text in ((1.2, TEAL, "kept: half of the weights"), (0, LIGHT, "exactly zero")):
        last.add_patch(Rectangle((0, y), 0.88, 0.88, facecolor=colour))
        last.text(1.4, y + 0.44, text, va="center")
    last.set_xlim(-2, 14)
    last.set_ylim(-3, 5)
    return drawn


# --- schedules ---------------------------------------------------------------------------------------------------------------------


def joint_run() -> dict[str, Any]:
    """A run with preset joint under SGD and a cosine: shares of the run, and the three options that change on the way."""
    preset, end = PRESETS["joint"]["sgd"], 0.95
    share = [i / 200 for i in range(201)]
    lr = [preset["lr"] * (1 + math.cos(math.pi * t)) / 2 for t in share]
    sparsity = [end * (1 - CURVES["cubic"](min(t / preset["ramp"], 1.0))) for t in share]
    return {"share": share, "lr": lr, "mask_lr": [preset["mask_lr_per_lr"] * x for x in lr], "sparsity": sparsity}


def schedule(run: dict[str, Any]) -> Any:
    drawn, (rates, zeros) = figure(8.2, 2.9, 2)
    rates.plot(run["share"], run["lr"], color=BLUE, linewidth=2)
    rates.set_ylabel("lr of the weights", color=BLUE)
    rates.set_ylim(0)
    twin = rates.twinx()
    twin.plot(run["share"], run["mask_lr"], color=ORANGE, linewidth=2, linestyle=(0, (4, 3)))
    twin.set_ylabel("step size of the scores", color=ORANGE)
    twin.set_ylim(0)
    rates.set_title("both step sizes fall together")
    zeros.plot(run["share"], [100 * x for x in run["sparsity"]], color=TEAL, linewidth=2)
    zeros.set_ylabel("zeros, %")
    zeros.set_ylim(0, 100)
    zeros.set_title("zeros grow in the first half")
    for axes in (rates, zeros):
        axes.set_xlabel("share of the run")
        axes.set_xlim(0, 1)
        axes.grid(color=LIGHT)
        axes.spines["top"].set_visible(False)
    zeros.spines["right"].set_visible(False)
    twin.spines["top"].set_visible(False)
    return drawn


def levels(rows: dict[str, list[str]]) -> Any:
    drawn, axes = figure(8.2, 2.5)
    plain(axes)
    colours = {"weights": PALE, "mask": "#fbd9c4", "weights\nand mask": "#d5e3f5"}
    for y, (name, steps) in zip((1.7, 0.0), rows.items(), strict=True):
        axes.text(0, y + 0.55, name, va="center", fontsize=10, fontweight="bold")
        for i, what in enumerate(steps):
            box(axes, 2.9 + 1.6 * i, y, 1.45, 1.1, what, colours[what], 9)
    for i in range(len(next(iter(rows.values())))):
        axes.text(2.9 + 1.6 * i + 0.72, 3.05, f"batch {i + 1}", ha="center", fontsize=9, color=GREY)
    axes.set_xlim(-0.1, 12.6)
    axes.set_ylim(-0.2, 3.5)
    return drawn


# --- the window --------------------------------------------------------------------------------------------------------------------


def window(scores: dict[str, Any]) -> Any:
    drawn, axes = figure(8.2, 3.2)
    x = [i / 400 for i in range(401)]
    height = [2.2 * math.exp(-(((t - 0.12) / 0.16) ** 2)) + 0.5 * math.exp(-(((t - 0.6) / 0.3) ** 2)) for t in x]
    low, high = scores["window"]
    for begin, end, colour in ((0.0, low, LIGHT), (low, high, "#f7b893"), (high, 1.0, PALE)):
        part = [(t, y) for t, y in zip(x, height, strict=True) if begin <= t <= end]
        axes.fill_between([t for t, _ in part], [y for _, y in part], color=colour, linewidth=0)
    axes.plot(x, height, color=GREY, linewidth=1)
    axes.axvline(scores["threshold"], color=ORANGE, linewidth=1.6, ymax=0.83)
    axes.text(scores["threshold"], 2.28, "threshold of\nthe last step", ha="center", fontsize=9, color=ORANGE)
    axes.text(0.12, 0.9, "below the window:\npruned at once", ha="center", fontsize=9.5)
    axes.text(0.74, 0.72, "above the window:\nkept at once, and counted", ha="center", fontsize=9.5)
    axes.annotate(
        "inside: a few candidates,\nsettled exactly",
        ((low + high) / 2, 0.35),
        (0.6, 1.65),
        ha="center",
        fontsize=9.5,
        arrowprops={"arrowstyle": "-|>", "color": INK},
    )
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 2.7)
    axes.set_yticks([])
    axes.set_xlabel("score (the window is drawn much wider than it is)")
    axes.set_ylabel("how many weights")
    axes.spines[["top", "right", "left"]].set_visible(False)
    return drawn


# --- several ranks -----------------------------------------------------------------------------------------------------------------


def ranks(texts: dict[str, list[str]]) -> Any:
    drawn, axes = figure(8.2, 3.4)
    plain(axes)
    names, columns = texts["ranks"], texts["columns"]
    for x, text in zip((1.35, 9.5), columns, strict=True):
        axes.text(x + 1.6, 4.5, text, ha="center", va="bottom", fontsize=9, color=GREY, linespacing=1.4)
    for y, name in zip((3.3, 2.2, 1.1), names, strict=True):
        axes.text(0, y + 0.42, name, fontsize=10, fontweight="bold", va="center")
        box(axes, 1.35, y, 3.2, 0.85, texts["local"][0], PALE, 9)
        arrow(axes, (4.6, y + 0.42), (5.55, 2.62 + 0.25 * (y - 2.2)))
        arrow(axes, (8.55, 2.62 + 0.25 * (y - 2.2)), (9.45, y + 0.42))
        box(axes, 9.5, y, 3.2, 0.85, texts["local"][1], PALE, 9)
    box(axes, 5.6, 1.75, 2.9, 1.75, texts["sum"][0], "#fbe3cf", 9)
    axes.set_xlim(-0.1, 12.9)
    axes.set_ylim(0.9, 5.3)
    return drawn


# --- one source, three backends ----------------------------------------------------------------------------------------------------


def simulator(texts: dict[str, str]) -> Any:
    drawn, axes = figure(8.2, 3.3)
    plain(axes)
    box(axes, 0, 2.35, 2.5, 1.0, texts["cpu"])
    box(axes, 0, 0.45, 2.5, 1.0, texts["cuda"])
    for y, name, compiler, begin in (
        (2.45, "CPU kernels", "host compiler", 2.85),
        (1.05, "simulated CUDA", "host compiler", 1.15),
        (-0.35, "CUDA on a GPU", "nvcc", 0.75),
    ):
        box(axes, 5.2, y, 2.3, 0.8, name, "#d5e3f5")
        arrow(axes, (2.55, begin), (5.15, y + 0.4), compiler)
        arrow(axes, (7.55, y + 0.4), (9.35, 1.65 + 0.35 * (y - 1.05)))
    box(axes, 9.4, 0.9, 2.5, 1.5, texts["tests"], "#fbe3cf")
    axes.set_xlim(-0.1, 12.0)
    axes.set_ylim(-0.5, 3.6)
    return drawn


PICTURES: dict[str, tuple[str, Any, Any]] = {
    "patterns": ("The kept weights of one matrix under each pattern", kept_weights, patterns),
    "schedule": ("Step sizes and zeros over a run with preset joint", joint_run, schedule),
    "levels": (
        "Which batches move the weights and which move the mask",
        lambda: {
            'alternating:\npreset="paper"': ["weights", "mask"] * 3,
            'joint:\npreset="joint"': ["weights\nand mask"] * 6,
        },
        levels,
    ),
    "window": ("What the window decides at once", lambda: {"threshold": 0.36, "window": [0.33, 0.39]}, window),
    "ranks": (
        "How ranks select together without gathering scores",
        lambda: {
            "ranks": ["rank 0", "rank 1", "rank 2"],
            "columns": ["each rank updates its own scores,\nonce over memory", "each rank settles\nits own few candidates"],
            "local": ["counts above and\ninside the window", "the same threshold,\nits own part of the mask"],
            "sum": ["all-reduce of\n4,100 numbers,\nnot of scores"],
        },
        ranks,
    ),
    "simulator": (
        "One set of sources, three backends, one set of tests",
        lambda: {"cpu": "csrc/cpu/*.cpp", "cuda": "csrc/cuda/*.cu", "tests": "one set of tests:\nequal, bit for bit"},
        simulator,
    ),
}

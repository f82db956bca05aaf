"""Pictures of a comparison: accuracy and cost against sparsity, and accuracy against every other setting that was varied."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .results import Row, summary
from .run import write_beside

__all__ = ["draw"]

COLOURS = ("#0055aa", "#33bbee", "#cc3311", "#ee7733", "#009988", "#ee3377", "#aa9900", "#777777", "#882255", "#44aa99", "#999933")
MARKERS = "osD^vPX*<>h"


def draw(rows: Sequence[Row], out: Path) -> list[Path]:
    """Write the pictures that ``rows`` give into ``out``; returns their paths."""
    made = []
    found = summary(rows)
    for data, model, width in dict.fromkeys((line["data"], line["model"], line["width"]) for line in found):
        part = [line for line in found if (line["data"], line["model"], line["width"]) == (data, model, width)]
        raw = [row for row in rows if (row["data"], row["model"], row["width"]) == (data, model, width)]
        name = "".join(c if c.isalnum() else "-" for c in f"{data}-{model}" + (f"-{width}" if width else ""))
        title = f"{model}{f' of width {width}' if width else ''} on {data}"
        if len({line["sparsity"] for line in part if line["sparsity"]}) > 1:
            made.append(_save(out / f"accuracy-{name}.png", lambda axes, part=part, title=title: _accuracy(axes, part, title)))
            made.append(_save(out / f"cost-{name}.png", lambda axes, part=part, title=title: _cost(axes, part, title)))
        for setting in sorted({key for row in raw for key in row if key.startswith("setting_")}):
            own = [row for row in raw if row.get(setting) is not None]
            if len({row[setting] for row in own}) > 1:
                plot = _save(
                    out / f"{setting.removeprefix('setting_')}-{name}.png",
                    lambda axes, own=own, setting=setting, title=title: _sweep(axes, own, setting, title),
                )
                made.append(plot)
    return made


def _save(path: Path, plot: Callable[[Any], None]) -> Path:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.2, 4.8), layout="constrained", facecolor="white")
    axes = figure.subplots()
    plot(axes)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    write_beside(path, lambda beside: figure.savefig(beside, dpi=140))
    return path


def _rows(part: Sequence[Row]) -> list[str]:
    return [row for row in dict.fromkeys(line["row"] for line in part) if any(line["sparsity"] for line in part if line["row"] == row)]


def _sparsity_axis(axes: Any, sparsities: Sequence[float]) -> None:
    """Zeros to the right; in equal steps of what is kept where networks get very sparse."""
    axes.set_xscale("log")
    axes.invert_xaxis()
    step = max(1, -(-len(sparsities) // 9))  # labels that would touch are left out
    shown = sorted(sparsities)[::step]
    axes.set_xticks([1 - s for s in shown], [f"{100 * s:.3g}" for s in shown])
    axes.minorticks_off()
    axes.set_xlabel("zeros among all Conv and Linear weights, % (log scale of what is kept)")


def _accuracy(axes: Any, part: Sequence[Row], title: str) -> None:
    """As figures 3 and 4 of the paper: the mean over seeds, its deviation, and the dense network as a band."""
    sparsities = sorted({line["sparsity"] for line in part if line["sparsity"]})
    ends = [1 - sparsities[0], 1 - sparsities[-1]]
    # Dense accuracy differs between rows that start from other dense runs; the band is that of the first.
    dense = next((line for line in part if line["dense_accuracy"] is not None), None)
    if dense:
        mean, deviation = 100 * dense["dense_accuracy"], 100 * (dense["dense_accuracy_std"] or 0)
        axes.plot(ends, [mean, mean], color="black", linestyle="--", linewidth=1.2, label=f"dense, where they start ({mean:.2f})")
        axes.fill_between(ends, mean - deviation, mean + deviation, color="black", alpha=0.08, linewidth=0)
    for line in part:
        if not line["sparsity"] and line["epochs_total"] > min(other["epochs_total"] for other in part):
            axes.plot(ends, [100 * line["accuracy"]] * 2, color="black", linestyle=":", linewidth=1.2, label=f"{line['row']} ({100 * line['accuracy']:.2f})")
    for i, row in enumerate(_rows(part)):
        own = sorted((line for line in part if line["row"] == row and line["sparsity"]), key=lambda line: line["sparsity"])
        deviations = [100 * (line["accuracy_std"] or 0) for line in own]
        axes.errorbar(
            [1 - line["sparsity"] for line in own],
            [100 * line["accuracy"] for line in own],
            yerr=deviations if any(deviations) else None,
            color=COLOURS[i % len(COLOURS)],
            marker=MARKERS[i % len(MARKERS)],
            markersize=4.5,
            capsize=2,
            linewidth=1.6,
            label=row,
        )
    _sparsity_axis(axes, sparsities)
    axes.set_ylabel("accuracy, %")
    axes.set_title(title, fontsize=10)
    values = sorted(100 * line["accuracy"] for line in part)
    middle = values[len(values) // 2]
    axes.set_ylim(bottom=max(values[0] - 1, middle - 4 * max(1.0, values[-1] - middle) - 6))  # one row that broke down hides no other


def _cost(axes: Any, part: Sequence[Row], title: str) -> None:
    """As figure 5: the time that leads to a network of that sparsity, dense training included."""
    for i, row in enumerate(_rows(part)):
        own = sorted((line for line in part if line["row"] == row and line["sparsity"]), key=lambda line: line["sparsity"])
        epochs = f"{own[0]['epochs_total']:.3g}" + (f" to {own[-1]['epochs_total']:.3g}" if own[-1]["epochs_total"] > 1.01 * own[0]["epochs_total"] else "")
        axes.plot(
            [1 - line["sparsity"] for line in own],
            [line["seconds_total"] / 60 for line in own],
            color=COLOURS[i % len(COLOURS)],
            marker=MARKERS[i % len(MARKERS)],
            markersize=4.5,
            linewidth=1.6,
            label=f"{row} ({epochs} epochs)",
        )
    _sparsity_axis(axes, sorted({line["sparsity"] for line in part if line["sparsity"]}))
    axes.set_yscale("log")
    axes.set_ylabel("minutes, dense training included (log scale)")
    axes.set_title(title, fontsize=10)


def _sweep(axes: Any, rows: Sequence[Row], setting: str, title: str) -> None:
    """Accuracy against a setting, as figure 6 against the epoch of a rewind: a line for each label and sparsity, a dot for each seed."""
    name = setting.removeprefix("setting_")
    values = sorted({row[setting] for row in rows}, key=lambda value: (isinstance(value, str), value if not str(value).isdecimal() else int(value)))
    places = {value: i for i, value in enumerate(values)}  # in equal steps: they are often decades, and some are words
    for i, (label, sparsity) in enumerate(dict.fromkeys((row["label"], row["sparsity"]) for row in rows)):
        own = [row for row in rows if (row["label"], row["sparsity"]) == (label, sparsity)]
        colour = COLOURS[i % len(COLOURS)]
        means = {value: [100 * row["accuracy"] for row in own if row[setting] == value] for value in values}
        line = [(places[value], sum(found) / len(found)) for value, found in means.items() if found]
        axes.plot(*zip(*line, strict=True), color=colour, marker=MARKERS[i % len(MARKERS)], label=f"{label}, {100 * sparsity:.4g} %")
        axes.scatter([places[row[setting]] for row in own], [100 * row["accuracy"] for row in own], s=10, color=colour, alpha=0.4, linewidths=0)
    axes.set_xticks(range(len(values)), [f"{value:g}" if isinstance(value, float) else str(value) for value in values])
    axes.set_xlabel(name.replace("_", " "))
    axes.set_ylabel("accuracy, %")
    axes.set_title(title, fontsize=10)

"""Pictures of a comparison: accuracy and cost against sparsity, and accuracy against every other setting that was varied."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ...atomic import write_beside
from ..data.sources import source_of
from .results import SWEPT, Row, summary, units

__all__ = ["draw"]

COLOURS = ("#0055aa", "#33bbee", "#cc3311", "#ee7733", "#009988", "#ee3377", "#aa9900", "#777777", "#882255", "#44aa99", "#999933")
MARKERS = "osD^vPX*<>h"


def draw(rows: Sequence[Row], out: Path) -> list[Path]:
    """Write the pictures that ``rows`` give into ``out``; returns their paths."""
    made = []
    found = summary(rows)
    for where in dict.fromkeys(_where(line) for line in found):
        part, raw = ([line for line in of if _where(line) == where] for of in (found, rows))
        data, model, width = where
        name = "".join(c if c.isalnum() else "-" for c in f"{data}-{model}" + (f"-{width}" if width else ""))
        title = f"{model}{f' of width {width}' if width else ''} on {data}"
        if len({line["sparsity"] for line in part if line["sparsity"]}) > 1:
            made.append(_save(out / f"accuracy-{name}.png", partial(_accuracy, part=part, title=title)))
            made.append(_save(out / f"cost-{name}.png", partial(_cost, part=part, title=title)))
        for setting in sorted({key for row in raw for key in row if key.startswith(SWEPT)}):
            own = [row for row in raw if row.get(setting) is not None]
            if len({row[setting] for row in own}) > 1:
                path = out / f"{setting.removeprefix(SWEPT)}-{name}.png"
                made.append(_save(path, partial(_sweep, rows=own, setting=setting, title=title)))
    return made


def _where(line: Row) -> tuple[Any, ...]:
    return line["data"], line["model"], line["width"]


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


def _lines(part: Sequence[Row]) -> Iterator[tuple[str, list[Row], dict[str, Any]]]:
    """Every row that is pruned, its figures by growing sparsity, and how it is drawn."""
    pruned = [line for line in part if line["sparsity"]]
    for i, row in enumerate(dict.fromkeys(line["row"] for line in pruned)):
        yield row, sorted((line for line in pruned if line["row"] == row), key=lambda line: line["sparsity"]), _style(i)


def _style(i: int) -> dict[str, Any]:
    return {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)], "markersize": 4.5, "linewidth": 1.6}


def _sparsity_axis(axes: Any, part: Sequence[Row]) -> None:
    """Zeros to the right; in equal steps of what is kept where networks get very sparse."""
    sparsities = sorted({line["sparsity"] for line in part if line["sparsity"]})
    axes.set_xscale("log")
    axes.invert_xaxis()
    step = max(1, -(-len(sparsities) // 9))  # labels that would touch are left out
    shown = sparsities[::step]
    axes.set_xticks([1 - s for s in shown], [f"{100 * s:.3g}" for s in shown])
    axes.minorticks_off()
    what = (
        f"zeros among {source_of(part[0]['data']).kind.weights}"
        if units(part) == "weights"
        else f"share of the {units(part)} that is pruned"
    )
    axes.set_xlabel(f"{what}, % (log scale of what is kept)")


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
        longer = dense is None or line["epochs_total"] > min(other["epochs_total"] for other in part)
        if line["method"] == "dense" and longer:  # where they do not start from a dense run, it stands for none of theirs
            value = 100 * line["accuracy"]
            axes.plot(ends, [value, value], color="black", linestyle=":", linewidth=1.2, label=f"{line['row']} ({value:.2f})")
    for row, own, style in _lines(part):
        deviations = [100 * (line["accuracy_std"] or 0) for line in own]
        axes.errorbar(
            [1 - line["sparsity"] for line in own],
            [100 * line["accuracy"] for line in own],
            yerr=deviations if any(deviations) else None,
            capsize=2,
            label=row,
            **style,
        )
    _sparsity_axis(axes, part)
    axes.set_ylabel("accuracy, %")
    axes.set_title(title, fontsize=10)
    values = sorted(100 * line["accuracy"] for line in part)
    middle = values[len(values) // 2]
    axes.set_ylim(bottom=max(values[0] - 1, middle - 4 * max(1.0, values[-1] - middle) - 6))  # one row that broke down hides no other


def _cost(axes: Any, part: Sequence[Row], title: str) -> None:
    """As figure 5: the time that leads to a network of that sparsity, dense training included."""
    for row, own, style in _lines(part):
        first, last = own[0]["epochs_total"], own[-1]["epochs_total"]
        epochs = f"{first:.3g} to {last:.3g}" if last > 1.01 * first else f"{first:.3g}"
        minutes = [line["seconds_total"] / 60 for line in own]
        axes.plot([1 - line["sparsity"] for line in own], minutes, label=f"{row} ({epochs} epochs)", **style)
    _sparsity_axis(axes, part)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.set_ylabel("minutes, dense training included (log scale)")
    axes.set_title(title, fontsize=10)


def _sweep(axes: Any, rows: Sequence[Row], setting: str, title: str) -> None:
    """Accuracy against a setting, as figure 6 against the epoch of a rewind: a line for each label and sparsity, a dot for each seed."""
    values = sorted({row[setting] for row in rows}, key=_order)
    places = {value: i for i, value in enumerate(values)}  # in equal steps: they are often decades, and some are words
    for i, (label, sparsity) in enumerate(dict.fromkeys((row["label"], row["sparsity"]) for row in rows)):
        own = [row for row in rows if (row["label"], row["sparsity"]) == (label, sparsity)]
        found = {value: [100 * row["accuracy"] for row in own if row[setting] == value] for value in values}
        means = [(places[value], sum(of) / len(of)) for value, of in found.items() if of]
        style = _style(i)
        axes.plot(*zip(*means, strict=True), label=f"{label}, {100 * sparsity:.4g} %", **style)
        dots = [(places[row[setting]], 100 * row["accuracy"]) for row in own]
        axes.scatter(*zip(*dots, strict=True), s=10, color=style["color"], alpha=0.4, linewidths=0)
    axes.set_xticks(range(len(values)), [f"{value:g}" if isinstance(value, float) else str(value) for value in values])
    axes.set_xlabel(setting.removeprefix(SWEPT).replace("_", " "))
    axes.set_ylabel("accuracy, %")
    axes.set_title(title, fontsize=10)


def _order(value: Any) -> tuple[bool, Any]:
    """Numbers first, also those that are written as words; the initialisation is epoch 0."""
    if value == "init":
        return False, 0.0
    return (False, float(value)) if isinstance(value, (int, float)) or str(value).isdecimal() else (True, str(value))

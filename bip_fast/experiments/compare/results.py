"""What came out of a comparison: a row for every run, means and deviations over seeds, as CSV and as a table."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...atomic import write_beside
from ...engine.patterns import parse
from ...tables import escaped
from ..data.kinds import LANGUAGE
from ..data.sources import source_of
from ..methods.table import steps_of
from ..runs.folder import RunFolder
from .execution import Comparison
from .grid import Cell

__all__ = ["Row", "collect", "group", "summary", "table", "units", "write"]

Row = dict[str, Any]
SWEPT = "setting_"  # in front of the columns of settings that the file gives a list of
GROUP = ("data", "model", "width", "row", "sparsity")


def collect(comparison: Comparison) -> list[Row]:
    """A row for every finished run that has a place in the results. Figures that end in _total include the runs that it started from."""
    reports: dict[str, Row] = {}

    def report(cell: Cell) -> Row:
        if cell.address not in reports:
            reports[cell.address] = RunFolder(comparison.folder(cell)).read_report()
        return reports[cell.address]

    return [_row(cell, report) for cell in comparison.grid.rows if _all_there(comparison, cell)]


def _all_there(comparison: Comparison, cell: Cell) -> bool:
    return all(comparison.is_finished(c) for c in (cell, *cell.ancestors(), *([cell.dense] if cell.dense else [])))


def _row(cell: Cell, report: Any) -> Row:
    own, settings = report(cell), cell.settings
    line = [own, *(report(ancestor) for ancestor in cell.ancestors())]
    totals = {name: [sum(r[name].values()) for r in line] for name in ("image_passes", "seconds")}
    joules = [used for r in line for used in r["joules"].values()]
    swept = dict(cell.swept)
    images = own["images"]["train"]
    dense = cell if settings.method == "dense" and not settings.epochs else cell.dense
    passes = totals["image_passes"]
    return {
        "data": settings.data,
        "model": settings.model,
        "width": settings.width,
        "label": cell.label,
        "row": cell.label + "".join(f", {name} {value}" for name, value in swept.items()),
        "method": settings.method,
        "pattern": settings.pattern,
        "scope": settings.scope,
        **steps_of(settings),
        "sparsity": settings.sparsity,
        "kept": own["kept"],
        "total": own["total"],
        "sparsity_exact": own["sparsity"],
        "seed": settings.seed,
        "evaluated_on": own["evaluated_on"],
        "accuracy": own["pruned"]["accuracy"],
        "loss": own["pruned"]["loss"],
        "perplexity": math.exp(own["pruned"]["loss"]) if source_of(settings.data).kind is LANGUAGE else None,
        "dense_accuracy": report(dense)["pruned"]["accuracy"] if dense else None,
        "image_passes": passes[0],
        "image_passes_total": sum(passes),
        "epochs_total": sum(passes) / images,
        "seconds": round(totals["seconds"][0], 3),
        "seconds_total": round(sum(totals["seconds"]), 3),
        "joules_total": round(sum(joules), 1) if joules and None not in joules else None,
        "device": own["device"],
        "processes": " ".join(map(str, own.get("processes", [1]))),
        "torch": own["versions"]["torch"],
        "bip_fast": own["versions"]["bip_fast"],
        "folder": cell.folder,
        **{f"{SWEPT}{name}": value for name, value in swept.items()},
    }


def group(rows: Sequence[Row]) -> dict[tuple[Any, ...], list[Row]]:
    """Rows of the same data, model, method and sparsity: one for each seed."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in GROUP), []).append(row)
    return groups


def summary(rows: Sequence[Row]) -> list[Row]:
    """Mean and sample standard deviation over seeds; a deviation needs two."""
    found = []
    for key, own in group(rows).items():
        line: Row = {**dict(zip(GROUP, key, strict=True)), "method": own[0]["method"], "pattern": own[0]["pattern"], "seeds": len(own)}
        for name in ("accuracy", "perplexity", "dense_accuracy", "sparsity_exact", "epochs_total", "seconds_total", "joules_total"):
            values = [row[name] for row in own if row.get(name) is not None]
            line[name] = statistics.mean(values) if values else None
            if name in ("accuracy", "perplexity", "dense_accuracy"):
                line[f"{name}_std"] = statistics.stdev(values) if len(values) > 1 else None
        found.append(line)
    return found


def units(lines: Sequence[Row]) -> str:
    """What the sparsities of ``lines`` are shares of."""
    return " or ".join(dict.fromkeys(parse(line["pattern"]).units for line in lines if line["method"] != "dense"))


def _csv(rows: Sequence[Row]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    out = io.StringIO()
    writer = csv.DictWriter(out, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def write(rows: Sequence[Row], out: Path) -> list[Path]:
    """runs.csv and summary.csv in ``out``; returns their paths."""
    contents = {out / "runs.csv": _csv(rows), out / "summary.csv": _csv(summary(rows))}
    for path, text in contents.items():
        write_beside(path, lambda beside, text=text: beside.write_text(text))  # type: ignore[misc]
    return list(contents)


def table(rows: Sequence[Row]) -> str:
    """Markdown, a table for each data set and model: a line for each method, a column for each sparsity, and the cost.

    A cell is the accuracy in percent, or the perplexity of a network that predicts tokens, mean and standard deviation over seeds; a dense
    network has the same one in every column. The cost is that of the sparsest networks: epochs of forward and backward passes, and minutes.
    """
    lines: list[str] = []
    found = summary(rows)
    for where in dict.fromkeys((line["data"], line["model"], line["width"]) for line in found):
        part = [line for line in found if (line["data"], line["model"], line["width"]) == where]
        sparsities = sorted({line["sparsity"] for line in part if line["method"] != "dense"})
        name = f"{where[0]}, {where[1]}" + (f" of width {where[2]}" if where[2] else "")
        of = "" if units(part) == "weights" else f" of the {units(part)}"
        lines += [
            f"| {escaped(name)} | " + " | ".join(f"{100 * s:.4g} %{of}" for s in sparsities) + " | epochs | minutes |",
            "|---" * (len(sparsities) + 3) + "|",
        ]
        for row in dict.fromkeys(line["row"] for line in part):
            own = {line["sparsity"]: line for line in part if line["row"] == row}
            cells = [_figure(own.get(0.0 if own[max(own)]["method"] == "dense" else s)) for s in sparsities]
            last = own[max(own)]
            cost = f"{last['epochs_total']:.4g} | {last['seconds_total'] / 60:.3g}"
            lines.append(f"| {' | '.join([escaped(row), *cells, cost])} |")
        lines.append("")
    return "\n".join(lines).rstrip()


def _figure(line: Row | None) -> str:
    if line is None:
        return ""
    name, scale = ("accuracy", 100) if line["perplexity"] is None else ("perplexity", 1)
    deviation = "" if line[f"{name}_std"] is None else f" ± {scale * line[f'{name}_std']:.2f}"
    return f"{scale * line[name]:.2f}{deviation}"

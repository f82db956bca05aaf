"""From pytest-benchmark's JSON to the committed results, the Markdown tables and the charts.

    python3 -m bench.report --save raw.json bench/results      write bench/results/<device>/results.json, iterations.json or both
    python3 -m bench.report bench/results/<device>             print the tables, write <device>/times.png and roofline.png

All times are medians of one run, beside a copy that was measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

from bench.workload import size_name

Row = dict[str, Any]


def trimmed(raw: dict[str, Any]) -> dict[str, Any]:
    """What a number needs to be understood, and nothing about whose machine it was. Launches join the row whose work they count."""
    rows: dict[tuple[str, str], Row] = {}
    for benchmark in sorted(raw["benchmarks"], key=lambda benchmark: "launches" in benchmark["extra_info"]):
        stats, extra = benchmark["stats"], benchmark["extra_info"]
        if "implementation" not in extra:  # the run was interrupted in this row
            continue
        key = benchmark["group"], extra["implementation"]
        if "launches" in extra:  # counted apart from the times, which the profiler would change
            if key in rows:
                rows[key].update(extra["launches"])
            continue
        calls = extra.pop("calls")
        times = {f"{name}_seconds": float(f"{stats[name] / calls:.4g}") for name in ("median", "min", "iqr")}
        rest = {name: float(f"{extra.pop(name):.4g}") for name in ("copy_seconds", "host_seconds") if name in extra}
        rows[key] = {"group": benchmark["group"], **extra, **times, **rest, "rounds": stats["rounds"]}
    return {"machine": raw["machine_info"], "date": raw["datetime"][:10], "rows": list(rows.values())}


def is_iteration(row: Row) -> bool:
    return "iteration" in row["group"]


def save(results: dict[str, Any], folder: Path) -> list[Path]:
    """Steps and masks into results.json, iterations into iterations.json; a file for which there are no rows stays as it is."""
    written = []
    head = {key: value for key, value in results.items() if key != "rows"}
    for name, wanted in (("results.json", False), ("iterations.json", True)):
        rows = [row for row in results["rows"] if is_iteration(row) == wanted]
        if rows:
            lines = ",\n  ".join(json.dumps(row) for row in rows)  # a line each, so that a diff shows which row changed
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(json.dumps(head)[:-1] + ',\n "rows": [\n  ' + lines + "\n]}\n")
            written.append(target)
    return written


def folder_name(device: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def groups_of(rows: list[Row]) -> dict[str, list[Row]]:
    """Rows by group, bip_fast first and the others by time."""
    groups: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: (row["implementation"] != "bip_fast", row["median_seconds"])):
        groups.setdefault(row["group"], []).append(row)
    order = list(dict.fromkeys(row["group"] for row in rows))
    return {name: groups[name] for name in order}


def table(results: dict[str, Any]) -> str:
    machine, rows = results["machine"], results["rows"]
    bandwidth = statistics.median(row["n"] * row["bytes_per_weight"] / row["copy_seconds"] for row in rows) / 1e9
    lines = [
        f"{machine['device']}; torch {machine['torch']}; {results['date']}. "
        f"A copy moves {bandwidth:.3g} GB/s, read plus write (median of the run); steps that update in place can beat it, because a copy",
        "also fetches the memory it overwrites.",
        "",
        "| step | n | density | implementation | median | bytes per weight | GB/s | % of copy | times bip_fast "
        "| host | launches | peak memory |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for group, members in groups_of(rows).items():
        ours = next((row["median_seconds"] for row in members if row["implementation"] == "bip_fast"), None)
        for row in members:
            seconds = row["median_seconds"]
            rate = row["n"] * row["bytes_per_weight"] / seconds / 1e9
            ratio = f"{seconds / ours:.2f}" if ours else "-"
            lines.append(
                f"| {group} | {size_name(row['n'])} | {100 * row['density']:g} % | {row['implementation']} | {_milliseconds(seconds)} "
                f"| {row['bytes_per_weight']:g} | {rate:.3g} | {100 * row['copy_seconds'] / seconds:.0f} | {ratio} | {gpu_cells(row)} |"
            )
    return "\n".join(lines)


def gpu_cells(row: Row) -> str:
    """What only a GPU's rows have: host time, launches, memory beyond what was there."""
    host = _milliseconds(row["host_seconds"]) if "host_seconds" in row else ""
    memory = f"{row['peak_bytes'] / 1e9:.3g} GB" if "peak_bytes" in row else ""
    return f"{host} | {row['kernels']:g} | {memory}" if "kernels" in row else f"{host} |  | {memory}"


def iterations(results: dict[str, Any]) -> str:
    """A line for each network and implementation: time, and times dense training of the same batches, in a graph if that is in a graph."""
    lines = [
        "| | batch | precision | implementation | median | times dense | times plain torch | host | launches | peak memory |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for group, members in groups_of(results["rows"]).items():
        by_name = {row["implementation"]: row["median_seconds"] for row in members}
        for row in members:
            name, seconds = row["implementation"], row["median_seconds"]
            graph = ", CUDA graph" if name.endswith(", CUDA graph") else ""
            dense, plain = by_name.get("dense SGD(fused=True)" + graph), by_name.get("plain torch")
            ratios = " | ".join(f"{seconds / peer:.3g}" if peer else "" for peer in (dense, plain))
            cells = f"{row['batch']} | {row['precision']} | {name} | {_milliseconds(seconds)} | {ratios} | {gpu_cells(row)}"
            lines.append(f"| {group} | {cells} |")
    return "\n".join(lines)


def pivot(results: dict[str, Any], prefixes: tuple[str, ...]) -> str:
    """The groups that start with one of ``prefixes``, a line each, a column per implementation: time, and times bip_fast."""
    groups = {name: members for name, members in groups_of(results["rows"]).items() if name.startswith(prefixes)}
    groups = {name: members for name, members in groups.items() if members[0]["implementation"] == "bip_fast"}
    names = list(dict.fromkeys(row["implementation"] for members in groups.values() for row in members))
    lines = ["| | copy | " + " | ".join(names) + " |", "|---|---|" + "---|" * len(names)]
    for group, members in groups.items():
        by_name = {row["implementation"]: row for row in members}
        ours = by_name["bip_fast"]
        cells = [_milliseconds(ours["copy_seconds"]), _milliseconds(ours["median_seconds"])]
        for name in names[1:]:
            row = by_name.get(name)
            cells.append(f"{_milliseconds(row['median_seconds'])} ({row['median_seconds'] / ours['median_seconds']:.1f}x)" if row else "")
        lines.append(f"| {group} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def chart(results: dict[str, Any], path: Path) -> None:
    """Times as multiples of a copy of the compulsory bytes, on a log axis: 1 is the speed of memory."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    n = statistics.mode(row["n"] for row in results["rows"])  # the size with the most rows; roofline.png shows the others
    rows = [row for row in results["rows"] if row["n"] == n]
    groups = groups_of(rows)
    names = sorted({row["implementation"] for row in rows}, key=lambda name: (name != "bip_fast", name))
    colours = {name: pyplot.get_cmap("tab10" if len(names) <= 10 else "tab20")(i) for i, name in enumerate(names)}
    ticks, labels, widths, y = [], [], [], 0.0
    figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.2 * len(rows) + 0.16 * len(groups)), layout="constrained")
    for group, members in groups.items():
        ticks.append(y + (len(members) - 1) / 2)
        labels.append(group)
        copy = members[0]["copy_seconds"]  # one yardstick for the group: that of bip_fast, its first row
        for row in members:
            width = row["median_seconds"] / copy
            widths.append(width)
            axes.barh(y, width, height=0.85, left=0, color=colours[row["implementation"]])
            axes.annotate(f"{width:.3g}", (width, y), xytext=(3, 0), textcoords="offset points", va="center", fontsize=7)
            y += 1
        y += 0.8
    axes.set_xscale("log")
    axes.set_yticks(ticks, labels)
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xlim(min(0.5, 0.8 * min(widths)), 1.6 * max(widths))  # room for the numbers
    axes.margins(y=0.01)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("median time / time of a copy of the compulsory bytes in the same run\n(log scale; left is better)")
    axes.set_title(f"{results['machine']['device']}, {size_name(n)} weights", fontsize=10)
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=colours[name]) for name in names]
    figure.legend(handles, names, fontsize=8, loc="outside lower center", ncols=3, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python3 -m bench.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--save", metavar="RAW.json", type=Path, help="results of pytest-benchmark to be trimmed into FOLDER/<device>")
    parser.add_argument("folder", metavar="FOLDER", type=Path)
    options = parser.parse_args(arguments)
    if options.save:
        results = trimmed(json.loads(options.save.read_text()))
        if not results["rows"]:
            print(f"{options.save} has no benchmarks in it", file=sys.stderr)
            return 2
        print(*save(results, options.folder / folder_name(results["machine"]["device"])), sep="\n")
        return 0
    steps, whole = (read(options.folder / name) for name in ("results.json", "iterations.json"))
    if not steps and not whole:
        print(f"no results.json and no iterations.json in {options.folder}", file=sys.stderr)
        return 2
    if steps:
        from bench import roofline

        chart(steps, options.folder / "times.png")
        roofline.chart(steps, options.folder / "roofline.png")
        print(f"{table(steps)}\n\n![times](times.png)\n\n![percent of copy bandwidth](roofline.png)\n")
    if whole:
        print(f"{iterations(whole)}\n")
    from bench import targets

    print(targets.table(steps, whole))
    return 0


def read(file: Path) -> dict[str, Any] | None:
    return json.loads(file.read_text()) if file.is_file() else None


if __name__ == "__main__":
    sys.exit(main())

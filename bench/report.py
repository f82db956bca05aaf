"""From pytest-benchmark's JSON to the committed results, the Markdown table and the chart.

    python3 -m bench.report --save raw.json bench/results      write bench/results/<device>/results.json
    python3 -m bench.report bench/results/<device>             print the tables, write <device>/times.png

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

Row = dict[str, Any]


def trimmed(raw: dict[str, Any]) -> dict[str, Any]:
    """What a number needs to be understood, and nothing about whose machine it was."""
    rows = []
    for benchmark in raw["benchmarks"]:
        stats = benchmark["stats"]
        calls = benchmark["extra_info"].pop("calls")
        times = {f"{name}_seconds": float(f"{stats[name] / calls:.4g}") for name in ("median", "min", "iqr")}
        copy = float(f"{benchmark['extra_info'].pop('copy_seconds'):.4g}")
        rows.append({"group": benchmark["group"], **benchmark["extra_info"], **times, "copy_seconds": copy, "rounds": stats["rounds"]})
    return {"machine": raw["machine_info"], "date": raw["datetime"][:10], "rows": rows}


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
        "| step | n | density | implementation | median | bytes per weight | GB/s | % of copy | times bip_fast |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for group, members in groups_of(rows).items():
        ours = next((row["median_seconds"] for row in members if row["implementation"] == "bip_fast"), None)
        for row in members:
            seconds = row["median_seconds"]
            rate = row["n"] * row["bytes_per_weight"] / seconds / 1e9
            ratio = f"{seconds / ours:.2f}" if ours else "-"
            lines.append(
                f"| {group} | {row['n'] / 1e6:.1f}M | {row['density']:.0%} | {row['implementation']} | {_milliseconds(seconds)} "
                f"| {row['bytes_per_weight']:g} | {rate:.3g} | {100 * row['copy_seconds'] / seconds:.0f} | {ratio} |"
            )
    return "\n".join(lines)


def pivot(results: dict[str, Any], prefixes: tuple[str, ...]) -> str:
    """The groups that start with one of ``prefixes``, a line each, a column per implementation: time, and times bip_fast."""
    groups = {name: members for name, members in groups_of(results["rows"]).items() if name.startswith(prefixes)}
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

    groups = groups_of(results["rows"])
    names = sorted({row["implementation"] for row in results["rows"]}, key=lambda name: (name != "bip_fast", name))
    colours = dict(zip(names, pyplot.get_cmap("tab10").colors, strict=False))
    ticks, labels, widths, y = [], [], [], 0.0
    figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.2 * len(results["rows"]) + 0.16 * len(groups)), layout="constrained")
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
    axes.set_xlabel("median time / time of a copy of the compulsory bytes in the same run (log scale; left is better)")
    axes.set_title(f"{results['machine']['device']}, {max(row['n'] for row in results['rows']) / 1e6:.1f}M weights", fontsize=10)
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
        target = options.folder / folder_name(results["machine"]["device"]) / "results.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        rows = ",\n  ".join(json.dumps(row) for row in results.pop("rows"))  # a line each, so that a diff shows which row changed
        target.write_text(json.dumps(results)[:-1] + ',\n "rows": [\n  ' + rows + "\n]}\n")
        print(target)
        return 0
    file = options.folder / "results.json"
    if not file.is_file():
        print(f"no results.json in {options.folder}", file=sys.stderr)
        return 2
    results = json.loads(file.read_text())
    chart(results, file.with_name("times.png"))
    print(f"{table(results)}\n\n![times](times.png)")
    return 0


if __name__ == "__main__":
    sys.exit(main())

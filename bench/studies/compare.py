"""The results of a comparison, brought into bench/results: its rows as JSON, its picture.

bip-fast compare configs/quick.yaml --data-dir DIR
python3 -m bench.studies.compare runs/quick           JSON and pictures under bench/results/<device>, table
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from bench.report import folder_name
from bench.workload import machine
from bip_fast.experiments.compare import results as compared


def _value(text: str) -> Any:
    """The value that was written as this cell of a CSV file."""
    try:
        return json.loads(text)
    except ValueError:
        return text or None


def table(results: dict[str, Any]) -> str:
    """Markdown, as `bip-fast compare` prints it."""
    return compared.table(results["rows"])


def search_table(results: dict[str, Any]) -> str:
    """Markdown: a line for each choice of settings of a search, a column for each sparsity; "" where a setting has no meaning."""
    settings = ("method", "levels", "lr", "mask_lr", "mask_momentum", "gamma", "score_start", "ramp", "freeze")
    rows = results["rows"]
    sparsities = sorted({row["sparsity"] for row in rows})
    found: dict[tuple[Any, ...], dict[float, float]] = {}
    for row in rows:
        chosen = {**row, "lr": row.get("setting_pretrain_lr") if row["lr"] is None else row["lr"]}  # of what trains from the beginning
        found.setdefault(tuple(chosen[name] for name in settings), {})[row["sparsity"]] = row["accuracy"]
    lines = ["| " + " | ".join([*settings, *(f"{100 * s:g} %" for s in sparsities)]) + " |"]
    lines.append("|---" * (len(settings) + len(sparsities)) + "|")
    for key, accuracies in sorted(found.items(), key=str):
        cells = [
            "" if value is None else "off" if value == 1e30 else f"{value:g}" if isinstance(value, float) else str(value) for value in key
        ]
        cells += [f"{100 * accuracies[s]:.2f}" if s in accuracies else "" for s in sparsities]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def settings_table(results: dict[str, Any]) -> str:
    """Markdown: a line for each label of a search at one sparsity, with what each of its settings came to, the best in bold."""
    found: dict[str, dict[str, float]] = {}
    for row in results["rows"]:
        found.setdefault(row["label"], {})[row["row"].removeprefix(row["label"]).lstrip(", ")] = row["accuracy"]
    lines = ["| | percent right with each setting | best |", "|---|---|---|"]
    for label, accuracies in found.items():
        best = max(accuracies.values())
        cells = [
            f"**{100 * right:.1f}** {settings}" if right == best else f"{100 * right:.1f} {settings}"
            for settings, right in accuracies.items()
        ]
        lines.append(f"| {label} | {'; '.join(cells)} | {100 * best:.1f} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python3 -m bench.studies.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", metavar="DIR", type=Path, help="folder of `bip-fast compare`")
    parser.add_argument("--results", type=Path, default=Path(__file__).parents[1] / "results", metavar="DIR", help="default: bench/results")
    options = parser.parse_args(arguments)
    with (options.folder / "runs.csv").open() as file:
        rows = [{name: _value(text) for name, text in row.items()} for row in csv.DictReader(file)]
    device = torch.device("cpu" if rows[0]["device"].startswith("CPU") else "cuda")
    results: dict[str, Any] = {"machine": machine(device), "date": datetime.date.today().isoformat()}
    target = options.results / folder_name(results["machine"]["device"]) / f"{options.folder.name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    target.write_text(json.dumps(results)[:-1] + ',\n "rows": [\n  ' + lines + "\n]}\n")
    for picture in sorted(options.folder.glob("*.png")):
        shutil.copyfile(picture, target.with_name(f"{options.folder.name}-{picture.name}"))
    print(f"{table({'rows': rows})}\n\n{target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

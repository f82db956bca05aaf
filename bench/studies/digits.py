"""The default run of the command line, over seeds: accuracy before and after pruning, and the time of the whole command.

    python3 -m bench.studies.digits                       three runs of `bip-fast prune`, JSON under bench/results/<device>, table

ResNet-20 on scikit-learn's digits, 95 % zeros. Every run is a new process, as a user starts it, and is timed from its start to its end.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bench.report import folder_name
from bench.workload import machine


def one_run(seed: int, out: Path) -> dict[str, Any]:
    """What report.json says of `bip-fast prune --seed SEED`, and its seconds."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "bip_fast", "prune", "--seed", str(seed), "--out", str(out)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - began
    report = json.loads((out / "report.json").read_text())
    accuracies = {name: report[name]["accuracy"] for name in ("dense", "pruned")}
    return {"seed": seed, **accuracies, "kept": report["kept"], "total": report["total"], "seconds": round(seconds, 1)}


def table(results: dict[str, Any]) -> str:
    """Markdown: a line for each seed."""
    lines = ["| seed | dense | pruned | weights kept | seconds |", "|---|---|---|---|---|"]
    for row in results["rows"]:
        kept = f"{row['kept']:,} of {row['total']:,}"
        lines.append(f"| {row['seed']} | {100 * row['dense']:.2f} % | {100 * row['pruned']:.2f} % | {kept} | {row['seconds']:.0f} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python3 -m bench.studies.digits", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="default: 0 1 2")
    parser.add_argument("--results", type=Path, default=Path(__file__).parents[1] / "results", metavar="DIR", help="default: bench/results")
    options = parser.parse_args(arguments)
    results: dict[str, Any] = {"machine": machine(torch.device("cpu")), "date": datetime.date.today().isoformat()}
    with tempfile.TemporaryDirectory() as folder:
        results["rows"] = [one_run(seed, Path(folder) / str(seed)) for seed in options.seeds]
    target = options.results / folder_name(results["machine"]["device"]) / "digits.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(results, indent=1) + "\n")
    print(f"{table(results)}\n\n{target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

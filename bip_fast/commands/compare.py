"""`bip-fast compare`: a grid of methods, sparsities and seeds."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from ..experiments import ranks
from ..experiments.compare import cluster, figures, progress, results
from ..experiments.compare.execution import Comparison, follow, run_here
from ..experiments.compare.grid import Grid, read
from ..experiments.data.sources import source_of
from ..experiments.runs.folder import RunFolder
from ..experiments.runs.signals import Stop
from .environment import pick_device

__all__ = ["add_options", "run"]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Run every combination of data, model, method, sparsity and seed that a YAML file names, several at a time, and make "
        "runs.csv, summary.csv and pictures. Stopped or killed, the same command goes on where every run stood; a finished run is never "
        "repeated."
    )
    parser.add_argument("config", metavar="CONFIG", type=Path, help="YAML file of the grid; the folder configs has examples")
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="folder with the standard files of the data sets")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of all runs and results; default: runs/<name of CONFIG>")
    parser.add_argument("--device", metavar="NAME", default="auto", help="auto, cpu, cuda or cuda:N; default: auto")
    parser.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help="runs at the same time, which changes no result; default: as many as the CPU cores have room for, or 1 on a GPU; "
        "each has one CPU thread, or as many as the setting `threads` of CONFIG says; more than one need Ray",
    )
    parser.add_argument(
        "--address",
        metavar="ADDRESS",
        help="run on the Ray cluster at this address, such as HOST:6379, whose nodes share the folders; `gpus` in CONFIG says what part of "
        "a GPU each run takes",
    )
    parser.add_argument("--list", action="store_true", help="only list the runs, what they cost, and which are finished")


def run(options: dict[str, Any]) -> int:
    """Run the grid; returns 1 when a run failed. UserError where the input is not what it should be."""
    device = pick_device(options["device"])
    if ranks.count() > 1:
        for name in ("jobs", "address"):
            if options[name] is not None:
                raise UserError(f"--{name} is for several runs at a time, and torchrun starts processes that share each run: leave it out")
    if not ranks.rank():
        return _lead(options, device)
    try:
        if not options["list"]:
            follow()
    except Stop as stop:
        return 128 + stop.number
    return 0


def _lead(options: dict[str, Any], device: torch.device) -> int:
    data_dir = options["data_dir"]
    grid = read(options["config"], data_dir)
    out: Path = options["out"] or Path("runs") / grid.name
    jobs, address = options["jobs"], options["address"]
    if jobs is not None and jobs < 1:
        raise UserError(f"--jobs must be at least 1, got {jobs}")
    if jobs is not None and address is not None:
        raise UserError("--jobs is for this machine, and the nodes at --address say themselves how many runs they take: give one of them")
    for name in sorted({cell.settings.data for cell in grid.cells.values()}):
        if data_dir is None and source_of(name).needs_folder:
            raise UserError(f"data {name} needs --data-dir, the folder with its files")
    comparison = Comparison(grid, out, data_dir, str(device), progress.make())
    if options["list"]:
        _list(comparison)
        return 0
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to --out {out}: {error.strerror}") from error
    folder = RunFolder(out)
    folder.lock()
    comparison.after_cell = lambda: _write(comparison)
    try:
        if address is not None:
            cluster.run_on_ray(comparison, None, address)
        elif (jobs := jobs or _jobs(grid, device)) > 1:
            cluster.run_on_ray(comparison, jobs)
        else:
            run_here(comparison)
    except Stop as stop:
        print("stopped; the same command goes on", file=sys.stderr)
        return 128 + stop.number
    finally:
        folder.release()
    return _finish(comparison)


def _jobs(grid: Grid, device: torch.device) -> int:
    """As many runs at a time as the CPU cores have room for, if there is Ray to run them; on a GPU one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    room = cores // max(cell.settings.threads or 1 for cell in grid.cells.values())
    if device.type != "cpu" or room < 2 or ranks.count() > 1:
        return 1
    if not cluster.available():
        print(f"one run at a time; {room} at a time need Ray: {cluster.INSTALL}", file=sys.stderr)
        return 1
    return room


def _write(comparison: Comparison) -> None:
    results.write(results.collect(comparison), comparison.out)


def _list(comparison: Comparison) -> None:
    for cell in comparison.grid.cells.values():
        mark = "finished" if comparison.is_finished(cell) else "to do"
        print(f"{mark:8}  {cell.epochs:5} epochs  {cell.name}  {cell.folder}")
    epochs = sum(cell.epochs for cell in comparison.grid.cells.values() if not comparison.is_finished(cell))
    print(f"{len(comparison.grid.cells)} runs, {epochs} epochs to do")


def _finish(comparison: Comparison) -> int:
    rows = results.collect(comparison)
    if rows:
        made = [*results.write(rows, comparison.out), *figures.draw(rows, comparison.out)]
        part = "validation" if rows[0]["evaluated_on"] == "validation" else "test"
        items = " and ".join(dict.fromkeys(source_of(row["data"]).kind.items for row in rows))
        words = all(row["perplexity"] is not None for row in rows)
        what = f"Perplexity on {part} {items}" if words else f"Accuracy on {part} {items} in percent"
        print(f"{what}, mean ± standard deviation over seeds; epochs and minutes with dense training.\n")
        print(results.table(rows))
        print(f"\nin {comparison.out}: {', '.join(path.name for path in made)}")
    for address, why in comparison.failed.items():
        print(f"failed: {comparison.grid.cells[address].folder}: {why}", file=sys.stderr)
    return 1 if comparison.failed else 0

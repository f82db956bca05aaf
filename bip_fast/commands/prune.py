"""`bip-fast prune`: train a network, prune it, measure both."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any, cast, get_args

import torch

from ..engine.native import kernels
from ..engine.report import Report, Row
from ..errors import UserError
from ..experiments import ranks
from ..experiments.data.kinds import LANGUAGE
from ..experiments.data.sources import DATA, TSV, load, source_of
from ..experiments.methods.table import METHODS
from ..experiments.models.transformer import PREFIX
from ..experiments.runs import display
from ..experiments.runs.events import NO_EVENTS, EventFiles
from ..experiments.runs.folder import RunFolder
from ..experiments.runs.job import Job
from ..experiments.runs.resolve import preset_of, resolve, unused
from ..experiments.runs.signals import Stop
from ..experiments.settings import FIELDS, PARTS, RUN, Settings, described, option
from .environment import pick_device

__all__ = ["add_options", "run"]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Train a network, prune it (with BiP, or another --method), measure both on the test set. Without options: ResNet-20 "
        "on scikit-learn's digits, 95 % zeros, in less than a minute on two CPU cores."
    )
    parser.epilog = (
        "The run folder gets model.safetensors (plain keys, exact zeros), dense.safetensors, report.json, config.json, curves.png "
        "and checkpoint.pt. Defaults were chosen on a part of the training images; test images are only looked at for the report."
    )
    parser.argument_default = argparse.SUPPRESS
    told = {name: info for name, info in described().items() if info.json_schema_extra}
    groups = {part: parser.add_argument_group(part) for part in PARTS}
    for name, info in told.items():
        more = cast(dict[str, Any], info.json_schema_extra)
        text = f"{', '.join(METHODS)}; {info.description}" if name == "method" else f"{info.description}"
        default = _default(name) if more["default"] is None else more["default"]
        text += f"; default: {default}" if default else ""
        group, kind = groups[more["part"]], (get_args(info.annotation) or (info.annotation,))[0]
        if kind is bool:
            group.add_argument(option(name), action="store_true", help=text)
        else:
            group.add_argument(option(name), type=kind, metavar=more["metavar"], help=text)
        if name == "data":
            group.add_argument(
                "--data-dir",
                type=Path,
                metavar="DIR",
                help="folder with the standard files of the data set (not for digits and tsv:PATH)",
            )
    run = groups[RUN]
    run.add_argument("--device", metavar="NAME", default="auto", help="auto, cpu, cuda or cuda:N; default: auto")
    run.add_argument("--out", type=Path, metavar="DIR", help="run folder; default: runs/<data>-<model>-<sparsity>-seed<seed>")
    run.add_argument(
        "--resume", nargs="?", type=Path, const=None, metavar="DIR", help="continue the run in DIR, or in the folder that the options name"
    )
    run.add_argument("--log", choices=("tensorboard",), help="tensorboard: write event files into the run folder")
    run.add_argument("--overwrite", action="store_true", help="start again in a folder that has a run")


def _default(name: str) -> str:
    """The value of a setting without an option: that of most data sets, and the others with the data sets that have them."""
    values: dict[Any, list[str]] = {}
    for data in DATA:
        values.setdefault(preset_of(data, Settings.method, {}).get(name, getattr(Settings, name)), []).append(data)
    usual, *others = sorted(values, key=lambda value: -len(values[value]))
    return f"{usual}" + "".join(f", for {' and '.join(values[value])} {value}" for value in others)


def run(options: dict[str, Any]) -> int:
    """Run it, or go on with it; UserError where the input is not what it should be."""
    device = pick_device(options["device"])
    if str(options.get("out", "out")) == "." and not options.get("overwrite"):
        raise UserError("--out must name a folder of its own, got the current one")
    given = {name: value for name, value in options.items() if name in FIELDS}
    for name in ("checkpoint", "rewind_checkpoint"):
        if given.get(name) and Path(given[name]).is_file():
            given[name] = str(Path(given[name]).resolve())  # --resume may come from another folder
    for name, prefix in (("data", TSV), ("model", PREFIX)):
        if str(given.get(name, "")).startswith(prefix):
            given[name] = prefix + str(Path(given[name].removeprefix(prefix)).resolve())
    resume = "resume" in options
    if resume and options.get("overwrite"):
        raise UserError("--resume continues a run and --overwrite starts again: give one of them")
    if resume and options["resume"] is not None and "out" in options:
        raise UserError("--resume DIR and --out both name the run folder: give one of them")
    path = options.get("resume") or options.get("out") or Path("runs") / resolve(given).folder_name
    folder = RunFolder(path)
    settings = folder.settings(given) if resume else resolve(given)
    if (useless := unused(settings, given)) is not None:
        raise UserError(f"--method {settings.method} makes no use of {option(useless)}: leave it out")
    if resume and folder.finished:
        print(f"{path} is finished; --overwrite runs it again", file=sys.stderr)
        print_result(folder.read_report(), folder.path)
        return 0
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    data = load(settings.data, options.get("data_dir"))
    kernels()  # before anything is trained
    events = EventFiles(folder.path) if "log" in options and not ranks.rank() else NO_EVENTS
    job = Job(settings, folder, data, device, display.make(), events=events)
    try:
        if resume:
            job.resume()
        else:
            job.start()
            folder.open(settings, overwrite=bool(options.get("overwrite")))
        if data.note:
            print(f"note: {data.note}", file=sys.stderr)
        result = job.run()
    except Stop as stop:
        where = "" if "data_dir" not in options else f" --data-dir {options['data_dir']}"
        log = f" --log {options['log']}" if "log" in options else ""
        print(f"stopped; continue with: bip-fast prune --resume {path}{where}{log}", file=sys.stderr)
        return 128 + stop.number
    finally:
        events.close()
        folder.release()
    print_result(result, path)
    return 0


def print_result(result: dict[str, Any], path: Path) -> None:
    """Table and figures of a finished run on stdout."""
    rows = tuple(Row(row["name"], tuple(row["shape"]), row["kept"], row["total"]) for row in result["layers"])
    part, seconds, pruned = result["evaluated_on"], result["seconds"], 100 * result["pruned"]["accuracy"]
    dense, kind = 100 * result["dense"]["accuracy"] if "dense" in result else None, source_of(result["data"]).kind
    before = "" if dense is None else f"dense {dense:.2f} %   "
    change = "" if dense is None else f" ({pruned - dense:+.2f})"
    print(f"\n{Report(rows)}\n")
    print(f"{part} accuracy   {before}pruned {pruned:.2f} %{change}   on {result['images'][part]} {kind.items}")
    if kind is LANGUAGE:
        both = {name: math.exp(result[name]["loss"]) for name in ("dense", "pruned") if name in result}
        print(f"{part} perplexity {'   '.join(f'{name} {value:.2f}' for name, value in both.items())}")
    times = {"dense training": seconds.get("pretrain"), "pruning": sum(x for stage, x in seconds.items() if stage != "pretrain")}
    print(f"seconds         {'   '.join(f'{name} {x:.1f}' for name, x in times.items() if x is not None)}")
    print(f"run folder      {path}")

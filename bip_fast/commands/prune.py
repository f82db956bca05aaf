"""`bip-fast prune`: train a network, prune it, measure both."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from ..engine.native import kernels
from ..engine.options import SCOPES
from ..engine.report import Report, Row
from ..errors import UserError
from ..experiments.data.sets import VALIDATION_IMAGES, load
from ..experiments.methods.table import METHODS
from ..experiments.models.names import MODELS
from ..experiments.runs import display
from ..experiments.runs.folder import RunFolder
from ..experiments.runs.job import Job
from ..experiments.runs.settings import FIELDS, LEVELS, PRESETS, SCORE_STARTS, Settings, option, unused
from ..experiments.runs.signals import Stop
from .environment import check_extras, pick_device

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
    _add_what(parser.add_argument_group("what to prune"))
    _add_how(parser.add_argument_group("how to prune"))
    _add_training(parser.add_argument_group("training"))
    _add_run(parser.add_argument_group("the run"))


def _default(name: str) -> str:
    """What a setting is without an option, with the data sets for which it differs."""
    values: dict[Any, list[str]] = {}
    own = METHODS[Settings.method].defaults
    for data, preset in PRESETS.items():
        values.setdefault(own.get(name, preset.get(name, getattr(Settings, name))), []).append(data)
    if len(values) == 1:
        return f"default: {next(iter(values))}"
    return "default: " + ", ".join(f"{value} ({' and '.join(names)})" for value, names in values.items())


def _add(group: Any, name: str, kind: type, metavar: str, text: str) -> None:
    group.add_argument(option(name), type=kind, metavar=metavar, help=f"{text}; {_default(name)}")


def _add_what(group: Any) -> None:
    _add(group, "data", str, "NAME", f"{', '.join(PRESETS)}")
    group.add_argument(
        "--data-dir", type=Path, metavar="DIR", help="folder with the standard files of the data set (not needed for digits)"
    )
    group.add_argument("--train-images", type=int, metavar="N", help="only so many training images, the same share of every class")
    _add(group, "stride", int, "N", "only every N-th pixel in both directions")
    _add(
        group,
        "model",
        str,
        "NAME",
        f"{', '.join(MODELS)}, timm:NAME, torchvision:NAME, or your own: FILE.py:function(channels, classes)",
    )
    group.add_argument(
        "--width", type=int, metavar="N", help="channels of the first stage; default: 16, for resnet18, resnet50 and vgg16bn 64"
    )
    group.add_argument(
        "--checkpoint", type=str, metavar="FILE", help="trained dense weights to prune (.safetensors or .pt): no dense training"
    )
    _add(
        group,
        "sparsity",
        float,
        "S",
        "fraction of zeros among all Conv and Linear weights, or pruned share of the units of --pattern, in [0, 1)",
    )

    _add(group, "pattern", str, "NAME", "unstructured, filter, channel, N:M such as 2:4, or block:RxC")
    _add(group, "scope", str, "NAME", f"{', '.join(SCOPES)}: whose weights or filters compete with whose")


def _add_how(group: Any) -> None:
    _add(group, "method", str, "NAME", f"{', '.join(METHODS)}; README.md has a table of what each does")
    _add(group, "levels", str, "NAME", f"{' or '.join(LEVELS)}: a lower and an upper step on different batches, or both from one")
    _add(group, "epochs", int, "N", "passes over the training images while pruning")
    _add(group, "lr", float, "X", "step size of the weights, at the start of a cosine")
    _add(group, "mask_lr", float, "X", "step size of the scores, at the start of a cosine")
    _add(group, "gamma", float, "X", "weight of the lower level's convexity; larger: smaller implicit gradient")
    _add(group, "score_start", str, "NAME", f"{' or '.join(SCORE_STARTS)}: scores of bip begin at min(|theta|, 1) or at theta^2 / 2")
    _add(group, "mask_momentum", float, "X", "momentum of the scores")
    _add(group, "ramp", float, "X", "share of the time until masks freeze in which the sparsity grows; 0: all of it at once")
    _add(group, "freeze", float, "X", "share of pruning after which masks stay; 0: one-shot magnitude pruning, 1: never")
    group.add_argument(
        "--rewind",
        type=str,
        metavar="E",
        help="retrain under the mask from the weights of an epoch of dense training, a number or init, under the rest of its schedule "
        "(all of it after the last epoch), or lr: the weights as they are, under all of it; default: init for imp and omp, otherwise not",
    )
    group.add_argument("--rewind-checkpoint", type=str, metavar="FILE", help="with --checkpoint: the weights that --rewind goes back to")
    _add(group, "per_round", float, "X", "imp: share of the weights left that goes in each round")


def _add_training(group: Any) -> None:
    _add(group, "pretrain_epochs", int, "N", "epochs of dense training")
    _add(group, "pretrain_lr", float, "X", "step size of dense training, at the start of a cosine")
    _add(group, "batch_size", int, "N", "images in a batch")
    _add(group, "momentum", float, "X", "momentum of the weights")
    _add(group, "weight_decay", float, "X", "weight decay of pruning and fine-tuning")
    group.add_argument(
        "--pretrain-weight-decay",
        type=float,
        metavar="X",
        help="of dense training, also where a method trains by its schedule; default: that of --weight-decay, or of the data set",
    )
    _add(group, "seed", int, "N", "decides the first weights and the order of the images")
    group.add_argument(
        "--validate",
        action="store_true",
        help=f"hold out {VALIDATION_IMAGES:,} training images, or a fifth if that is less, and measure on these: for choosing options",
    )
    group.add_argument(
        "--amp",
        action="store_true",
        help="train under bfloat16 autocast, for speed on a GPU; default: float32 on every device, and results are measured in it",
    )


def _add_run(group: Any) -> None:
    group.add_argument("--device", metavar="NAME", default="auto", help="auto, cpu, cuda or cuda:N; default: auto")
    group.add_argument(
        "--threads", type=int, metavar="N", help="CPU threads; sums, and so results, depend on their number; default: one for each core"
    )
    group.add_argument("--out", type=Path, metavar="DIR", help="run folder; default: runs/<data>-<model>-<sparsity>-seed<seed>")
    group.add_argument(
        "--resume", nargs="?", type=Path, const=None, metavar="DIR", help="continue the run in DIR, or in the folder that the options name"
    )
    group.add_argument("--overwrite", action="store_true", help="start again in a folder that has a run")


def run(options: dict[str, Any]) -> int:
    """Run it, or go on with it; UserError where the input is not what it should be."""
    check_extras()
    device = pick_device(options["device"])
    if str(options.get("out", "out")) == "." and not options.get("overwrite"):
        raise UserError("--out must name a folder of its own, got the current one")
    given = {name: value for name, value in options.items() if name in FIELDS}
    for name in ("checkpoint", "rewind_checkpoint"):
        if given.get(name) and Path(given[name]).is_file():
            given[name] = str(Path(given[name]).resolve())  # --resume may come from another folder
    resume = "resume" in options
    if resume and options.get("overwrite"):
        raise UserError("--resume continues a run and --overwrite starts again: give one of them")
    if resume and options["resume"] is not None and "out" in options:
        raise UserError("--resume DIR and --out both name the run folder: give one of them")
    if resume and options["resume"] is not None:
        path = options["resume"]
    else:
        path = options.get("out", Path("runs") / Settings.of(given).folder_name)
    folder = RunFolder(path)
    settings = folder.settings(given) if resume else Settings.of(given)
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
    job = Job(settings, folder, data, device, display.make())
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
        print(f"stopped; continue with: bip-fast prune --resume {path}{where}", file=sys.stderr)
        return 128 + stop.number
    finally:
        folder.release()
    print_result(result, path)
    return 0


def print_result(result: dict[str, Any], path: Path) -> None:
    """Table and figures of a finished run on stdout."""
    rows = tuple(Row(row["name"], tuple(row["shape"]), row["kept"], row["total"]) for row in result["layers"])
    part, seconds, pruned = result["evaluated_on"], result["seconds"], 100 * result["pruned"]["accuracy"]
    dense = 100 * result["dense"]["accuracy"] if "dense" in result else None
    before = "" if dense is None else f"dense {dense:.2f} %   "
    change = "" if dense is None else f" ({pruned - dense:+.2f})"
    print(f"\n{Report(rows)}\n")
    print(f"{part} accuracy   {before}pruned {pruned:.2f} %{change}   on {result['images'][part]} images")
    times = {"dense training": seconds.get("pretrain"), "pruning": sum(x for stage, x in seconds.items() if stage != "pretrain")}
    print(f"seconds         {'   '.join(f'{name} {x:.1f}' for name, x in times.items() if x is not None)}")
    print(f"run folder      {path}")

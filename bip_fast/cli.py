"""The command `bip-fast`: `prune` trains and prunes a network, `compare` runs a grid of methods, `measure` says what was won, `report`
shows a saved one, `doctor` says what works here, `bench` how fast.

Exit codes: 0 done, 2 bad input (one line on stderr, no traceback), 130 interrupted and 143 terminated (the checkpoint is good), 141 when
nobody reads the output any more, and for `doctor` 1 when something needed is missing. The core of bip_fast needs none of the packages
that are used here.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from .experiments import ExperimentError

__all__ = ["main"]

EXTRAS = {"sklearn": "scikit-learn", "rich": "rich", "matplotlib": "matplotlib", "safetensors": "safetensors", "yaml": "pyyaml"}
INSTALL = "pip install 'bip_fast[cli]'"


class Parser(argparse.ArgumentParser):
    """Errors in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} ({self.prog} --help lists all options)\n")


def missing_extras() -> list[str]:
    """Names of the packages of `[cli]` that are not installed."""
    return [package for module, package in EXTRAS.items() if importlib.util.find_spec(module) is None]


def check_extras() -> None:
    """ExperimentError when a package of `[cli]` is not installed."""
    missing = missing_extras()
    if missing:
        raise ExperimentError(f"needs {', '.join(missing)}: {INSTALL}")


def parser() -> argparse.ArgumentParser:
    top = Parser(prog="bip-fast", description="Bi-level pruning (BiP) for PyTorch.")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", title="commands", parser_class=Parser)
    prune = commands.add_parser(
        "prune",
        help="train a network, prune it, measure both",
        description="Train a network, prune it (with BiP, or another --method), measure both on the test set. Without options: ResNet-20 on scikit-learn's "
        "digits, 95 % zeros, in less than a minute on two CPU cores.",
        epilog="The run folder gets model.safetensors (plain keys, exact zeros), dense.safetensors, report.json, config.json, curves.png "
        "and checkpoint.pt. Defaults were chosen on a part of the training images; test images are only looked at for the report.",
        argument_default=argparse.SUPPRESS,
    )
    _add_prune_options(prune)
    shown = commands.add_parser(
        "report", help="show the layers of a saved network", description="Layers of a saved network: kept of total."
    )
    shown.add_argument("file", metavar="FILE", type=Path, help=".safetensors file, state dict saved by torch, or run folder")
    shown.add_argument("--json", action="store_true", help="print JSON instead of a table")
    bench = commands.add_parser(
        "bench",
        help="time the steps on this machine",
        description="Times of lower, upper and joint steps and of topk_mask, beside a copy of the same bytes and beside plain torch. "
        "Takes about half a minute on two CPU cores.",
    )
    bench.add_argument("--numel", type=int, default=11_164_352, metavar="N", help="number of weights; default: those of a ResNet-18")
    bench.add_argument("--density", type=float, default=0.1, metavar="D", help="fraction of weights kept; default: %(default)s")
    bench.add_argument("--device", metavar="NAME", default="auto", help="auto, cpu, cuda or cuda:N; default: auto")
    _add_measure_options(commands)
    _add_compare_options(commands)
    commands.add_parser("doctor", help="show versions, devices and what is missing", description="What works here, and what is missing.")
    return top


def _add_measure_options(commands: Any) -> None:
    from .export.command import add_options

    add_options(commands)


def _add_compare_options(commands: Any) -> None:
    from .experiments.compare_command import add_options

    add_options(commands)


def _add_prune_options(prune: argparse.ArgumentParser) -> None:
    from .budgets import SCOPES
    from .experiments.methods import METHODS
    from .experiments.settings import LEVELS, PRESETS, Settings

    def default(name: str) -> str:
        values: dict[Any, list[str]] = {}
        for data, preset in PRESETS.items():
            values.setdefault(preset.get(name, getattr(Settings, name)), []).append(data)
        if len(values) == 1:
            return f"default: {next(iter(values))}"
        return "default: " + ", ".join(f"{value} ({' and '.join(names)})" for value, names in values.items())

    def add(group: Any, name: str, kind: type, metavar: str, text: str, **more: Any) -> None:
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=metavar, help=f"{text}; {default(name)}", **more)

    what = prune.add_argument_group("what to prune")
    add(what, "data", str, "NAME", f"{', '.join(PRESETS)}")
    what.add_argument("--data-dir", type=Path, metavar="DIR", help="folder with the standard files of the data set (not needed for digits)")
    what.add_argument("--train-images", type=int, metavar="N", help="only so many training images, the same share of every class")
    add(what, "stride", int, "N", "only every N-th pixel in both directions")
    add(
        what,
        "model",
        str,
        "NAME",
        "resnet20, resnet20b, resnet32, resnet56, resnet18, vgg16bn (CIFAR form), resnet18-imagenet, resnet50, timm:NAME, torchvision:NAME, "
        "or your own: FILE.py:function(channels, classes)",
    )
    what.add_argument("--width", type=int, metavar="N", help="channels of the first stage; default: 16, for resnet18, resnet50 and vgg16bn 64")
    what.add_argument(
        "--checkpoint", type=str, metavar="FILE", help="trained dense weights to prune (.safetensors or .pt): no dense training"
    )
    add(what, "sparsity", float, "S", "fraction of zeros among all Conv and Linear weights, in [0, 1)")

    add(what, "pattern", str, "NAME", "unstructured, filter, channel, N:M such as 2:4, or block:RxC")
    add(what, "scope", str, "NAME", f"{', '.join(SCOPES)}: whose weights or filters compete with whose")

    how = prune.add_argument_group("how to prune")
    add(how, "method", str, "NAME", f"{', '.join(METHODS)}; docs/methods.md says what each does")
    add(how, "levels", str, "NAME", f"{' or '.join(LEVELS)}: a lower and an upper step on different batches, or both from one")
    add(how, "epochs", int, "N", "passes over the training images while pruning")
    add(how, "lr", float, "X", "step size of the weights, at the start of a cosine")
    add(how, "mask_lr", float, "X", "step size of the scores, at the start of a cosine")
    add(how, "gamma", float, "X", "weight of the lower level's convexity; larger: smaller implicit gradient")
    add(how, "mask_momentum", float, "X", "momentum of the scores")
    add(how, "ramp", float, "X", "share of pruning in which the sparsity grows; 0: it is there from the beginning")
    add(how, "freeze", float, "X", "share of pruning after which masks stay; 0: one-shot magnitude pruning, 1: never")
    how.add_argument(
        "--rewind",
        type=str,
        metavar="E",
        help="retrain under the mask from the weights of an epoch of dense training: a number, init, or lr for the weights as they are "
        "under the schedule of dense training; default: init for imp and omp, otherwise not at all",
    )
    how.add_argument("--rewind-checkpoint", type=str, metavar="FILE", help="with --checkpoint: the weights that --rewind goes back to")
    add(how, "per_round", float, "X", "imp: share of the weights left that goes in each round")

    training = prune.add_argument_group("training")
    add(training, "pretrain_epochs", int, "N", "epochs of dense training")
    add(training, "pretrain_lr", float, "X", "step size of dense training, at the start of a cosine")
    add(training, "batch_size", int, "N", "images in a batch")
    add(training, "momentum", float, "X", "momentum of the weights")
    add(training, "weight_decay", float, "X", "weight decay")
    add(training, "seed", int, "N", "decides the first weights and the order of the images")
    training.add_argument(
        "--validate",
        action="store_true",
        help="train on four fifths of the training images and measure on the others: for choosing options",
    )
    training.add_argument(
        "--amp",
        action="store_true",
        help="train under bfloat16 autocast, for speed on a GPU; default: float32 on every device, and results are measured in it",
    )

    run = prune.add_argument_group("the run")
    run.add_argument("--device", metavar="NAME", default="auto", help="auto, cpu, cuda or cuda:N; default: auto")
    run.add_argument("--out", type=Path, metavar="DIR", help="run folder; default: runs/<data>-<model>-<sparsity>-seed<seed>")
    run.add_argument(
        "--resume", nargs="?", type=Path, const=None, metavar="DIR", help="continue the run in DIR, or in the folder that the options name"
    )
    run.add_argument("--overwrite", action="store_true", help="start again in a folder that has a run")


def command_prune(options: dict[str, Any]) -> int:
    check_extras()
    from .experiments import display
    from .experiments.data import load
    from .experiments.run import RunFolder, Stop
    from .experiments.settings import FIELDS, Settings

    if str(options.get("out", "out")) == "." and not options.get("overwrite"):
        raise ExperimentError("--out must name a folder of its own, got the current one")
    given = {name: value for name, value in options.items() if name in FIELDS}
    for name in ("checkpoint", "rewind_checkpoint"):
        if given.get(name) and Path(given[name]).is_file():
            given[name] = str(Path(given[name]).resolve())  # --resume may come from another folder
    resume = "resume" in options
    if resume and options.get("overwrite"):
        raise ExperimentError("--resume continues a run and --overwrite starts again: give one of them")
    if resume and options["resume"] is not None and "out" in options:
        raise ExperimentError("--resume DIR and --out both name the run folder: give one of them")
    if resume and options["resume"] is not None:
        path = options["resume"]
    else:
        path = options.get("out", Path("runs") / Settings.of(given).folder_name)
    folder = RunFolder(path)
    settings = folder.settings(given) if resume else Settings.of(given)
    if resume and folder.finished:
        print(f"{path} is finished; --overwrite runs it again", file=sys.stderr)
        print_result(folder.read_json("report.json"), folder.path)
        return 0
    device = pick_device(options["device"])
    data = load(settings.data, options.get("data_dir"))
    from .experiments.prune import Job
    from .ops import kernels

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


def pick_device(name: str) -> Any:
    """The torch device for a name.

    Raises:
        ExperimentError: it does not exist, or there are no kernels for it.
    """
    import torch

    from .ops import BACKENDS

    if name == "auto":
        return torch.device("cuda" if "cuda" in BACKENDS and torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ExperimentError(f"--device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda":
        if not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count():
            raise ExperimentError(f"--device {name}: torch sees {torch.cuda.device_count()} CUDA devices; `bip-fast doctor` says more")
        if "cuda" not in BACKENDS:
            raise ExperimentError(f"--device {name}: bip_fast was built without CUDA; `bip-fast doctor` says more")
    return device


def print_result(result: dict[str, Any], path: Path) -> None:
    """Table and figures of a finished run on stdout."""
    from .report import Report, Row

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


def command_report(options: dict[str, Any]) -> int:
    from .experiments.run import read_state_dict
    from .report import report

    path: Path = options["file"]
    if path.is_dir():
        path = path / "model.safetensors"
    try:
        table = report(read_state_dict(path))
    except (ValueError, RuntimeError) as error:  # torch cannot count in every kind of tensor
        raise ExperimentError(f"{path}: {' '.join(str(error).split())}") from error
    print(json.dumps(table.as_dict(), indent=2) if options["json"] else table)
    return 0


def command_doctor(options: dict[str, Any]) -> int:
    from .doctor import doctor

    return doctor()


def command_bench(options: dict[str, Any]) -> int:
    import torch

    from . import benchmark
    from .ops import kernels

    numel, density = options["numel"], options["density"]
    if not 1 <= numel < 2**32:
        raise ExperimentError(f"--numel must be in [1, 2**32), got {numel}")
    if not 1e-12 <= density <= 1:
        raise ExperimentError(f"--density must be in [1e-12, 1], got {density}")
    kernels()
    device = pick_device(options["device"])
    if why := benchmark.too_large(numel, device):
        raise ExperimentError(f"--numel {numel}: {why} on {device}")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}, {numel:,} weights, fp32, {100 * density:g} % kept, one mask over all\n", flush=True)
    try:
        rows = benchmark.measure(numel, device, density)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise ExperimentError(f"--numel {numel}: not enough memory on {device}") from error
    print(benchmark.table(rows))
    print("\ncopy: as many bytes as the operation must move, read plus write; % of copy: of that copy's bandwidth")
    return 0


def command_measure(options: dict[str, Any]) -> int:
    from .export.command import command

    return command(options, pick_device(options["device"]))


def command_compare(options: dict[str, Any]) -> int:
    check_extras()
    from .experiments.compare_command import command

    return command(options, pick_device(options["device"]))


COMMANDS = {"bench": command_bench, "compare": command_compare, "measure": command_measure, "prune": command_prune, "report": command_report, "doctor": command_doctor}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name that the terminal cannot show must not end a run
    top = parser()
    try:
        options = vars(top.parse_args(arguments))
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 2
    command = options.pop("command")
    if command is None:
        top.print_help()
        return 0
    try:
        return COMMANDS[command](options)
    except (ExperimentError, ImportError) as error:  # ImportError: the kernels are not built
        print(f"bip-fast {command}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `bip-fast report ... | head`
        sys.stderr.close()
        return 141
    except OSError as error:  # a full disk, a folder that went away
        print(f"bip-fast {command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())

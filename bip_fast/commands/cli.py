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
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from ..errors import UserError, one_line

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
    """UserError when a package of `[cli]` is not installed."""
    missing = missing_extras()
    if missing:
        raise UserError(f"needs {', '.join(missing)}: {INSTALL}")


def parser() -> argparse.ArgumentParser:
    top = Parser(prog="bip-fast", description="Bi-level pruning (BiP) for PyTorch.")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", title="commands", parser_class=Parser)
    _add_prune_options(commands)
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
    from .measure import add_options

    add_options(commands)


def _add_compare_options(commands: Any) -> None:
    from .compare import add_options

    add_options(commands)


def _add_prune_options(commands: Any) -> None:
    from .prune import add_options

    add_options(commands)


def command_prune(options: dict[str, Any]) -> int:
    check_extras()
    from .prune import command

    return command(options, pick_device(options["device"]))


def pick_device(name: str) -> Any:
    """The torch device for a name.

    Raises:
        UserError: it does not exist, or there are no kernels for it.
    """
    import torch

    from ..engine.native import BACKENDS

    if name == "auto":
        return torch.device("cuda" if "cuda" in BACKENDS and torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda":
        if not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count():
            raise UserError(f"--device {name}: torch sees {torch.cuda.device_count()} CUDA devices; `bip-fast doctor` says more")
        if "cuda" not in BACKENDS:
            raise UserError(f"--device {name}: bip_fast was built without CUDA; `bip-fast doctor` says more")
    return device


def command_report(options: dict[str, Any]) -> int:
    from ..engine.report import report
    from ..experiments.runs.state_dicts import read_state_dict

    path: Path = options["file"]
    if path.is_dir():
        path = path / "model.safetensors"
    try:
        table = report(read_state_dict(path))
    except (ValueError, RuntimeError) as error:  # torch cannot count in every kind of tensor
        raise UserError(f"{path}: {one_line(error)}") from error
    print(json.dumps(table.as_dict(), indent=2) if options["json"] else table)
    return 0


def command_doctor(options: dict[str, Any]) -> int:
    from .doctor import doctor

    return doctor()


def command_bench(options: dict[str, Any]) -> int:
    import torch

    from ..engine.native import kernels
    from ..timing import steps as benchmark

    numel, density = options["numel"], options["density"]
    if not 1 <= numel < 2**32:
        raise UserError(f"--numel must be in [1, 2**32), got {numel}")
    if not 1e-12 <= density <= 1:
        raise UserError(f"--density must be in [1e-12, 1], got {density}")
    kernels()
    device = pick_device(options["device"])
    if why := benchmark.too_large(numel, device):
        raise UserError(f"--numel {numel}: {why} on {device}")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}, {numel:,} weights, fp32, {100 * density:g} % kept, one mask over all\n", flush=True)
    try:
        rows = benchmark.measure(numel, device, density)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise UserError(f"--numel {numel}: not enough memory on {device}") from error
    print(benchmark.table(rows))
    print("\ncopy: as many bytes as the operation must move, read plus write; % of copy: of that copy's bandwidth")
    return 0


def command_measure(options: dict[str, Any]) -> int:
    from .measure import command

    return command(options, pick_device(options["device"]))


def command_compare(options: dict[str, Any]) -> int:
    check_extras()
    from .compare import command

    return command(options, pick_device(options["device"]))


COMMANDS = {
    "bench": command_bench,
    "compare": command_compare,
    "measure": command_measure,
    "prune": command_prune,
    "report": command_report,
    "doctor": command_doctor,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed before this began: `2>&-`
            nowhere = open(os.devnull, "w")  # noqa: SIM115
            os.set_inheritable(nowhere.fileno(), True)  # by the processes of a comparison
            setattr(sys, name, nowhere)
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
    except (UserError, ImportError) as error:  # ImportError: the kernels are not built
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

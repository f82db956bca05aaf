"""The command `bip-fast`: one room of this folder for each command, listed in `COMMANDS`.

Exit codes: 0 done, 1 a run of `compare` failed, or `doctor` misses something, 2 bad input (one line on stderr, no traceback), 130
interrupted and 143 terminated (the checkpoint is good), 141 when nobody reads the output any more. Only the room of the command that is
run is imported, so that a package that another one needs may be missing.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NoReturn

from ..errors import UserError
from ..experiments import ranks
from .environment import EXTRAS, check_extras

__all__ = ["COMMANDS", "main"]

# A room has `add_options(parser)` and `run(options)`, which returns the exit code.
COMMANDS = {
    "prune": "train a network, prune it, measure both",
    "report": "show the layers of a saved network",
    "bench": "time the steps on this machine",
    "measure": "time a pruned network beside the dense one, and say why it is or is not faster",
    "compare": "run a grid of methods, sparsities and seeds; tables and pictures",
    "doctor": "show versions, devices and what is missing",
}
# Modules of [cli] that a command cannot do without.
NEEDS = {"prune": tuple(EXTRAS), "compare": tuple(EXTRAS), "measure": ("pydantic", "filelock", "safetensors")}


# Commands that torchrun may start in several processes.
TOGETHER = ("prune", "compare")


class Parser(argparse.ArgumentParser):
    """Errors in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} ({self.prog} --help lists all options)\n")


def room_of(command: str) -> Any:
    return importlib.import_module(f".{command}", __package__)


def parser(command: str | None) -> Parser:
    """Knows the names of all commands, and the options of one."""
    top = Parser(prog="bip-fast", description="Bi-level pruning (BiP) for PyTorch.")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", title="commands", parser_class=Parser)
    for name, what in COMMANDS.items():
        own = commands.add_parser(name, help=what)
        if name == command:
            room_of(name).add_options(own)
    return top


def _open_streams() -> None:
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed before this began: `2>&-`
            nowhere = open(os.devnull, "w")  # noqa: SIM115
            os.set_inheritable(nowhere.fileno(), True)  # by the processes of a comparison
            setattr(sys, name, nowhere)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name that the terminal cannot show must not end a run


def _run(command: str | None, arguments: Sequence[str]) -> int:
    check_extras(NEEDS.get(str(command), ()))
    top = parser(command)
    try:
        options = vars(top.parse_args(arguments))
    except SystemExit as stop:  # bad options, or --help
        return stop.code if isinstance(stop.code, int) else 2
    if options.pop("command") is None:
        top.print_help()
        return 0
    return int(room_of(str(command)).run(options))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    _open_streams()
    arguments = sys.argv[1:] if arguments is None else arguments
    command = next((word for word in arguments[:1] if word in COMMANDS), None)
    try:
        with ranks.opened() if command in TOGETHER else nullcontext():
            return _run(command, arguments)
    except (UserError, ImportError) as error:  # ImportError: the kernels are not built, or a package is missing
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

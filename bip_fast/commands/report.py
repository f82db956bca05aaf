"""`bip-fast report`: the layers of a saved network."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ..engine.report import report
from ..errors import UserError, one_line
from ..state_dicts import read_state_dict

__all__ = ["add_options", "run"]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.description = "Layers of a saved network: how many of its weights each has kept."
    parser.add_argument("file", metavar="FILE", type=Path, help=".safetensors file, state dict saved by torch, or run folder")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(options: dict[str, Any]) -> int:
    """Print the table; UserError for a file that cannot be read or has no weights."""
    path: Path = options["file"]
    if path.is_dir():
        path = path / "model.safetensors"
    try:
        table = report(read_state_dict(path))
    except (ValueError, RuntimeError) as error:  # torch cannot count in every kind of tensor
        raise UserError(f"{path}: {one_line(error)}") from error
    print(json.dumps(table.as_dict(), indent=2) if options["json"] else table)
    return 0

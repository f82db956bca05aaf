"""`bip-fast bench`: how long the steps take on this machine."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from ..engine.native import kernels
from ..errors import UserError
from ..timing import steps
from ..timing.clock import too_large
from .environment import pick_device

__all__ = ["add_options", "run"]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Times of lower, upper and joint steps and of topk_mask, beside a copy of the same bytes and beside plain torch. "
        "Takes about half a minute on two CPU cores."
    )
    parser.add_argument("--numel", type=int, default=11_164_352, metavar="N", help="number of weights; default: those of a ResNet-18")
    parser.add_argument("--density", type=float, default=0.1, metavar="D", help="fraction of weights kept; default: %(default)s")
    parser.add_argument("--device", metavar="NAME", default="auto", help="auto, cpu, cuda or cuda:N; default: auto")


def run(options: dict[str, Any]) -> int:
    """Print the times; UserError for sizes that are out of range or do not fit."""
    numel, density = options["numel"], options["density"]
    if not 1 <= numel < 2**32:
        raise UserError(f"--numel must be in [1, 2**32), got {numel}")
    if not 1e-12 <= density <= 1:
        raise UserError(f"--density must be in [1e-12, 1], got {density}")
    kernels()
    device = pick_device(options["device"])
    if why := too_large(numel, device):
        raise UserError(f"--numel {numel}: {why} on {device}")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}, {numel:,} weights, fp32, {100 * density:g} % kept, one mask over all\n", flush=True)
    try:
        rows = steps.measure(numel, device, density)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise UserError(f"--numel {numel}: not enough memory on {device}") from error
    print(steps.table(rows))
    print("\ncopy: as many bytes as the operation must move, read plus write; % of copy: of that copy's bandwidth")
    return 0

"""What the commands need of a machine: the packages of `[cli]`, and a device with kernels."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable

import torch

from ..engine.native import BACKENDS
from ..errors import UserError
from ..experiments import ranks

__all__ = ["EXTRAS", "INSTALL", "check_extras", "missing_extras", "pick_device"]

# The packages of [cli]: a module that each has, and the name it is installed by.
EXTRAS = {
    "sklearn": "scikit-learn",
    "rich": "rich",
    "matplotlib": "matplotlib",
    "safetensors": "safetensors",
    "yaml": "pyyaml",
    "pydantic": "pydantic",
    "filelock": "filelock",
}
INSTALL = "pip install 'bip_fast[cli]'"


def missing_extras(modules: Iterable[str] = EXTRAS) -> list[str]:
    """Names of the packages of `[cli]`, or of some of its ``modules``, that are not installed."""
    return [EXTRAS[module] for module in modules if importlib.util.find_spec(module) is None]


def check_extras(modules: Iterable[str]) -> None:
    """UserError when a package of `[cli]` that has one of the ``modules`` is not installed."""
    if missing := missing_extras(modules):
        raise UserError(f"needs {', '.join(missing)}: {INSTALL}")


def pick_device(name: str) -> torch.device:
    """The torch device for a name.

    Raises:
        UserError: it does not exist, or there are no kernels for it.
    """
    if name == "auto":
        return _of_rank(torch.device("cuda" if "cuda" in BACKENDS and torch.cuda.is_available() else "cpu"))
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index is not None):
        raise UserError(f"--device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda":
        if not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count():
            raise UserError(f"--device {name}: torch sees {torch.cuda.device_count()} CUDA devices; `bip-fast doctor` says more")
        if "cuda" not in BACKENDS:
            raise UserError(f"--device {name}: bip_fast was built without CUDA; `bip-fast doctor` says more")
    return _of_rank(device)


def _of_rank(device: torch.device) -> torch.device:
    """The device, which `ranks.opened` has made the current one where it is a GPU."""
    if device.type == "cuda" and ranks.count() > 1:
        if str(device) != "cuda":
            raise UserError(f"--device must be auto, cpu or cuda under torchrun, which gives each process a GPU of its own, got {device}")
        if ranks.rank_here() >= torch.cuda.device_count():
            raise UserError(f"--nproc-per-node must be at most {torch.cuda.device_count()}, the GPUs here, got {ranks.count_here()}")
    return device

"""`bip-fast doctor`: versions, how the kernels were built, which of them run on which device, and what is missing.

Everything is looked at on its own, so one broken part does not hide the others; nothing here raises.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
from typing import Any

import torch

from ..engine import native
from ..errors import one_line
from .environment import EXTRAS, INSTALL, missing_extras

__all__ = ["add_options", "run"]

REBUILD = "python3 -m pip install --force-reinstall --no-deps SOURCE, where SOURCE is the bip_fast source tree"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    return {True: "yes", False: "no", None: "none"}.get(value, str(value)) if not isinstance(value, str) else value or "none"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _build() -> tuple[dict[str, Any], str | None]:
    """Build information, or why there is none."""
    try:
        return native.build_info(), None
    except Exception as error:  # a broken extension may fail in any way; the doctor reports it
        return {}, one_line(error)


def _devices(built: bool) -> list[tuple[str, str]]:
    """(device, what runs there) for every device that torch sees."""
    runs = "kernels of bip_fast" if built and "cpu" in native.BACKENDS else "no kernels"
    rows = [("cpu", f"{runs}; {_processor()}, {torch.get_num_threads()} threads")]
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        major, minor = torch.cuda.get_device_capability(i)
        runs = "kernels of bip_fast" if "cuda" in native.BACKENDS else "no kernels"
        rows.append((f"cuda:{i}", f"{runs}; {torch.cuda.get_device_name(i)}, compute capability {major}.{minor}"))
    return rows


def _needs(error: str | None, missing: list[str]) -> list[tuple[str, str]]:
    """(what is missing, the command that mends it)."""
    needs = []
    if error is not None:
        needs.append((f"the kernels: {error}", REBUILD))
    if missing:
        needs.append((f"{', '.join(missing)}: for `bip-fast prune` and `compare`", INSTALL))
    if torch.cuda.is_available() and error is None and "cuda" not in native.BACKENDS:
        needs.append(("CUDA kernels: torch sees a GPU, this build is for the CPU only", f"BIP_FAST_CUDA=1 {REBUILD} (needs nvcc)"))
    return needs


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.description = "What works here, and what is missing."


def run(options: dict[str, Any]) -> int:
    """Print the findings; returns 0 when pruning works on some device, 1 when the kernels or the packages of `[cli]` are missing."""
    build, error = _build()
    missing = missing_extras()
    packages = ["bip-fast", "torch", "numpy", *EXTRAS.values()]
    rows: list[tuple[str, str]] = [("python", platform.python_version())]
    rows += [(package, _version(package) or "not installed") for package in packages]
    rows = [(name, torch.__version__ if name == "torch" else value) for name, value in rows]
    sections = {
        "versions": rows,
        "build": [(name, _text(value)) for name, value in build.items()] or [("kernels", f"missing: {error}")],
        "devices": _devices(error is None),
        "missing": _needs(error, missing) or [("nothing", "")],
    }
    for title, lines in sections.items():
        print(title)
        width = max(len(name) for name, _ in lines)
        for name, value in lines:
            if title == "missing" and value:
                print(f"  {name}\n    {value}")
            else:
                print(f"  {name.ljust(width)}  {value}".rstrip())
    if not torch.cuda.is_available():
        print("no CUDA device: everything runs on the CPU")
    return 1 if error is not None or missing else 0

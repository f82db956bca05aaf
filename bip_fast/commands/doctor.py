"""`bip-fast doctor`: versions, how the kernels were built, which of them run on which device, and what is missing.

On a GPU a kernel is launched: a toolkit newer than the driver, or a build for other GPUs, fails only then.
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
from ..presets import preset_rows
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


def _trial(device: torch.device) -> str | None:
    """Why the kernels of bip_fast do not run on a GPU, in one line; None when they do. It launches one: only that shows it."""
    try:
        scores = torch.arange(100.0)
        mask = native.topk_mask(scores.to(device), 10).cpu()
    except Exception as error:  # of CUDA, of torch or of the build
        return one_line(error)
    return None if torch.equal(mask, scores >= 90) else "a mask is wrong"


def _failures() -> dict[str, str]:
    """Why the CUDA kernels fail, by device; empty where they run or where there are none."""
    if "cuda" not in native.BACKENDS or not torch.cuda.is_available():
        return {}
    names = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    return {name: error for name in names if (error := _trial(torch.device(name))) is not None}


def _cure(build: dict[str, Any], name: str) -> str:
    """What to do where the CUDA kernels fail on a device: they were built by too new a toolkit, or not for this GPU."""
    toolkit, architectures = build.get("cuda_toolkit"), build.get("cuda_architectures", "")
    major, minor = torch.cuda.get_device_capability(torch.device(name))
    return (
        f"TORCH_CUDA_ARCH_LIST={major}.{minor} BIP_FAST_CUDA=1 {REBUILD}; built by CUDA {toolkit} for {architectures}: if nvidia-smi "
        "shows an older CUDA version, update the driver or build with a toolkit of that version"
    )


def _devices(built: bool, failures: dict[str, str]) -> list[tuple[str, str]]:
    """(device, what runs there) for every device that torch sees."""
    runs = "kernels of bip_fast" if built and "cpu" in native.BACKENDS else "no kernels"
    rows = [("cpu", f"{runs}; {_processor()}, {torch.get_num_threads()} threads")]
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        major, minor = torch.cuda.get_device_capability(i)
        runs = "kernels of bip_fast" if "cuda" in native.BACKENDS else "no kernels"
        runs = "kernels of bip_fast FAIL" if f"cuda:{i}" in failures else runs
        rows.append((f"cuda:{i}", f"{runs}; {torch.cuda.get_device_name(i)}, compute capability {major}.{minor}"))
    return rows


def _needs(build: dict[str, Any], error: str | None, missing: list[str], failures: dict[str, str]) -> list[tuple[str, str]]:
    """(what is missing, the command that mends it)."""
    needs = []
    if error is not None:
        needs.append((f"the kernels: {error}", REBUILD))
    if missing:
        needs.append((f"{', '.join(missing)}: for `bip-fast prune` and `compare`", INSTALL))
    if torch.cuda.is_available() and error is None and "cuda" not in native.BACKENDS:
        needs.append(("CUDA kernels: torch sees a GPU, this build is for the CPU only", f"BIP_FAST_CUDA=1 {REBUILD} (needs nvcc)"))
    needs += [(f"CUDA kernels on {name}: {failure}", _cure(build, name)) for name, failure in failures.items()]
    if build.get("mutation"):
        needs.append((f"right results: the kernels are wrong on purpose ({build['mutation']})", f"without BIP_FAST_MUTATION: {REBUILD}"))
    return needs


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.description = "What works here, and what is missing."


def run(options: dict[str, Any]) -> int:
    """Print the findings; returns 0 when pruning works, 1 when kernels fail or they or the packages of `[cli]` are missing."""
    build, error = _build()
    missing, failures = missing_extras(), _failures()
    packages = ["bip-fast", "torch", "numpy", *EXTRAS.values()]
    rows: list[tuple[str, str]] = [("python", platform.python_version())]
    rows += [(package, _version(package) or "not installed") for package in packages]
    rows = [(name, torch.__version__ if name == "torch" else value) for name, value in rows]
    sections = {
        "versions": rows,
        "build": [(name, _text(value)) for name, value in build.items()] or [("kernels", f"missing: {error}")],
        "devices": _devices(error is None, failures),
        "presets": preset_rows(),
        "missing": _needs(build, error, missing, failures) or [("nothing", "")],
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
    return 1 if error is not None or missing or failures or build.get("mutation") else 0

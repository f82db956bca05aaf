"""CUB's DeviceTopK, compiled on the machine that runs it, where nvcc and headers of CCCL 3.2 or later are found."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("device_topk.cu")
HEADER = "cub/device/device_topk.cuh"


def header_folders() -> list[list[Path]]:
    """Folders for nvcc's -I, likely ones first: CCCL_INCLUDE, the toolkit's own, those of Python packages."""
    nvcc = shutil.which("nvcc")
    places = [Path(os.environ["CCCL_INCLUDE"])] if "CCCL_INCLUDE" in os.environ else []
    if nvcc:
        toolkit = Path(nvcc).resolve().parents[1]
        places += [toolkit / "include" / "cccl", *toolkit.glob("targets/*/include/cccl"), *Path("/usr/local").glob("cuda*/include/cccl")]
    site = [Path(folder) for folder in sys.path if folder.endswith("-packages")]
    places += [found for folder in site for found in folder.glob("nvidia/*/include/cccl")]
    folders = [[place] for place in places]
    for folder in site:  # CuPy keeps the three libraries apart
        bundle = folder / "cupy/_core/include/cupy/_cccl"
        folders.append([bundle / "cub", bundle / "thrust", bundle / "libcudacxx" / "include", bundle / "libcudacxx"])
    return [found for found in folders if any((folder / HEADER).is_file() for folder in found)]


def compile_to(out: Path, architecture: str) -> str | None:
    """Compile the peer into ``out``; why that is not possible, or None."""
    if shutil.which("nvcc") is None:
        return "there is no nvcc"
    found = header_folders()
    if not found:
        return f"no {HEADER} (CCCL 3.2 or later; CCCL_INCLUDE names a folder that has it)"
    said = ""
    for folders in found:
        includes = [f"-I{folder}" for folder in folders]
        command = [
            "nvcc",
            "-std=c++17",
            "-O3",
            f"-arch={architecture}",
            "-shared",
            "-Xcompiler",
            "-fPIC",
            *includes,
            str(SOURCE),
            "-o",
            str(out),
        ]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode == 0:
            return None
        said = next((line for line in result.stderr.splitlines() if "error" in line), "nvcc failed")
    return said


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | str:
    """The compiled peer, or why there is none."""
    major, minor = torch.cuda.get_device_capability()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "device_topk.so"
        why = compile_to(out, f"sm_{major}{minor}")
        if why:
            return why
        loaded = ctypes.CDLL(str(out))  # stays when the file goes
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    loaded.bench_device_topk.argtypes = [pointer, ctypes.POINTER(ctypes.c_uint64), pointer, pointer, integer, integer, pointer]
    loaded.bench_device_topk.restype = ctypes.c_int
    return loaded


def device_topk(n: int, k: int, device: torch.device) -> Callable[[Tensor], Tensor] | str:
    """A function from fp32 scores [n] on ``device`` to their ``k`` largest values, unsorted and in one buffer; or why there is none."""
    found = library()
    if isinstance(found, str):
        return found
    largest = torch.empty(k, device=device)
    size = ctypes.c_uint64(0)

    def run(scores: Tensor | None, temp: Tensor | None) -> None:
        stream = torch.cuda.current_stream(device).cuda_stream
        address = scores.data_ptr() if scores is not None else None
        workspace = temp.data_ptr() if temp is not None else None
        status = found.bench_device_topk(workspace, ctypes.byref(size), address, largest.data_ptr(), n, k, stream)
        if status != 0:
            raise RuntimeError(f"cub::DeviceTopK failed with CUDA error {status}")

    with torch.cuda.device(device):
        run(None, None)
    temp = torch.empty(max(1, size.value), dtype=torch.uint8, device=device)

    def call(scores: Tensor) -> Tensor:
        run(scores, temp)
        return largest

    return call

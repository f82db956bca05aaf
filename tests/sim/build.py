"""Builds and loads the CUDA kernels for the host: the module ``_sim``, the twin of ``bip_fast._C``.

``load().cuda`` is the CUDA backend on the simulator, ``load().cpu`` the CPU one, and ``load().sim`` steers the simulator. What it
finds and what it cannot is said in cuda_runtime.h. Needs a C++ compiler (``$CXX``, else c++ or g++), pybind11 and numpy; ``$CXXFLAGS``
and ``$LDFLAGS`` are used as in setup.py. Built once, into ``build/sim`` under a name that depends on everything that goes into it.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import importlib.machinery
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
OUT = ROOT / "build" / "sim"
RUNTIME = HERE / "simulator.cpp"
# The arithmetic of the real build: no contraction, no fast-math. The simulator's cuda_runtime.h is found before a toolkit's.
FLAGS = ["-O2", "-Wall", "-Wextra", "-Wno-unknown-pragmas", *shlex.split(os.environ.get("CXXFLAGS", ""))]
FLAGS += ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-pthread"]
LINK = shlex.split(os.environ.get("LDFLAGS", ""))
INCLUDES = [f"-I{HERE}", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'cuda'}"]


def compiler() -> list[str]:
    command = shlex.split(os.environ.get("CXX", "")) or [name for name in ("c++", "g++", "clang++") if shutil.which(name)][:1]
    if not command or not shutil.which(command[0]):
        raise RuntimeError("the CUDA simulator needs a C++ compiler: install g++ or clang++, or set CXX")
    return command


@functools.cache
def is_clang(command: str) -> bool:
    return "clang" in subprocess.run([command, "--version"], capture_output=True, text=True, check=True).stdout


def flags_for(source: Path, cxx: list[str]) -> list[str]:
    if source == RUNTIME and "-fsanitize=thread" in FLAGS:  # sanitizers.h says why
        return [*FLAGS, "-fno-sanitize=thread", "-DBIP_SIM_THREAD_SANITIZER"]
    if source.suffix != ".cu":
        return FLAGS
    # The checks call two functions of simulator.cpp; no sanitizer library is linked.
    bounds = "bounds" if is_clang(cxx[0]) else "bounds-strict"
    return [*FLAGS, f"-fsanitize={bounds},alignment", "-x", "c++"]


@contextmanager
def locked(path: Path) -> Iterator[None]:
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def fingerprint(sources: Sequence[Path], cxx: list[str], flags: Sequence[str]) -> str:
    digest = hashlib.sha256()
    version = subprocess.run([*cxx, "--version"], capture_output=True, text=True, check=True).stdout
    headers = (path for folder in (HERE, ROOT / "csrc") for path in folder.rglob("*") if path.suffix in (".h", ".cuh"))
    for part in (sys.version, version, *cxx, *FLAGS, *LINK, *flags, Path(__file__).read_text()):
        digest.update(part.encode() + b"\0")
    for path in sorted({*sources, *headers}):
        digest.update(str(path).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"building the CUDA simulator failed: {shlex.join(command)}\n{done.stderr[-8000:]}")


def build(name: str, sources: Sequence[Path], flags: Sequence[str] = ()) -> Path:
    """Compile and link ``sources`` with the simulator into ``build/sim``; return the library. Safe to call from several processes."""
    cxx = compiler()
    sources = [*sources, RUNTIME]
    library = OUT / f"{name}-{fingerprint(sources, cxx, flags)}" / f"{name}.so"
    OUT.mkdir(parents=True, exist_ok=True)
    with locked(OUT / f"{name}.lock"):
        if library.exists():
            return library
        with tempfile.TemporaryDirectory(dir=OUT) as folder:
            objects = [str(Path(folder) / f"{source.stem}-{i}.o") for i, source in enumerate(sources)]
            commands = [
                [*cxx, *flags_for(source, cxx), *INCLUDES, *flags, "-c", str(source), "-o", target]
                for source, target in zip(sources, objects, strict=True)
            ]
            with ThreadPoolExecutor(2) as pool:
                list(pool.map(run, commands))
            beside = Path(folder) / library.name
            undefined = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
            run([*cxx, "-shared", "-pthread", *undefined, *LINK, *objects, "-o", str(beside)])
            for old in OUT.glob(f"{name}-*"):
                shutil.rmtree(old, ignore_errors=True)
            library.parent.mkdir()
            beside.rename(library)
    return library


class Simulator:
    """Steers the simulator in one library. Nothing here is remembered between libraries."""

    def __init__(self, library: ctypes.CDLL):
        self._library = library
        library.bip_sim_set_seed.argtypes = [ctypes.c_uint64]
        library.bip_sim_launches.restype = ctypes.c_int64
        library.bip_sim_guarded.argtypes = [ctypes.c_size_t, ctypes.c_size_t]
        library.bip_sim_guarded.restype = ctypes.c_void_p
        library.bip_sim_free_guarded.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
        library.bip_sim_free_guarded.restype = None

    def set_seed(self, seed: int) -> None:
        """Order of blocks, warps and lanes from now on; 0 is the natural one."""
        self._library.bip_sim_set_seed(seed)

    def set_max_grid(self, blocks: int) -> None:
        """The number of blocks the device holds at once, and so the largest grid; 4 at the start."""
        if blocks < 1:
            raise ValueError(f"blocks must be at least 1, got {blocks}")
        self._library.bip_sim_set_max_grid(blocks)

    def launches(self, reset: bool = True) -> int:
        """Kernels launched since the last reset."""
        return self._library.bip_sim_launches(int(reset))

    def guarded(self, shape: int | tuple[int, ...], dtype: np.typing.DTypeLike = np.float32, align: int | None = None) -> np.ndarray:
        """Zeros; touching what lies behind (and, within a page, before) is a fault. Aligned to 16, or to ``align``, bytes and no more."""
        dtype = np.dtype(dtype)
        count = int(np.prod(shape))
        nbytes = max(count * dtype.itemsize, 1)
        align = align or 16
        address = self._library.bip_sim_guarded(nbytes, align)
        if not address:
            raise MemoryError(f"no {nbytes} bytes of guarded memory")
        return np.asarray(_Guarded(self._library, address, nbytes, align, shape, dtype))


class _Guarded:
    """Owns guarded memory; numpy arrays made of it keep it alive."""

    def __init__(self, library, address, nbytes, align, shape, dtype):
        self._free = functools.partial(library.bip_sim_free_guarded, address, nbytes, align)
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        self.__array_interface__ = {"data": (address, False), "shape": shape, "typestr": dtype.str, "version": 3}

    def __del__(self):
        self._free()


def library() -> Path:
    """The file of the module that `load` loads, built."""
    import pybind11

    csrc = ROOT / "csrc"
    sources = [csrc / "bindings.cpp", *sorted((csrc / "cpu").glob("*.cpp")), *sorted((csrc / "cuda").glob("*.cu"))]
    defines = ["-DBIP_MODULE=_sim", "-DBIP_WITH_CUDA", '-DBIP_CUDA_TOOLKIT="simulator"']
    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    return build("_sim", sources, [*defines, *includes])


@functools.cache
def load() -> ModuleType:
    """The module ``_sim``: the contents of ``bip_fast._C`` with the CUDA backend simulated, and ``.sim``, its `Simulator`."""
    path = library()
    loader = importlib.machinery.ExtensionFileLoader("_sim", str(path))
    spec = importlib.util.spec_from_file_location("_sim", path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    module.sim = Simulator(ctypes.CDLL(str(path)))
    return module

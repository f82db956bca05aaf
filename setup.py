"""Build policy only: what is compiled, with what, for which GPUs. Names, versions and dependencies are in pyproject.toml.

One module, bip_fast._C, from csrc/bindings.cpp and csrc/cpu/*.cpp and, when there is an nvcc, csrc/cuda/*.cu. A build.ninja under
build/ makes it parallel and incremental. torch is not needed, and neither is a GPU. The environment decides:

    BIP_FAST_CUDA          auto (default): CUDA if nvcc is found; 0: CPU only; 1: CUDA, or an error that says what is missing
    CUDA_HOME, CUDA_PATH   the CUDA toolkit; otherwise the nvcc on PATH, then /usr/local/cuda
    TORCH_CUDA_ARCH_LIST   GPUs to compile for, such as "8.0;9.0+PTX"; otherwise DEFAULT_ARCHITECTURES as far as nvcc knows them
    CXX, CXXFLAGS, LDFLAGS, MAX_JOBS   as usual; the module is stripped unless CXXFLAGS has a -g
    BIP_FAST_MUTATION      no-fences: wrong CUDA kernels on purpose, for tests/large/stress.py; only for `build_ext`, never in an install
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, OptionError, PlatformError

ROOT = Path(__file__).resolve().parent
DEFAULT_ARCHITECTURES = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
OLDEST_GPU = (7, 0)  # the kernels take their parameters as __grid_constant__
OLDEST_NVCC = (11, 8)  # the toolkit of the oldest torch wheels this package supports

# No fast-math and no contraction of a*b+c anywhere: results on CPU and GPU are equal bit for bit. No -march either, so that one
# wheel serves every machine: vector code is chosen at run time, and neither errno nor floating-point traps, which nobody asks for,
# may keep a loop from it. These flags come last, where CXXFLAGS cannot undo them.
EXACT = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-fast-math", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
WARNINGS = ["-Wall", "-Wextra"]
MUTATIONS = {"no-fences": "-DBIP_WITHOUT_FENCES"}  # what CUDA kernels are compiled with


class Nvcc(NamedTuple):
    path: str
    version: tuple[int, int]
    known: tuple[str, ...]  # compute capabilities it compiles for, such as "9.0"


def cuda_mode(environ: Mapping[str, str]) -> str:
    mode = environ.get("BIP_FAST_CUDA", "auto")
    if mode not in ("auto", "0", "1"):
        raise OptionError(f"BIP_FAST_CUDA must be auto, 0 or 1, got {mode!r}")
    return mode


def find_nvcc(environ: Mapping[str, str], fallback: str = "/usr/local/cuda") -> str | None:
    homes = [environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if environ.get(name)]
    folders = [os.path.join(home, "bin") for home in homes] + [environ.get("PATH", ""), os.path.join(fallback, "bin")]
    return next(filter(None, (shutil.which("nvcc", path=folder) for folder in folders)), None)


def ask_nvcc(path: str) -> Nvcc:
    """Version and known architectures of an nvcc; PlatformError if it is of no use."""
    try:
        version_text = subprocess.run([path, "--version"], check=True, capture_output=True, text=True).stdout
        known_text = subprocess.run([path, "--list-gpu-arch"], check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise PlatformError(f"{path} does not run ({error})") from None
    found = re.search(r"release (\d+)\.(\d+)", version_text)
    version = (int(found[1]), int(found[2])) if found else (0, 0)
    if version < OLDEST_NVCC:
        raise PlatformError("{} is CUDA {}.{}, but {}.{} or newer is needed".format(path, *version, *OLDEST_NVCC))
    known = tuple(f"{major}.{minor}" for major, minor in re.findall(r"compute_(\d+)(\d)\b", known_text))
    return Nvcc(path, version, known)


def choose_cuda(environ: Mapping[str, str]) -> Nvcc | None:
    """The nvcc to build with, or None, after one line that says why, for a CPU-only build."""
    mode = cuda_mode(environ)
    if mode == "0":
        print("building CPU only: BIP_FAST_CUDA=0")
        return None
    try:
        if sys.platform == "win32":
            raise PlatformError("CUDA builds are not supported on Windows")
        path = find_nvcc(environ)
        if path is None:
            raise PlatformError("no nvcc in CUDA_HOME, on PATH or in /usr/local/cuda")
        return ask_nvcc(path)
    except PlatformError as error:
        if mode == "1":
            raise PlatformError(f"BIP_FAST_CUDA=1, but {error}") from None
        print(f"building CPU only: {error}; install the CUDA toolkit and reinstall with BIP_FAST_CUDA=1")
        return None


def choose_architectures(environ: Mapping[str, str], nvcc: Nvcc) -> list[str]:
    """Compute capabilities to compile for, such as ["8.0", "9.0a", "12.0+PTX"]."""
    wanted = re.split(r"[;,\s]+", environ.get("TORCH_CUDA_ARCH_LIST", "").strip(" ;,\t\n"))
    if wanted == [""]:
        default = [arch for arch in DEFAULT_ARCHITECTURES if arch in nvcc.known]
        return [*default[:-1], default[-1] + "+PTX"]  # newer GPUs compile the PTX of the newest when the module is first used
    chosen = []
    for arch in wanted:
        form = re.fullmatch(r"(\d+\.\d)[af]?(\+PTX)?", arch)
        if not form:
            raise OptionError(f"TORCH_CUDA_ARCH_LIST must look like '8.0;9.0a;12.0+PTX' (numbers, not names), got {arch!r}")
        if tuple(map(int, form[1].split("."))) < OLDEST_GPU:
            print(f"leaving out {arch} of TORCH_CUDA_ARCH_LIST: the kernels need compute capability {OLDEST_GPU[0]}.{OLDEST_GPU[1]}")
            continue
        if form[1] not in nvcc.known:
            raise OptionError(
                "TORCH_CUDA_ARCH_LIST has {}, but {} (CUDA {}.{}) knows {}".format(arch, nvcc.path, *nvcc.version, " ".join(nvcc.known))
            )
        chosen.append(arch)
    if not chosen:
        raise OptionError(f"TORCH_CUDA_ARCH_LIST must have a GPU of compute capability 7.0 or newer, got {' '.join(wanted)!r}")
    return list(dict.fromkeys(chosen))


def gencode(architectures: list[str]) -> list[str]:
    """The nvcc flags for a list of architectures: machine code for each, PTX too where it says so."""
    flags = []
    for arch in architectures:
        digits = arch.removesuffix("+PTX").replace(".", "")
        kinds = ("sm", "compute") if arch.endswith("+PTX") else ("sm",)
        flags += [f"-gencode=arch=compute_{digits},code={kind}_{digits}" for kind in kinds]
    return flags


def choose_mutation(environ: Mapping[str, str], commands: Sequence[str], cuda: bool) -> str:
    """The mutation to build, or ""; an error wherever somebody could come to use it. `commands`: those that setup.py was started with."""
    wanted = environ.get("BIP_FAST_MUTATION", "")
    if wanted not in ("", *MUTATIONS):
        raise OptionError(f"BIP_FAST_MUTATION must be one of {', '.join(MUTATIONS)}, or empty, got {wanted!r}")
    if wanted and list(commands) != ["build_ext"]:
        raise OptionError(
            f"BIP_FAST_MUTATION={wanted} makes wrong kernels: it is for `python3 setup.py build_ext --build-lib build/{wanted}`, "
            "not for an install; unset it"
        )
    if wanted and not cuda:
        raise OptionError(f"BIP_FAST_MUTATION={wanted} changes CUDA kernels, but this build is CPU only")
    return wanted


def jobs(environ: Mapping[str, str]) -> int:
    wanted = environ.get("MAX_JOBS", "")
    if wanted and not re.fullmatch(r"[1-9]\d*", wanted):
        raise OptionError(f"MAX_JOBS must be a positive integer, got {wanted!r}")
    if wanted:
        return int(wanted)
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def default_cxx() -> str:
    found = next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if found is None:
        raise PlatformError("no C++ compiler found: install g++ or clang++, or set CXX")
    return found


def commands(environ: Mapping[str, str], nvcc: Nvcc | None, architectures: list[str]) -> dict[str, list[str]]:
    """The command lines that compile C++, compile CUDA and link, without inputs and outputs."""
    cxx = shlex.split(environ.get("CXX", "")) or [default_cxx()]
    cxxflags, ldflags = shlex.split(environ.get("CXXFLAGS", "")), shlex.split(environ.get("LDFLAGS", ""))
    strip = not any(flag.startswith("-g") for flag in cxxflags)  # who asks for debug information wants to keep it
    # A static CUDA runtime whose symbols were visible would resolve to the version that torch loads.
    link = ["-shared", "-pthread", *(["-Wl,-s"] if strip else []), "-Wl,--exclude-libs=ALL", *ldflags]
    if sys.platform == "darwin":
        link = ["-bundle", "-undefined", "dynamic_lookup", *(["-Wl,-x"] if strip else []), *ldflags]
    compile_cxx = [*cxx, "-O3", *WARNINGS, "-pthread", *cxxflags, *EXACT, "-Icsrc"]
    if not nvcc:
        return {"cxx": compile_cxx, "link": [*cxx, *link]}

    def to_host(flags: list[str]) -> list[str]:
        return ["-Xcompiler=" + flag.replace(",", "\\,") for flag in flags]

    host = [nvcc.path, "--cudart=static", *(["-ccbin", cxx[0]] if environ.get("CXX") and len(cxx) == 1 else [])]
    compile_cuda = [*host, "-O3", "-std=c++17", "--fmad=false", *to_host([*WARNINGS, *EXACT[1:]]), *gencode(architectures), "-Icsrc"]
    # nvcc links because it knows where its runtime is. Without relocatable device code there is nothing to link for the device.
    return {"cxx": compile_cxx, "nvcc": compile_cuda, "link": [*host, "--no-device-link", *to_host(link)]}


def ninja_file(folder: str, module: str, sources: list[str], bindings_flags: list[str], rules: dict[str, list[str]]) -> str:
    """A build.ninja that compiles `sources` into `folder` and links `module` there. Paths are relative to where ninja runs."""

    def shell(words: list[str]) -> str:  # quoted for the shell and then for ninja
        return shlex.join(words).replace("$", "$$")

    lines = ["# Written by setup.py.", f"builddir = {folder}"]
    for rule, command in rules.items():
        if rule == "link":
            lines += ["rule link", f"  command = {shell(command)} $in -o $out"]
        else:  # the compiler lists the headers it read, so that an edited header rebuilds what includes it
            lines += [f"rule {rule}", f"  command = {shell(command)} $flags -MMD -MF $out.d -c $in -o $out"]
            lines += ["  depfile = $out.d", "  deps = gcc"]
        lines.append(f"  description = {rule} $out")
    for source in sources:
        lines.append(f"build {folder}/{source}.o: {'nvcc' if source.endswith('.cu') else 'cxx'} {source}")
        if source.endswith("bindings.cpp"):
            lines.append(f"  flags = {shell(bindings_flags)}")
    lines.append(f"build {folder}/{module}: link {' '.join(f'{folder}/{source}.o' for source in sources)}")
    return "\n".join(lines) + "\n"


def pybind11_headers() -> str:
    """A copy of pybind11's headers under build/: pip's isolated builds install it in a new folder each time, and objects that
    depend on that folder would be compiled again each time."""
    import pybind11

    copy = ROOT / "build" / f"pybind11-{pybind11.__version__}"
    if not copy.is_dir():
        partial = copy.with_name(f"{copy.name}-partial-{os.getpid()}")
        shutil.copytree(pybind11.get_include(), partial)
        partial.rename(copy)
    return copy.relative_to(ROOT).as_posix()


def run_ninja(folder: str, environ: Mapping[str, str], cuda_sources: int) -> None:
    try:
        from ninja import BIN_DIR

        program = os.path.join(BIN_DIR, "ninja")
    except ImportError:
        program = shutil.which("ninja") or "ninja"
    count, env = jobs(environ), dict(environ)
    if cuda_sources:
        # Several GPUs from one source in parallel. Not in build.ninja, where another MAX_JOBS would mean compiling everything again.
        env["NVCC_APPEND_FLAGS"] = f"{env.get('NVCC_APPEND_FLAGS', '')} --threads={max(1, count // cuda_sources)}".strip()
    sys.stdout.flush()
    try:
        subprocess.run([program, "-f", f"{folder}/build.ninja", "-j", str(count)], cwd=ROOT, env=env, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        hint = "; BIP_FAST_CUDA=0 builds without CUDA" if cuda_sources else ""
        raise CompileError(f"the build failed ({error}); its messages are above{hint}") from None


class BuildExt(build_ext):
    def finalize_options(self) -> None:
        super().finalize_options()
        self.force = True  # ninja says what is new. A module copied only when newer would outlive a change of BIP_FAST_CUDA.

    def build_extension(self, ext: Extension) -> None:
        nvcc = choose_cuda(os.environ)
        mutation = choose_mutation(os.environ, self.distribution.commands, nvcc is not None)
        if sys.platform == "win32":  # setuptools' own compiler support; untested
            import pybind11

            ext.include_dirs.append(pybind11.get_include())
            super().build_extension(ext)
            return
        architectures = choose_architectures(os.environ, nvcc) if nvcc else []
        flags = ["-isystem", pybind11_headers(), "-isystem", sysconfig.get_path("include")]
        cuda_sources = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("csrc/cuda/*.cu")) if nvcc else []
        if nvcc:
            toolkit = "{}.{}".format(*nvcc.version)
            flags += ["-DBIP_WITH_CUDA", f'-DBIP_CUDA_TOOLKIT="{toolkit}"', f'-DBIP_CUDA_ARCHITECTURES="{";".join(architectures)}"']
            print(f"building CPU and CUDA {toolkit} for {' '.join(architectures)}")
        rules = commands(os.environ, nvcc, architectures)
        if mutation:
            print(f"building WRONG kernels: BIP_FAST_MUTATION={mutation}")
            flags.append(f'-DBIP_MUTATION="{mutation}"')
            rules["nvcc"].append(MUTATIONS[mutation])
        # A folder for each kind of build, so that changing between them compiles nothing again.
        tag = "-".join(filter(None, (sysconfig.get_platform(), sys.implementation.cache_tag, "cuda" if nvcc else "cpu", mutation)))
        folder, target = f"build/{tag}", Path(self.get_ext_fullpath(ext.name))
        text = ninja_file(folder, target.name, ext.sources + cuda_sources, flags, rules)
        (ROOT / folder).mkdir(parents=True, exist_ok=True)
        (ROOT / folder / "build.ninja").write_text(text)
        run_ninja(folder, os.environ, len(cuda_sources))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(str(ROOT / folder / target.name), str(target))


if __name__ == "__main__":
    extension = Extension(
        "bip_fast._C",
        ["csrc/bindings.cpp", *sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("csrc/cpu/*.cpp"))],
        include_dirs=["csrc"],
        extra_compile_args=["/O2", "/std:c++17", "/fp:precise", "/EHsc"] if sys.platform == "win32" else [],
    )
    setup(ext_modules=[extension], cmdclass={"build_ext": BuildExt})

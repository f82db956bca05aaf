"""Build policy (setup.py), what the package promises about imports, and the stubs of the compiled module."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def build() -> ModuleType:
    """setup.py as a module; it builds only when it is run."""
    pytest.importorskip("setuptools", reason="needs setuptools, to import setup.py")
    spec = importlib.util.spec_from_file_location("bip_fast_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fake_nvcc(folder: Path, version: str = "13.0", known: str = "compute_80\ncompute_90\ncompute_120\n") -> str:
    if sys.platform == "win32":
        pytest.skip("needs a POSIX shell, for a stand-in of nvcc")
    path = folder / "bin" / "nvcc"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!/bin/sh\ncase "$1" in\n--version) echo "release {version}, V{version}.1";;\n*) printf "{known}";;\nesac\n')
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def nvcc(build: ModuleType) -> object:
    return build.Nvcc("nvcc", (13, 0), ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0", "12.1"))


def test_cuda_mode_accepts_three_values(build: ModuleType) -> None:
    assert [build.cuda_mode(env) for env in ({}, {"BIP_FAST_CUDA": "0"}, {"BIP_FAST_CUDA": "1"})] == ["auto", "0", "1"]
    with pytest.raises(Exception, match=r"^BIP_FAST_CUDA must be auto, 0 or 1, got 'yes'$"):
        build.cuda_mode({"BIP_FAST_CUDA": "yes"})


def test_nvcc_is_searched_in_cuda_home_then_path_then_the_usual_place(build: ModuleType, tmp_path: Path) -> None:
    paths = {name: fake_nvcc(tmp_path / name) for name in ("home", "cuda_path", "path", "usual")}
    environ = {
        "CUDA_HOME": str(tmp_path / "home"),
        "CUDA_PATH": str(tmp_path / "cuda_path"),
        "PATH": str(tmp_path / "path" / "bin"),
    }
    for name, variable in (("home", "CUDA_HOME"), ("cuda_path", "CUDA_PATH"), ("path", "PATH")):
        assert build.find_nvcc(environ, fallback=str(tmp_path / "usual")) == paths[name]
        del environ[variable]
    assert build.find_nvcc(environ, fallback=str(tmp_path / "usual")) == paths["usual"]
    assert build.find_nvcc(environ, fallback=str(tmp_path / "nowhere")) is None


def test_without_nvcc_auto_says_so_in_one_line_and_1_is_an_error(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build, "find_nvcc", lambda environ: None)
    assert build.choose_cuda({}) is None
    line = capsys.readouterr().out
    assert line.startswith("building CPU only: no nvcc")
    assert "BIP_FAST_CUDA=1" in line
    assert line.count("\n") == 1
    with pytest.raises(build.PlatformError, match="BIP_FAST_CUDA=1, but no nvcc"):
        build.choose_cuda({"BIP_FAST_CUDA": "1"})


def test_0_does_not_look_for_nvcc(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "find_nvcc", lambda environ: pytest.fail("looked for nvcc"))
    assert build.choose_cuda({"BIP_FAST_CUDA": "0"}) is None


def test_an_old_or_broken_nvcc_is_none(build: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    environ = {"CUDA_HOME": str(tmp_path), "BIP_FAST_CUDA": "1"}
    fake_nvcc(tmp_path, version="13.0")
    assert build.choose_cuda(environ) == (str(tmp_path / "bin" / "nvcc"), (13, 0), ("8.0", "9.0", "12.0"))
    fake_nvcc(tmp_path, version="10.2")
    with pytest.raises(build.PlatformError, match=r"is CUDA 10\.2, but 11\.8 or newer is needed"):
        build.choose_cuda(environ)
    (tmp_path / "bin" / "nvcc").write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(build.PlatformError, match="does not run"):
        build.choose_cuda(environ)
    assert build.choose_cuda({"CUDA_HOME": str(tmp_path)}) is None
    assert "does not run" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8.0", ["8.0"]),
        ("8.0;8.6 9.0+PTX", ["8.0", "8.6", "9.0+PTX"]),
        (" 9.0a, 9.0a; ", ["9.0a"]),
        ("", ["8.0", "8.6", "8.9", "9.0", "10.0", "12.0+PTX"]),
    ],
)
def test_architecture_lists(build: ModuleType, nvcc: object, text: str, expected: list[str]) -> None:
    assert build.choose_architectures({"TORCH_CUDA_ARCH_LIST": text}, nvcc) == expected


def test_default_architectures_are_those_that_nvcc_knows(build: ModuleType) -> None:
    assert build.choose_architectures({}, build.Nvcc("nvcc", (11, 8), ("7.5", "8.0", "8.6", "8.9", "9.0"))) == [
        "8.0",
        "8.6",
        "8.9",
        "9.0+PTX",
    ]


@pytest.mark.parametrize("text", ["Hopper", "9", "sm_90", "8.0;nonsense", "9.0b", "9.0+ptx"])
def test_nonsense_in_the_architecture_list_is_an_error(build: ModuleType, nvcc: object, text: str) -> None:
    with pytest.raises(build.OptionError, match="TORCH_CUDA_ARCH_LIST must look like"):
        build.choose_architectures({"TORCH_CUDA_ARCH_LIST": text}, nvcc)


def test_an_architecture_that_nvcc_does_not_know_is_an_error(build: ModuleType, nvcc: object) -> None:
    with pytest.raises(build.OptionError, match=r"has 7\.0, but nvcc \(CUDA 13\.0\) knows 7\.5 8\.0"):
        build.choose_architectures({"TORCH_CUDA_ARCH_LIST": "8.0 7.0"}, nvcc)


def test_architectures_too_old_for_the_kernels_are_left_out(build: ModuleType, nvcc: object, capsys: pytest.CaptureFixture[str]) -> None:
    assert build.choose_architectures({"TORCH_CUDA_ARCH_LIST": "5.2 6.0 8.0 9.0+PTX"}, nvcc) == ["8.0", "9.0+PTX"]
    assert capsys.readouterr().out.count("leaving out") == 2
    with pytest.raises(build.OptionError, match=r"7\.0 or newer, got '5\.2 6\.0'"):
        build.choose_architectures({"TORCH_CUDA_ARCH_LIST": "5.2 6.0"}, nvcc)


def test_gencode(build: ModuleType) -> None:
    assert build.gencode(["9.0a", "10.0+PTX"]) == [
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_100,code=sm_100",
        "-gencode=arch=compute_100,code=compute_100",
    ]


def test_a_mutation_is_built_on_purpose_only(build: ModuleType) -> None:
    """Wrong kernels must not get into anything that somebody installs."""
    choose, wanted = build.choose_mutation, {"BIP_FAST_MUTATION": "no-fences"}
    assert choose({}, ["bdist_wheel"], True) == ""
    assert choose(wanted, ["build_ext"], True) == "no-fences"
    for commands in (["bdist_wheel"], ["editable_wheel"], ["build_ext", "install"], ["develop"], []):
        with pytest.raises(build.OptionError, match=r"BIP_FAST_MUTATION=no-fences makes wrong kernels: .* not for an install"):
            choose(wanted, commands, True)
    with pytest.raises(build.OptionError, match="this build is CPU only"):
        choose(wanted, ["build_ext"], False)
    with pytest.raises(build.OptionError, match="BIP_FAST_MUTATION must be one of no-fences, or empty, got 'fences'"):
        choose({"BIP_FAST_MUTATION": "fences"}, ["build_ext"], True)
    sources = "".join(path.read_text() for path in (ROOT / "csrc" / "cuda").iterdir())
    assert all(f"#ifndef {define.removeprefix('-D')}" in sources for define in build.MUTATIONS.values())
    assert sources.count("__threadfence();") == 1, "a fence that the mutation does not leave out"


def test_importing_a_mutated_build_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    import bip_fast
    from bip_fast import _C
    from bip_fast.engine import native

    assert native.build_info()["mutation"] is None
    spec = importlib.util.spec_from_file_location("bip_fast.engine.native_again", native.__file__)
    module = importlib.util.module_from_spec(spec)
    mutated = ModuleType("bip_fast._C")
    mutated.build_info = lambda: {**_C.build_info(), "mutation": "no-fences"}
    monkeypatch.setattr(bip_fast, "_C", mutated)
    with pytest.warns(RuntimeWarning, match="wrong results on purpose .BIP_FAST_MUTATION=no-fences."):
        spec.loader.exec_module(module)


def test_max_jobs(build: ModuleType) -> None:
    assert build.jobs({"MAX_JOBS": "3"}) == 3
    assert build.jobs({}) >= 1
    with pytest.raises(build.OptionError, match="MAX_JOBS must be a positive integer, got '0'"):
        build.jobs({"MAX_JOBS": "0"})


def test_flags_keep_results_exact_whatever_the_user_adds(build: ModuleType, nvcc: object) -> None:
    rules = build.commands({"CXX": "c++", "CXXFLAGS": "-ffast-math -O1", "LDFLAGS": "-Wl,-O1,--as-needed"}, nvcc, ["9.0"])
    cxx, cuda, link = rules["cxx"], rules["nvcc"], rules["link"]
    assert cxx.index("-fno-fast-math") > cxx.index("-ffast-math")
    assert cxx.index("-ffp-contract=off") > cxx.index("-ffast-math")
    assert "--fmad=false" in cuda
    assert "--cudart=static" in link
    assert not [flag for flag in cxx + cuda if "march" in flag or "fast_math" in flag]
    assert "-Xcompiler=-Wl\\,-s" in link, "not stripped"
    assert "-Wl,-s" not in build.commands({"CXX": "c++", "CXXFLAGS": "-g1"}, None, [])["link"]
    assert "-Xcompiler=-Wl\\,-O1\\,--as-needed" in link


def test_build_is_incremental(build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Touch one source: it is compiled again and nothing else. Touch a header: all that include it are."""
    if sys.platform == "win32" or not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("needs a C++ compiler with the options of GCC")
    pytest.importorskip("ninja", reason="needs ninja")
    folder = tmp_path / "build" / "here"
    folder.mkdir(parents=True)
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "shared.h").write_text("int one();\n")
    (tmp_path / "csrc" / "a.cpp").write_text('#include "shared.h"\nint one() { return 1; }\n')
    (tmp_path / "csrc" / "bindings.cpp").write_text('extern "C" int two() { return TWO; }\n')
    monkeypatch.setattr(build, "ROOT", tmp_path)
    environ = {name: value for name, value in os.environ.items() if name not in ("CXXFLAGS", "LDFLAGS")}
    text = build.ninja_file(
        "build/here", "module.so", ["csrc/bindings.cpp", "csrc/a.cpp"], ['-DTWO=sizeof("$ ")-1'], build.commands(environ, None, [])
    )
    (folder / "build.ninja").write_text(text)

    def built() -> set[str]:
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.suffix in (".o", ".so")}
        build.run_ninja("build/here", environ, 0)
        after = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.suffix in (".o", ".so")}
        return {path.name for path, time in after.items() if before.get(path) != time}

    assert built() == {"a.cpp.o", "bindings.cpp.o", "module.so"}
    assert built() == set()
    (tmp_path / "csrc" / "bindings.cpp").touch()
    assert built() == {"bindings.cpp.o", "module.so"}
    (tmp_path / "csrc" / "shared.h").touch()
    assert built() == {"a.cpp.o", "module.so"}
    (tmp_path / "csrc" / "a.cpp").write_text("#error stop here\n")
    with pytest.raises(build.CompileError, match="the build failed"):
        build.run_ninja("build/here", environ, 0)


@pytest.mark.slow
def test_everything_compiles_without_a_warning_on_clang(build: ModuleType, tmp_path: Path) -> None:
    """Its own assembler reads less than that of GCC. Optimisation, most of the time, adds no warning."""
    from sim import build as simulator

    clang = shutil.which("clang++")
    if clang is None:
        pytest.skip("needs clang++")
    pybind11 = pytest.importorskip("pybind11", reason="needs pybind11")
    flags = ["-Werror", "-O0"]
    host = build.commands({"CXX": clang, "CXXFLAGS": shlex.join(flags)}, None, [])["cxx"]
    python = ["-isystem", pybind11.get_include(), "-isystem", sysconfig.get_path("include")]
    csrc, out = ROOT / "csrc", ["-o", str(tmp_path / "out.o")]
    commands = [[*host, "-c", str(source), *out] for source in sorted((csrc / "cpu").glob("*.cpp"))]
    commands.append([*host, *python, "-fsyntax-only", str(csrc / "bindings.cpp")])
    for source in [*sorted((csrc / "cuda").glob("*.cu")), simulator.RUNTIME]:
        commands.append([clang, *simulator.flags_for(source, [clang]), *simulator.INCLUDES, *flags, "-c", str(source), *out])
    for command in commands:
        subprocess.run(command, cwd=ROOT, check=True)


def test_assembler_has_no_offset_before_an_operand() -> None:
    """``32+%0``: clang does not read it where the operand is ``(%rax,%rcx,4)``."""
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cuh", ".cpp", ".cu")]
    assembler = [line for path in sources for line in path.read_text().splitlines() if re.search(r"%%[xyz]mm", line)]
    assert assembler
    assert not [line for line in assembler if re.search(r"\d\+%\d", line)]


def test_the_built_module_is_always_copied(build: ModuleType) -> None:
    """Copied only when newer, the module with CUDA would survive a rebuild with BIP_FAST_CUDA=0."""
    from setuptools import Distribution

    command = build.BuildExt(Distribution({"ext_modules": [build.Extension("bip_fast._C", ["csrc/bindings.cpp"])]}))
    command.ensure_finalized()
    assert command.force


def test_sources_do_not_know_torch() -> None:
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cuh", ".cpp", ".cu")]
    assert sources
    for path in sources:
        includes = re.findall(r'#\s*include\s*[<"]([^>"]+)', path.read_text())
        assert not [name for name in includes if re.match(r"torch|ATen|c10", name)], path
        if path.name != "bindings.cpp":
            assert not [name for name in includes if "pybind11" in name or name == "Python.h"], path


def test_import_does_not_touch_cuda() -> None:
    code = "import bip_fast, torch; assert not torch.cuda.is_initialized(); print(bip_fast.build_info()['simd'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def names_in(body: list[ast.stmt]) -> set[str]:
    """Public names that a stub's module or class body declares."""
    names = {node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    names |= {node.target.id for node in body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)}
    return {name for name in names if not name.startswith("_")}


def public(thing: object) -> set[str]:
    return {name for name in dir(thing) if not name.startswith("_")}


def test_stubs_match_the_module() -> None:
    from bip_fast import _C

    stub = ast.parse((ROOT / "bip_fast" / "_C.pyi").read_text())
    classes = {node.name: node for node in stub.body if isinstance(node, ast.ClassDef)}
    info = _C.build_info()
    assert public(_C) == names_in(stub.body) - (set() if info["cuda"] else {"cuda", "cuda_shards"})
    assert set(info) == names_in(classes["_BuildInfo"].body)
    methods = {node.name: node for node in classes["_Backend"].body if isinstance(node, ast.FunctionDef)}
    for backend in [_C.cpu] + ([_C.cuda] if info["cuda"] else []):
        assert public(backend) == set(methods)
        for name, method in methods.items():
            signature = getattr(backend, name).__doc__.splitlines()[0].rpartition("->")[0]
            arguments = [argument.arg for argument in method.args.args[1:] + method.args.kwonlyargs]
            assert re.findall(r"(\w+):", signature) == arguments, name
    for backend in [_C.cpu_shards] + ([_C.cuda_shards] if info["cuda"] else []):
        assert public(backend) == names_in(classes["_Shards"].body)

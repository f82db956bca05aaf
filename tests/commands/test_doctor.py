"""The command line around its commands: doctor, help, what is missing, and what the core does without."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cli_runs import SMALL, one_line, prune
from helpers import use_backend

import bip_fast
from bip_fast.commands import cli, doctor, environment
from bip_fast.engine import native
from bip_fast.presets import PRESETS

PACKAGES = "scikit-learn, rich, matplotlib, safetensors, pyyaml, pydantic, filelock"


def test_doctor_names_versions_devices_and_build(capsys):
    assert cli.main(["doctor"]) == 0
    shown = capsys.readouterr().out
    for part in ("python", torch.__version__, "simd", f"{torch.get_num_threads()} threads", "kernels of bip_fast", "nothing"):
        assert part in shown


def test_doctor_says_which_presets_go_with_an_optimizer_of_the_users_own(capsys):
    cli.main(["doctor"])
    shown = capsys.readouterr().out
    for preset in PRESETS:
        assert f"  {preset}, optimizer of your own  levels " in shown
    assert ", given " not in shown


def test_doctor_survives_missing_kernels_and_packages(monkeypatch, capsys):
    monkeypatch.setattr(native, "_C", None)
    monkeypatch.setattr(native, "_C_ERROR", ImportError("undefined symbol: x"))
    monkeypatch.setattr(native, "BACKENDS", {})
    monkeypatch.setattr(environment.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["doctor"]) == 1
    shown = capsys.readouterr()
    assert "undefined symbol: x" in shown.out
    assert "pip install --force-reinstall" in shown.out
    assert f"{PACKAGES}: for `bip-fast prune` and `compare`\n    pip install 'bip_fast[cli]'" in shown.out
    assert shown.err == ""


class OneGPU:
    """What doctor asks of torch.cuda, as on a machine with one GPU."""

    def __init__(self, monkeypatch):
        for name, value in {
            "is_available": True,
            "device_count": 1,
            "get_device_capability": (9, 0),
            "get_device_name": "NVIDIA H100",
        }.items():
            monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
        monkeypatch.setitem(native.BACKENDS, "cuda", native.BACKENDS["cpu"])


def test_doctor_launches_a_kernel(monkeypatch, capsys):
    """On the CPU in the place of a GPU: the mask is looked at."""
    OneGPU(monkeypatch)
    trial = doctor._trial
    monkeypatch.setattr(doctor, "_trial", lambda device: trial(torch.device("cpu")))
    assert cli.main(["doctor"]) == 0
    assert "cuda:0  kernels of bip_fast; NVIDIA H100, compute capability 9.0" in capsys.readouterr().out
    monkeypatch.setattr(native, "topk_mask", lambda scores, k: torch.zeros(len(scores), dtype=torch.bool))
    assert cli.main(["doctor"]) == 1
    assert "CUDA kernels on cuda:0: a mask is wrong" in capsys.readouterr().out


def test_doctor_says_in_one_line_what_a_launch_failed_of(monkeypatch, capsys):
    OneGPU(monkeypatch)

    def fail(scores, k):
        raise RuntimeError("bip::cuda::topk: cudaMemsetAsync: CUDA driver version is insufficient for CUDA runtime version\nmore")

    monkeypatch.setattr(torch.Tensor, "to", lambda x, *_: x)
    monkeypatch.setattr(native, "topk_mask", fail)
    assert cli.main(["doctor"]) == 1
    lines = capsys.readouterr().out.splitlines()
    at = next(i for i, line in enumerate(lines) if "CUDA kernels on cuda:0: " in line)
    assert "CUDA driver version is insufficient for CUDA runtime version" in lines[at]
    assert "TORCH_CUDA_ARCH_LIST=9.0 BIP_FAST_CUDA=1" in lines[at + 1]
    assert "update the driver" in lines[at + 1]
    assert any("kernels of bip_fast FAIL" in line for line in lines)


@pytest.mark.gpu
def test_doctor_on_a_gpu(monkeypatch, capsys):
    use_backend("cuda", monkeypatch)
    assert cli.main(["doctor"]) == 0
    assert "cuda:0" in capsys.readouterr().out


def test_prune_without_its_packages_says_what_to_install(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(environment.importlib.util, "find_spec", lambda name: None)
    assert prune(tmp_path / "run") == 2
    line = one_line(capsys.readouterr().err)
    assert line == f"bip-fast prune: needs {PACKAGES}: pip install 'bip_fast[cli]'\n"


def test_no_command_and_help_and_unknown_command(capsys):
    assert cli.main([]) == 0
    assert "prune" in capsys.readouterr().out
    assert cli.main(["prune", "--help"]) == 0
    shown = capsys.readouterr().out
    for option in (*SMALL[::2], "--data", "--data-dir", "--model", "--checkpoint", "--levels", "--lr", "--mask-lr", "--gamma", "--seed"):
        assert f"  {option} " in shown
    for option in ("--device", "--out", "--resume", "--overwrite", "--validate"):
        assert f"  {option}" in shown
    assert "default: 0.95" in shown
    assert cli.main(["plune"]) == 2
    assert "plune" in one_line(capsys.readouterr().err)


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals of POSIX")
@pytest.mark.parametrize("swallowed", [False, True])
def test_an_interrupt_while_torch_is_loaded_is_one_line(tmp_path, swallowed):
    """Also where the import goes on whatever is raised in it, as torch's own import of numpy does."""
    lines = ["import os, signal, time", "os.kill(os.getpid(), signal.SIGINT)", "time.sleep(60)"]
    if swallowed:
        lines = [lines[0], "try:", *(f"    {line}" for line in lines[1:]), "except BaseException:", "    pass"]
    (tmp_path / "torch.py").write_text("\n".join(lines) + "\n")
    root = Path(bip_fast.__file__).resolve().parents[1]
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(root)!r}]; import bip_fast_cli; sys.exit(bip_fast_cli.main())"
    ended = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (130, "interrupted\n")
    assert 'bip-fast = "bip_fast_cli:main"' in (root / "pyproject.toml").read_text()


@pytest.mark.slow
def test_the_core_needs_no_package_of_the_command_line():
    extras = {"rich", "sklearn", "matplotlib", "safetensors", "bip_fast.experiments", "bip_fast.commands.cli"}
    code = f"import sys, bip_fast; print(*(set(sys.modules) & {extras}))"
    root = Path(bip_fast.__file__).resolve().parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout == "\n"

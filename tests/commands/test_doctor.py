"""The command line around its commands: doctor, help, what is missing, and what the core does without."""

import subprocess
import sys
from pathlib import Path

import torch
from cli_runs import SMALL, one_line, prune

import bip_fast
from bip_fast.commands import cli, environment
from bip_fast.engine import native

PACKAGES = "scikit-learn, rich, matplotlib, safetensors, pyyaml, pydantic, filelock"


def test_doctor_names_versions_devices_and_build(capsys):
    assert cli.main(["doctor"]) == 0
    shown = capsys.readouterr().out
    for part in ("python", torch.__version__, "simd", f"{torch.get_num_threads()} threads", "kernels of bip_fast", "nothing"):
        assert part in shown


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


def test_the_core_needs_no_package_of_the_command_line():
    extras = {"rich", "sklearn", "matplotlib", "safetensors", "bip_fast.experiments", "bip_fast.commands.cli"}
    code = f"import sys, bip_fast; print(*(set(sys.modules) & {extras}))"
    root = Path(bip_fast.__file__).resolve().parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout == "\n"

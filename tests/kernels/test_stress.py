"""tests/large/stress.py is for a GPU. Here: that it runs, that it compares, and what its mutated build is kept from."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "large" / "stress.py"
TINY = ("--weights", "12000", "--tensors", "3", "--steps", "3", "--repeats", "2")


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("stress", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("device", ["cpu", "sim", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_tiny_stress(script, monkeypatch, capsys, device):
    if device == "cuda":
        from helpers import use_backend

        use_backend("cuda", monkeypatch)
    assert script.main(["--device", device, *TINY]) == 0
    assert capsys.readouterr().out.count("equal ") == 2


@pytest.mark.parametrize("taken", [2, 3], ids=["against the CPU", "against the first time"])
def test_one_wrong_bit_is_found(script, monkeypatch, capsys, taken):
    """Steps of the tested side and of the CPU alternate, and in the end the tested side repeats its own."""
    right, steps = script.Side.step, []

    def step(side):
        right(side)
        steps.append(side)
        if len(steps) == taken:
            side.arrays()["scores"][77] += 0.25

    monkeypatch.setattr(script.Side, "step", step)
    assert script.main(["--device", "cpu", *TINY, "--scopes", "global"]) == 1
    line = capsys.readouterr().out
    assert line.startswith("DIFFERS after")
    assert "step 0" in line
    assert "first in scores at 77: " in line


def test_a_stress_that_cannot_begin_has_found_nothing(script, capsys):
    for arguments in (["--device", "cuda:99"], ["--device", "cpu", "--module", "no_such_file.so"]):
        with pytest.raises(SystemExit) as left:
            script.main(arguments)
        assert left.value.code == 2
        assert "error: " in capsys.readouterr().err

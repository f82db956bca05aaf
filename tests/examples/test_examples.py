"""Every example runs as it is, some on a smaller network or for fewer epochs, and says what it has achieved.

The ones on text take a tiny random network instead of MiniLM. `decoder.py` and `sharded.py` are tested beside what they show.
"""

import importlib.util
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "examples"
ELSEWHERE = {"decoder.py", "sharded.py"}
# file: packages that it needs, arguments (TINY is the network, OUT a folder), a part of what it prints last, the least that main() returns
TINY, OUT = "TINY", "OUT"
RUNS = {
    "two_of_four.py": ((), (), "of 3 layers converted", 0.85),
    "topk.py": ((), (), "torch.topk", 104857),
    "sentences.py": (("transformers", "tokenizers"), ("--model", TINY, "--epochs", "2", "--out", OUT), "24 sentences that were held", 0.2),
    "hf_trainer.py": (
        ("transformers", "accelerate", "tokenizers"),
        ("--model", TINY, "--epochs", "2", "--out", OUT),
        "24 sentences that were held",
        0.2,
    ),
    "lightning_digits.py": (("lightning",), ("--epochs", "4", "--out", OUT), "45,180 of 50,200 weights are zero", 0.85),
    "lightning_digits.py --two-loaders": (
        ("lightning",),
        ("--two-loaders", "--epochs", "4", "--out", OUT),
        "45,180 of 50,200 weights are zero",
        0.5,
    ),
}


def test_none_is_forgotten():
    named = {name.split()[0] for name in RUNS} | {"plain_loop.py", "filters_to_onnx.py"} | ELSEWHERE
    assert {path.name for path in FOLDER.glob("*.py")} == named


@pytest.fixture(autouse=True)
def as_a_user(tmp_path, monkeypatch):
    """From a folder of their own, with nothing but scikit-learn beside torch."""
    pytest.importorskip("sklearn", reason="needs scikit-learn")
    monkeypatch.chdir(tmp_path)
    random = torch.random.get_rng_state()
    yield
    torch.random.set_rng_state(random)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", RUNS)
def test_it_runs(name, tmp_path, capsys):
    packages, arguments, says, least = RUNS[name]
    for package in packages:
        pytest.importorskip(package, reason=f"needs {package}")
    if TINY in arguments:
        from text_files import write_bert

        write_bert(tmp_path / "tiny")
    places = {TINY: str(tmp_path / "tiny"), OUT: str(tmp_path / "out")}
    spec = importlib.util.spec_from_file_location(f"example_{name.split('.')[0]}", FOLDER / name.split()[0])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    given = [[places.get(word, word) for word in arguments]] if arguments else []
    assert module.main(*given) >= least
    assert says in capsys.readouterr().out.strip().splitlines()[-1]


def test_the_plain_loop(capsys):
    found = runpy.run_path(str(FOLDER / "plain_loop.py"))
    assert found["pruned"] > 0.88
    assert found["opt"].report().sparsity == 0.95
    assert "pruned 0.9" in capsys.readouterr().out


@pytest.mark.slow
def test_filters_go_to_onnx(tmp_path):
    """In a process of its own, as what runs there is not ours."""
    for package in ("torch_pruning", "onnxruntime", "onnxscript"):
        pytest.importorskip(package, reason=f"needs {package}: pip install 'bip_fast[export]'")
    command = [sys.executable, FOLDER / "filters_to_onnx.py", "--epochs", "1"]
    environment = os.environ | {"PYTHONPATH": str(FOLDER.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "4.second: 32 -> 16 channels" in done.stdout
    assert "37,802" in done.stdout  # dense
    assert "9,690" in done.stdout  # a quarter, as half of the filters have half of the inputs
    assert (tmp_path / "small.onnx").stat().st_size < 4 * 37_802

"""The example of sharded training, as a user starts it: by torchrun, stopped, and gone on with on another number of ranks."""

from pathlib import Path

import pytest
import torch
from ranks import torchrun

pytestmark = pytest.mark.slow

pytest.importorskip("torch.distributed.fsdp", reason="needs a torch with torch.distributed.fsdp")
pytest.importorskip("safetensors", reason="needs the package safetensors: pip install 'bip-fast[test]'")
ROOT = Path(__file__).parents[2]


def run(ranks, *arguments):
    done = torchrun(ranks, ROOT / "examples" / "sharded.py", *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_it_goes_on_with_another_number_of_ranks(tmp_path):
    from safetensors.torch import load_file

    text = tmp_path / "text.txt"
    text.write_text((ROOT / "docs" / "paper.md").read_text())
    arguments = ["--text", text, "--save-every", 4, "--out", tmp_path / "run"]
    first = run(2, *arguments, "--steps", 8)
    assert "step 4 of 8" in first
    assert "step 8 of 8" in first
    (tmp_path / "run" / "model.safetensors").unlink()
    second = run(1, *arguments, "--steps", 8)  # nothing is left to do but to write the file
    assert "step" not in second
    weights = load_file(tmp_path / "run" / "model.safetensors")
    pruned = [x for name, x in weights.items() if x.dim() == 2 and "bytes" not in name and "places" not in name]
    total, zeros = (sum(int(count(x)) for x in pruned) for count in (torch.numel, lambda x: (x == 0).sum()))
    assert zeros == round(0.9 * total)

"""FSDP2 as trainers of other packages use it: they shard the model after the optimizer was made, save it, and go on from there."""

import pytest
import torch
import trainer_runs
from ranks import run_on

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("kind", ["accelerated", "trainer", "lightning"])
def test_a_sharded_run_that_is_interrupted_has_the_bits_of_one_that_is_not(kind, tmp_path):
    for package in {"accelerated": ["accelerate"], "trainer": ["accelerate", "transformers"], "lightning": ["lightning"]}[kind]:
        pytest.importorskip(package, reason=f"needs the package {package}: pip install 'bip-fast[test]'")
    for whole, stopped in run_on(2, trainer_runs.both, getattr(trainer_runs, kind), str(tmp_path)):
        assert whole["sharded"]
        assert whole["sparsity"] == pytest.approx(0.9, abs=2e-4)
        assert not [name for name, x in whole["weights"].items() if not torch.equal(x, stopped["weights"][name])]

"""DistributedDataParallel: every rank finds the same masks by itself; ranks that were told different things all hear of it."""

import pytest
import torch
from ddp_runs import different_models, errors, network, run, sharded_later, train
from ranks import run_on

from bip_fast import FastBiP

SGD = {"sparsity": 0.7, "lr": 0.05, "mask_lr": 0.3}
ADAMW = {"sparsity": 0.7, "optimizer": "adamw", "mask_lr": 0.3}
RUNS = {
    "plain": (2, ({}, SGD)),
    "three ranks, bound late": (3, ({}, ADAMW, 1, False, True)),
    "no_sync": (2, ({}, ADAMW, 3)),
    "unused": (2, ({"find_unused_parameters": True}, SGD, 1, True)),
    "static graph": (2, ({"static_graph": True}, SGD)),
    "gradients are views": (2, ({"gradient_as_bucket_view": True}, SGD | {"pattern": "filter"})),
}


@pytest.mark.parametrize(
    ("world", "arguments"),
    [pytest.param(*run, id=name, marks=() if name == "plain" else pytest.mark.slow) for name, run in RUNS.items()],
)
def test_all_ranks_have_the_same_bits(world, arguments):
    first, *others = run_on(world, run, *arguments)
    assert any(name.endswith("mask") for name in first)
    for other in others:
        assert first.keys() == other.keys()
        assert [name for name in first if not torch.equal(first[name], other[name])] == []


DIFFERENT = {
    "sparsity, pattern, scope, min_kept and prune": [{"sparsity": 0.5}, {"sparsity": 0.6}],
    "exclude, overrides and coupled": [{"sparsity": 0.5}, {"sparsity": 0.5, "exclude": "*side"}],
    "optimizer, levels and lower_steps": [{"sparsity": 0.5}, {"sparsity": 0.5, "lower_steps": 2}],
}


@pytest.mark.slow
@pytest.mark.parametrize(("what", "options"), DIFFERENT.items(), ids=DIFFERENT)
def test_every_rank_hears_of_different_arguments(what, options):
    expected = f"all ranks must give FastBiP the same {what}, but those of ranks [1] differ from those of rank 0"
    assert run_on(2, errors, options) == [expected, expected]


@pytest.mark.slow
def test_ranks_may_train_different_models():
    assert run_on(2, different_models) == [16, 9]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["untold", "as accelerate", "pruned before"])
def test_a_model_that_is_sharded_after_the_optimizer_was_made(how):
    """Its bits are those of one process, also where it had pruned the whole parameters already."""
    model = network()
    options = {"untold": ADAMW, "as accelerate": SGD, "pruned before": SGD | {"pattern": "filter"}}[how]
    expected = train(model, FastBiP(model, **options))
    for given in run_on(2, sharded_later, options, how):
        assert given.keys() == expected.keys()
        assert [name for name in expected if not torch.equal(given[name], expected[name])] == []

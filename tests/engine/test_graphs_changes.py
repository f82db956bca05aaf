"""`GraphedIteration` where parameters come, go and freeze, where calls fail, and where it is used in ways that cannot work."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from bip_fast import FastBiP
from bip_fast.graphs import GraphedIteration


def two_parts(seed=0):
    torch.manual_seed(seed)
    return nn.Linear(6, 6), nn.Linear(6, 3)


def six(i):
    generator = torch.Generator().manual_seed(i)
    return torch.randn(5, 6, generator=generator), torch.randint(3, (5,), generator=generator)


@pytest.mark.parametrize("recorded", [False, True])
def test_parameters_added_to_the_optimizer_are_trained_as_in_the_loop(double, recorded):
    """Also those that no module of the iteration has."""
    if recorded:
        double()
    parts = [two_parts() for _ in range(2)]
    opts = [FastBiP(body, sparsity=0.5, levels="joint", lr=0.1) for body, _ in parts]
    body, head = parts[0]
    iteration = GraphedIteration(body, opts[0], lambda out, y: cross_entropy(head(out), y), warmup=1)
    for i in range(8):
        if i == 3:
            for (_, tail), opt in zip(parts, opts, strict=True):
                opt.add_param_group({"params": tail.parameters(), "prune": False})
        x, y = six(i)
        iteration(x, y)
        cross_entropy(parts[1][1](parts[1][0](x)), y).backward()
        opts[1].step()
        for part in parts[1]:
            part.zero_grad()
        assert i < 3 or all(p.grad is None for part in parts[0] for p in part.parameters())
    for ours, plain in zip(parts[0], parts[1], strict=True):
        assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), plain.parameters(), strict=True))


def test_freezing_a_parameter_that_no_module_has_drops_the_graphs(double):
    made = double()
    body, head = two_parts()
    opt = FastBiP([{"params": body.parameters()}, {"params": head.parameters(), "prune": False}], sparsity=0.5, levels="joint")
    iteration = GraphedIteration(body, opt, lambda out, y: cross_entropy(head(out), y), warmup=1)
    for i in range(3):
        iteration(*six(i))
    records = sum(recorder.records for recorder in made)
    head.requires_grad_(False)
    before = head.weight.clone()
    for i in range(3):
        iteration(*six(i))
    assert sum(recorder.records for recorder in made) == records + 1
    assert torch.equal(head.weight, before)


def test_calls_that_fail_do_not_warm_up(double):
    made = double()
    body, _ = two_parts()
    opt = FastBiP(body, sparsity=0.5, levels="joint")
    fail = [True]

    def loss(out, y):
        if fail[0]:
            raise ValueError("no loss")
        return out.sum()

    iteration = GraphedIteration(body, opt, loss, warmup=2)
    for i in range(4):
        with pytest.raises(ValueError, match="no loss"):
            iteration(*six(i))
    fail[0] = False
    for i in range(2):
        iteration(*six(i))
    assert sum(recorder.records for recorder in made) == 0
    iteration(*six(2))
    assert sum(recorder.records for recorder in made) == 1


def test_an_autocast_around_the_call_counts():
    body, _ = two_parts()
    seen = []
    iteration = GraphedIteration(body, FastBiP(body, sparsity=0.5), lambda out, y: seen.append(out.dtype) or out.float().sum())
    with torch.autocast("cpu", torch.bfloat16):
        iteration(*six(0))
    iteration(*six(0))
    assert seen == [torch.bfloat16, torch.float32]


def test_what_cannot_work_is_refused_before_anything_runs():
    body, _ = two_parts()
    with pytest.raises(ValueError, match="without a closure, got LBFGS"):
        GraphedIteration(body, torch.optim.LBFGS(body.parameters()), cross_entropy)
    opt = FastBiP(body, sparsity=0.5)
    with pytest.raises(TypeError, match=r"loss_fn must return the loss, a tensor, .* got list"):
        GraphedIteration(body, opt, lambda out, y: [out.sum()])(*six(0))
    iteration = GraphedIteration(body, opt, lambda out, y: out.sum())
    opt.finalize()
    with pytest.raises(RuntimeError, match=r"finalize\(\) was called"):
        iteration(*six(0))
    assert body.weight.grad is None

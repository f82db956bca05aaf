"""Warm-up, decay, clipping and the step size of a head, against torch's own schedulers and clipping."""

from dataclasses import replace

import pytest
import torch
from method_stages import network
from torch import nn
from torch.optim import lr_scheduler

from bip_fast import FastBiP
from bip_fast.experiments.methods.stage import Recipe
from bip_fast.experiments.runs.training import Cursor, clipped, rate_at, set_rates, train
from bip_fast.experiments.settings import DECAYS

PLAIN = Recipe("prune", epochs=1, batch_size=8, seed=0, lr=0.3, mask_lr=2.0)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize(("warmup", "total"), [(0.0, 40), (0.06, 100), (0.025, 40), (0.5, 21)])
def test_step_sizes_are_those_of_torchs_schedulers(decay, warmup, total):
    recipe = replace(PLAIN, warmup=warmup, decays=DECAYS[decay])
    steps = round(warmup * total)
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), recipe.lr)
    left = total - steps
    down = (
        lr_scheduler.CosineAnnealingLR(optimizer, left)
        if decay == "cosine"
        else lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=left)
    )
    schedule: lr_scheduler.LRScheduler = down
    if steps:
        up = lr_scheduler.LinearLR(optimizer, 1 / steps, 1.0, total_iters=max(steps - 1, 1))
        schedule = lr_scheduler.SequentialLR(optimizer, [up, down], [steps])
    for done in range(total):
        expected = optimizer.param_groups[0]["lr"]
        # torch multiplies from step to step, which rounds a few times more; with a single step of warm-up it begins at 1 as we do
        assert recipe.lr * rate_at(recipe, done, total) == pytest.approx(expected, rel=1e-9, abs=1e-12)
        optimizer.step()
        schedule.step()


def test_without_warmup_the_factor_is_half_a_cosine_bit_for_bit():
    import math

    for done in range(360):
        assert rate_at(PLAIN, done, 360) == 0.5 * (1 + math.cos(math.pi * (done / 360)))


def test_scores_and_head_follow_the_weights():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    optimizer = FastBiP(model, sparsity=0.5, optimizer="adamw", exclude=["1"], overrides={"1": {"lr": 1e-3}})
    head = {model[1].weight, model[1].bias}
    for recipe, expected in ((replace(PLAIN, head_lr=3.0), 1.5), (PLAIN, 0.15)):
        assert set_rates(optimizer, recipe, 0.5, head) == 0.15
        for group in optimizer.param_groups:
            in_head = {p in head for p in group["params"]}
            assert len(in_head) == 1, "no group is half of the head"
            assert (group["lr"], group["mask_lr"]) == (expected if True in in_head else 0.15, 1.0)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 4


@pytest.mark.parametrize("make", [lambda m: torch.optim.AdamW(m.parameters()), lambda m: FastBiP(m, sparsity=0.5, optimizer="adamw")])
def test_clipping_is_torchs(make):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3))
    optimizer = make(model)
    given = [torch.randn_like(p) for p in model.parameters()]
    for norm in (0.0, 0.5, 1e6):
        twins = [nn.Parameter(torch.zeros_like(p)) for p in model.parameters()]
        for p, twin, g in zip(model.parameters(), twins, given, strict=True):
            p.grad, twin.grad = g.clone(), g.clone()
        if norm:
            torch.nn.utils.clip_grad_norm_(twins, norm)
        seen = []
        with clipped(model, optimizer, norm):
            hook = optimizer.register_step_pre_hook(lambda *_, seen=seen: seen.append([p.grad.clone() for p in model.parameters()]))
            optimizer.step()
            hook.remove()
        assert all(torch.equal(a, twin.grad) for a, twin in zip(seen[0], twins, strict=True)), norm
    assert not optimizer._optimizer_step_pre_hooks, "nothing is left of it"


def test_training_clips_where_it_is_asked_to(digits):
    """The first step, of step size 0.3."""

    def stop(cursor):
        raise StopIteration

    results = []
    for norm in (0.0, 1e-3):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        before = [p.detach().clone() for p in model.parameters()]

        with pytest.raises(StopIteration):
            train(model, optimizer, digits, replace(PLAIN, clip=norm, batch_size=200), Cursor(), stop)
        results.append(torch.cat([(p.detach() - b).flatten() for p, b in zip(model.parameters(), before, strict=True)]))
    whole, small = results
    assert whole.norm() > 1e-2
    torch.testing.assert_close(small, whole * (small.norm() / whole.norm()), rtol=1e-2, atol=1e-7)
    assert float(small.norm()) == pytest.approx(0.3 * 1e-3, rel=1e-3)  # lr of the recipe times the norm

"""`FastBiP.set_scores`: masks by other criteria than the magnitudes that BiP starts from."""

import pytest
import torch
from helpers import make_model, make_params, pruned_of, snapshot, train_step
from torch import nn

from bip_fast import FastBiP, reference


def random_scores(params, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {p: torch.rand(p.shape, generator=generator).to(p.device) for p in params}


def expected_masks(opt, params, scores, density):
    """The exact top-k over all parameters in the order of the optimizer."""
    flat = torch.cat([scores[p].flatten() for p in params]).cpu()
    mask = reference.topk_mask(flat, flat.numel() - round((1 - density) * flat.numel()))
    return dict(zip(params, mask.split([p.numel() for p in params]), strict=True))


@pytest.mark.parametrize("levels", ["alternating", "joint"])
def test_masks_are_the_top_k_of_the_scores(backend, levels):
    params = make_params([300, 500, 77], device=backend.device)
    theta = {p: p.detach().clone() for p in params}
    opt = FastBiP(params, sparsity=0.7, levels=levels)
    scores = random_scores(params)
    opt.set_scores(scores)
    masks = expected_masks(opt, params, scores, 0.3)
    for p in params:
        assert torch.equal(opt.mask_of(p).cpu().flatten(), masks[p])
        assert torch.equal(opt.weight_of(p), theta[p]), "weights stay"
        assert torch.equal(p.detach(), torch.where(opt.mask_of(p), theta[p], 0.0))
        assert torch.equal(opt.scores_of(p), scores[p])


def test_pruned_params_are_those_that_compete(backend):
    model = make_model(device=backend.device)
    first, *others = (p for p in model.parameters() if p in pruned_of(model))
    opt = FastBiP(model, sparsity=0.5, exclude=[first])
    assert all(a is b for a, b in zip(opt.pruned_params, others, strict=True))
    assert [row.total for row in opt.report()] == [p.numel() for p in opt.pruned_params]
    opt.finalize()
    with pytest.raises(RuntimeError, match="finalize"):
        _ = opt.pruned_params


def test_a_sparsity_changed_before_counts_at_once(backend):
    params = make_params([400, 300], device=backend.device)
    opt = FastBiP(params, sparsity=0.9)
    opt.param_groups[0]["sparsity"] = 0.25
    opt.set_scores({})
    assert sum(int(opt.mask_of(p).sum()) for p in params) == 700 - round(0.25 * 700)
    assert sum(int(p.count_nonzero()) for p in params) == 700 - round(0.25 * 700)


def test_other_parameters_keep_their_scores(backend):
    first, second = params = make_params([400, 300], device=backend.device)
    with torch.no_grad():
        second.mul_(0.1)  # its own scores stay below 1
    opt = FastBiP(params, sparsity=0.5)
    before = opt.scores_of(second)
    opt.set_scores({first: torch.full_like(first, 1.0)})
    assert torch.equal(opt.scores_of(second), before)
    assert opt.mask_of(first).sum() == 350, "all places go to the larger scores"
    assert not opt.mask_of(second).any()


def test_training_goes_on(backend):
    model = make_model(device=backend.device)
    opt = FastBiP(model, sparsity=0.6, lr=0.05, mask_lr=0.5)
    pruned = [p for p in model.parameters() if p in pruned_of(model)]
    opt.set_scores(random_scores(pruned))
    for i in range(4):
        train_step(model, opt, i, backend.device)
    kept = sum(int(opt.mask_of(p).sum()) for p in pruned)
    n = sum(p.numel() for p in pruned)
    assert kept == n - round(0.6 * n)
    for p in pruned:
        assert 0 <= opt.scores_of(p).min() <= opt.scores_of(p).max() <= 1
        assert torch.equal(p.detach(), torch.where(opt.mask_of(p), opt.weight_of(p), 0.0))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_scores_follow_the_entries_whatever_the_layout(backend, memory_format):
    layer = nn.Conv2d(6, 8, 3).to(backend.device).to(memory_format=memory_format)
    opt = FastBiP([layer.weight], sparsity=0.8)
    scores = random_scores([layer.weight])
    opt.set_scores(scores)
    n = layer.weight.numel()
    lowest_kept = scores[layer.weight].flatten().sort(descending=True).values[n - round(0.8 * n) - 1]
    assert torch.equal(opt.mask_of(layer.weight), scores[layer.weight] >= lowest_kept)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_filter_has_the_mean_of_its_scores(backend, memory_format):
    layer = nn.Conv2d(3, 10, 3).to(backend.device).to(memory_format=memory_format)
    opt = FastBiP([layer.weight], sparsity=0.4, pattern="filter")
    scores = random_scores([layer.weight])
    opt.set_scores(scores)
    means = scores[layer.weight].mean((1, 2, 3))
    kept = opt.mask_of(layer.weight).flatten(1)
    assert torch.equal(kept.all(1), kept.any(1))
    assert set(kept.all(1).nonzero().flatten().tolist()) == set(means.topk(6).indices.tolist())


def test_n_of_m(backend):
    params = make_params([64, 32], device=backend.device)
    opt = FastBiP(params, pattern="2:4")
    scores = random_scores(params)
    opt.set_scores(scores)
    for p in params:
        assert torch.equal(opt.mask_of(p).cpu(), reference.nm_mask(scores[p].cpu(), 2, 4))


def test_wrong_scores_change_nothing(backend):
    first, second, other = make_params([30, 40, 50], device=backend.device)
    opt = FastBiP([first, second], sparsity=0.5)
    before = snapshot(opt)
    nan = torch.zeros_like(second)
    nan[-1] = torch.nan
    good = {first: torch.ones_like(first)}
    for wrong, message in [
        ({other: torch.ones_like(other)}, "must be a parameter that is pruned"),
        ({second: torch.ones(7, device=backend.device)}, r"must have the shape \("),
        ({second: 1.0}, "got float"),
        ({second: nan}, r"must be in \[0, 1\], got nan"),
        ({second: torch.full_like(second, 1.001)}, r"must be in \[0, 1\], got 1.001 to 1.001"),
        ({second: torch.full_like(second, -1.0)}, r"must be in \[0, 1\], got -1"),
        ({second: torch.zeros_like(second).to_sparse()}, "must be a dense tensor of real numbers"),
        ({second: torch.zeros_like(second, device="meta")}, "real numbers of 16 bits or more, got .* on meta"),
        ({second: torch.zeros_like(second, dtype=torch.complex64)}, "real numbers of 16 bits or more, got .* of torch.complex64"),
        ({second: torch.zeros_like(second, dtype=torch.float8_e5m2)}, "real numbers of 16 bits or more, got .* of torch.float8_e5m2"),
    ]:
        with pytest.raises(ValueError, match=message):
            opt.set_scores(good | wrong)
    with pytest.raises(TypeError, match="scores must be a dict of tensors by parameter, got list"):
        opt.set_scores([second])
    for name, x in snapshot(opt).items():
        assert torch.equal(x, before[name]), name


def test_frozen_or_foreign_is_an_error(backend):
    (p,) = make_params([40], device=backend.device)
    opt = FastBiP([p], sparsity=0.5)
    with torch.no_grad():
        p.add_(1)
    with pytest.raises(RuntimeError, match="written by other code"):
        opt.set_scores({p: torch.ones_like(p)})
    (p,) = make_params([40], device=backend.device)
    opt = FastBiP([p], sparsity=0.5)
    opt.freeze_masks()
    with pytest.raises(RuntimeError, match="masks are frozen"):
        opt.set_scores({p: torch.ones_like(p)})
    opt.finalize()
    with pytest.raises(RuntimeError, match="finalize"):
        opt.set_scores({})

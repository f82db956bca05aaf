"""Patterns in lock-step with the reference: filters, channels, blocks and N:M, exact counts, in any shape and layout."""

import pytest
import torch
from helpers import ADVERSARIAL, assert_bits, fill_gradients, flat_like, params_of
from lockstep import MOVING, Lockstep
from torch import nn

from bip_fast import FastBiP, SparsitySchedule, reference
from bip_fast.engine.patterns import parse

STRUCTURED = ["filter", "channel", "block:1x1", "block:3x5", "block:4x4", "block:1x31", "block:2x33", "block:70x2", "block:130x40"]
N_OF_M = ["1:2", "2:4", "1:4", "3:4", "4:8", "5:16", "16:32"]


def locked(params, pattern, **options):
    options = MOVING | options
    if parse(pattern).kind == "N:M":
        options.pop("sparsity")
    return Lockstep(params, lambda: FastBiP(params, pattern=pattern, **options))


def run(backend, pattern, shapes, *, steps=8, dtype=torch.float32, channels_last=False, gradients=None, **options):
    params = params_of(shapes, backend.device, dtype, channels_last)
    lockstep = locked(params, pattern, **options)
    lockstep.random_steps(steps, **(gradients or {}))
    return lockstep


# one size below, at and above every border: lanes 32, items 128, strips 64, mask words 32, tiles 1024
FILTER_SHAPES = [(5, 1), (3, 31), (3, 32), (3, 33), (2, 127), (2, 129), (33, 1000), (4, 1031), (40, 3, 3, 3), (1, 7)]
CHANNEL_SHAPES = [(1, 5), (63, 3), (64, 33), (65, 2), (130, 130), (7, 40, 3, 3), (70, 5, 7, 7), (3, 1025)]


@pytest.mark.parametrize("levels", ["alternating", "joint"])
@pytest.mark.parametrize(("pattern", "shapes"), [("filter", FILTER_SHAPES), ("channel", CHANNEL_SHAPES)], ids=["filter", "channel"])
def test_sizes(backend, pattern, shapes, levels):
    run(backend, pattern, shapes, levels=levels)


@pytest.mark.parametrize("pattern", ["block:1x2", "block:2x4", "block:1x8", "block:3x16", "block:1x32", "block:2x64", "block:1x20"])
def test_blocks_cut_off_at_the_edges(backend, pattern):
    run(backend, pattern, [(7, 149), (5, 33), (4, 9)], steps=4)


@pytest.mark.parametrize("pattern", STRUCTURED + N_OF_M)
@pytest.mark.parametrize("scope", ["global", "layer", "erk"])
def test_patterns_and_scopes(backend, pattern, scope):
    lockstep = run(backend, pattern, [(12, 32), (40, 8, 2, 2), (6, 96)], scope=scope, steps=6)
    for i, p in enumerate(lockstep.states):
        if parse(pattern).kind == "N:M":
            n, m = parse(pattern).sizes
            assert (lockstep.opt.mask_of(p).reshape(-1, m).sum(1) == n).all(), i


@pytest.mark.parametrize("pattern", ["filter", "channel", "block:3x5", "2:4", "4:8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_and_mixed_gradients(backend, pattern, dtype):
    run(backend, pattern, [(9, 40), (16, 8, 3, 3)], dtype=dtype, gradients={"dtype": torch.bfloat16} if dtype == torch.bfloat16 else {})


@pytest.mark.parametrize("pattern", ["filter", "channel", "block:3x5", "2:4", "4:8"])
def test_channels_last(backend, pattern):
    run(backend, pattern, [(16, 8, 3, 3), (10, 16, 1, 1), (5, 32)], channels_last=True)


@pytest.mark.parametrize("pattern", ["filter", "channel", "block:3x5", "2:4", "8:16"])
@pytest.mark.parametrize("levels", ["alternating", "joint"])
def test_mask_momentum(backend, pattern, levels):
    run(backend, pattern, [(16, 48), (12, 16, 2, 2)], mask_momentum=0.9, levels=levels)


@pytest.mark.parametrize("levels", ["alternating", "joint"])
@pytest.mark.parametrize("pattern", ["filter", "channel", "block:2x33", "2:4"])
def test_unaligned_storage(backend, pattern, levels):
    """Parameters that begin in the middle of their storage."""
    flat = torch.randn(3 + 33 * 20 + 8 * 40, generator=backend.generator(0)).to(backend.device)
    params = [nn.Parameter(flat[3 : 3 + 660].view(33, 20)), nn.Parameter(flat[663:].view(8, 40))]
    locked(params, pattern, levels=levels).random_steps(6)


# --- what the engine does around it --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("min_kept", [0, 1, 3])
def test_every_layer_keeps_some(backend, min_kept):
    """One layer's weights are far smaller: without a minimum it would go."""
    params = params_of([(40, 6), (1100, 2), (8, 5), (2, 50)], backend.device)
    with torch.no_grad():
        params[2].mul_(1e-3)
        params[1][30:].mul_(1e-3)
    lockstep = locked(params, "filter", min_kept=min_kept, sparsity=0.95)
    lockstep.random_steps(6)
    opt = FastBiP(params, sparsity=0.95, pattern="filter", min_kept=min_kept)
    filters = [int(opt.mask_of(p).any(1).sum()) for p in params]
    assert sum(filters) == reference.kept(1150, 0.95)
    assert (filters[2] == 0) if min_kept == 0 else (filters[2] == min_kept)
    assert filters[3] == 2 or filters[3] >= min(min_kept, 2)


def test_a_minimum_above_the_budget(backend):
    params = params_of([(20, 3), (30, 3), (2, 3)], backend.device)
    lockstep = locked(params, "filter", min_kept=4, sparsity=0.9)
    assert [int(lockstep.opt.mask_of(p).any(1).sum()) for p in params] == [4, 4, 2]
    lockstep.random_steps(4)


@pytest.mark.parametrize("levels", ["alternating", "joint"])
def test_nonfinite_gradients_leave_their_unit(backend, levels):
    params = params_of([(20, 9), (15, 6, 2, 2), (12, 32)], backend.device)
    lockstep = locked(params, "filter", levels=levels, mask_momentum=0.5)
    count = 0
    for i in range(4):
        fill_gradients(params, i)
        params[0].grad[3, 4] = float("nan")
        params[1].grad[7] = float("inf")
        lockstep.step()
        count += 1 + 24
        assert lockstep.opt.num_nonfinite == count


@pytest.mark.parametrize("levels", ["alternating", "joint"])
@pytest.mark.parametrize("pattern", ["unstructured", "filter", "channel", "block:3x5", "2:4", "4:8"])
@pytest.mark.parametrize("share", [0.01, 1.0])
def test_weights_that_are_not_finite(backend, pattern, levels, share):
    """NaN is the smallest weight, infinity the largest; masks stay exact, also where nothing else is there to be kept."""
    params = params_of([(20, 96), (1100, 8), (16, 8, 3, 3)], backend.device)
    with torch.no_grad():
        for p in params:
            spoilt = torch.rand(p.shape, generator=backend.generator(1)).to(p.device)
            p[spoilt <= share] = torch.nan
            p[spoilt <= share / 3] = -torch.inf
        params[0][3] = torch.nan
    lockstep = locked(params, pattern, levels=levels, min_kept=2)
    lockstep.random_steps(3)
    for p in params:
        assert lockstep.opt.scores_of(p).isfinite().all()


def test_a_layer_of_nan_alone(backend):
    conv = nn.Conv2d(3, 8, 3).to(backend.device)
    nn.init.constant_(conv.weight, torch.nan)
    opt = FastBiP([conv.weight], sparsity=0.5, pattern="filter")
    assert int(opt.mask_of(conv.weight)[:, 0, 0, 0].sum()) == 4


@pytest.mark.parametrize("pattern", ["unstructured", "filter"])
@pytest.mark.parametrize("share", [0.4, 1.0])
def test_scores_without_a_value_are_never_kept_before_others(backend, pattern, share):
    """Nothing leaves such scores; if they come from elsewhere, counts are exact all the same and nothing is written anywhere else."""
    params = params_of([(1100, 3), (40, 5)], backend.device)
    opt = FastBiP(params, sparsity=0.7, pattern=pattern, min_kept=3)
    n = 1140 if pattern == "filter" else 3500
    for p in params:
        scores = opt.state[p]["scores"]
        scores[(torch.rand(scores.shape, generator=backend.generator(2)) <= share).to(p.device)] = torch.nan
    for _ in range(2):
        with opt.upper():
            opt.step()
        scores = torch.cat([opt.state[p]["scores"].flatten() for p in params])
        mask = torch.cat([opt.mask_of(p)[:, 0] if pattern == "filter" else opt.mask_of(p).flatten() for p in params])
        assert int(mask.sum()) == reference.kept(n, 0.7)
        assert int((mask & ~scores.isnan()).sum()) == min(reference.kept(n, 0.7), int((~scores.isnan()).sum()))


@pytest.mark.parametrize("pattern", ["1:2", "2:4", "4:8", "16:32"])
@pytest.mark.parametrize("kind", ["all nan", "nan of many kinds", "nan and minus inf", "minus zero", "infinities", "negative", "any bits"])
def test_n_of_m_whatever_the_scores(backend, pattern, kind):
    """Both ways through the kernels: without gradients, and with some that leave every score as it is."""
    p = params_of([(40, 32)], backend.device)[0]
    opt, (n, m) = FastBiP([p], pattern=pattern), parse(pattern).sizes
    for gradient in (None, torch.full_like(p, torch.inf)):
        scores = ADVERSARIAL[kind](1280).roll(5 if gradient is None else 70)
        opt.state[p]["scores"].copy_(scores.view(40, 32))
        p.grad = gradient
        with opt.upper():
            opt.step()
        assert torch.equal(opt.mask_of(p).cpu().flatten(), reference.nm_mask(scores, n, m)), gradient


@pytest.mark.parametrize("pattern", ["filter", "2:4"])
def test_no_gradient_and_skipped_steps(backend, pattern):
    params = params_of([(20, 12), (16, 8, 2, 2), (12, 32)], backend.device)
    lockstep = locked(params, pattern, mask_momentum=0.5)
    for i in range(6):
        fill_gradients(params, i)
        params[i % 3].grad = None
        lockstep.step()
    lockstep.opt.found_inf = torch.ones((), device=backend.device)
    fill_gradients(params, 9)
    lockstep.step(skipped=True)


def test_mixed_patterns(backend):
    """Groups of different patterns in one optimizer: one step serves them all."""
    params = params_of([(20, 12), (30, 7), (16, 8, 3, 3), (12, 32), (9, 5)], backend.device)
    groups = [
        {"params": params[:1], "pattern": "filter"},
        {"params": params[1:2]},
        {"params": params[2:3], "pattern": "channel", "sparsity": 0.3},
        {"params": params[3:4], "pattern": "2:4"},
        {"params": params[4:], "prune": False},
    ]
    for levels in ("alternating", "joint"):
        build = [dict(group) for group in groups]
        lockstep = Lockstep(params, lambda build=build, levels=levels: FastBiP(build, levels=levels, **MOVING), params[:4])
        lockstep.random_steps(6)


def test_coupled_filters_and_what_follows(backend):
    """Two convolutions whose outputs add up share their filters, and batch-norm and biases are masked with them."""
    model = nn.ModuleDict(
        {
            "a": nn.Conv2d(3, 8, 3),
            "b": nn.Conv2d(8, 8, 3, bias=False),
            "bn": nn.BatchNorm2d(8),
            "c": nn.Conv2d(8, 6, 3),
            "head": nn.Linear(6, 4),
        }
    ).to(backend.device)
    with torch.no_grad():
        model["bn"].bias.uniform_(0.5, 1)
    coupled = [["a.weight", "b.weight", "bn.weight", "bn.bias"]]
    inside = [model["a"].weight, model["b"].weight, model["bn"].weight, model["bn"].bias, model["a"].bias]
    for levels in ("alternating", "joint"):
        lockstep = Lockstep(
            model.parameters(),
            lambda levels=levels: FastBiP(model, pattern="filter", coupled=coupled, levels=levels, **(MOVING | {"sparsity": 0.5})),
            [model["a"].weight, model["b"].weight, model["c"].weight],
            coupled=[inside, [model["c"].weight, model["c"].bias]],
        )
        lockstep.random_steps(8)
        kept = lockstep.opt.mask_of(model["a"].weight)[:, 0, 0, 0]
        assert torch.equal(lockstep.opt.mask_of(model["b"].weight)[:, 0, 0, 0], kept)
        for p in inside[2:]:
            assert torch.equal(p != 0, kept)


@pytest.mark.parametrize("pattern", ["filter", "channel", "block:3x5", "2:4"])
def test_save_and_load_in_the_middle(backend, pattern):
    shapes = [(20, 12), (16, 8, 3, 3)]
    one, two = (params_of(shapes, backend.device) for _ in range(2))
    options = {k: v for k, v in MOVING.items() if k != "sparsity" or pattern != "2:4"} | {"mask_momentum": 0.5}
    first = FastBiP(one, pattern=pattern, **options)
    for i in range(5):
        fill_gradients(one, i)
        first.step()
    state = first.state_dict()
    second = FastBiP(two, pattern=pattern, **options)
    second.load_state_dict(state)
    for i in range(5, 10):
        fill_gradients(one, i)
        fill_gradients(two, i)
        first.step()
        second.step()
    for a, b in zip(one, two, strict=True):
        assert_bits(flat_like(a, a), flat_like(b, b), "value")
        assert_bits(flat_like(a, first.scores_of(a)), flat_like(b, second.scores_of(b)), "scores")


def test_a_state_of_another_pattern_or_of_parts_of_units(backend):
    params = params_of([(20, 12)], backend.device)
    state = FastBiP(params, sparsity=0.5, pattern="filter").state_dict()
    with pytest.raises(ValueError, match="pattern"):
        FastBiP(params_of([(20, 12)], backend.device), sparsity=0.5).load_state_dict(state)
    state["state"][0]["mask"] = state["state"][0]["mask"].roll(1).bitwise_xor(1)
    with pytest.raises(ValueError, match=r"whole units|damaged"):
        FastBiP(params_of([(20, 12)], backend.device), sparsity=0.5, pattern="filter").load_state_dict(state)


def test_a_schedule_of_units_makes_no_new_plan(backend):
    params = params_of([(40, 9), (30, 6, 2, 2)], backend.device)
    lockstep = locked(params, "filter", levels="joint", sparsity=0.8)
    schedule = SparsitySchedule(lockstep.opt, "cubic", start=0.0, steps=6)
    plan, kept = lockstep.opt._engine.plan, []
    for i in range(8):
        fill_gradients(params, i)
        lockstep.step()
        kept.append(sum(int(lockstep.opt.mask_of(p).flatten(1).any(1).sum()) for p in params))
        schedule.step()
    assert lockstep.opt._engine.plan is plan
    assert kept[0] == 70
    assert kept[-1] == reference.kept(70, 0.8)
    assert kept == sorted(kept, reverse=True)


@pytest.mark.parametrize("pattern", ["filter", "channel", "2:4"])
def test_gradients_are_unscaled_before_they_are_squared(backend, pattern):
    """As a GradScaler hands them over: 1024 times too large."""
    params = params_of([(20, 12), (16, 8, 2, 2)], backend.device)
    lockstep = locked(params, pattern, levels="joint")
    lockstep.opt.grad_scale = torch.tensor(1024.0, device=backend.device)
    for i in range(4):
        fill_gradients(params, i)
        for p in params:
            p.grad.mul_(1024)
        lockstep.step(scale=1024.0)


def test_many_threads_find_the_same_bits(backend):
    def go(threads):
        params = params_of([(300, 700), (64, 64, 3, 3), (40, 2000)], backend.device)
        torch.set_num_threads(threads)
        opt = FastBiP(params, pattern="channel", levels="joint", mask_momentum=0.3, **MOVING)
        for i in range(5):
            fill_gradients(params, i)
            opt.step()
        return [p.detach().clone() for p in params] + [opt.scores_of(p) for p in params]

    for a, b in zip(go(1), go(4), strict=True):
        assert_bits(flat_like(a, a), flat_like(b, b), "threads")


def test_many_units_fall_back(backend, monkeypatch):
    """More blocks than one launch settles, so that the selection among units takes all its ways."""
    p = params_of([(1100, 1000)], backend.device)
    lockstep = locked(p, "block:1x1", sparsity=0.7)
    lockstep.random_steps(3)

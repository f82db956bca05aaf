"""Every method of the table: what its stages do to weights, scores and masks."""

import itertools
import json

import pytest
import torch
from cli_runs import load_weights, prune
from method_stages import begun, flat_weights, network, run_stage, settings_of

import bip_fast
from bip_fast.engine.layers import weights
from bip_fast.engine.report import report
from bip_fast.experiments.methods import begin
from bip_fast.experiments.methods.imp import rounds
from bip_fast.experiments.methods.table import stages
from bip_fast.experiments.models.names import build

# --- masks at the beginning --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["omp", "omp-finetune", "imp"])
def test_the_first_mask_is_the_top_k_of_the_magnitudes(digits, method):
    model = network()
    with torch.no_grad():
        model.fc.weight.mul_(9)  # above 1, where the start scores of BiP are all the same
    magnitudes = flat_weights(model).abs()
    stage, opt = begun(method, digits, model, rewind=None)
    expected = bip_fast.topk_mask(magnitudes, magnitudes.numel() - round(stage.sparsity * magnitudes.numel()))
    assert torch.equal(torch.cat([opt.mask_of(x).flatten() for _, x in weights(model)]), expected)
    assert opt.phase == "lower"
    assert (stage.sparsity == 0.8) is (method != "imp")


@pytest.mark.parametrize("method", ["snip", "grasp", "synflow", "random"])
def test_pruning_at_the_start_uses_the_scores_of_the_criterion(digits, method):
    model = network()
    stage = stages(settings_of(method))[0]
    assert (stage.criterion.name, stage.recipe.epochs, stage.recipe.lr) == (method, 5, 0.1)
    scores = begin._scores(stage, model, settings_of(method), digits)
    flat = torch.cat([x.flatten() for x in scores.values()])
    _, opt = begun(method, digits, model)
    mask = torch.cat([opt.mask_of(x).flatten() for _, x in weights(model)])
    assert mask.sum() == flat.numel() - round(0.8 * flat.numel())
    assert flat[mask].min() >= flat[~mask].max()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scope", "pattern"),
    [("global", "unstructured"), ("layer", "unstructured"), ("erk", "unstructured"), ("layer", "filter"), ("global", "block:2x2")],
)
def test_the_rounds_of_synflow_prune_what_is_pruned_in_the_end(digits, monkeypatch, scope, pattern):
    """What a round has removed is not kept, but for ties with weights that have no flow left, because what they feed is gone."""
    if pattern == "filter":  # coupled filters are found by it
        pytest.importorskip("torch_pruning", reason="needs the package torch-pruning: pip install 'bip-fast[test]'")
    torch.manual_seed(0)
    model = build("resnet20b", 1, 10, width=8)
    settings = settings_of("synflow", model="resnet20b", scope=scope, pattern=pattern)
    rounds_, selector = [], begin._selector

    def watched(*given):
        select = selector(*given)
        return lambda chosen, sparsity: rounds_.append(select(chosen, sparsity)) or rounds_[-1]

    monkeypatch.setattr(begin, "_selector", watched)
    opt = begin.begin(stages(settings)[0], model, settings, digits)
    assert len(rounds_) == 99
    kept = {name: opt.mask_of(p) for name, p in weights(model) if p in set(opt.pruned_params)}
    for before, after in itertools.pairwise([*rounds_, kept]):
        assert before.keys() == after.keys()
        again = sum(int((after[name] & ~before[name]).sum()) for name in after)
        assert again <= (0.01 if scope == "layer" else 0) * sum(int(mask.sum()) for mask in after.values())
    assert all(mask.any() for mask in kept.values())


def test_methods_keep_different_weights(digits):
    masks = {}
    for method in ("snip", "grasp", "synflow", "random", "omp-finetune"):
        model = network()
        begun(method, digits, model)
        masks[method] = flat_weights(model) != 0
    for a in masks:
        for b in masks:
            assert a == b or (masks[a] != masks[b]).sum() > 50, (a, b)


# --- what stages move --------------------------------------------------------------------------------------------------------------------


def test_hydra_learns_scores_while_everything_else_stays(digits):
    model = network()
    vectors = {name: p.detach().clone() for name, p in model.named_parameters() if p.dim() < 2}
    stage, opt = begun("hydra", digits, model, mask_lr=3.0)
    before = {p: (opt.weight_of(p), opt.mask_of(p)) for _, p in weights(model)}
    run_stage(stage, opt, model, digits)
    assert sum(int((opt.mask_of(p) != mask).sum()) for p, (_, mask) in before.items()) > 0
    assert all(torch.equal(opt.weight_of(p), theta) for p, (theta, _) in before.items())
    assert all(torch.equal(p, vectors[name]) for name, p in model.named_parameters() if name in vectors)
    assert opt.param_groups[0]["gamma"] == float("inf"), "weights that stay have no implicit gradient"


def test_hydra_starts_with_scores_scaled_in_every_layer_and_has_momentum_on_them(digits):
    model = network()
    with torch.no_grad():
        model.fc.weight.mul_(9)
    stage, opt = begun("hydra", digits, model)
    theta = {name: opt.weight_of(p).abs() for name, p in weights(model)}
    for name, p in weights(model):
        assert torch.equal(opt.scores_of(p), theta[name] / theta[name].max()), name
    assert (opt.param_groups[0]["mask_momentum"], stage.recipe.mask_lr) == (0.9, 0.1)
    flat = torch.cat([opt.scores_of(p).flatten() for _, p in weights(model)])
    mask = torch.cat([opt.mask_of(p).flatten() for _, p in weights(model)])
    assert torch.equal(mask, bip_fast.topk_mask(flat, int(mask.sum())))
    for p in model.parameters():
        p.grad = None
    model.fc.weight.grad = torch.full_like(model.fc.weight, 0.01)
    scores, h = opt.scores_of(model.fc.weight), 0.01 * opt.weight_of(model.fc.weight)
    for rate in (0.1, 0.1 * 1.9):
        with begin.moving(stage, opt):
            opt.param_groups[0]["mask_lr"] = 0.1
            opt.step()
        scores = (scores - rate * h).clamp(0, 1)
        torch.testing.assert_close(opt.scores_of(model.fc.weight), scores)


def test_a_layer_of_zeros_has_scores(digits):
    model = network()
    torch.nn.init.zeros_(model.fc.weight)
    _, opt = begun("hydra", digits, model)
    assert not opt.scores_of(model.fc.weight).any()


def test_the_second_half_of_hydra_trains_under_its_mask(digits):
    model = network()
    kept = flat_weights(model)
    _, opt = begun("hydra", digits, model)
    opt.finalize()
    kept = flat_weights(model) != 0
    stage, opt = begun("hydra", digits, model, number=1)
    theta = flat_weights(model)
    run_stage(stage, opt, model, digits)
    assert torch.equal(flat_weights(model) != 0, kept)
    assert not torch.equal(flat_weights(model), theta)


def test_gradual_pruning_follows_the_cubic_curve_and_the_magnitudes(digits):
    model = network()
    stage, opt = begun("gmp", digits, model, ramp=0.5)
    grow = begin.before_step(stage, opt)
    n = flat_weights(model).numel()
    seen = []
    for done in range(41):
        grow(done, 40)
        theta = torch.cat([opt.weight_of(p).abs().flatten() for _, p in weights(model)])
        mask = torch.cat([opt.mask_of(p).flatten() for _, p in weights(model)])
        sparsity = 0.8 * (1 - (1 - min(done, 20) / 20) ** 3)
        assert mask.sum() == n - round(sparsity * n)
        assert done > 20 or torch.equal(mask, bip_fast.topk_mask(theta, int(mask.sum())))
        seen.append(int(mask.sum()))
        with begin.moving(stage, opt):
            assert opt.phase == "lower"
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(done))
            opt.step()
    assert seen[0] == n
    assert len(set(seen)) > 15


def test_bip_with_a_ramp_starts_dense_and_ends_sparse(digits):
    model = network()
    n = flat_weights(model).numel()
    stage, opt = begun("bip", digits, model)
    assert (stage.moves, stage.ramp) == ("joint", 0.5)
    assert report(model).sparsity == 0
    for p in opt.pruned_params:
        assert torch.equal(opt.scores_of(p), opt.weight_of(p).square().div(2).clamp(max=1))
    grow = begin.before_step(stage, opt)
    grow(10, 20)
    assert report(model).kept == n - round(0.8 * n), "at the end of the ramp, whether or not there are mask steps left"
    for done, kept in ((0, n), (5, n - round(0.8 * (1 - 0.5**3) * n)), (10, n - round(0.8 * n)), (11, n - round(0.8 * n))):
        grow(done, 20)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        opt.step()
        assert sum(int(opt.mask_of(p).sum()) for _, p in weights(model)) == kept


@pytest.mark.parametrize("method", ["bip", "gmp"])
@pytest.mark.parametrize(("ramp", "freeze"), [(0.5, 0.0), (1.0, 1.0), (1.0, 0.3), (0.01, 0.01), (0.99, 1.0)])
@pytest.mark.parametrize("levels", ["joint", "alternating"])
def test_the_sparsity_is_reached_whatever_the_ramp(digits, method, ramp, freeze, levels):
    model = network()
    stage, opt = begun(method, digits, model, ramp=ramp, freeze=freeze, levels=levels)
    run_stage(stage, opt, model, digits)
    result = report(model)
    assert result.kept == result.total - round(0.8 * result.total)


# --- rewinding ---------------------------------------------------------------------------------------------------------------------------


def test_rewound_weights_are_the_saved_ones_bit_for_bit(digits):
    saved = {name: x.clone() for name, x in network(seed=1).state_dict().items()}
    model = network(seed=2)
    trained = {name: x.detach().clone() for name, x in weights(model)}
    settings = settings_of("imp", rewind="init")
    stage = [stage for stage in stages(settings) if stage.sparsity is not None][1]
    opt = begin.begin(stage, model, settings, digits, lambda: model.load_state_dict(saved))
    chosen = torch.cat([x.abs().flatten() for x in trained.values()])
    k = chosen.numel() - round(stage.sparsity * chosen.numel())
    mask = bip_fast.topk_mask(chosen, k)
    assert torch.equal(torch.cat([opt.mask_of(x).flatten() for _, x in weights(model)]), mask), "by the trained weights"
    for name, x in model.state_dict().items():
        if name in trained:
            p = dict(model.named_parameters())[name]
            assert torch.equal(opt.weight_of(p), saved[name])
            assert torch.equal(x, torch.where(opt.mask_of(p), saved[name], 0.0))
        else:
            assert torch.equal(x, saved[name]), "norms and biases too"


@pytest.mark.parametrize("rewind", ["init", "1"])
def test_the_end_of_a_round_keeps_less_of_what_was_kept(tmp_path, monkeypatch, rewind):
    """A whole run of three rounds: masks are nested, and what a round starts from is the file of that epoch."""
    seen = []
    original = begin.begin

    def watched(stage, model, settings, data, rewind=None):
        opt = original(stage, model, settings, data, rewind)
        seen.append({name: (p.detach() != 0, opt.weight_of(p)) for name, p in weights(model)})
        return opt

    monkeypatch.setattr("bip_fast.experiments.runs.job.begin", watched)
    assert prune(tmp_path / "run", "--method", "imp", "--rewind", rewind, "--per-round", "0.5") == 0
    epoch = 0 if rewind == "init" else 1
    saved = load_weights(tmp_path / "run" / f"epoch-{epoch}.safetensors")
    sizes = []
    for before, after in zip([None, *seen], seen, strict=False):
        for name, (kept, theta) in after.items():
            assert torch.equal(theta, saved[name])
            assert before is None or not (kept & ~before[name][0]).any()
        sizes.append(sum(int(kept.sum()) for kept, _ in after.values()))
    n = sum(kept.numel() for kept, _ in seen[0].values())
    assert sizes == [n - round(s * n) for s in (0.5, 0.75, 0.8)]
    result = json.loads((tmp_path / "run" / "report.json").read_text())
    assert list(result["history"]) == ["pretrain", "round 50 %", "round 75 %", "round 80 %"]
    first = 1 + epoch
    assert [row["epoch"] for row in result["history"]["round 80 %"]] == list(range(first, 4))
    assert result["image_passes"]["round 80 %"] == (3 - epoch) * 5 * 200


SIX = [0.2, 0.36, 0.488, 0.5904, 0.67232, 0.737856]


@pytest.mark.parametrize(
    ("start", "end", "found"), [(0.0, 0.5, [0.2, 0.36, 0.488, 0.5]), (0.36, 0.488, [0.488]), (0.5, 0.5, []), (0.0, 0.79, [*SIX, 0.79])]
)
def test_rounds_remove_a_share_of_what_is_left(start, end, found):
    assert rounds(start, end, 0.2) == found
    assert all(x < 1 for x in rounds(start, 0.9999999, 0.5))


EVERY = itertools.product(["bip", "gmp", "hydra", "snip", "synflow", "omp"], ["filter", "channel", "block:2x2", "2:4"])


@pytest.mark.slow
@pytest.mark.parametrize(("method", "pattern"), [pair for pair in EVERY if pair != ("synflow", "2:4")])  # which is refused
def test_methods_take_every_pattern(digits, method, pattern):
    """One epoch: masks are whole units, and what is not kept is 0."""
    if pattern == "filter":  # coupled filters are found by it
        pytest.importorskip("torch_pruning", reason="needs the package torch-pruning: pip install 'bip-fast[test]'")
    settings = settings_of(method, pattern=pattern, model="resnet20b", epochs=2, sparsity=0.5)
    torch.manual_seed(0)
    model = build("resnet20b", 1, 10, width=8)
    stage = next(stage for stage in stages(settings) if stage.sparsity is not None)
    saved = {name: x.clone() for name, x in model.state_dict().items()}
    opt = begin.begin(stage, model, settings, digits, lambda: model.load_state_dict(saved))
    run_stage(stage, opt, model, digits)
    kept = {name: opt.mask_of(x) for name, x in weights(model) if x in set(opt.pruned_params)}
    assert len(kept) > 10
    for name, mask in kept.items():
        assert not model.get_parameter(name)[~mask].any(), name
        if pattern == "filter":
            assert torch.equal(mask.flatten(1).all(1), mask.flatten(1).any(1)), name
        if pattern == "channel":
            channels = mask.transpose(0, 1).flatten(1)
            assert torch.equal(channels.all(1), channels.any(1)), name
        if pattern == "block:2x2":
            rows, cols = (n // 2 * 2 for n in mask.flatten(1).shape)
            blocks = mask.flatten(1)[:rows, :cols].unflatten(1, (-1, 2)).unflatten(0, (-1, 2)).transpose(1, 2).flatten(2)
            assert torch.equal(blocks.all(2), blocks.any(2)), name
        if pattern == "2:4":
            assert (mask.view(-1, 4).sum(1) == 2).all(), name
    assert 0.25 < sum(int(mask.sum()) for mask in kept.values()) / sum(mask.numel() for mask in kept.values()) < 0.7

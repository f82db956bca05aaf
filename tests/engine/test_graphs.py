"""`GraphedIteration` beside the plain loop, bit for bit, without a GPU.

`Double` stands in for CUDA graphs: what was recorded is run again on a replay, after checking that nothing has changed that a graph would
not see. So all decisions (when to warm up, record, replay, go back to eager) are tested; test_graphs_cuda.py has the rest.
"""

import pytest
import torch
from graph_pairs import LEVELS, Double, Pair, Uncapturable, whole_run
from helpers import ConvNet, batch, make_model
from ranks import alone
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import lr_scheduler

from bip_fast import FastBiP, graphs
from bip_fast.graphs import GraphedIteration

# --- eager --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", LEVELS)
def test_without_cuda_it_is_the_plain_loop_and_says_why(levels):
    pair = Pair(levels=levels)
    whole_run(pair)
    assert pair.iteration.reason == "the parameters are on cpu, and only CUDA has graphs"


def trained_under_ddp():
    model = nn.Sequential(nn.parallel.DistributedDataParallel(nn.Linear(4, 3)))  # inside of a module, as `torch.compile` returns it
    iteration = GraphedIteration(model, FastBiP(model, sparsity=0.5), cross_entropy)
    return iteration.reason, [float(iteration(torch.ones(5, 4), torch.zeros(5, dtype=torch.int64))) for _ in range(6)]


def test_under_ddp_nothing_is_captured(double, tmp_path):
    made = double()
    reason, losses = alone(tmp_path, trained_under_ddp)
    assert reason == "the model is in DistributedDataParallel"
    assert losses[-1] < losses[0]
    assert not made


def test_eager_autocast_is_the_plain_loop():
    pair = Pair(iteration={"autocast": torch.bfloat16})
    pair.steps(6)
    pair.check()


def test_arguments_out_of_range():
    model = make_model()
    opt = FastBiP(model, sparsity=0.5)
    with pytest.raises(ValueError, match="float16 needs a GradScaler"):
        GraphedIteration(model, opt, cross_entropy, autocast=torch.float16)
    with pytest.raises(ValueError, match="warmup must be an integer of at least 1, got 0"):
        GraphedIteration(model, opt, cross_entropy, warmup=0)
    with pytest.raises(TypeError, match="a batch must be tensors, got Tensor, float"):
        GraphedIteration(model, opt, cross_entropy)(batch(0)[0], 0.5)
    opt.finalize()
    with pytest.raises(ValueError, match="has no parameters"):
        GraphedIteration(model, opt, cross_entropy)


def test_what_the_loss_function_returns_comes_back(double):
    double()
    model = make_model()
    opt = FastBiP(model, sparsity=0.5)
    Double.watched = model, opt
    iteration = GraphedIteration(model, opt, lambda out, y: (cross_entropy(out, y), out), warmup=1)
    kept = []
    for i in range(6):
        x, y = batch(i)
        expected = ConvNet.forward(model, x).detach()
        model.norm.running_mean.zero_()
        loss, out = iteration(x, y)
        kept.append((loss, out, expected))
        assert not out.requires_grad
    for loss, out, expected in kept:
        torch.testing.assert_close(out, expected)
        assert loss.shape == ()


# --- when to record and when to replay ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["sgd", "adamw"])
@pytest.mark.parametrize("levels", LEVELS)
def test_a_whole_run(double, levels, rule):
    made = double()
    pair = Pair(levels=levels, optimizer=rule)
    whole_run(pair)
    assert pair.iteration.reason is None
    assert [recorder.records for recorder in made] == [2]  # of joint levels: joint, and lower after freezing
    assert made[0].replays >= 12
    steps = [{int(state["step"]) for state in opt.state.values() if "step" in state} for opt in pair.opts]
    assert steps[0] == steps[1]  # a replay counts as a step does
    assert len(steps[0]) == (rule == "adamw")


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("pattern", ["block:2x3", "block:1x99", "block:99x1"])
def test_a_whole_run_of_units(double, pattern, levels):
    """The number of kept units changes where the recorded kernels read it."""
    made = double()
    pair = Pair(levels=levels, pattern=pattern, sparsity=0.5)
    whole_run(pair)
    (recorder,) = made
    assert pair.iteration.reason is None
    assert recorder.replays > 10
    assert recorder.records == 2


@pytest.mark.parametrize("warmup", [1, 3])
def test_every_phase_warms_up_on_its_own(double, warmup):
    made = double()
    pair = Pair(iteration={"warmup": warmup})
    for i in range(2 * warmup):
        assert made[0].records == 0
        pair.step(i)
    pair.step(100)
    assert (made[0].records, made[0].replays, made[0].warmings) == (1, 1, 2 * warmup)
    pair.step(101)
    assert (made[0].records, made[0].replays) == (2, 2)
    pair.steps(6, 102)
    assert (made[0].records, made[0].replays, made[0].warmings) == (2, 8, 2 * warmup)
    pair.check()


def test_another_shape_runs_eagerly_until_it_has_come_often(double):
    made = double()
    pair = Pair(levels="joint")
    pair.steps(5)
    assert (made[0].records, made[0].replays) == (1, 2)
    pair.steps(3, 5, n=6)
    assert (made[0].records, made[0].replays) == (1, 2)
    pair.steps(2, 8, n=6)
    pair.steps(2, 10)
    assert (made[0].records, made[0].replays) == (2, 6)
    pair.check()


def test_shapes_without_end_do_not_make_graphs_without_end(double, monkeypatch):
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 2)
    made = double()
    pair = Pair(levels="joint", iteration={"warmup": 1})
    for n in (4, 5, 6, 7):
        pair.steps(3, n=n)
    assert made[0].records == 2
    pair.check()


def test_phases_by_hand(double):
    double()
    pair = Pair(iteration={"warmup": 1})
    for i, phase in enumerate(["lower", "upper", "joint", "joint", "upper", "lower", "joint", "upper"]):
        with getattr(pair.opts[0], phase)(), getattr(pair.opts[1], phase)():
            pair.step(i)
    pair.steps(4, 10)
    pair.check()


def test_a_new_plan_is_recorded_anew(double):
    """Other weights compete, momenta of the scores need memory, a loaded state: graphs of the old tables are not replayed."""
    made = double()
    pair = Pair(levels="joint")
    pair.steps(5)
    records = [made[0].records]
    changes = [
        lambda model, opt: opt.param_groups[0].update(scope="layer"),
        lambda model, opt: opt.param_groups[0].update(mask_momentum=0.5),
        lambda model, opt: opt.load_state_dict(opt.state_dict()),
    ]
    for i, change in enumerate(changes):
        pair.each(change)
        pair.steps(3, 10 * i)
        records.append(made[0].records)
    assert records == [1, 2, 3, 4]
    assert len(made) == 1
    pair.check()


def test_modes_and_frozen_parameters_are_recorded_anew(double):
    made = double()
    pair = Pair(levels="joint", iteration={"warmup": 1})
    changes = [
        lambda model, opt: model.norm.eval(),
        lambda model, opt: model.train(),
        lambda model, opt: model.head.bias.requires_grad_(False),
        lambda model, opt: setattr(model.norm, "running_mean", model.norm.running_mean.clone()),
        lambda model, opt: model.eval() and model.train(),  # as an evaluation does: no change in the end
    ]
    for i, change in enumerate([lambda model, opt: None, *changes]):
        pair.each(change)
        pair.steps(3, 10 * i)
    assert [recorder.records for recorder in made] == [1] * 5
    assert [recorder.replays for recorder in made] == [2, 2, 2, 2, 5]
    pair.check()


def test_stray_gradients_do_not_count(double):
    double()
    pair = Pair(levels="joint", iteration={"warmup": 1})
    for i in range(4):
        for p in pair.models[0].parameters():
            p.grad = torch.ones_like(p)
        pair.step(i)
    pair.check()


def test_errors_of_the_optimizer_come_before_the_batch_is_used(double):
    made = double()
    pair = Pair(levels="joint", iteration={"warmup": 1})
    pair.steps(3)
    with torch.no_grad():
        pair.models[0].head.weight.add_(1)
    with pytest.raises(RuntimeError, match=r"head\.weight was written by other code"):
        pair.iteration(*batch(3))
    assert made[0].replays == 2
    assert pair.opts[0]._launch is None


def test_a_failed_capture_falls_back_and_loses_nothing(double):
    made = double(Uncapturable)
    pair = Pair()
    whole_run(pair)
    assert pair.iteration.reason == "capture failed: operation not permitted when stream is capturing"
    assert (made[0].records, made[0].replays) == (1, 0)


def test_an_error_of_the_model_is_raised(double):
    double()
    model = make_model()
    opt = FastBiP(model, sparsity=0.5)
    with pytest.raises(RuntimeError, match="shape"):
        GraphedIteration(model, opt, cross_entropy)(torch.zeros(2, 3, 5, 5), torch.zeros(2, dtype=torch.int64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_types_and_layouts(double, dtype, layout, autocast):
    """bfloat16 parameters keep fp32 weights beside them; the batch keeps its layout on its way into the graph."""
    double()
    models, seen = [], set()

    def prepare(model):
        models.append(model)
        if len(models) == 1:  # the graphed one
            model.conv.register_forward_pre_hook(
                lambda module, given: seen.add((given[0].dtype, given[0].stride()[1] == 1, torch.is_autocast_cache_enabled()))
            )
        return model.to(dtype=dtype, memory_format=layout)

    pair = Pair(prepare=prepare, iteration={"autocast": autocast, "warmup": 1})
    pair.steps(8)
    assert seen == {(torch.float32 if autocast else dtype, layout == torch.channels_last, False)}
    pair.check()


# --- steps outside of the graph -------------------------------------------------------------------------------------------------------


def test_step_hooks_see_gradients(double):
    """A hook that clips: the step is then not in the graph."""

    def clip(opt, args, kwargs):
        nn.utils.clip_grad_norm_(opt.param_groups[0]["params"], 0.01)

    made = double()
    pair = Pair(iteration={"warmup": 1})
    pair.steps(4)
    pair.each(lambda model, opt: opt.register_step_pre_hook(clip))
    pair.steps(6, 4)
    assert (made[0].records, made[0].replays) == (4, 6)
    pair.check()


def test_another_optimizer_inside(double):
    """Its step follows the graph, which holds forward and backward."""
    made = double()
    pair = Pair(
        optimizer=lambda groups: torch.optim.RMSprop(groups, lr=0.01), levels="joint", iteration={"warmup": 1}, lr=None, weight_decay=None
    )
    pair.steps(8)
    assert (made[0].records, made[0].replays) == (1, 7)
    pair.check()


def test_another_optimizer(double):
    made = double()
    pair = Pair(make_optimizer=torch.optim.SGD, lr=0.1, momentum=0.9)
    schedulers = [lr_scheduler.CosineAnnealingLR(opt, 12) for opt in pair.opts]
    for i in range(10):
        pair.step(i)
        for scheduler in schedulers:
            scheduler.step()
    assert (made[0].records, made[0].replays) == (1, 7)
    pair.check()

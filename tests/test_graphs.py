"""`GraphedIteration` beside the plain loop, bit for bit.

Where there is no GPU, `Double` stands in for CUDA graphs: what was recorded is run again on a replay, after checking that nothing has
changed that a graph would not see. So all decisions (when to warm up, record, replay, go back to eager) are tested everywhere.
"""

import warnings
from contextlib import nullcontext

import pytest
import torch
from helpers import TOLERANCE, ConvNet, assert_bits, assert_same_snapshot, batch, make_model, snapshot, use_backend
from lockstep import MOVING
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import lr_scheduler

from bip_fast import FastBiP, graphs
from bip_fast.graphs import GraphedIteration


class Double:
    """Stands in for `CudaRecorder` on the CPU."""

    made: list["Double"]
    watched: tuple = ()  # (model, optimizer): what a replay must find as the record did

    def __init__(self, device):
        self.records = self.replays = self.warmings = 0
        Double.made.append(self)

    def warming(self):
        self.warmings += 1
        return nullcontext()

    def baked(self):
        model, opt = self.watched
        seen = [module.training for module in model.modules()]
        seen += [(t.data_ptr(), t.requires_grad, t.grad is None) for t in (*model.parameters(), *model.buffers())]
        return [*seen, getattr(opt, "phase", None), id(getattr(getattr(opt, "_engine", None), "plan", None))]

    def record(self, body):
        self.records += 1
        baked = self.baked()

        def replay():
            assert self.baked() == baked, "a graph would not see this change"
            self.replays += 1
            return body()

        return replay


class Uncapturable(Double):
    def record(self, body):
        super().record(body)
        try:
            raise RuntimeError("operation not permitted when stream is capturing\nand more lines")
        except RuntimeError:
            raise RuntimeError("capture_end: operation failed due to a previous error") from None


@pytest.fixture
def double(monkeypatch):
    def use(kind=Double):
        Double.made = []
        monkeypatch.setitem(graphs.RECORDERS, "cpu", kind)
        return Double.made

    return use


@pytest.fixture
def cuda(monkeypatch):
    return use_backend("cuda", monkeypatch)


def plain_step(model, opt, x, y, autocast=None):
    """The loop of the README."""
    with torch.autocast(x.device.type, dtype=autocast, enabled=autocast is not None):
        loss = cross_entropy(model(x), y)
    loss.backward()
    opt.step()
    opt.zero_grad()
    return loss.detach()


class Pair:
    """The same training twice: graphed and by the plain loop."""

    def __init__(self, *, device=None, make_optimizer=FastBiP, model=None, prepare=lambda model: model, iteration=None, **options):
        options = options if make_optimizer is not FastBiP else MOVING | options
        self.device, self.autocast = device, (iteration or {}).get("autocast")
        self.models = [prepare(model() if model else make_model(device=device)) for _ in range(2)]
        self.opts = [make_optimizer(m if make_optimizer is FastBiP else m.parameters(), **options) for m in self.models]
        Double.watched = self.models[0], self.opts[0]
        self.iteration = GraphedIteration(self.models[0], self.opts[0], cross_entropy, **(iteration or {}))

    def step(self, seed, n=8):
        """One step of both on the same batch; the losses are equal bit for bit."""
        x, y = batch(seed, self.device, n)
        x = x.to(next(self.models[0].parameters()).dtype) if self.autocast is None else x
        x = x.to(memory_format=torch.channels_last) if self.models[0].conv.weight.stride()[1] == 1 else x
        loss = self.iteration(x, y)
        assert all(p.grad is None for p in self.models[0].parameters())
        assert not loss.requires_grad
        assert_bits(loss, plain_step(self.models[1], self.opts[1], x, y, self.autocast), f"loss of step {seed}")

    def steps(self, count, first=0, **options):
        for i in range(count):
            self.step(first + i, **options)

    def each(self, change):
        for model, opt in zip(self.models, self.opts, strict=True):
            change(model, opt)

    def check(self):
        given, expected = (model.state_dict() for model in self.models)
        for name in expected:
            assert_bits(given[name], expected[name], name)
        if isinstance(self.opts[0], FastBiP):
            assert_same_snapshot(snapshot(self.opts[0]), snapshot(self.opts[1]))
            assert self.opts[0].phase == self.opts[1].phase


def whole_run(pair):
    """Schedulers, another number of kept weights, a last smaller batch in each epoch, phases by hand, freezing."""
    schedulers = [lr_scheduler.OneCycleLR(opt, max_lr=0.2, total_steps=40) for opt in pair.opts]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of a scheduler that did not see the optimizer step
        for i in range(24):
            pair.step(i, n=5 if i % 8 == 7 else 8)
            for scheduler in schedulers:
                scheduler.step()
            if i == 13:
                pair.each(lambda model, opt: opt.param_groups[0].update(sparsity=0.6, mask_lr=0.1, weight_decay=0.0))
            if i == 17:
                pair.each(lambda model, opt: opt.freeze_masks())
    pair.check()


LEVELS = ["alternating", "joint"]


# --- eager --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", LEVELS)
def test_without_cuda_it_is_the_plain_loop_and_says_why(levels):
    pair = Pair(levels=levels)
    whole_run(pair)
    assert pair.iteration.reason == "the parameters are on cpu, and only CUDA has graphs"


def test_eager_autocast_is_the_plain_loop():
    pair = Pair(iteration={"autocast": torch.bfloat16})
    pair.steps(6)
    pair.check()


def test_arguments_out_of_range():
    model = make_model()
    opt = FastBiP(model, sparsity=0.5)
    with pytest.raises(ValueError, match="float16 needs a GradScaler"):
        GraphedIteration(model, opt, cross_entropy, autocast=torch.float16)
    with pytest.raises(ValueError, match="warmup must be at least 1, got 0"):
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


@pytest.mark.parametrize("levels", LEVELS)
def test_a_whole_run(double, levels):
    made = double()
    pair = Pair(levels=levels)
    whole_run(pair)
    assert pair.iteration.reason is None
    assert [recorder.records for recorder in made] == [2]  # of joint levels: joint, and lower after freezing
    assert made[0].replays >= 12


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
        lambda model, opt: opt.add_param_group({"params": [nn.Parameter(torch.ones(40, 2))]}),
    ]
    for i, change in enumerate(changes):
        pair.each(change)
        pair.steps(3, 10 * i)
        records.append(made[0].records)
    assert records == [1, 2, 3, 4, 5]
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
    with pytest.raises(RuntimeError, match=r"head\.weight was written by someone else"):
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


# --- on a GPU ---------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def deterministic():
    """cuDNN's own choice of algorithms may sum in an order that changes from run to run."""
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    yield
    torch.backends.cudnn.deterministic = before


@pytest.mark.usefixtures("deterministic")
class TestCuda:
    @pytest.mark.parametrize("levels", LEVELS)
    def test_a_whole_run(self, cuda, levels):
        pair = Pair(device=cuda.device, levels=levels)
        whole_run(pair)
        assert pair.iteration.reason is None
        assert len(pair.iteration._graphs) == 2

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
    @pytest.mark.parametrize("autocast", [None, torch.bfloat16])
    def test_types_and_layouts(self, cuda, dtype, layout, autocast):
        prepare = lambda model: model.to(dtype=dtype, memory_format=layout)  # noqa: E731
        pair = Pair(device=cuda.device, prepare=prepare, iteration={"autocast": autocast})
        pair.steps(16)
        assert pair.iteration.reason is None
        pair.check()

    def test_a_new_plan_is_recorded_anew(self, cuda):
        pair = Pair(device=cuda.device, levels="joint")
        pair.steps(5)
        for change in ({"scope": "layer"}, {"mask_momentum": 0.5}):
            pair.each(lambda model, opt, change=change: opt.param_groups[0].update(change))
            pair.steps(4, 5)
        pair.each(lambda model, opt: model.norm.eval())
        pair.steps(6, 9)
        assert pair.iteration.reason is None
        pair.check()

    def test_another_optimizer(self, cuda):
        pair = Pair(device=cuda.device, make_optimizer=torch.optim.SGD, lr=0.1, momentum=0.9)
        pair.steps(10)
        assert pair.iteration.reason is None
        pair.check()

    def test_batches_on_the_cpu(self, cuda):
        model, same = (make_model(device=cuda.device) for _ in range(2))
        opt, plain = FastBiP(model, **MOVING), FastBiP(same, **MOVING)
        iteration = GraphedIteration(model, opt, cross_entropy)
        for i in range(12):
            iteration(*(t.pin_memory() for t in batch(i)))
            plain_step(same, plain, *batch(i, cuda.device))
        assert_same_snapshot(snapshot(opt), snapshot(plain))

    def test_replays_do_not_synchronise(self, cuda):
        pair = Pair(device=cuda.device)
        pair.steps(10)
        batches = [batch(i, cuda.device) for i in range(4)]
        torch.cuda.set_sync_debug_mode("error")
        try:
            for i, (x, y) in enumerate(batches):
                pair.opts[0].param_groups[0]["lr"] = 0.1 / (i + 1)
                pair.iteration(x, y)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_a_model_that_asks_the_host_falls_back_and_trains(self, cuda):
        """With dropout: after a failed capture, the random generator must still serve eager calls; and another model's capture works."""

        class Asking(ConvNet):
            def forward(self, x):
                x = nn.functional.dropout(x, 0.1)
                return super().forward(x) * (1.0 if x.sum().item() > -1e9 else 0.0)

        pair = Pair(device=cuda.device, model=lambda: make_model(device=cuda.device, kind=Asking))
        x, y = batch(0, cuda.device)
        losses = [float(pair.iteration(x, y)) for _ in range(30)]
        assert pair.iteration.reason.startswith("capture failed: ")
        assert losses[-1] < losses[0]
        other = Pair(device=cuda.device)
        other.steps(12)
        assert other.iteration.reason is None
        other.check()

    def test_dropout_draws_anew_in_every_replay(self, cuda):
        model = nn.Sequential(nn.Flatten(), nn.Linear(48, 64), nn.Dropout(0.5), nn.Linear(64, 5)).to(cuda.device)
        opt = FastBiP(model, sparsity=0.5, lr=0.0, mask_lr=0.0)
        iteration = GraphedIteration(model, opt, cross_entropy)
        x, y = batch(0, cuda.device)
        assert len({float(iteration(x, y)) for _ in range(16)}) == 16
        assert iteration.reason is None

    def test_cudnn_may_choose_its_algorithms(self, cuda, monkeypatch):
        monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
        model = make_model(device=cuda.device, width=16)
        opt = FastBiP(model, sparsity=0.5, lr=0.0, mask_lr=0.0)
        iteration = GraphedIteration(model.eval(), opt, cross_entropy)
        x, y = batch(0, cuda.device)
        losses = torch.stack([iteration(x, y) for _ in range(12)])
        assert iteration.reason is None
        torch.testing.assert_close(losses, losses[:1].expand(12), **TOLERANCE["float32 gradient"])

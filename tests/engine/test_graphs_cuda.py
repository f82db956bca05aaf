"""`GraphedIteration` on a GPU beside the plain loop: real captures, equal bit for bit, and what only CUDA can get wrong."""

import pytest
import torch
from graph_pairs import LEVELS, Pair, plain_step, whole_run
from helpers import TOLERANCE, ConvNet, assert_same_snapshot, batch, make_model, snapshot, use_backend
from lockstep import MOVING
from torch import nn
from torch.nn.functional import cross_entropy

from bip_fast import FastBiP
from bip_fast.graphs import GraphedIteration


@pytest.fixture
def cuda(monkeypatch):
    """cuDNN's own choice of algorithms may sum in an order that changes from run to run."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    return use_backend("cuda", monkeypatch)


@pytest.mark.parametrize("rule", ["sgd", "adamw"])
@pytest.mark.parametrize("levels", LEVELS)
def test_a_whole_run(cuda, levels, rule):
    pair = Pair(device=cuda.device, levels=levels, optimizer=rule)
    whole_run(pair)
    assert pair.iteration.reason is None
    assert len(pair.iteration._graphs) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_types_and_layouts(cuda, dtype, layout, autocast):
    prepare = lambda model: model.to(dtype=dtype, memory_format=layout)  # noqa: E731
    pair = Pair(device=cuda.device, prepare=prepare, iteration={"autocast": autocast})
    pair.steps(16)
    assert pair.iteration.reason is None
    pair.check()


def test_a_new_plan_is_recorded_anew(cuda):
    pair = Pair(device=cuda.device, levels="joint")
    pair.steps(5)
    for change in ({"scope": "layer"}, {"mask_momentum": 0.5}):
        pair.each(lambda model, opt, change=change: opt.param_groups[0].update(change))
        pair.steps(4, 5)
    pair.each(lambda model, opt: model.norm.eval())
    pair.steps(6, 9)
    assert pair.iteration.reason is None
    pair.check()


def test_another_optimizer(cuda):
    pair = Pair(device=cuda.device, make_optimizer=torch.optim.SGD, lr=0.1, momentum=0.9)
    pair.steps(10)
    assert pair.iteration.reason is None
    pair.check()


def test_batches_on_the_cpu(cuda):
    model, same = (make_model(device=cuda.device) for _ in range(2))
    opt, plain = FastBiP(model, **MOVING), FastBiP(same, **MOVING)
    iteration = GraphedIteration(model, opt, cross_entropy)
    for i in range(12):
        iteration(*(t.pin_memory() for t in batch(i)))
        plain_step(same, plain, *batch(i, cuda.device))
    assert_same_snapshot(snapshot(opt), snapshot(plain))


def test_replays_do_not_synchronise(cuda):
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


def test_a_model_that_asks_the_host_falls_back_and_trains(cuda):
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


def test_dropout_draws_anew_in_every_replay(cuda):
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 64), nn.Dropout(0.5), nn.Linear(64, 5)).to(cuda.device)
    opt = FastBiP(model, sparsity=0.5, lr=0.0, mask_lr=0.0)
    iteration = GraphedIteration(model, opt, cross_entropy)
    x, y = batch(0, cuda.device)
    assert len({float(iteration(x, y)) for _ in range(16)}) == 16
    assert iteration.reason is None


def test_cudnn_may_choose_its_algorithms(cuda, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    model = make_model(device=cuda.device, width=16)
    opt = FastBiP(model, sparsity=0.5, lr=0.0, mask_lr=0.0)
    iteration = GraphedIteration(model.eval(), opt, cross_entropy)
    x, y = batch(0, cuda.device)
    losses = torch.stack([iteration(x, y) for _ in range(12)])
    assert iteration.reason is None
    torch.testing.assert_close(losses, losses[:1].expand(12), **TOLERANCE["float32 gradient"])

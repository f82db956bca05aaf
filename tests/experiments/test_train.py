"""The training loop against the plain loop it stands for, its schedule, freezing, and the figures it keeps."""

import math
import time
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from data_files import write_fashion_mnist
from graph_pairs import Double, Uncapturable
from torch import nn

from bip_fast import FastBiP, graphs
from bip_fast.experiments.data import sources
from bip_fast.experiments.data.augment import normalised
from bip_fast.experiments.data.batches import Position
from bip_fast.experiments.methods.stage import Recipe
from bip_fast.experiments.runs.training import Cursor, evaluate, kept_flags, train

RECIPE = Recipe("prune", epochs=3, batch_size=16, seed=4, lr=0.1, mask_lr=2.0)


@pytest.fixture
def images(tmp_path):
    write_fashion_mnist(tmp_path, train=70, test=30)
    return sources.load("fashion-mnist", tmp_path)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 3, stride=3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(162, 10))


def clone(model):
    torch.manual_seed(0)
    copy = nn.Sequential(nn.Conv2d(1, 2, 3, stride=3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(162, 10))
    copy.load_state_dict(model.state_dict())
    return copy


class Watched(torch.optim.SGD):
    """SGD that notes the step sizes it is given and when its masks are frozen."""

    def __init__(self, model):
        super().__init__([{"params": list(model.parameters()), "mask_lr": 0.0}], lr=0.0)
        self.rates, self.frozen_at = [], None

    def step(self):
        self.rates.append((self.param_groups[0]["lr"], self.param_groups[0]["mask_lr"]))
        super().step()

    def freeze_masks(self):
        self.frozen_at = len(self.rates)


def test_it_is_the_plain_loop(images, model):
    plain, optimizer = clone(model), torch.optim.SGD(model.parameters(), lr=9.0, momentum=0.9)
    cursor = Cursor()
    train(model, optimizer, images, RECIPE, cursor)

    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / 12)))
    for epoch in range(3):
        batches, losses, right = images.epoch(16, Position(4, "prune", epoch)), [], 0
        for step in range(4):  # 70 images make four full batches of 16
            x, y = batches.batch(step)
            optimizer.zero_grad()
            logits = plain(x)
            loss = F.cross_entropy(logits, y)
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            right += (logits.argmax(1) == y).sum().item()
        row = cursor.history[epoch]
        assert row["epoch"] == epoch + 1
        assert row["loss"] == pytest.approx(sum(losses) / 4)
        assert row["accuracy"] == right / 64
    assert (cursor.epoch, cursor.step) == (3, 0)
    for name, x in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], x)


@pytest.mark.parametrize("kind", [Double, Uncapturable])
@pytest.mark.parametrize("amp", [False, True])
def test_in_graphs_it_trains_the_same(images, model, monkeypatch, kind, amp):
    """Dense training, whose step follows the graph, then pruning; what cannot be a graph is said once a stage."""
    other, said, figures = clone(model), [], []
    for network in (model, other):
        if network is other:
            Double.made = []
            monkeypatch.setitem(graphs.RECORDERS, "cpu", kind)
        for make in (lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), lambda model: FastBiP(model, sparsity=0.8)):
            optimizer = make(network)
            Double.watched, cursor = (network, optimizer), Cursor()
            train(network, optimizer, images, replace(RECIPE, freeze=0.7), cursor, amp=amp, say=said.append)
            figures.append([{**row, "seconds": 0} for row in cursor.history])
    assert figures[:2] == figures[2:]
    assert all(torch.equal(x, other.state_dict()[name]) for name, x in model.state_dict().items())
    assert len(Double.made) == 2
    assert said == ([] if kind is Double else ["no CUDA graphs: capture failed: operation not permitted when stream is capturing"] * 2)
    assert [recorder.replays > 0 for recorder in Double.made] == [kind is Double] * 2


class Late(torch.Tensor):
    """Sums on a device that works behind the host: reading them takes until it is ready."""

    clock, ready = 0.0, 0.0

    def cpu(self):
        Late.clock = max(Late.clock, Late.ready)
        return self.as_subclass(torch.Tensor)

    def tolist(self):
        return self.cpu().tolist()


@pytest.mark.parametrize("pauses", [False, True])
def test_seconds_are_those_of_the_device_and_not_of_checkpoints(images, model, monkeypatch, pauses):
    Late.clock = Late.ready = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: Late.clock)

    class Slow(nn.Module):
        def forward(self, x):
            Late.clock += 1  # to start the batch, which then takes 10
            Late.ready = max(Late.ready, Late.clock) + 10
            return model(x)

    def after_step(cursor):
        if pauses:
            with cursor.aside():
                Late.clock += 100

    cursor = Cursor(sums=torch.zeros(3, dtype=torch.float64).as_subclass(Late))
    train(Slow(), torch.optim.SGD(model.parameters(), lr=0.1), images, RECIPE, cursor, after_step)
    each = 4 * 11 if pauses else 1 + 4 * 10
    assert [row["seconds"] for row in cursor.history] == [each, 2 * each, 3 * each]
    assert cursor.seconds == 3 * each
    assert "began" not in cursor.state_dict()


def test_both_step_sizes_follow_half_a_cosine(images, model):
    optimizer = Watched(model)
    train(model, optimizer, images, RECIPE, Cursor())
    factors = [0.5 * (1 + math.cos(math.pi * step / 12)) for step in range(12)]
    assert optimizer.rates == [(pytest.approx(0.1 * factor), pytest.approx(2.0 * factor)) for factor in factors]


@pytest.mark.parametrize(("freeze", "step"), [(0.0, 0), (0.5, 6), (0.51, 7), (1.0, None)])
def test_masks_freeze_at_their_share_of_the_stage(images, model, freeze, step):
    optimizer = Watched(model)
    train(model, optimizer, images, Recipe("prune", 3, 16, 4, 0.1, freeze=freeze), Cursor())
    assert optimizer.frozen_at == step


def test_mask_changes_are_counted_over_an_epoch(images, model):
    class Zeroing(torch.optim.SGD):
        """Clears one more weight of the Linear layer in every step."""

        steps = 0

        def step(self):
            with torch.no_grad():
                model[3].weight.view(-1)[self.steps] = 0
            self.steps += 1

    cursor = Cursor()
    train(model, Zeroing(model.parameters(), lr=0.1), images, RECIPE, cursor)
    total = 18 + 1620
    assert [row["mask_changes"] for row in cursor.history] == [4 / total] * 3
    assert int(sum((~flags).sum() for flags in kept_flags(model).values())) == 12


def test_evaluate_uses_eval_mode_and_every_test_image(images, model):
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), images, RECIPE, Cursor())
    before = {name: x.clone() for name, x in model.state_dict().items()}
    score = evaluate(model, images)
    assert all(torch.equal(x, model.state_dict()[name]) for name, x in before.items())
    logits = model.eval()(normalised(images.test_images, images.mean, images.std))
    assert score.accuracy == (logits.argmax(1) == images.test_labels).sum().item() / 30
    assert score.loss == pytest.approx(F.cross_entropy(logits, images.test_labels).item(), rel=1e-5)

"""Parts of batches: what several ranks learn together is what one process learns from the whole batch."""

from dataclasses import replace

import pytest
import torch
from test_decoder_data import windows
from torch import nn

from bip_fast.experiments.data.batches import Position
from bip_fast.experiments.data.scoring import IGNORED
from bip_fast.experiments.data.sentences import Sentences
from bip_fast.experiments.ranks import Share
from bip_fast.experiments.runs.training import measured


def text():
    texts = [" ".join("x" * (i % 7 + 1)) for i in range(31)]
    read = Sentences("own", ("a", "b"), texts, torch.arange(31) % 2, texts[:7], torch.arange(7) % 2)
    return read.tokens(lambda own: [[i % 90 for i in range(len(x))] for x in own])


def asked():
    """Windows of text that do not ask for as much."""
    data = windows(train=90)
    labels = data.train_labels.clone()
    labels[::2, :5] = IGNORED
    return replace(data, train_labels=labels)


class First(nn.Module):
    """Looks at the first token only, so that padding makes no difference."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(90, 2)

    def forward(self, ids):
        return self.words(ids[:, 0])


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("kind", ["images", "text", "windows"])
def test_the_mean_over_ranks_is_the_mean_over_the_batch(kind, ranks, digits):
    torch.manual_seed(0)
    data, batch_size, model = {
        "images": (digits, 200, nn.Sequential(nn.Flatten(), nn.Linear(64, 10))),
        "text": (text(), 10, First()),  # the last batch has one sentence
        "windows": (asked(), 4, nn.Embedding(100, 100)),
    }[kind]
    model, position = model.double(), Position(0, "prune", 0)

    def learned(batch):
        inputs, *targets = batch
        model.zero_grad()
        loss, sums = measured(model(inputs.double() if inputs.is_floating_point() else inputs), *targets)
        loss.backward()
        return [*(p.grad for p in model.parameters()), sums]

    for step in range(data.steps(batch_size)):
        *gradients, sums = learned(data.epoch(batch_size, position).batch(step))
        parts = [learned(data.epoch(batch_size, position, Share(rank, ranks)).batch(step)) for rank in range(ranks)]
        *found, total = (sum(same) for same in zip(*parts, strict=True))
        for own, expected in zip(found, gradients, strict=True):
            torch.testing.assert_close(own / ranks, expected, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(total, sums, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("made", [lambda digits: digits, lambda _: text(), lambda _: asked()], ids=["images", "text", "windows"])
def test_every_test_batch_goes_to_one_rank(made, digits):
    data = made(digits)
    batches = [labels.tolist() for _, labels in data.test_batches()]
    parts = [[labels.tolist() for _, labels in data.test_batches(Share(rank, 3))] for rank in range(3)]
    assert sum(map(len, parts)) == len(batches)
    assert [parts[i % 3][i // 3] for i in range(len(batches))] == batches

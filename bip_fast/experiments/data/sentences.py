"""Labelled sentences: as text, and as the tokens of a network, in batches of about one length.

A batch is one tensor int64 (sentences, tokens) with `PADDING` behind the shorter ones; the network makes ids and a padding mask of it.
The batches of an epoch depend on (seed, stage, epoch) only, so a run can continue from any of them with the same bits: sentences in random
order, sorted by length within pools of `POOL` batches, cut into batches, and these in random order. Each sentence comes once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..ranks import WHOLE, Share
from .batches import Position, epoch_order, on_device, places_of, targets_of
from .kinds import TEXT, Kind

__all__ = ["PADDING", "BucketedEpoch", "Sentences", "Tokens", "bucketed"]

PADDING = -1  # instead of a token
POOL = 32  # batches that are sorted together
EVALUATED = 64  # sentences of an evaluation batch


@dataclass(frozen=True)
class Sentences:
    """Texts and labels int64 (n,) of both parts, before a network's tokenizer has seen them; ``labels``: their names."""

    name: str
    labels: tuple[str, ...]
    train_texts: Sequence[str]
    train_labels: Tensor
    test_texts: Sequence[str]
    test_labels: Tensor
    note: str = ""
    kind: Kind = TEXT
    channels: None = None  # images have some

    @property
    def classes(self) -> int:
        return len(self.labels)

    def selected(self, train: Tensor, test: Tensor | None = None) -> Sentences:
        """Only training sentences ``train``; with ``test``, these training sentences in place of the test part. Both are indices."""
        parts: dict[str, Any] = {"train_texts": [self.train_texts[i] for i in train], "train_labels": self.train_labels[train]}
        if test is not None:
            parts |= {"test_texts": [self.train_texts[i] for i in test], "test_labels": self.train_labels[test]}
        return replace(self, **parts)

    def tokens(self, tokenize: Callable[[list[str]], list[list[int]]]) -> Tokens:
        """What a network is trained on; ``tokenize`` gives the ids of every text."""
        train, test = (_padded(tokenize(list(texts))) for texts in (self.train_texts, self.test_texts))
        return Tokens(self.name, self.classes, *train, self.train_labels, *test, self.test_labels, self.note)

    def to(self, device: torch.device) -> NoReturn:
        raise TypeError("texts have no device; see `tokens`")


def _padded(ids: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Token ids int64 (n, longest) with `PADDING`, and lengths int64 (n,)."""
    lengths = torch.tensor([len(own) for own in ids])
    out = torch.full((len(ids), max(1, int(lengths.max()))), PADDING)
    for row, own in zip(out, ids, strict=True):
        row[: len(own)] = torch.tensor(own, dtype=torch.int64)
    return out, lengths


@dataclass(frozen=True)
class Tokens:
    """Token ids (n, longest) with `PADDING`, lengths on the CPU and labels int64 (n,) of both parts. The other attributes mean what they
    mean in `dataset.Dataset`."""

    name: str
    classes: int
    train_ids: Tensor
    train_lengths: Tensor
    train_labels: Tensor
    test_ids: Tensor
    test_lengths: Tensor
    test_labels: Tensor
    note: str = ""
    kind: Kind = TEXT
    channels: None = None

    def steps(self, batch_size: int) -> int:
        """Batches of an epoch; the last one of a pool may be smaller."""
        return -(-len(self.train_labels) // batch_size)

    def seen(self, batch_size: int) -> int:
        """Sentences of an epoch: all."""
        return len(self.train_labels)

    def example(self) -> Tensor:
        """Two sentences, as a batch."""
        rows = torch.arange(len(self.train_ids))[:2]
        return _batch(self.train_ids, self.train_lengths, rows)

    def epoch(self, batch_size: int, position: Position, share: Share = WHOLE) -> BucketedEpoch:
        """Batches of an epoch, or a part of each."""
        return BucketedEpoch(self, batch_size, position, share)

    def test_batches(self, share: Share = WHOLE) -> Iterator[tuple[Tensor, Tensor]]:
        """All test sentences, the shortest first, or some of their batches."""
        for rows in share.every(self.test_lengths.argsort(stable=True).split(EVALUATED)):
            yield _batch(self.test_ids, self.test_lengths, rows), self.test_labels[on_device(rows, self.test_labels.device)]

    def selected(self, train: Tensor, test: Tensor | None = None) -> NoReturn:
        raise TypeError("parts are taken of the texts; see `Sentences.selected`")

    def to(self, device: torch.device) -> Tokens:
        """Copy with ids and labels on ``device``."""
        names = ("train_ids", "train_labels", "test_ids", "test_labels")
        moved: dict[str, Any] = {name: getattr(self, name).to(device) for name in names}
        return replace(self, **moved)


def _batch(ids: Tensor, lengths: Tensor, rows: Tensor) -> Tensor:
    """Ids of the sentences ``rows``, as wide as the longest of them."""
    return ids[on_device(rows, ids.device), : int(lengths[rows].max())]


def bucketed(lengths: Tensor, order: Tensor, batch_size: int, generator: torch.Generator) -> list[Tensor]:
    """Batches of indices, all tensors on the CPU.

    Args:
        lengths: of all sentences.
        order: in which they come, before they are sorted.
    """
    batches: list[Tensor] = []
    for pool in order.split(POOL * batch_size):
        batches += pool[lengths[pool].argsort(stable=True)].split(batch_size)
    return [batches[i] for i in torch.randperm(len(batches), generator=generator)]


class BucketedEpoch:
    """Batches of one epoch by number."""

    def __init__(self, data: Tokens, batch_size: int, position: Position, share: Share = WHOLE) -> None:
        self.data, self.share = data, share
        order = epoch_order(data.train_lengths, position)
        self.batches = bucketed(data.train_lengths, order, batch_size, position._replace(step=0).generator(1))

    def batch(self, step: int) -> tuple[Tensor, ...]:
        """Batch ``step``: ids int64 (batch, tokens) with `PADDING`, and labels int64 (batch,) as from `targets_of`."""
        rows, labels = self.batches[step], self.data.train_labels
        ids = _batch(self.data.train_ids, self.data.train_lengths, rows[places_of(self.share, len(rows))])
        return ids, *targets_of(self.share, labels[on_device(rows, labels.device)])

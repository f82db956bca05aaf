"""Running text: as it was read, and as the tokens of a network in windows of equal length, in which tokens are predicted.

Training windows follow each other through the text without a gap: of ``n`` tokens ``(n - 1) // length`` windows, whose last token is the
first of the next one; a rest is left out. An epoch takes them in random order, which depends on (seed, stage, epoch) only.

Test windows move on by half their length. The first asks for all of its tokens, every other for those that no window before it asked for.
So each token but the very first is asked once, and has at least half a window before it, but for those of the first window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...errors import UserError
from ..ranks import WHOLE, Share
from .batches import Position, WholeBatches, batch_count, epoch_order, places_of, targets_of
from .kinds import LANGUAGE, Kind
from .scoring import IGNORED

__all__ = ["Prose", "Windows", "packed", "strided"]

EXAMPLE = 16  # tokens
EVALUATED = 4096  # tokens of an evaluation batch: logits are words times as many


@dataclass(frozen=True)
class Prose:
    """The text of both parts, before a network's tokenizer has seen it."""

    name: str
    train_text: str
    test_text: str
    note: str = ""
    kind: Kind = LANGUAGE

    def windows(self, tokenize: Callable[[str], list[int]], length: int, test_tokens: int | None = None) -> Windows:
        """What a network is trained on.

        Args:
            length: tokens of a window.
            test_tokens: only so many from the beginning of the test text.

        Raises:
            UserError: the training text has fewer tokens than one window, or the test text fewer than 2.
        """
        train, test = (torch.tensor(tokenize(text), dtype=torch.int64) for text in (self.train_text, self.test_text))
        if len(train) <= length:
            raise UserError(f"--max-tokens must be less than the {len(train):,} tokens of the training text, got {length:,}")
        test = test[:test_tokens]
        if len(test) < 2:
            raise UserError(f"the test text of --data {self.name} must have 2 tokens or more, got {len(test)}")
        return Windows(self.name, *packed(train, length), *strided(test, length), self.note)


def packed(ids: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Windows (n, length) of int64 tokens, and for every token the next one."""
    n = (len(ids) - 1) // length
    return ids[: n * length].view(n, length), ids[1 : n * length + 1].view(n, length)


def strided(ids: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Windows (n, length) that overlap by half, the last one as much as it must, and for every token the next one or `IGNORED`. A text
    that is shorter is one window."""
    answers = len(ids) - 1
    length = min(length, answers)
    starts = [*range(0, answers - length, max(length // 2, 1)), answers - length]
    inputs = torch.stack([ids[s : s + length] for s in starts])
    labels = torch.stack([ids[s + 1 : s + 1 + length] for s in starts])
    asked = 0
    for start, row in zip(starts, labels, strict=True):
        row[: asked - start] = IGNORED
        asked = start + length
    return inputs, labels


@dataclass(frozen=True)
class Windows(WholeBatches):
    """Tokens and labels int64 (windows, tokens) of both parts. The other attributes mean what they mean in `dataset.Dataset`; 0 classes:
    they are the words of the network."""

    name: str
    train_ids: Tensor
    train_labels: Tensor
    test_ids: Tensor
    test_labels: Tensor
    note: str = ""
    kind: Kind = LANGUAGE
    channels: None = None
    classes: int = 0

    def example(self) -> Tensor:
        """The first tokens of two windows."""
        rows = self.train_ids if len(self.train_ids) > 1 else self.train_ids.repeat(2, 1)
        return rows[:2, :EXAMPLE]

    def epoch(self, batch_size: int, position: Position, share: Share = WHOLE) -> _Epoch:
        """Batches of an epoch, or a part of each."""
        return _Epoch(self, batch_size, position, share)

    def test_batches(self, share: Share = WHOLE) -> Iterator[tuple[Tensor, Tensor]]:
        """All test windows in order, or some of their batches."""
        rows = max(1, EVALUATED // self.test_ids.shape[1])
        return share.every(zip(self.test_ids.split(rows), self.test_labels.split(rows), strict=True))

    def first(self, count: int) -> Windows:
        """Only the first training windows."""
        return replace(self, train_ids=self.train_ids[:count], train_labels=self.train_labels[:count])

    def held_out(self, count: int) -> Windows:
        """The last ``count`` training windows in place of the test part: neighbours would know each other's words."""
        kept = self.first(len(self.train_ids) - count)
        return replace(kept, test_ids=self.train_ids[-count:], test_labels=self.train_labels[-count:])

    def to(self, device: torch.device) -> Windows:
        """Copy with all tensors on ``device``."""
        moved: dict[str, Any] = {name: x.to(device) for name, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **moved)


class _Epoch:
    """Batches of one epoch by number."""

    def __init__(self, data: Windows, batch_size: int, position: Position, share: Share) -> None:
        self.data, self.batch_size, self.share = data, batch_size, share
        self.order = epoch_order(data.train_labels, position)

    def batch(self, step: int) -> tuple[Tensor, ...]:
        """Batch ``step``: tokens int64 (batch, tokens), and labels int64 of that shape as from `targets_of`."""
        if not 0 <= step < batch_count(len(self.order), self.batch_size):
            raise IndexError(f"step must be one of the epoch, got {step}")
        chosen = self.order[step * self.batch_size : (step + 1) * self.batch_size]
        own = places_of(self.share, len(chosen))
        return self.data.train_ids[chosen[own]], *targets_of(self.share, self.data.train_labels[chosen])

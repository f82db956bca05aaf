"""What a logger is told of a run, a point after every epoch and the scores of the networks; and TensorBoard's files, in the run folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ...engine.report import Report
from ...errors import UserError
from ...optimizer import FastBiP

__all__ = ["NO_EVENTS", "EventFiles", "Events"]

TRAINING = ("loss", "accuracy", "lr", "mask_changes")  # of an epoch


class Events:
    """Tells nobody. ``done`` counts batches over all stages of a run."""

    def begin(self, done: int) -> None:
        """The run starts, or goes on, after so many batches."""

    def epoch(self, done: int, row: Mapping[str, float], report: Callable[[], Report], optimizer: torch.optim.Optimizer) -> None:
        """An epoch has ended; ``row`` is what its history has."""

    def score(self, done: int, part: str, score: Mapping[str, float]) -> None:
        """A network was measured on a part of the data."""

    def close(self) -> None:
        """The run is over, or has stopped."""


NO_EVENTS = Events()


class EventFiles(Events):
    """Event files of TensorBoard. A run that goes on begins another one, which says that what the others have of later batches is void.

    Args:
        folder: where they are.

    Raises:
        UserError: tensorboard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError("--log tensorboard needs tensorboard: pip install tensorboard") from error
        self._make: Callable[..., Any] = SummaryWriter
        self._folder = folder
        self._writer: Any = None

    def begin(self, done: int) -> None:
        self._writer = self._make(str(self._folder), purge_step=done + 1)

    def epoch(self, done: int, row: Mapping[str, float], report: Callable[[], Report], optimizer: torch.optim.Optimizer) -> None:
        values = {f"train/{name}": row[name] for name in TRAINING} | {"train/sparsity": report().sparsity}
        metrics = optimizer.metrics() if isinstance(optimizer, FastBiP) else {}
        self._write(done, values | {f"pruning/{name}": value for name, value in metrics.items()})

    def score(self, done: int, part: str, score: Mapping[str, float]) -> None:
        self._write(done, {f"{part}/{name}": value for name, value in score.items()})

    def _write(self, done: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, done)
        self._writer.flush()  # a checkpoint may follow, which the run goes on from

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

"""The main job: one run of one method, from its settings to its report.

The stages of the method (`methods.stages`) follow each other in one training loop. Test images are looked at twice: after dense training,
if there is some, and at the end, for the report. Nothing is chosen by them.
"""

from __future__ import annotations

import copy
import functools
import platform
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch

import bip_fast

from ...engine.report import Report, layer_table
from ...errors import UserError, one_line
from ...optimizer import FastBiP
from ...state_dicts import load_into, read_state_dict, write_safetensors
from .. import ranks
from ..data.parts import AnyRead
from ..methods.begin import before_step, begin, dense_optimizer, moving, optimizer_of
from ..methods.stage import PRETRAIN, Stage, first_epoch
from ..methods.table import METHODS, stages
from ..models.heads import candidates
from ..models.names import build
from ..settings import Settings
from . import display
from .curves import curves
from .energy import Meter
from .events import NO_EVENTS, Events
from .folder import DamagedCheckpoint, RunFolder, of_the_machine, snapshot_name
from .processes import at_one_place, load_processes, processes_state, seed_process
from .signals import STOP_SIGNALS, Stop, stop_requests
from .training import Cursor, check_finite, evaluate, train
from .trial import check_model

__all__ = ["Job"]

SAVE_EVERY = 60.0  # seconds between checkpoints inside of an epoch


class _Enough(Exception):
    """All weights that the run was for are kept (``until``)."""


class Job:
    """One run: everything between its settings and its report.

    Args:
        settings: of the run.
        folder: that it writes to.
        data: as loaded; the run takes the part that its settings name.
        shown: tells a person how far it is.
        snapshots: epochs of dense training whose weights are kept in the folder, for other runs that rewind to them; 0: before the first.
        until: epoch of dense training to end after, if only the weights of ``snapshots`` are wanted.
        score_start: whether to look at the test images before pruning as well.
        alone: whether no other run of ours uses the device meanwhile, so that its energy counter measures this run alone.
        events: what a logger is told.
        start: sparsity that was asked of the network of ``settings.checkpoint``; None: as it is found.
        stop_on: signals at which `run` saves and stops.
    """

    def __init__(
        self,
        settings: Settings,
        folder: RunFolder,
        data: AnyRead,
        device: torch.device,
        shown: display.Display,
        *,
        snapshots: Collection[int] = (),
        until: int | None = None,
        score_start: bool = True,
        alone: bool = True,
        events: Events = NO_EVENTS,
        start: float | None = None,
        stop_on: Sequence[int] = STOP_SIGNALS,
    ) -> None:
        self.settings, self.folder, self.device, self.shown = settings, folder, device, shown
        self.score_start, self.stop_on, self.asked, self.events = score_start, stop_on, start, events
        self.data = settings.part_of(data).to(device)
        torch.manual_seed(settings.seed)
        try:
            model = build(settings.model, self.data.channels, self.data.classes, settings.width)
        except (RuntimeError, MemoryError) as error:
            raise UserError(f"cannot build --model {settings.model}: {one_line(error, 160)}") from error
        model = model.to(getattr(torch, settings.dtype)) if settings.dtype != "float32" else model
        unused = check_model(model, settings, self.data)
        seed_process(settings.seed)
        self.model = model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        # Ranks come together here, before any of them writes: until then they may look at the folder on their own.
        self.network = ranks.replicated(self.model, torch.zeros_like(self.data.example(), device=device), unused=unused)
        self.counts = [ranks.count()]  # of processes, one after another
        self.steps = self.data.steps(settings.batch_size)
        self.stages: tuple[Stage, ...] = ()
        self.at = 0  # number of the stage
        self.cursor = Cursor()
        # Of finished stages; ``start`` is the sparsity of the network that the run began with.
        self.done: dict[str, Any] = {"start": {}, "history": {}, "seconds": {}, "image_passes": {}, "joules": {}, "scores": {}}
        self.optimizer = dense_optimizer(self.model, settings)
        self.snapshots, self.until = set(snapshots), until
        self.decisions: list[dict[str, Any]] = []
        self.meter = Meter(device, counts=alone and ranks.count() == 1)
        self.saved = time.monotonic()
        self.signals: list[int] = []
        self.say_once = functools.cache(shown.say)  # every stage may have the same to say

    @property
    def stage(self) -> Stage:
        return self.stages[self.at]

    def run(self) -> dict[str, Any]:
        """Go from where the job stands to its end; returns the content of report.json, or nothing if it ends earlier (``until``).

        Raises:
            Stop: a signal came; the checkpoint holds the state after the last batch.
        """
        try:
            return self._run()
        except _Enough:
            return {}

    def _run(self) -> dict[str, Any]:
        total, done = self.steps * sum(self._epochs(stage) for stage in self.stages), at_one_place(self._batches_done())
        with stop_requests(self.stop_on) as self.signals, self.shown:
            self.shown.begin(total, done)
            self.events.begin(done)
            if not self.at and not self.cursor.epoch and not self.cursor.step:
                self._keep(0)
            while True:
                with moving(self.stage, self.optimizer):
                    self._train()
                self._end_stage()
                if self.at + 1 == len(self.stages):
                    return self._finish()
                self._begin_stage(self.at + 1)
                self._save()

    def start(self) -> None:
        """Load the weights that the settings name, if any.

        Raises:
            UserError: they cannot be read or do not fit the model, or leave nothing to do.
        """
        source = self.settings.checkpoint
        if source:
            load_into(self.model, read_state_dict(Path(source)), Path(source))
        if self.settings.rewind_checkpoint:
            self._rewind(check_only=True)
        start = self.asked if self.asked is not None else self._report().sparsity if source else 0.0
        self.done["start"] = {"sparsity": start}
        self._plan(start)
        if self.stage.name != PRETRAIN:
            self._begin_stage(0)

    def _plan(self, start: float) -> None:
        self.stages = stages(self.settings, start)
        if len(self.stages) == 1 and METHODS[self.settings.method].in_rounds:
            raise UserError(f"--checkpoint has {100 * start:.4g} % zeros already, and --sparsity asks for {self.settings.sparsity:g}")
        if any(stage.rewind for stage in self.stages) and not self.settings.rewind_checkpoint:
            self.snapshots.add(first_epoch(self.settings))

    def resume(self) -> None:
        """Take up the state of the checkpoint, or start if the run did not get that far.

        Raises:
            DamagedCheckpoint: the checkpoint cannot be read, or does not fit the model or this version.
            UserError: another run has the folder.
        """
        self.folder.lock()
        self.folder.remove_leftovers()
        state = self.folder.load_checkpoint()
        if state is None:
            self.start()
            return
        try:
            load_into(self.model, state["model"], self.folder.path / "checkpoint.pt")
            self.done = {name: dict(state["done"][name]) for name in self.done}
            self._plan(float(self.done["start"]["sparsity"]))
            self.at = [stage.name for stage in self.stages].index(state["stage"])
            self.optimizer = optimizer_of(self.stage, self.model, self.settings, self.data)
            self.optimizer.load_state_dict(state["optimizer"])
            self.cursor = Cursor.from_state(state["cursor"], self.device)
            if not (0 <= self.cursor.epoch <= self.stage.recipe.epochs and 0 <= self.cursor.step < self.steps):
                raise ValueError(f"epoch {self.cursor.epoch}, batch {self.cursor.step} are not in this run")
            self.counts = load_processes(state, self.device, self.settings.seed, self.stage.name, self.cursor.epoch, self.cursor.step)
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError, UserError) as error:
            if of_the_machine(error):
                raise
            message = " ".join(f"{type(error).__name__}: {error}".split())
            raise DamagedCheckpoint(self.folder.path / "checkpoint.pt", f"does not fit this version ({message})") from error

    def _epochs(self, stage: Stage) -> int:
        return stage.recipe.epochs - stage.recipe.first_epoch

    def _batches_done(self) -> int:
        before = sum(self._epochs(stage) for stage in self.stages[: self.at])
        return (before + self.cursor.epoch - self.stage.recipe.first_epoch) * self.steps + self.cursor.step

    def _train(self) -> None:
        train(
            self.model,
            self.optimizer,
            self.data,
            self.stage.recipe,
            self.cursor,
            self._after_step,
            before_step=before_step(self.stage, self.optimizer),
            network=self.network,
            amp=self.settings.amp,
            say=self.say_once,
        )
        ranks.broadcast_(self.model.buffers())

    def _begin_stage(self, number: int) -> None:
        self.at = number
        self.cursor = Cursor(epoch=self.stage.recipe.first_epoch)
        began = time.perf_counter()
        self.optimizer = begin(self.stage, self.model, self.settings, self.data, self._rewind)
        self.cursor.seconds = time.perf_counter() - began
        if isinstance(self.optimizer, FastBiP):
            for line in self.optimizer.report().decision_lines():
                self.say_once(line)

    def _rewind(self, *, check_only: bool = False) -> None:
        """Load the weights that the run goes back to."""
        given = self.settings.rewind_checkpoint
        source = Path(given) if given else self.folder.path / snapshot_name(first_epoch(self.settings))
        model = copy.deepcopy(self.model) if check_only else self.model
        load_into(model, read_state_dict(source), source)

    def _keep(self, epoch: int) -> None:
        """Keep the weights of an epoch of dense training, if a rewind will go back to them."""
        if self.stage.name != PRETRAIN:
            return
        if epoch in self.snapshots:
            self.folder.write(snapshot_name(epoch), lambda path: write_safetensors(path, self.model))
        if epoch == self.until:
            raise _Enough

    def _after_step(self, cursor: Cursor) -> None:
        show = self.shown.wants() or (cursor.epoch == self.stage.recipe.epochs and not cursor.step)
        save = bool(self.signals) or not cursor.step or time.monotonic() - self.saved > SAVE_EVERY
        show, save = map(bool, ranks.all_reduce_max(show, save))  # by the clock of any rank
        if not show and not save:
            return
        with cursor.aside():
            unread = self._show(cursor) if show else None
            if not cursor.step:
                self.events.epoch(self._batches_done(), cursor.history[-1], self._report, self.optimizer)
                self._keep(cursor.epoch)
            lost, stop = ranks.all_reduce_max(unread is not None, *self.signals[:1] or [0])  # one may have come while it told
            if save or lost or stop:
                self._save()
            if unread or stop:
                raise unread or Stop(stop)

    def _show(self, cursor: Cursor) -> BrokenPipeError | None:
        """Tell how far the run is. Returns the error of a pipe that nobody reads any more, to be raised once the state is saved."""
        loss, accuracy = cursor.running()
        epochs = self.stage.recipe.epochs
        epoch = f"{min(cursor.epoch + 1, epochs)}/{epochs}"
        try:
            self.shown.update(self.stage.name, epoch, self._batches_done(), loss, accuracy, self._report().sparsity)
        except BrokenPipeError as error:
            return error
        return None

    def _save(self) -> None:
        self.meter.add(self.done["joules"], self.stage.name)
        self.folder.save_checkpoint({
            "stage": self.stage.name,
            "cursor": self.cursor.state_dict(),
            "done": self.done,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            **processes_state(self.device, self.counts),
        })  # fmt: skip
        ranks.broadcast_object(None)  # torchrun would end rank 0, which is writing, as soon as another rank has stopped
        self.saved = time.monotonic()

    def _report(self) -> Report:
        return layer_table(candidates(self.model))

    def _score(self, name: str) -> None:
        score = evaluate(self.model, self.data)
        check_finite(score.loss, self._part)
        self.done["scores"][name] = {"accuracy": score.accuracy, "loss": score.loss}
        self.events.score(self._batches_done(), self._part, self.done["scores"][name])

    def _say_score(self, name: str) -> None:
        """Called after everything is written, because the reader of the progress may be gone."""
        score = self.done["scores"][name]
        self.shown.say(f"{name}: {self.data.kind.told(score['accuracy'], score['loss'], self._part)}")

    def _end_stage(self) -> None:
        stage = self.stage
        self.meter.add(self.done["joules"], self.stage.name)
        self.done["history"][stage.name] = self.cursor.history
        self.done["seconds"][stage.name] = self.cursor.seconds
        passes = self._epochs(stage) * self.data.seen(self.settings.batch_size)
        self.done["image_passes"][stage.name] = passes + stage.criterion.images(self.settings, self.data)
        if stage.name == PRETRAIN:
            score = self.score_start and bool(stage.recipe.epochs or self.settings.checkpoint)  # else nothing was trained
            if score:
                self._score("dense")
            if stage.recipe.epochs:
                self.folder.write("dense.safetensors", lambda path: write_safetensors(path, self.model))
            if score:
                self._say_score("dense")
        if isinstance(self.optimizer, FastBiP):
            self.decisions = [row.as_dict() for row in self.optimizer.report().decisions]
            self.optimizer.finalize()

    @property
    def _part(self) -> str:
        return "validation" if self.settings.validate else "test"

    def _finish(self) -> dict[str, Any]:
        self._score("pruned")
        self.folder.write("model.safetensors", lambda path: write_safetensors(path, self.model))
        result = {
            "data": self.settings.data,
            "note": self.data.note,
            "model": self.settings.model,
            "method": self.settings.method,
            "evaluated_on": self._part,
            "images": {"train": len(self.data.train_labels), self._part: len(self.data.test_labels)},
            **self.done["scores"],
            **self._report().as_dict(),
            "decisions": self.decisions,
            "image_passes": self.done["image_passes"],
            "seconds": self.done["seconds"],
            "joules": self.done["joules"],
            "history": self.done["history"],
            "settings": self.settings.as_dict(),
            "versions": {"bip_fast": bip_fast.__version__, "torch": torch.__version__, "python": platform.python_version()},
            "processes": self.counts,
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        }
        self.folder.write("curves.png", lambda path: curves(result, path))
        self.folder.write_json("report.json", result)
        self._say_score("pruned")
        return result

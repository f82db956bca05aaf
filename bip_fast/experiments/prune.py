"""The main job: train a network, prune it with BiP, measure both, leave a run folder.

Two stages, `pretrain` (plain SGD; skipped with a checkpoint) and `prune` (`FastBiP`), both run by `train.train`. Test images are
looked at twice: at the end of each stage, for the report. Nothing is chosen by them.
"""

from __future__ import annotations

import copy
import functools
import platform
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import bip_fast

from ..report import report, weights
from . import ExperimentError, display, resnet
from .data import Dataset, batch_count, hold_out
from .run import RunFolder, Stop, load_into, read_state_dict, stop_requests, write_safetensors
from .settings import Settings
from .train import Cursor, Recipe, evaluate, train

__all__ = ["Job", "pruner", "recipes"]

STAGES = ("pretrain", "prune")
VALIDATION = 0.2  # share of the training images that --validate holds out
SAVE_EVERY = 60.0  # seconds between checkpoints inside of an epoch


def recipes(settings: Settings) -> dict[str, Recipe]:
    """Both stages; no epochs of dense training when it starts from a checkpoint."""
    epochs = 0 if settings.checkpoint else settings.pretrain_epochs
    dense = Recipe("pretrain", epochs, settings.batch_size, settings.seed, settings.pretrain_lr)
    sparse = Recipe(
        "prune", settings.epochs, settings.batch_size, settings.seed, settings.lr, mask_lr=settings.mask_lr, freeze=settings.freeze
    )
    return {"pretrain": dense, "prune": sparse}


def dense_optimizer(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), settings.pretrain_lr, settings.momentum, weight_decay=settings.weight_decay)


def pruner(model: nn.Module, settings: Settings, data: Dataset) -> bip_fast.FastBiP:
    """FastBiP over all Conv and Linear weights of ``model``. Filters that can only be removed together are learned together."""
    coupled: list[list[str]] = []
    if settings.pattern == "filter":
        from ..export.coupling import coupled_filters

        coupled = coupled_filters(model, data.train_images[:2].float())
    return bip_fast.FastBiP(
        model,
        sparsity=settings.sparsity,
        pattern=settings.pattern,
        scope=settings.scope,
        coupled=coupled,
        lr=settings.lr,
        mask_lr=settings.mask_lr,
        gamma=settings.gamma,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        levels=settings.levels,
    )


def _check(model: nn.Module, settings: Settings, data: Dataset) -> None:
    """Raises ExperimentError unless ``model`` makes logits of two images of the data set, learns, and can be pruned and saved.

    All on a copy, so that a long training does not end in an error that could have been seen before it.
    """
    name, shape = settings.model, (2, *data.train_images.shape[1:])
    try:
        with torch.no_grad():
            logits = model.eval()(torch.zeros(shape))
    except Exception as error:  # the user's code may raise anything
        message = " ".join(str(error).split())
        raise ExperimentError(f"--model {name} failed on images of shape {shape}: {type(error).__name__}: {message}") from error
    expected = (2, data.classes)
    if not isinstance(logits, torch.Tensor) or logits.shape != expected:
        found = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise ExperimentError(f"--model {name} must give logits of shape {expected} for images of shape {shape}, got {found}")
    if not weights(model):
        raise ExperimentError(f"--model {name} has no Conv or Linear layer to prune")
    try:
        trial = copy.deepcopy(model).train()
        optimizer = pruner(trial, settings, data)
        trial(torch.zeros(shape)).sum().backward()
        optimizer.step()
        if not all(isinstance(x, torch.Tensor) for x in trial.state_dict().values()):
            raise TypeError("its state_dict() holds more than tensors")
    except Exception as error:  # the user's code may raise anything
        message = " ".join(str(error).split())
        raise ExperimentError(f"--model {name} cannot be trained and pruned: {type(error).__name__}: {message}") from error


class Job:
    """One run of `bip-fast prune`: everything between its settings and its report."""

    def __init__(self, settings: Settings, folder: RunFolder, data: Dataset, device: torch.device, shown: display.Display) -> None:
        self.settings, self.folder, self.device, self.shown = settings, folder, device, shown
        self.data = (hold_out(data, VALIDATION) if settings.validate else data).to(device)
        torch.manual_seed(settings.seed)
        try:
            model = resnet.build(settings.model, data.channels, data.classes, settings.width)
        except (RuntimeError, MemoryError) as error:
            raise ExperimentError(f"cannot build --model {settings.model}: {' '.join(str(error).split())[:160]}") from error
        _check(model, settings, data)
        torch.manual_seed(settings.seed)
        self.model = model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.recipes = recipes(settings)
        self.steps = batch_count(self.data, settings.batch_size)
        self.stage = STAGES[0]
        self.cursor = Cursor()
        self.done: dict[str, Any] = {"history": {}, "seconds": {}, "scores": {}}  # of finished stages
        self.optimizer = dense_optimizer(self.model, settings)
        self.sparsity = 0.0
        self.saved = time.monotonic()
        self.signals: list[int] = []
        self.say_once = functools.cache(shown.say)  # both stages may have the same to say

    def run(self) -> dict[str, Any]:
        """Go from where the job stands to its end; returns the content of report.json.

        Raises:
            Stop: a signal came; the checkpoint holds the state after the last batch.
        """
        total = self.steps * sum(recipe.epochs for recipe in self.recipes.values())
        with stop_requests() as self.signals, self.shown:
            self.shown.begin(total, self._batches_done())
            if self.stage == "pretrain":
                self._train()
                self._end_stage("dense")
                self.folder.write("dense.safetensors", lambda path: write_safetensors(path, self.model))
                self._begin_pruning()
                self._save()
            self._train()
            self._end_stage("pruned")
            return self._finish()

    def start(self) -> None:
        """Load the dense weights that the settings name, if any.

        Raises:
            ExperimentError: they cannot be read or do not fit the model.
        """
        if self.settings.checkpoint:
            load_into(self.model, read_state_dict(Path(self.settings.checkpoint)), Path(self.settings.checkpoint))

    def resume(self) -> None:
        """Take up the state of the checkpoint, or start if the run did not get that far.

        Raises:
            ExperimentError: the checkpoint is damaged or does not fit the model.
        """
        self.folder.lock()
        self.folder.remove_leftovers()
        state = self.folder.load_checkpoint()
        if state is None:
            self.start()
            return
        try:
            load_into(self.model, state["model"], self.folder.path / "checkpoint.pt")
            if state["stage"] == "prune":
                self._begin_pruning()
            self.optimizer.load_state_dict(state["optimizer"])
            self.cursor = Cursor.from_state(state["cursor"], self.device)
            if not (0 <= self.cursor.epoch <= self.recipes[self.stage].epochs and 0 <= self.cursor.step < self.steps):
                raise ValueError(f"epoch {self.cursor.epoch}, batch {self.cursor.step} are not in this run")
            self.done = {name: dict(state["done"][name]) for name in self.done}
            torch.set_rng_state(state["rng"])
            if self.device.type == "cuda" and state["cuda_rng"] is not None:
                torch.cuda.set_rng_state(state["cuda_rng"], self.device)
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
            message = " ".join(f"{type(error).__name__}: {error}".split())
            raise ExperimentError(
                f"{self.folder.path / 'checkpoint.pt'} does not fit this version; --overwrite starts again ({message})"
            ) from error

    def _batches_done(self) -> int:
        before = sum(self.recipes[stage].epochs for stage in STAGES[: STAGES.index(self.stage)])
        return (before + self.cursor.epoch) * self.steps + self.cursor.step

    def _train(self) -> None:
        recipe, amp = self.recipes[self.stage], self.settings.amp
        train(self.model, self.optimizer, self.data, recipe, self.cursor, self._after_step, amp=amp, say=self.say_once)

    def _begin_pruning(self) -> None:
        self.stage, self.cursor = "prune", Cursor()
        self.optimizer = pruner(self.model, self.settings, self.data)
        for line in self.optimizer.report().decision_lines():
            self.shown.say(line)
        self.sparsity = report(self.model).sparsity

    def _after_step(self, cursor: Cursor) -> None:
        epochs = self.recipes[self.stage].epochs
        if self.shown.wants() or (cursor.epoch == epochs and not cursor.step):
            loss, accuracy = cursor.running()
            epoch = f"{min(cursor.epoch + 1, epochs)}/{epochs}"
            self.shown.update(self.stage, epoch, self._batches_done(), loss, accuracy, self.sparsity)
        if self.signals or not cursor.step or time.monotonic() - self.saved > SAVE_EVERY:
            self._save()
        if self.signals:
            raise Stop(self.signals[0])

    def _save(self) -> None:
        self.folder.save_checkpoint({
            "stage": self.stage,
            "cursor": self.cursor.state_dict(),
            "done": self.done,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        })  # fmt: skip
        self.saved = time.monotonic()

    def _end_stage(self, name: str) -> None:
        score = evaluate(self.model, self.data)
        self.done["scores"][name] = {"accuracy": score.accuracy, "loss": score.loss}
        self.done["history"][self.stage] = self.cursor.history
        self.done["seconds"][self.stage] = self.cursor.seconds
        self.shown.say(f"{name}: {100 * score.accuracy:.2f} % of the {self._part} images right")

    @property
    def _part(self) -> str:
        return "validation" if self.settings.validate else "test"

    def _finish(self) -> dict[str, Any]:
        from .curves import curves

        assert isinstance(self.optimizer, bip_fast.FastBiP)
        decisions = [row.as_dict() for row in self.optimizer.report().decisions]
        self.optimizer.finalize()
        self.folder.write("model.safetensors", lambda path: write_safetensors(path, self.model))
        passes = self.steps * self.settings.batch_size
        result = {
            "data": self.settings.data,
            "note": self.data.note,
            "model": self.settings.model,
            "evaluated_on": self._part,
            "images": {"train": len(self.data.train_labels), self._part: len(self.data.test_labels)},
            **self.done["scores"],
            **report(self.model).as_dict(),
            "decisions": decisions,
            "image_passes": {stage: recipe.epochs * passes for stage, recipe in self.recipes.items()},
            "seconds": self.done["seconds"],
            "history": self.done["history"],
            "settings": self.settings.as_dict(),
            "versions": {"bip_fast": bip_fast.__version__, "torch": torch.__version__, "python": platform.python_version()},
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        }
        self.folder.write("curves.png", lambda path: curves(result, path))
        self.folder.write_json("report.json", result)
        return result

"""What a run is told: options with their defaults for each data set, and what is checked before anything starts.

Defaults were chosen on a part of the training images (`--validate`), never on test images.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any

from ...engine.options import SCOPES
from ...engine.patterns import parse
from ...errors import UserError
from ..data.sets import DATA, VALIDATION_IMAGES
from ..methods.table import METHODS, STEPS, stages, used

__all__ = ["LEVELS", "PATHS", "PRESETS", "Settings"]

LEVELS = ("alternating", "joint")
# What scores start from: |theta|, as in the paper, or theta^2 / 2, which gradient descent on theta moves by -lr*theta*g, as upper steps
# move scores by -mask_lr*theta*g: learned and inherited parts of a score are then of one kind.
SCORE_STARTS = ("magnitude", "square")
_NONE = type(None)
_TYPES = {"str": (str,), "int": (int,), "float": (float, int), "bool": (bool,), "int | None": (int, _NONE), "str | None": (str, _NONE)}


@dataclass(frozen=True)
class Settings:
    """Everything that decides the result of a run; `config.json` holds exactly this."""

    data: str = "digits"
    train_images: int | None = None
    stride: int = 1
    model: str = "resnet20"
    width: int | None = None
    method: str = "bip"
    sparsity: float = 0.95
    pattern: str = "unstructured"
    scope: str = "global"
    levels: str = "alternating"
    pretrain_epochs: int = 30
    epochs: int = 40
    batch_size: int = 64
    pretrain_lr: float = 0.1
    lr: float = 0.05
    mask_lr: float = 1.0
    gamma: float = 1.0
    momentum: float = 0.9
    weight_decay: float = 5e-4
    pretrain_weight_decay: float = 5e-4
    mask_momentum: float = 0.0
    score_start: str = "magnitude"
    ramp: float = 0.0
    freeze: float = 1.0
    rewind: str | None = None
    per_round: float = 0.2
    seed: int = 0
    checkpoint: str | None = None
    rewind_checkpoint: str | None = None
    validate: bool = False
    validation_images: int = VALIDATION_IMAGES
    amp: bool = False
    threads: int | None = None  # of the CPU, which order the sums; None: as many as torch takes

    @classmethod
    def of(cls, given: dict[str, Any]) -> Settings:
        """Settings from the options that were given; the preset of the data set fills in the others.

        Raises:
            UserError: a value is out of range.
        """
        data = given.get("data", cls.data)
        if not isinstance(data, str) or data not in DATA:
            raise UserError(f"--data must be one of {', '.join(DATA)}, got {data!r}")
        method = given.get("method", cls.method)
        if not isinstance(method, str) or method not in METHODS:
            raise UserError(f"--method must be one of {', '.join(METHODS)}, got {method!r}")
        try:
            sparsity = parse(given.get("pattern", cls.pattern)).sparsity
        except ValueError as error:
            raise UserError(f"--{error}") from error
        own = {} if sparsity is None else {"sparsity": sparsity}
        preset = PRESETS[data]
        decay = given.get("weight_decay", preset.get("weight_decay", cls.weight_decay))  # not that of a method that has its own
        values = {**preset, "pretrain_weight_decay": decay, **METHODS[method].defaults, **own, **given}
        for field in fields(cls):
            if field.type == "float" and type(values.get(field.name)) is int:
                values[field.name] = float(str(values[field.name]))  # 1 and 1.0 are one setting; inf for what is too large
        settings = cls(**values)
        settings.check()
        return settings

    def check(self) -> None:
        """Raises UserError for the first value out of range."""
        for field in fields(self):
            value, allowed = getattr(self, field.name), _TYPES[str(field.type)]
            if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
                raise UserError(f"{option(field.name)} must be {' or '.join(kind.__name__ for kind in allowed)}, got {value!r}")
        self._check_names()
        self._check_numbers()
        self._check_method()

    def _check_names(self) -> None:
        if self.checkpoint == "":
            raise UserError("--checkpoint must name a file, got an empty name")
        if self.method == "dense" and self.pattern != Settings.pattern:
            raise UserError(f"--pattern must be {Settings.pattern} with --method dense, which prunes nothing, got {self.pattern}")
        if self.scope not in SCOPES:
            raise UserError(f"--scope must be one of {', '.join(SCOPES)}, got {self.scope!r}")
        if self.levels not in LEVELS:
            raise UserError(f"--levels must be one of {', '.join(LEVELS)}, got {self.levels!r}")
        if self.score_start not in SCORE_STARTS:
            raise UserError(f"--score-start must be one of {', '.join(SCORE_STARTS)}, got {self.score_start!r}")
        if self.rewind not in (None, "init", "lr") and not re.fullmatch("0|[1-9][0-9]*", self.rewind):
            raise UserError(f"--rewind must be init, lr or a number of epochs, got {self.rewind!r}")

    def _check_method(self) -> None:
        method = METHODS[self.method]
        if self.method == "dense" and self.sparsity:
            raise UserError(f"--sparsity must be 0 with --method dense, which prunes nothing, got {self.sparsity:g}")
        if self.checkpoint and not method.needs_dense:
            raise UserError(f"--method {self.method} starts from random weights: leave --checkpoint out")
        rewinds = self.rewind not in (None, "lr")
        if rewinds and self.checkpoint and not self.rewind_checkpoint:
            raise UserError(f"--rewind {self.rewind} with --checkpoint needs --rewind-checkpoint, the weights to go back to")
        if self.rewind_checkpoint and not (rewinds and self.checkpoint):
            raise UserError("--rewind-checkpoint needs --checkpoint, and --rewind init or a number of epochs")
        if method.in_rounds and not self.sparsity:
            raise UserError(f"--sparsity must be more than 0 with --method {self.method}, got 0")
        if method.any_sparsity and parse(self.pattern).sparsity is not None:
            raise UserError(f"--method {self.method} prunes in rounds, and --pattern {self.pattern} has one sparsity only")
        if rewinds and self.rewind != "init":
            epoch, end = int(str(self.rewind)), self.pretrain_epochs
            trained = min([end, *(stage.recipe.epochs for stage in stages(self) if stage.rewind)])
            if epoch >= trained and epoch != end:
                raise UserError(f"--rewind must be an epoch before the last of {trained}, or {end}, the trained network, got {epoch}")

    def _check_numbers(self) -> None:
        if self.seed >= 2**63:
            raise UserError(f"--seed must be less than 2**63, got {self.seed}")
        if not 0 <= self.sparsity < 1:
            hint = f" (write {self.sparsity / 100:g} for {self.sparsity:g} %)" if 1 < self.sparsity < 100 else ""
            raise UserError(f"--sparsity must be in [0, 1), got {self.sparsity:g}{hint}")
        own = parse(self.pattern).sparsity
        if own is not None and self.sparsity != own:
            raise UserError(f"--sparsity must be {own:g} with --pattern {self.pattern}, got {self.sparsity:g}")
        least_epochs = 0 if self.method == "dense" else 1
        leasts = {"pretrain_epochs": 0, "epochs": least_epochs, "batch_size": 2, "seed": 0, "width": 1, "train_images": 1, "stride": 1}
        leasts |= {"validation_images": 1, "threads": 1}
        for name, least in leasts.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"{option(name)} must be at least {least}, got {value}")
        for name in ("pretrain_lr", "lr", "mask_lr", "weight_decay", "pretrain_weight_decay"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise UserError(f"{option(name)} must be 0 or more, got {value:g}")
        if not (math.isfinite(self.gamma) and self.gamma > 0):
            raise UserError(f"--gamma must be more than 0, got {self.gamma:g}")
        for name in ("momentum", "mask_momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{option(name)} must be in [0, 1), got {getattr(self, name):g}")
        for name in ("freeze", "ramp"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{option(name)} must be in [0, 1], got {getattr(self, name):g}")
        if not 0 < self.per_round < 1:
            raise UserError(f"--per-round must be in (0, 1), got {self.per_round:g}")

    @property
    def folder_name(self) -> str:
        """Name of the default run folder: what a person tells runs apart by."""
        model, pattern = ("".join(c if c.isalnum() else "-" for c in name) for name in (self.model, self.pattern))
        kind = "" if self.pattern == "unstructured" else f"-{pattern}"
        method = "" if self.method == "bip" else f"-{self.method}"
        return f"{self.data}-{model}{method}-{100 * self.sparsity:g}{kind}-seed{self.seed}"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def unused(settings: Settings, names: Iterable[str]) -> str | None:
    """The first of the settings ``names`` that has no meaning for a run; None if all have one."""
    meaningless = {*STEPS} - used(settings) | (set() if METHODS[settings.method].in_rounds else {"per_round"})
    return next((name for name in names if name in meaningless), None)


def option(field: str) -> str:
    """Option of the command line that sets a field."""
    return "--" + field.replace("_", "-")


# What differs from the defaults above, for each data set. CIFAR: the schedule of the paper, whose 100 epochs of BiP take two batches,
# a lower and an upper one, in each iteration; here an epoch is one pass over the images, so they are 200.
_PAPER = {"pretrain_epochs": 200, "epochs": 200, "batch_size": 128, "pretrain_lr": 0.1}
PRESETS: dict[str, dict[str, Any]] = {
    "digits": {},
    "fashion-mnist": {"pretrain_epochs": 20, "epochs": 20, "batch_size": 128},
    "cifar10": _PAPER,
    "cifar100": _PAPER,
    "tiny-imagenet": _PAPER,
    "imagenet": {"model": "resnet50", "pretrain_epochs": 90, "epochs": 90, "batch_size": 256, "pretrain_lr": 0.1, "weight_decay": 1e-4},
}
FIELDS = tuple(field.name for field in fields(Settings))
PATHS = ("checkpoint", "rewind_checkpoint")  # that say where something is, not what

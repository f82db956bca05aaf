"""From the options that were given to the settings of a run: presets fill in the others, and what a method asks for is checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import ValidationError

from ...engine.patterns import parse
from ...errors import UserError
from ..data.kinds import IMAGES, LANGUAGE, TEXT
from ..data.sources import source_of
from ..methods.stage import STEPS
from ..methods.table import METHODS, stages, used
from ..settings import Settings, described, user_error

__all__ = ["changed", "preset_of", "resolve", "unused"]

# Where a rule moves the weights for which the settings of a data set were not chosen.
_OF_RULES = {
    "sgd": {name: getattr(Settings, name) for name in ("lr", "pretrain_lr", "weight_decay")},
    "adamw": {"lr": 1e-3, "pretrain_lr": 1e-3, "weight_decay": 0.01},
}


def resolve(given: dict[str, Any]) -> Settings:
    """Settings from the options that were given; the data set's preset and the method fill in the others.

    Raises:
        UserError: there is no such option, or a value is out of range.
    """
    data, method = given.get("data", Settings.data), given.get("method", Settings.method)
    source_of(data)
    if not isinstance(method, str) or method not in METHODS:
        raise UserError(f"--method must be one of {', '.join(METHODS)}, got {method!r}")
    try:
        sparsity = parse(given.get("pattern", Settings.pattern)).sparsity
    except ValueError as error:
        raise UserError(f"--{error}") from error
    own = {} if sparsity is None else {"sparsity": sparsity}
    values = {**preset_of(data, method, given), **own, **given}
    for name, info in described().items():
        if info.annotation is float and type(values.get(name)) is int:
            values[name] = float(str(values[name]))  # 1 and 1.0 are one setting; inf for what is too large
    try:
        settings = Settings(**values)
    except ValidationError as error:
        raise user_error(error) from error
    _check(settings)
    return settings


def preset_of(data: str, method: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """What a data set and a method fill in beside what is ``given``."""
    preset = dict(source_of(data).preset)
    own = preset.get("optimizer", Settings.optimizer)
    if (rule := given.get("optimizer", own)) != own:
        preset |= _OF_RULES.get(str(rule), {})  # step sizes of another rule are of no use
    decay = given.get("weight_decay", preset.get("weight_decay", Settings.weight_decay))  # not that of a method that has its own
    steps = METHODS[method].defaults_with(str(rule))
    if rule == own == "adamw":  # fine-tuning knows its step size
        steps = {name: value for name, value in steps.items() if name != "lr"}
    return {**preset, "pretrain_weight_decay": decay, **steps}


def changed(settings: Settings, **values: Any) -> Settings:
    """The same settings but for some; UserError as from `resolve`."""
    try:
        settings = dataclasses.replace(settings, **values)
    except ValidationError as error:
        raise user_error(error) from error
    _check(settings)
    return settings


def _check(settings: Settings) -> None:
    """UserError for values that do not go together, or not with the method."""
    method, sparsity, dense = METHODS[settings.method], parse(settings.pattern).sparsity, settings.method == "dense"
    if dense and settings.pattern != Settings.pattern:
        raise UserError(f"--pattern must be {Settings.pattern} with --method dense, which prunes nothing, got {settings.pattern}")
    if sparsity is not None and settings.sparsity != sparsity:
        raise UserError(f"--sparsity must be {sparsity:g} with --pattern {settings.pattern}, got {settings.sparsity:g}")
    if dense and settings.sparsity:
        raise UserError(f"--sparsity must be 0 with --method dense, which prunes nothing, got {settings.sparsity:g}")
    least = 0 if dense or method.one_shot else 1
    if settings.epochs < least:
        raise UserError(f"--epochs must be at least {least}, got {settings.epochs}")
    if settings.checkpoint and not method.needs_dense:
        raise UserError(f"--method {settings.method} starts from random weights: leave --checkpoint out")
    if method.in_rounds and not settings.sparsity:
        raise UserError(f"--sparsity must be more than 0 with --method {settings.method}, got 0")
    kind = source_of(settings.data).kind
    if settings.dtype != Settings.dtype and kind is IMAGES:
        raise UserError(f"--dtype is for transformers, got --data {settings.data}; --amp is for images")
    if method.images_only and kind is not IMAGES:
        raise UserError(f"--method {settings.method} is for images, got --data {settings.data}")
    if settings.head_lr and kind is IMAGES:
        raise UserError(f"--head-lr is for transformers, got --data {settings.data}")
    if settings.ramp and settings.ramp_start >= settings.ramp:
        raise UserError(f"--ramp-start must be less than --ramp, {settings.ramp:g}, got {settings.ramp_start:g}")
    if method.any_sparsity and sparsity is not None:
        raise UserError(f"--method {settings.method} prunes in rounds, and --pattern {settings.pattern} has one sparsity only")
    if method.blockwise:
        _check_blockwise(settings)
    _check_rewind(settings)
    if settings.freeze and any(stage.moves == "scores" and not stage.recipe.epochs for stage in stages(settings)):
        share = f"--freeze {settings.freeze:g} of --epochs {settings.epochs}"
        raise UserError(f"--epochs must leave --method {settings.method} at least one for its scores, got none with {share}")


def _check_blockwise(settings: Settings) -> None:
    if source_of(settings.data).kind is not LANGUAGE:
        raise UserError(f"--method {settings.method} is for running text, such as --data text:FILE, got --data {settings.data}")
    if settings.scope != "layer":
        raise UserError(f"--scope must be layer with --method {settings.method}, got {settings.scope}")
    if parse(settings.pattern).kind not in ("unstructured", "N:M"):
        raise UserError(f"--pattern must be unstructured or N:M with --method {settings.method}, got {settings.pattern}")


def _check_rewind(settings: Settings) -> None:
    rewinds = settings.rewind not in (None, "lr")
    if rewinds and settings.checkpoint and not settings.rewind_checkpoint:
        raise UserError(f"--rewind {settings.rewind} with --checkpoint needs --rewind-checkpoint, the weights to go back to")
    if settings.rewind_checkpoint and not (rewinds and settings.checkpoint):
        raise UserError("--rewind-checkpoint needs --checkpoint, and --rewind init or a number of epochs")
    if rewinds and settings.rewind != "init":
        epoch, end = int(str(settings.rewind)), settings.pretrain_epochs
        trained = min([end, *(stage.recipe.epochs for stage in stages(settings) if stage.rewind)])
        if epoch >= trained and epoch != end:
            raise UserError(f"--rewind must be an epoch before the last of {trained}, or {end}, the trained network, got {epoch}")


def unused(settings: Settings, names: Iterable[str]) -> str | None:
    """The first of the settings ``names`` that has no meaning for a run; None if all have one."""
    meaningless = {*STEPS} - used(settings) | (set() if METHODS[settings.method].in_rounds else {"per_round"})
    if "lr" in meaningless and settings.weight_decay != settings.pretrain_weight_decay:  # all its training is as dense training
        meaningless.add("weight_decay")
    meaningless |= {"momentum"} if settings.optimizer == "adamw" else {"beta1", "beta2", "eps"}
    of_kinds = {IMAGES: {"max_tokens", "test_tokens", "dtype", "calibration"}, TEXT: {"test_tokens", "calibration"}}
    meaningless |= of_kinds.get(source_of(settings.data).kind, set())
    meaningless |= set() if METHODS[settings.method].blockwise else {"calibration"}
    return next((name for name in names if name in meaningless), None)

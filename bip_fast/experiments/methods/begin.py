"""The beginning of a stage: weights rewound, masks chosen, and the optimizer that trains what the stage moves."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from ...engine.layers import weights
from ...optimizer import FastBiP
from ...schedule import CURVES
from ..data.sets import AnyData, Position
from ..runs.settings import Settings
from . import criteria as scores
from .table import Stage, pretraining

__all__ = ["before_step", "begin", "dense_optimizer", "moving", "pruner", "scored_images"]

UPDATES = 100  # of the masks while the sparsity grows by magnitude
GRASP_IMAGES = 10  # of every class, as in its paper


def dense_optimizer(model: nn.Module, settings: Settings, stage: Stage | None = None) -> torch.optim.Optimizer:
    """SGD over all of ``model``, for ``stage`` or for dense training."""
    recipe = (pretraining(settings) if stage is None else stage).recipe
    return torch.optim.SGD(model.parameters(), recipe.lr, settings.momentum, weight_decay=recipe.weight_decay)


def pruner(model: nn.Module, settings: Settings, data: AnyData, stage: Stage | None = None) -> FastBiP:
    """FastBiP over all Conv and Linear weights of ``model``. Filters that can only be removed together are learned together."""
    coupled: list[list[str]] = []
    if settings.pattern == "filter":
        from ...export.coupling import coupled_filters

        coupled = coupled_filters(model, data.example())
    sparsity = settings.sparsity if stage is None or stage.sparsity is None else stage.sparsity
    moves = settings.levels if stage is None else stage.moves
    return FastBiP(
        model,
        sparsity=sparsity,
        pattern=settings.pattern,
        scope=settings.scope,
        coupled=coupled,
        lr=settings.lr,
        mask_lr=settings.mask_lr,
        mask_momentum=settings.mask_momentum,
        gamma=math.inf if moves == "scores" else settings.gamma,  # weights that stay have no implicit gradient
        momentum=settings.momentum,
        weight_decay=settings.weight_decay if stage is None else stage.recipe.weight_decay,
        levels="joint" if moves == "joint" else "alternating",
    )


def optimizer_of(stage: Stage, model: nn.Module, settings: Settings, data: AnyData) -> torch.optim.Optimizer:
    """The optimizer of a stage, with the masks that `FastBiP` starts from."""
    return dense_optimizer(model, settings, stage) if stage.sparsity is None else pruner(model, settings, data, stage)


def begin(
    stage: Stage, model: nn.Module, settings: Settings, data: AnyData, rewind: Callable[[], None] = lambda: None
) -> torch.optim.Optimizer:
    """Weights, masks and optimizer as ``stage`` starts with them.

    Args:
        model: changed in place.
        rewind: loads the weights of a stage that rewinds.
    """
    chosen = None if stage.sparsity is None else _criterion(stage, model, settings, data)
    if stage.rewind:
        rewind()
    optimizer = optimizer_of(stage, model, settings, data)
    if not isinstance(optimizer, FastBiP):
        return optimizer
    if stage.ramp > 0:
        _set_sparsity(optimizer, 0.0)
    # The scores of BiP are a relaxed mask and stay what FastBiP makes of the magnitudes; all others are an order, or Hydra's start.
    learned = stage.moves != "weights" and stage.criterion == "magnitude"
    if learned and settings.score_start == "square" and chosen is not None:
        squares = {name: (x * x / 2).clamp(max=1) for name, x in chosen.items()}
        optimizer.set_scores(_by_parameter(optimizer, model, squares))
    else:
        optimizer.set_scores({} if learned or chosen is None else _by_parameter(optimizer, model, chosen))
    if stage.moves == "weights" and not stage.follow_magnitude:
        optimizer.freeze_masks()
    return optimizer


def _criterion(stage: Stage, model: nn.Module, settings: Settings, data: AnyData) -> scores.Scores:
    """Scores of every Conv and Linear weight by the criterion of the stage."""
    if stage.criterion == "magnitude":
        return scores.magnitude(model)
    if stage.criterion == "layer":
        return scores.layer_magnitude(model)
    position = Position(settings.seed, "scores", 0)
    if stage.criterion == "random":
        return scores.random(model, position.generator(0))
    if stage.criterion == "synflow":
        return scores.synflow(model, data.shape, float(stage.sparsity or 0.0), _selector(stage, model, settings, data))
    epoch = data.epoch(settings.batch_size, position)
    batches = [epoch.batch(i) for i in range(_score_batches(stage, settings, data))]
    return scores.snip(model, batches) if stage.criterion == "snip" else scores.grasp(model, batches)


def _selector(stage: Stage, model: nn.Module, settings: Settings, data: AnyData) -> scores.Select:
    """Masks as the stage chooses them, under its pattern, scope and budgets, without touching ``model``."""
    twin = copy.deepcopy(model)
    optimizer = pruner(twin, settings, data, stage)
    pruned = set(optimizer.pruned_params)

    def select(chosen: scores.Scores, sparsity: float) -> dict[str, Tensor]:
        _set_sparsity(optimizer, sparsity)
        optimizer.set_scores(_by_parameter(optimizer, twin, chosen))
        return {name: optimizer.mask_of(p) for name, p in weights(twin) if p in pruned}

    return select


def _score_batches(stage: Stage, settings: Settings, data: AnyData) -> int:
    if stage.criterion != "grasp":
        return int(stage.criterion == "snip")
    available = max(1, len(data.train_labels) // settings.batch_size)
    return min(available, math.ceil(GRASP_IMAGES * data.classes / settings.batch_size))


def scored_images(stage: Stage, settings: Settings, data: AnyData) -> int:
    """Forward and backward passes that the criterion of a stage takes, in images."""
    images = _score_batches(stage, settings, data) * min(settings.batch_size, len(data.train_labels))
    # GraSP: one backward for g, one with a graph and one through it for H g.
    return {"snip": images, "grasp": 3 * images, "synflow": scores.ROUNDS}.get(stage.criterion, 0)


def _by_parameter(optimizer: FastBiP, model: nn.Module, chosen: scores.Scores) -> dict[Tensor, Tensor]:
    pruned = set(optimizer.pruned_params)
    return scores.to_unit_interval({x: chosen[name] for name, x in weights(model) if x in pruned})


def _set_sparsity(optimizer: FastBiP, sparsity: float) -> None:
    for group in optimizer.param_groups:
        if group["prune"] and group["sparsity"] is not None:
            group["sparsity"] = sparsity


def moving(stage: Stage, optimizer: torch.optim.Optimizer) -> AbstractContextManager[None]:
    """Inside, steps of ``optimizer`` move what the stage moves."""
    if isinstance(optimizer, FastBiP) and stage.moves == "scores":
        return optimizer.upper()
    if isinstance(optimizer, FastBiP) and stage.follow_magnitude:
        return optimizer.lower()
    return nullcontext()


def before_step(stage: Stage, optimizer: torch.optim.Optimizer) -> Callable[[int, int], None]:
    """What happens before every step of a stage: nothing, or the sparsity grows. A function of the position alone, so that a resumed run
    goes on with the same bits."""
    if not isinstance(optimizer, FastBiP) or not stage.ramp or stage.sparsity is None:
        return lambda done, total: None
    end = stage.sparsity

    def grow(done: int, total: int) -> None:
        length = min(round(stage.ramp * stage.recipe.freeze * total), total - 1)
        if done > length:
            return
        last = done == length
        _set_sparsity(optimizer, end if last else end * (1 - CURVES["cubic"](done / length)))
        if stage.follow_magnitude and (last or done % max(1, length // UPDATES) == 0):
            optimizer.set_scores(scores.to_unit_interval({p: optimizer.weight_of(p).abs() for p in optimizer.pruned_params}))
        elif last:
            optimizer.set_scores({})  # now: there may be no upper step any more

    return grow

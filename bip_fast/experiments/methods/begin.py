"""How a stage begins: weights are rewound, masks chosen, and the optimizer is made that trains what the stage moves."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ...engine.layers import weights
from ...export.coupling import coupled_filters
from ...optimizer import FastBiP
from ...schedule import CURVES
from ..data.parts import AnyData
from ..models.heads import head_of, stays_dense
from ..ranks import broadcast_
from ..settings import Settings
from .criteria import MAGNITUDE, Scored, Scores, Select, to_unit_interval
from .stage import Stage, pretraining

__all__ = ["before_step", "begin", "dense_optimizer", "moving", "optimizer_of", "pruner"]

UPDATES = 100  # of the masks while the sparsity grows by magnitude


def dense_optimizer(model: nn.Module, settings: Settings, stage: Stage | None = None) -> torch.optim.Optimizer:
    """The plain rule over all of ``model``, for ``stage`` or for dense training."""
    recipe = (pretraining(settings) if stage is None else stage).recipe
    head = set(head_of(model).values())
    parts = [[p for p in model.parameters() if (p in head) == inside and (p.requires_grad or not head)] for inside in (False, True)]
    groups = [{"params": part} for part in parts if part]
    if settings.optimizer == "adamw":
        betas = (settings.beta1, settings.beta2)
        return torch.optim.AdamW(groups, recipe.lr, betas, settings.eps, weight_decay=recipe.weight_decay)
    return torch.optim.SGD(groups, recipe.lr, settings.momentum, weight_decay=recipe.weight_decay)


def pruner(model: nn.Module, settings: Settings, data: AnyData, stage: Stage | None = None) -> FastBiP:
    """FastBiP over all matrices of ``model`` that compete. Filters that can only be removed together are learned together."""
    coupled: list[list[str]] = []
    if settings.pattern == "filter":
        coupled = coupled_filters(model, data.example())
    sparsity = settings.sparsity if stage is None or stage.sparsity is None else stage.sparsity
    moves = settings.levels if stage is None else stage.moves
    rule: dict[str, Any] = {"momentum": settings.momentum}
    if settings.optimizer == "adamw":
        rule = {"betas": (settings.beta1, settings.beta2), "eps": settings.eps}
    optimizer = FastBiP(
        model,
        optimizer=settings.optimizer,
        exclude=stays_dense(model),
        overrides={name: {"lr": settings.head_lr or settings.lr} for name in head_of(model)},  # a group of its own
        sparsity=sparsity,
        pattern=settings.pattern,
        scope=settings.scope,
        coupled=coupled,
        lr=settings.lr,
        mask_lr=settings.mask_lr,
        mask_momentum=settings.mask_momentum,
        gamma=math.inf if moves == "scores" else settings.gamma,  # weights that stay have no implicit gradient
        weight_decay=settings.weight_decay if stage is None else stage.recipe.weight_decay,
        levels="joint" if moves == "joint" else "alternating",
        **rule,
    )
    optimizer.bind()  # among several ranks it would wait, as somebody might shard the model
    return optimizer


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
    chosen = None if stage.sparsity is None else _scores(stage, model, settings, data)
    if chosen is not None:  # every rank has made its own, also of weights (`layerwise`), and not every device has the same bits twice
        broadcast_([*model.state_dict().values(), *chosen.values()])
    if stage.rewind:
        rewind()
    optimizer = optimizer_of(stage, model, settings, data)
    if not isinstance(optimizer, FastBiP):
        return optimizer
    if stage.ramp > 0:
        _set_sparsity(optimizer, 0.0)
    # The scores of BiP are a relaxed mask and stay what FastBiP makes of the magnitudes; all others are an order, or Hydra's start.
    learned = stage.moves != "weights" and stage.criterion is MAGNITUDE
    if learned and settings.score_start == "square" and chosen is not None:
        squares = {name: (x * x / 2).clamp(max=1) for name, x in chosen.items()}
        optimizer.set_scores(_by_parameter(optimizer, model, squares))
    else:
        optimizer.set_scores({} if learned or chosen is None else _by_parameter(optimizer, model, chosen))
    if stage.moves == "weights" and not stage.follow_magnitude:
        optimizer.freeze_masks()
    return optimizer


def _scores(stage: Stage, model: nn.Module, settings: Settings, data: AnyData) -> Scores:
    """What every weight that can be pruned is worth by the criterion of the stage."""
    of = Scored(model, settings, data, float(stage.sparsity or 0.0), _selector(stage, model, settings, data))
    return stage.criterion.scores(of)


def _selector(stage: Stage, model: nn.Module, settings: Settings, data: AnyData) -> Select:
    """Masks as the stage chooses them, under its pattern, scope and budgets, without touching ``model``."""

    @functools.cache
    def twin_and_optimizer() -> tuple[nn.Module, FastBiP]:
        twin = copy.deepcopy(model)
        return twin, pruner(twin, settings, data, stage)

    def select(chosen: Scores, sparsity: float) -> dict[str, Tensor]:
        twin, optimizer = twin_and_optimizer()
        pruned = set(optimizer.pruned_params)
        _set_sparsity(optimizer, sparsity)
        optimizer.set_scores(_by_parameter(optimizer, twin, chosen))
        return {name: optimizer.mask_of(p) for name, p in weights(twin) if p in pruned}

    return select


def _by_parameter(optimizer: FastBiP, model: nn.Module, chosen: Scores) -> dict[Tensor, Tensor]:
    pruned = set(optimizer.pruned_params)
    return to_unit_interval({x: chosen[name] for name, x in weights(model) if x in pruned})


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
        last, wait = done == length, min(round(stage.ramp_start * stage.recipe.freeze * total), length - 1)
        _set_sparsity(optimizer, end if last else end * (1 - CURVES["cubic"](max(done - wait, 0) / (length - wait))))
        if stage.follow_magnitude and (last or done % max(1, length // UPDATES) == 0):
            optimizer.set_scores(to_unit_interval({p: optimizer.weight_of(p).abs() for p in optimizer.pruned_params}))
        elif last:
            optimizer.set_scores({})  # now: there may be no upper step any more

    return grow

"""What a method is made of: stages, each a stretch of training under one optimizer, and the recipes that most methods share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..settings import DECAYS, Settings
from .criteria import MAGNITUDE, Criterion

__all__ = ["PRETRAIN", "STEPS", "Method", "Recipe", "Stage", "as_dense", "first_epoch", "pretraining", "recipe", "retraining"]

PRETRAIN = "pretrain"
# Settings of the steps, for which a method may have no use.
STEPS = ("levels", "lr", "mask_lr", "mask_momentum", "gamma", "score_start", "ramp", "ramp_start", "freeze", "rewind")


@dataclass(frozen=True)
class Recipe:
    """One stage of a run.

    Args:
        stage: its name; enters the random order of the images.
        lr, mask_lr: step sizes before they decay, for weights and scores.
        head_lr: that of a transformer's head; 0: as ``lr``.
        warmup: share of the stage in which all of them grow from 0.
        decays: their factor at a share of the way from there to the end.
        clip: largest norm of all gradients together; 0: they are not clipped.
        freeze: share of the stage after which the masks stay as they are; 0 is one-shot magnitude pruning with fine-tuning.
        first_epoch: of the schedule, that a rewound stage starts with.
        weight_decay: of the optimizer that it is trained with.
    """

    stage: str
    epochs: int
    batch_size: int
    seed: int
    lr: float
    mask_lr: float = 0.0
    freeze: float = 1.0
    first_epoch: int = 0
    weight_decay: float = 0.0
    head_lr: float = 0.0
    warmup: float = 0.0
    decays: Callable[[float], float] = DECAYS["cosine"]
    clip: float = 0.0


@dataclass(frozen=True)
class Stage:
    """One stretch of training under one optimizer.

    Args:
        recipe: epochs, batches and step sizes.
        sparsity: of the masks; None: dense, trained by the plain rule.
        moves: what its steps move. "weights" under masks that stay; "scores" under weights that stay; "alternating" or "joint": both.
        criterion: that chooses the masks at the beginning, from the weights before a rewind.
        rewind: go back to the weights that the run has kept (`first_epoch`), with their norms and biases.
        ramp: share of the time until masks freeze after which the sparsity has grown from 0, along the cubic curve of gradual magnitude
            pruning; 0: it is there from the first step.
        ramp_start: share of that time after which it begins to grow.
        follow_magnitude: while it grows, masks are chosen by magnitude again and again.
    """

    recipe: Recipe
    sparsity: float | None = None
    moves: str = "weights"
    criterion: Criterion = MAGNITUDE
    rewind: bool = False
    ramp: float = 0.0
    ramp_start: float = 0.0
    follow_magnitude: bool = False

    @property
    def name(self) -> str:
        return self.recipe.stage


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Args:
        what: it does, in one line.
        cost: in epochs of forward and backward passes: D of dense training (``pretrain_epochs``), E of its own (``epochs``).
        source: the paper.
        needs_dense: whether it starts from a trained dense network.
        plan: its stages after dense training.
        defaults: settings that differ from those of BiP, with SGD below.
        adamw: those with AdamW below.
        uses: settings of its steps (`STEPS`) that can have a meaning for it; `used` says which have.
        in_rounds: whether it trains in rounds, each from the network that the one before leaves.
        any_sparsity: whether it takes more sparsities than one on its way, which N:M has not.
        images_only: whether it cannot look at text.
        one_shot: whether it may end where it has pruned, without an epoch.
        blockwise: whether it prunes decoders block after block, every matrix by the same share, single weights or N:M.
    """

    what: str
    cost: str
    source: str
    needs_dense: bool
    plan: Callable[[Settings, float], tuple[Stage, ...]]
    defaults: dict[str, Any] = field(default_factory=dict)
    uses: tuple[str, ...] = ()
    in_rounds: bool = False
    any_sparsity: bool = False
    images_only: bool = False
    one_shot: bool = False
    blockwise: bool = False
    adamw: dict[str, Any] = field(default_factory=dict)

    def defaults_with(self, optimizer: str) -> dict[str, Any]:
        """Settings that differ from those of BiP."""
        return self.adamw if optimizer == "adamw" else self.defaults


# --- recipes ---------------------------------------------------------------------------------------------------------------------------


def first_epoch(settings: Settings) -> int:
    """Epoch of dense training whose weights a rewind goes back to; 0 is the initialisation."""
    return 0 if settings.rewind in (None, "init", "lr") else int(settings.rewind)


def recipe(settings: Settings, stage: str, **changed: Any) -> Recipe:
    same = ("epochs", "batch_size", "seed", "lr", "weight_decay", "head_lr", "warmup", "decays", "clip")
    return Recipe(stage, **{**{name: getattr(settings, name) for name in same}, **changed})


def as_dense(settings: Settings, stage: str, **changed: Any) -> Recipe:
    """With the step size and weight decay of dense training."""
    return recipe(settings, stage, **{"lr": settings.pretrain_lr, "weight_decay": settings.pretrain_weight_decay, **changed})


def pretraining(settings: Settings) -> Stage:
    """Dense training; no epochs of it when the run starts from a checkpoint."""
    return Stage(as_dense(settings, PRETRAIN, epochs=0 if settings.checkpoint else settings.pretrain_epochs))


def retraining(settings: Settings, stage: str, sparsity: float, epochs: int) -> Stage:
    """Masks by magnitude, then weights as ``settings.rewind`` says: those of an earlier epoch, or as they are under the schedule of dense
    training ("lr") or under that of fine-tuning (None). The schedule goes on from that epoch; after the last one it starts over."""
    if settings.rewind is None:
        return Stage(recipe(settings, stage, epochs=epochs), sparsity)
    first = first_epoch(settings)
    own = as_dense(settings, stage, epochs=epochs, first_epoch=first if first < settings.pretrain_epochs else 0)
    return Stage(own, sparsity, rewind=settings.rewind != "lr")

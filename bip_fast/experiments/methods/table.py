"""Every way to prune that can be compared, each as the stages that one training loop runs: the table is `METHODS`.

A stage starts from the weights as they are or rewinds them, chooses masks by a criterion of `scores.py` or keeps none, and then trains
weights, scores or both. All masks are exact top-k selections by the same engine, under the same pattern, scope and budget, so methods
differ in what they score and when, and in nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ...tables import escaped
from ..runs.training import Recipe

if TYPE_CHECKING:
    from ..runs.settings import Settings

__all__ = ["METHODS", "Method", "Stage", "first_epoch", "pretraining", "rounds", "stages", "steps_of", "table", "used"]

PRETRAIN = "pretrain"
STEPS = ("levels", "lr", "mask_lr", "mask_momentum", "gamma", "score_start", "ramp", "freeze", "rewind")


@dataclass(frozen=True)
class Stage:
    """One stretch of training under one optimizer.

    Args:
        recipe: epochs, batches and step sizes.
        sparsity: of the masks; None: dense, trained by plain SGD.
        moves: what its steps move. "weights" under masks that stay; "scores" under weights that stay; "alternating" or "joint": both.
        criterion: that chooses the masks at the beginning, from the weights before a rewind.
        rewind: go back to the weights that the run has kept (`first_epoch`), with their norms and biases.
        ramp: share of the time until masks freeze in which the sparsity grows from 0, along the cubic curve of gradual magnitude pruning.
        follow_magnitude: while it grows, masks are chosen by magnitude again and again.
    """

    recipe: Recipe
    sparsity: float | None = None
    moves: str = "weights"
    criterion: str = "magnitude"
    rewind: bool = False
    ramp: float = 0.0
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
        defaults: settings that differ from those of BiP.
        uses: settings of its steps (`STEPS`) that can have a meaning for it; `used` says which have.
        in_rounds: whether it trains in rounds, each from the network that the one before leaves.
        any_sparsity: whether it takes more sparsities than one on its way, which N:M has not.
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


def rounds(start: float, end: float, share: float) -> list[float]:
    """Sparsities of iterative pruning from ``start`` to ``end``, each of which removes ``share`` of what is left; the last one less.

    All but the last depend on ``start`` and ``share`` only, so that runs to several ends have them in common. They are rounded as people
    write them, 0.790285 for 1 - 0.8**7; an ``end`` that is written with fewer digits takes no round for the rest.
    """
    found: list[float] = []
    while start < end and (not found or found[-1] < end):
        left = (1 - start) * (1 - share) ** (len(found) + 1)
        found.append(end if left < 1.001 * (1 - end) else round(1 - left, max(6, 3 - math.floor(math.log10(left)))))
    return found


def first_epoch(settings: Settings) -> int:
    """Epoch of dense training whose weights a rewind goes back to; 0 is the initialisation."""
    return 0 if settings.rewind in (None, "init", "lr") else int(settings.rewind)


def _recipe(settings: Settings, stage: str, **changed: Any) -> Recipe:
    given = {"epochs": settings.epochs, "batch_size": settings.batch_size, "seed": settings.seed, "lr": settings.lr}
    return Recipe(stage, **{**given, "weight_decay": settings.weight_decay, **changed})


def _as_dense(settings: Settings, stage: str, **changed: Any) -> Recipe:
    """With the step size and weight decay of dense training."""
    return _recipe(settings, stage, **{"lr": settings.pretrain_lr, "weight_decay": settings.pretrain_weight_decay, **changed})


def pretraining(settings: Settings) -> Stage:
    """Dense training; no epochs of it when the run starts from a checkpoint."""
    return Stage(_as_dense(settings, PRETRAIN, epochs=0 if settings.checkpoint else settings.pretrain_epochs))


def _retraining(settings: Settings, stage: str, sparsity: float, epochs: int) -> Stage:
    """Masks by magnitude, then weights as ``settings.rewind`` says: those of an earlier epoch, or as they are under the schedule of dense
    training ("lr") or under that of fine-tuning (None). The schedule goes on from that epoch; after the last one it starts over."""
    if settings.rewind is None:
        return Stage(_recipe(settings, stage, epochs=epochs), sparsity)
    first = first_epoch(settings)
    recipe = _as_dense(settings, stage, epochs=epochs, first_epoch=first if first < settings.pretrain_epochs else 0)
    return Stage(recipe, sparsity, rewind=settings.rewind != "lr")


def _dense(settings: Settings, start: float) -> tuple[Stage, ...]:
    return (Stage(_recipe(settings, "more")),) if settings.epochs else ()


def _bip(settings: Settings, start: float) -> tuple[Stage, ...]:
    recipe = _recipe(settings, "prune", mask_lr=settings.mask_lr, freeze=settings.freeze)
    learned = Stage(recipe, settings.sparsity, settings.levels, ramp=settings.ramp)
    if settings.rewind is None:
        return (learned,)
    return learned, _retraining(settings, "retrain", settings.sparsity, settings.pretrain_epochs)


def _hydra(settings: Settings, start: float) -> tuple[Stage, ...]:
    epochs = round(settings.freeze * settings.epochs)
    recipe = _recipe(settings, "scores", epochs=epochs, mask_lr=settings.mask_lr)
    scores = Stage(recipe, settings.sparsity, "scores", "layer")
    return scores, Stage(_recipe(settings, "finetune", epochs=settings.epochs - epochs), settings.sparsity)


def _one_shot(settings: Settings, start: float) -> tuple[Stage, ...]:
    return (_retraining(settings, "retrain", settings.sparsity, settings.epochs),)


def _iterative(settings: Settings, start: float) -> tuple[Stage, ...]:
    sparsities = rounds(start, settings.sparsity, settings.per_round)
    return tuple(_retraining(settings, f"round {100 * sparsity:.4g} %", sparsity, settings.epochs) for sparsity in sparsities)


def _gradual(settings: Settings, start: float) -> tuple[Stage, ...]:
    return (Stage(_recipe(settings, "prune"), settings.sparsity, ramp=settings.ramp, follow_magnitude=True),)


def _at_init(criterion: str) -> Callable[[Settings, float], tuple[Stage, ...]]:
    def plan(settings: Settings, start: float) -> tuple[Stage, ...]:
        recipe = _as_dense(settings, "train", epochs=settings.pretrain_epochs + settings.epochs)
        return (Stage(recipe, settings.sparsity, criterion=criterion),)

    return plan


METHODS: dict[str, Method] = {
    "bip": Method(
        "learns weights and masks at two levels, from one backward pass (levels joint) or on separate batches (alternating)",
        "D + E",
        "Zhang et al. 2022, with the settings of this project (docs/paper.md)",
        True,
        _bip,
        {"levels": "joint", "lr": 0.2, "mask_lr": 1.6, "gamma": 1e30, "ramp": 0.5, "score_start": "square"},
        uses=STEPS,
    ),
    "bip-paper": Method(
        "the same with the settings of the paper: separate batches, the whole sparsity from the first step",
        "D + E",
        "Zhang et al. 2022, arXiv 2210.04092",
        True,
        _bip,
        {"lr": 0.01, "mask_lr": 0.1, "weight_decay": 1e-4},
        uses=STEPS,
    ),
    "hydra": Method(
        "learns scores, clipped to [0, 1], under the scope asked for, while the weights stay, for a share of E (freeze); then fine-tunes",
        "D + E",
        "Sehwag et al. 2020, arXiv 2002.10509",
        True,
        _hydra,
        {"freeze": 0.5, "mask_lr": 0.1, "mask_momentum": 0.9},
        uses=("lr", "mask_lr", "mask_momentum", "freeze"),
    ),
    "omp": Method(
        "one-shot magnitude pruning of the trained network, weights back to where they began (rewind), trained again",
        "D + E",
        "Frankle and Carbin 2019, arXiv 1803.03635; rewind: Frankle et al. 2020, arXiv 1912.05671",
        True,
        _one_shot,
        {"rewind": "init"},
        uses=("lr", "rewind"),
    ),
    "omp-finetune": Method(
        "one-shot magnitude pruning of the trained network, its weights fine-tuned under a restarted step size",
        "D + E",
        "Han et al. 2015, arXiv 1506.02626; restarted: Le and Hua 2021, arXiv 2105.03193",
        True,
        _one_shot,
        uses=("lr", "rewind"),
    ),
    "imp": Method(
        "iterative magnitude pruning: a share of the weights (per_round) goes, the rest rewinds and is trained for E, and again",
        "D + E for each round",
        "Frankle and Carbin 2019; rewind to an epoch: Frankle et al. 2020; of the step size: Renda et al. 2020, arXiv 2003.02389",
        True,
        _iterative,
        {"rewind": "init"},
        uses=("lr", "rewind"),
        in_rounds=True,
        any_sparsity=True,
    ),
    "gmp": Method(
        "gradual magnitude pruning: the sparsity grows along a cubic curve (ramp), masks are chosen anew on the way",
        "D + E",
        "Zhu and Gupta 2017, arXiv 1710.01878",
        True,
        _gradual,
        {"ramp": 0.5},
        uses=("lr", "ramp"),
    ),
    "snip": Method(
        "prunes random weights once by |theta * g| on a batch, then trains",
        "D + E",
        "Lee et al. 2019, arXiv 1810.02340",
        False,
        _at_init("snip"),
    ),
    "grasp": Method(
        "prunes random weights once by theta * (Hessian g), then trains",
        "D + E",
        "Wang et al. 2020, arXiv 2002.07376",
        False,
        _at_init("grasp"),
    ),
    "synflow": Method(
        "prunes random weights in 100 rounds by their share in the flow through the network, without data, then trains",
        "D + E",
        "Tanaka et al. 2020, arXiv 2006.05467",
        False,
        _at_init("synflow"),
        any_sparsity=True,
    ),
    "random": Method("prunes random weights at random, then trains", "D + E", "", False, _at_init("random")),
    "dense": Method("no pruning: trained on for as long", "D + E", "", True, _dense, {"sparsity": 0.0}, uses=("lr",)),
}


def stages(settings: Settings, start: float = 0.0) -> tuple[Stage, ...]:
    """All stages of a run, dense training first where there is some; ``start``: sparsity of the network it starts from."""
    method = METHODS[settings.method]
    own = method.plan(settings, start)
    return (pretraining(settings), *own) if method.needs_dense else own


def used(settings: Settings) -> set[str]:
    """Settings of the steps that have a meaning for a run."""
    uses = set(METHODS[settings.method].uses)
    if settings.rewind is not None and uses == {"lr", "rewind"}:  # all its training goes by the schedule of dense training
        uses.remove("lr")
    return uses


def steps_of(settings: Settings) -> dict[str, Any]:
    """Settings of the steps by name; None where they have no meaning for the run."""
    uses = used(settings)
    return {name: getattr(settings, name) if name in uses else None for name in STEPS}


def table() -> str:
    """Markdown: a line for each method."""
    lines = ["| method | what it does | cost | source |", "|---|---|---|---|"]
    lines += [f"| `{name}` | {escaped(method.what)} | {method.cost} | {method.source} |" for name, method in METHODS.items()]
    return "\n".join(lines)

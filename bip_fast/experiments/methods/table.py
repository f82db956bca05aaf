"""Every way to prune that can be compared: the table is `METHODS`.

A method is the stages that one training loop runs. A stage starts from the weights as they are or rewinds them, chooses masks by a
criterion or keeps none, and then trains weights, scores or both. All masks are exact top-k selections by the same engine, under the same
pattern, scope and budget, so methods differ in what they score and when, and in nothing else.
"""

from __future__ import annotations

from typing import Any

from ...tables import escaped
from ..settings import Settings
from . import at_start, bip, hydra, imp, layerwise, magnitude, movement
from .stage import STEPS, Method, Stage, pretraining, recipe

__all__ = ["METHODS", "stages", "steps_of", "table", "used"]


def _dense(settings: Settings, start: float) -> tuple[Stage, ...]:
    return (Stage(recipe(settings, "more")),) if settings.epochs else ()


METHODS: dict[str, Method] = {
    "bip": bip.BIP,
    "bip-paper": bip.PAPER,
    "hydra": hydra.HYDRA,
    "omp": magnitude.OMP,
    "omp-finetune": magnitude.OMP_FINETUNE,
    "imp": imp.IMP,
    "gmp": magnitude.GMP,
    "movement": movement.MOVEMENT,
    "wanda": layerwise.WANDA,
    "sparsegpt": layerwise.SPARSEGPT,
    "snip": at_start.SNIP,
    "grasp": at_start.GRASP,
    "synflow": at_start.SYNFLOW,
    "random": at_start.RANDOM,
    "dense": Method(
        "no pruning: trained on for as long", "D + E", "", True, _dense, {"sparsity": 0.0}, uses=("lr",), adamw={"sparsity": 0.0}
    ),
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

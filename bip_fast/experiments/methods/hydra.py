"""Hydra: scores are learned while the weights stay, then the weights are fine-tuned."""

from __future__ import annotations

import torch
from torch import nn

from ..settings import Settings
from .criteria import Criterion, Scores, magnitude
from .stage import Method, Stage, recipe

__all__ = ["HYDRA"]


def layer_magnitude(model: nn.Module) -> Scores:
    """|theta| as a share of the largest of its layer: what Hydra's scores start from, so that they are as large in every layer."""
    return {name: x / x.max().clamp(min=torch.finfo(x.dtype).tiny) for name, x in magnitude(model).items()}


LAYER = Criterion("layer", lambda of: layer_magnitude(of.model))


def _hydra(settings: Settings, start: float) -> tuple[Stage, ...]:
    epochs = round(settings.freeze * settings.epochs)
    own = recipe(settings, "scores", epochs=epochs, mask_lr=settings.mask_lr)
    scores = Stage(own, settings.sparsity, "scores", LAYER)
    return scores, Stage(recipe(settings, "finetune", epochs=settings.epochs - epochs), settings.sparsity)


HYDRA = Method(
    "learns scores, clipped to [0, 1], under the scope asked for, while the weights stay, for a share of E (freeze); then fine-tunes",
    "D + E",
    "Sehwag et al. 2020, arXiv 2002.10509",
    True,
    _hydra,
    {"freeze": 0.5, "mask_lr": 0.1, "mask_momentum": 0.9},
    uses=("lr", "mask_lr", "mask_momentum", "freeze"),
    adamw={"freeze": 0.5, "mask_lr": 10.0, "mask_momentum": 0.9},
)

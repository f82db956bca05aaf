"""Methods that prune a trained decoder at one moment, block after block, by what flows through it: Wanda and SparseGPT.

What they keep of the network is then fine-tuned under their masks; without epochs they are what their papers have, pruning alone. Every
matrix loses the same share. They look at windows of the training text (``calibration``), in two forward passes and no backward one.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from ...engine.patterns import parse
from ...errors import UserError
from ..data.parts import AnyData
from ..models.heads import candidates
from ..settings import Settings
from .criteria import Criterion, Scored, Scores
from .sparsegpt import sparsegpt_
from .stage import Method, Stage, recipe
from .wanda import wanda_

__all__ = ["SPARSEGPT", "WANDA"]


def _batches(settings: Settings, data: AnyData) -> int:
    return min(math.ceil(settings.calibration / settings.batch_size), data.steps(settings.batch_size))


def _criterion(name: str, prune: Callable[..., dict[str, Tensor]]) -> Criterion:
    def scores(of: Scored) -> Scores:
        inputs = [ids for ids, _ in of.batches(_batches(of.settings, of.data))]
        competing = candidates(of.model)
        masks = prune(of.model, inputs, of.sparsity, pattern=of.settings.pattern, only=[name for name, _ in competing])
        multiple = parse(of.settings.pattern).sizes[1]  # N:M leaves others dense
        missed = next((name for name, p in competing if name not in masks and p.shape[1] % multiple == 0), None)
        if missed is not None:
            raise UserError(
                f"--method {name} prunes the matrices of layers in blocks, and --model {of.settings.model} has {missed} as well"
            )
        return {name: mask.float() for name, mask in masks.items()}

    return Criterion(name, scores, lambda settings, data: _batches(settings, data) * min(settings.batch_size, len(data.train_labels)))


def _plan(criterion: Criterion) -> Callable[[Settings, float], tuple[Stage, ...]]:
    return lambda settings, start: (Stage(recipe(settings, "finetune"), settings.sparsity, criterion=criterion),)


def _method(what: str, source: str, criterion: Criterion) -> Method:
    own = {"scope": "layer"}
    return Method(what, "D + E", source, True, _plan(criterion), own, uses=("lr",), adamw=own, one_shot=True, blockwise=True)


WANDA = _method(
    "prunes a trained decoder block after block by |weight| times the norm of its input, within every row; then fine-tunes for E, or 0",
    "Sun et al. 2023, arXiv 2306.11695",
    _criterion("wanda", wanda_),
)

SPARSEGPT = _method(
    "prunes a trained decoder block after block by optimal brain surgery, which updates the weights that stay; then fine-tunes for E, or 0",
    "Frantar and Alistarh 2023, arXiv 2301.00774",
    _criterion("sparsegpt", sparsegpt_),
)

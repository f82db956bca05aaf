"""Wanda (Sun, Liu, Bair and Kolter 2023, arXiv 2306.11695): a weight is worth its size times the norm of what it is multiplied with.

    S_ij = |W_ij| * ||X_j||_2,  X_j: input j of the matrix over all calibration tokens          (eq. 1)

compared within every row, that is among the weights of one output: the lowest of a row go, or of every M inputs in it. The weights that
stay are as they were. No gradients; the order of blocks is that of `blockwise`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .blockwise import Rule, Share, counts, prune_blocks_, share_of

__all__ = ["wanda_", "wanda_mask"]


def wanda_mask(weight: Tensor, norms: Tensor, share: Share) -> Tensor:
    """Mask of one matrix, bool (outputs, inputs). Of equal scores the first go.

    Args:
        weight: (outputs, inputs).
        norms: of the inputs (inputs,), not negative.
    """
    scores = weight.abs() * norms
    rows, columns = scores.shape
    if share.n_of_m is not None:
        scores = scores.reshape(-1, share.n_of_m.of)
        go = torch.full((len(scores), 1), share.n_of_m.of - share.n_of_m.keep, device=scores.device)
    else:
        go = torch.tensor(counts([columns] * rows, share.sparsity), device=scores.device)[:, None]
    ranks = scores.argsort(dim=1, stable=True).argsort(dim=1)
    return (ranks >= go).reshape(rows, columns)


def wanda_(
    model: nn.Module,
    batches: Iterable[Any],
    sparsity: float | None = None,
    *,
    pattern: str = "unstructured",
    only: Collection[str] | None = None,
) -> dict[str, Tensor]:
    """Prune ``model`` in place: what goes is 0 afterwards. Arguments, masks and errors are those of `blockwise.prune_blocks_` and
    `blockwise.share_of`.

    Examples:
        >>> masks = wanda_(model, calibration, 0.5)
        >>> opt = FastBiP(model, sparsity=0.5, scope="layer", exclude="lm_head")  # to train on what is left
        >>> opt.set_scores({p: masks[name].float() for name, p in model.named_parameters() if name in masks})
        >>> opt.freeze_masks()
    """
    share = share_of(sparsity, pattern)

    def prune(weight: Tensor, squares: Tensor) -> tuple[Tensor, Tensor]:
        mask = wanda_mask(weight, squares.sqrt(), share)
        return weight * mask, mask

    rule = Rule(lambda x: x.square().sum(0), prune)
    return prune_blocks_(model, batches, rule, only, multiple=share.n_of_m.of if share.n_of_m else 1)

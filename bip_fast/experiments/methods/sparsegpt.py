"""SparseGPT (Frantar and Alistarh 2023, arXiv 2301.00774): weights go one column after another, and the columns behind make up for them.

    H = X X^T + damp * mean(diag(X X^T)) * I,  X: inputs of the matrix over all calibration tokens; U upper, U^T U = H^-1
    for every column j, from the first to the last (Algorithm 1):
        e = W_:j / U_jj where a weight goes, 0 where it stays;  W_:k -= e * U_jk for k >= j

which is the optimal brain surgeon's update with the columns before j fixed: ``U_jj^2`` is entry (j, j) of the inverse of H without its
first j rows and columns, and ``w_j^2 / U_jj^2`` the error that removing w_j makes. By that error masks are chosen, for `BLOCK` columns at a
time, or in N:M for M at a time. Updates of the columns behind a block are made once for the whole block.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .blockwise import Rule, Share, counts, prune_blocks_, share_of

__all__ = ["sparsegpt_", "sparsegpt_matrix"]

BLOCK = 128  # columns, and
DAMP = 0.01  # of the mean of the diagonal, as in the paper


def inverse_factor(gram: Tensor, damp: float) -> Tensor:
    """``U``, upper (inputs, inputs), of ``gram = X X^T``. An input that is always 0 counts as one that nothing correlates with.

    Raises:
        ValueError: ``damp`` is too small for this matrix.
    """
    h = gram.clone()
    diagonal = h.diagonal()
    dead = diagonal == 0
    diagonal.add_(damp * diagonal.mean())
    diagonal[dead] = 1
    lower, failed = torch.linalg.cholesky_ex(h)
    if not int(failed):
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    if int(failed):
        raise ValueError(f"damp must be large enough for H to be positive definite, got {damp}")
    return upper


def sparsegpt_matrix(weight: Tensor, gram: Tensor, share: Share, *, block: int = BLOCK, damp: float = DAMP) -> tuple[Tensor, Tensor]:
    """One matrix.

    Args:
        weight: float32 or float64 (outputs, inputs); overwritten.
        gram: ``X X^T`` in the same dtype (inputs, inputs), symmetric.
        share: N:M needs a number of inputs that is a multiple of M.
        block: columns that are chosen among, and updated, together.

    Returns:
        The updated matrix, 0 where the mask is False, and the mask, bool.

    Raises:
        ValueError: as from `inverse_factor`, or ``block`` is no multiple of M.
    """
    width = share.n_of_m.of if share.n_of_m else block
    if block % width:
        raise ValueError(f"block must be a multiple of {width} for {share.n_of_m}, got {block}")
    rows, columns = weight.shape
    upper = inverse_factor(gram, damp)
    weight[:, gram.diagonal() == 0] = 0
    mask = torch.ones_like(weight, dtype=torch.bool)
    firsts = range(0, columns, block)
    go = counts([rows * min(block, columns - first) for first in firsts], share.sparsity)
    for first, count in zip(firsts, go, strict=True):
        last = min(first + block, columns)
        errors = torch.zeros_like(weight[:, first:last])
        for j in range(first, last):
            if j % width == 0:
                end = min(j + width, last)
                loss = (weight[:, j:end] / upper.diagonal()[j:end]).square()
                mask[:, j:end] = _lowest_go(loss, share, count)
            e = torch.where(mask[:, j], 0.0, weight[:, j] / upper[j, j])
            weight[:, j:last] -= torch.outer(e, upper[j, j:last])
            errors[:, j - first] = e
        weight[:, last:] -= errors @ upper[first:last, last:]
    return weight.masked_fill_(~mask, 0), mask


def _lowest_go(loss: Tensor, share: Share, count: int) -> Tensor:
    """Mask of some columns: of every row all but N stay out, or ``count`` of all entries."""
    if share.n_of_m is not None:
        return loss.argsort(dim=1, stable=True).argsort(dim=1) >= share.n_of_m.of - share.n_of_m.keep
    mask = torch.ones(loss.numel(), dtype=torch.bool, device=loss.device)
    mask[loss.flatten().argsort(stable=True)[:count]] = False
    return mask.view_as(loss)


def sparsegpt_(
    model: nn.Module,
    batches: Iterable[Any],
    sparsity: float | None = None,
    *,
    pattern: str = "unstructured",
    only: Collection[str] | None = None,
    damp: float = DAMP,
) -> dict[str, Tensor]:
    """Prune ``model`` in place and update the weights that stay. Arguments, masks and errors are those of `blockwise.prune_blocks_`,
    `blockwise.share_of` and `inverse_factor`; `wanda.wanda_` shows how to train on what is left."""
    share = share_of(sparsity, pattern)
    rule = Rule(lambda x: x.T @ x, lambda weight, gram: sparsegpt_matrix(weight, gram, share, damp=damp))
    return prune_blocks_(model, batches, rule, only, multiple=share.n_of_m.of if share.n_of_m else 1)

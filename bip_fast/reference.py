"""BiP in plain torch, written to be read beside the paper. It is the oracle of every test.

There is one function for each formula, on flat tensors, out of place. In float32 the results equal those of the kernels bit for bit,
because every product and sum is a torch operation of its own and so rounds as in the kernels. In float64 they are the mathematics.

Symbols: ``theta`` dense weights, ``s`` scores in [0, 1], ``m`` boolean mask, ``z = m*theta``, ``g = dloss/dz``, ``v`` momentum of
``theta``, ``u`` momentum of ``s``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Blocks",
    "PAPER",
    "Hyper",
    "State",
    "Variant",
    "expand",
    "joint",
    "kept",
    "lower",
    "masked",
    "nm_mask",
    "start",
    "start_scores",
    "start_values",
    "topk_mask",
    "topk_of_sets",
    "unit_gradient",
    "unit_means",
    "unit_sums",
    "upper",
    "upper_units",
]


class Hyper(NamedTuple):
    """Hyper-parameters of both levels, with the defaults and the meaning they have in `FastBiP`. ``betas`` and ``eps`` are for AdamW."""

    lr: float = 1e-2
    mask_lr: float = 1e-1
    gamma: float = 1.0
    momentum: float = 0.9
    mask_momentum: float = 0.0
    weight_decay: float = 1e-4
    nesterov: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8


class Variant(NamedTuple):
    """An upper level that is not the paper's, to measure what the difference makes (docs/paper.md). The kernels have none of these.

    Attributes:
        implicit: "paper", ``-m*g^2/gamma``; "published", ``-1e-4*(theta*g)^2``, as in the authors' code; "none".
        shared: scores and weights share their storage, as in the authors' code: an upper step moves ``theta`` in place of ``s``, and then
            ``s = min(|theta|, 1)``. Has no joint step.
    """

    implicit: str = "paper"
    shared: bool = False


PAPER = Variant()


class State(NamedTuple):
    """The state of one selection group: flat tensors of the same length.

    Attributes:
        theta: dense weights.
        v: momentum of ``theta``; under AdamW the running mean of ``m*g``.
        s: scores in [0, 1].
        u: momentum of ``s``.
        m: the mask, bool.
        b: under AdamW the running mean of the square of ``m*g``.
        t: the number of steps that ``theta`` has taken.
    """

    theta: Tensor
    v: Tensor
    s: Tensor
    u: Tensor
    m: Tensor
    b: Tensor | None = None
    t: int = 0


class Blocks(NamedTuple):
    """Units of a tensor: its entries in memory order are a matrix ``rows x cols``, and a unit is a block of it.

    Units are numbered row by row; those at the far edges may be smaller.
    """

    rows: int
    cols: int
    block_rows: int
    block_cols: int

    @property
    def down(self) -> int:
        return -(-self.rows // self.block_rows) if self.rows else 0

    @property
    def across(self) -> int:
        return -(-self.cols // self.block_cols) if self.cols else 0

    @property
    def units(self) -> int:
        return self.down * self.across


def kept(n: int, sparsity: float) -> int:
    """Number of weights kept out of ``n`` at a ``sparsity`` in [0, 1)."""
    return n - round(sparsity * n)


def masked(m: Tensor, x: Tensor) -> Tensor:
    """``m*x`` with exact +0 where the mask is 0, whatever ``x`` holds there."""
    return torch.where(m, x, torch.zeros((), dtype=x.dtype, device=x.device))


def _best_first(scores: Tensor) -> Tensor:
    """Positions in ``scores.flatten()``, the largest first: equal scores by ``(i * 2654435761) mod 2**32``, lowest first."""
    flat = scores.flatten().double()  # every float32 is a double; the order is the same
    flat = torch.where(flat.isnan(), torch.full_like(flat, -torch.inf), flat)
    lowest = scores.flatten().isnan().long()  # -inf still beats NaN
    index = torch.arange(flat.numel(), device=flat.device)
    tie = (index * 2654435761) % 2**32
    # Sort by the least significant criterion first; every later sort is stable and keeps it among equals.
    order = tie.argsort(stable=True)
    order = order[lowest[order].argsort(stable=True)]
    return order[flat[order].argsort(stable=True, descending=True)]


def topk_mask(scores: Tensor, k: int) -> Tensor:
    """Mask of exactly ``k`` ones: larger score first, equal scores by ``(i * 2654435761) mod 2**32``, lowest first.

    ``i`` is the position in ``scores.flatten()``. NaN is smaller than every number, and -0 equals +0.
    """
    mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    mask[_best_first(scores)[:k]] = True
    return mask.view(scores.shape)


def nm_mask(scores: Tensor, n: int, m: int) -> Tensor:
    """Mask that keeps, of every ``m`` neighbours in ``scores.flatten()``, the ``n`` largest in the order of `topk_mask`."""
    rank = _best_first(scores).argsort()  # among all, which is an order inside of each group too
    return (rank.view(-1, m).argsort(1).argsort(1) < n).view(scores.shape)


def topk_of_sets(scores: Sequence[Tensor], k: int, least: Sequence[int]) -> list[Tensor]:
    """Masks of ``k`` ones in all over several flat tensors, each of which keeps at least its ``least`` largest entries."""
    flat = torch.cat(list(scores))
    number = torch.cat([torch.full_like(x, i, dtype=torch.long) for i, x in enumerate(scores)])
    order = _best_first(flat)
    needed = torch.cat([order[number[order] == i][:count] for i, count in enumerate(least)])
    return list(topk_mask(flat.index_fill(0, needed, 2.0), k).split([x.numel() for x in scores]))


# --- units: weights that share one score ---------------------------------------------------------------------------------------------


def expand(values: Tensor, blocks: Blocks) -> Tensor:
    """``values`` of the units, repeated for each of the ``rows * cols`` entries in memory order."""
    by_row = values.view(blocks.down, blocks.across).repeat_interleave(blocks.block_rows, 0)[: blocks.rows]
    return by_row.repeat_interleave(blocks.block_cols, 1)[:, : blocks.cols].flatten()


def _padded(x: Tensor, dim: int, length: int) -> Tensor:
    zeros = torch.zeros([length - x.shape[d] if d == dim else size for d, size in enumerate(x.shape)], dtype=x.dtype, device=x.device)
    return torch.cat([x, zeros], dim)


def unit_sums(x: Tensor, blocks: Blocks, onto: Tensor | None = None) -> Tensor:
    """Sums over the members of every unit, ``[units]``, of a value ``x`` for every entry in memory order.

    The order of the additions decides the bits. A strip has at most 64 rows of a unit: each column is added from the first row to the last,
    column j goes to partial sum j mod 32, and the 32 partial sums are added in pairs of neighbours. Strips are added in order. Zeros that
    stand for missing entries change nothing.

    Args:
        onto: sums of the tensors before this one, to which its own are added.
    """
    rows, cols, block_rows, block_cols = blocks
    matrix = _padded(_padded(x.view(rows, cols), 0, blocks.down * block_rows), 1, blocks.across * block_cols)
    terms = matrix.view(blocks.down, block_rows, blocks.across, block_cols)
    total = torch.zeros(blocks.units, dtype=x.dtype, device=x.device) if onto is None else onto
    for begin in range(0, block_rows, 64):
        columns = torch.zeros_like(terms[:, 0])
        for row in range(begin, min(begin + 64, block_rows)):
            columns = columns + terms[:, row]
        width = min(32, 1 << (block_cols - 1).bit_length())
        columns = _padded(columns, 2, -(-block_cols // width) * width)
        lanes = torch.zeros_like(columns[:, :, :width])
        for i in range(0, columns.shape[2], width):
            lanes = lanes + columns[:, :, i : i + width]
        while lanes.shape[2] > 1:
            lanes = lanes[:, :, 0::2] + lanes[:, :, 1::2]
        total = total + lanes.flatten()
    return total


def unit_means(values: Sequence[Tensor], parts: Sequence[Blocks]) -> Tensor:
    """Start scores of units: the mean over their weights of `start_values`, over all tensors that the units are made of."""
    total: Tensor | None = None
    count: Tensor | None = None
    for x, blocks in zip(values, parts, strict=True):
        total = unit_sums(x, blocks, total)
        count = unit_sums(torch.ones_like(x), blocks, count)
    assert total is not None
    assert count is not None
    return _relaxed(total / count)


def unit_gradient(theta: Tensor, m: Tensor, g: Tensor, gamma: float, blocks: Blocks, onto: Tensor | None = None) -> Tensor:
    """``h`` of units, ``sum of (theta_j - m*g_j/gamma) * g_j``, over one tensor, added to ``onto``. NaN where a gradient is not finite."""
    terms = (theta - masked(m, g) * (1 / gamma)) * g
    return unit_sums(torch.where(g.isfinite(), terms, torch.full_like(terms, torch.nan)), blocks, onto)


def upper_units(s: Tensor, u: Tensor, gradient: Tensor, h: Hyper) -> tuple[Tensor, Tensor]:
    """A4, A5 for the scores ``s`` of units. Units whose gradient is NaN keep ``s`` and ``u``."""
    known = ~gradient.isnan()
    if h.mask_momentum > 0:
        moved = h.mask_momentum * u + gradient
        u = torch.where(known, moved, u)
        gradient = moved
    x = s - h.mask_lr * gradient
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    return torch.where(known, torch.where(x > 0, torch.where(x < 1, x, one), zero), s), u


def start_values(theta: Tensor, score_start: str = "magnitude") -> Tensor:
    """What a weight is worth at first: ``|theta|``; with "square" ``theta^2 / 2``, what losing it costs where the curvature is 1. The order
    is that of the magnitudes in both."""
    return theta.abs() if score_start == "magnitude" else theta * theta / 2


def _relaxed(values: Tensor) -> Tensor:
    return values.clamp(max=1).nan_to_num(nan=0)


def start_scores(theta: Tensor, score_start: str = "magnitude") -> Tensor:
    """``s = min(start_values, 1)``; 0 where theta is NaN, so that scores are always numbers in [0, 1]."""
    return _relaxed(start_values(theta, score_start))


def start(theta: Tensor, k: int, score_start: str = "magnitude") -> State:
    """Start of BiP: ``s = min(|theta|, 1)``, so the first mask is magnitude pruning; moments are 0."""
    s = start_scores(theta, score_start)
    zeros = [torch.zeros_like(theta) for _ in range(3)]
    return State(theta, zeros[0], s, zeros[1], topk_mask(s, k), zeros[2])


def _lower_theta(theta: Tensor, v: Tensor, m: Tensor, g: Tensor, h: Hyper) -> tuple[Tensor, Tensor]:
    """A3: gradient step on ``theta`` under the mask, with the momentum of `torch.optim.SGD`."""
    d = masked(m, g) + h.weight_decay * theta
    v = h.momentum * v + d
    direction = d + h.momentum * v if h.nesterov else v
    return theta - h.lr * direction, v


def _score_gradient(theta: Tensor, m: Tensor, g: Tensor, h: Hyper, variant: Variant) -> Tensor:
    """A4, with the implicit term of the variant."""
    if variant.implicit == "published":
        return theta * g - 1e-4 * (theta * g) ** 2
    return theta * g if variant.implicit == "none" else (theta - masked(m, g) * (1 / h.gamma)) * g


def _upper_scores(state: State, g: Tensor, h: Hyper, variant: Variant) -> tuple[Tensor, Tensor]:
    """A4, A5: implicit gradient ``h = (theta - m*g/gamma) * g``, then the projected step on ``s``; on ``theta`` if it is shared."""
    s, u = state.s, state.u
    gradient = _score_gradient(state.theta, state.m, g, h, variant)
    if h.mask_momentum > 0:
        u = h.mask_momentum * u + gradient
        gradient = u
    if variant.shared:
        return state.theta - h.mask_lr * gradient, u
    x = s - h.mask_lr * gradient
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    # clip(x, 0, 1), except that a NaN becomes 0 and does not enter the order
    return torch.where(x > 0, torch.where(x < 1, x, one), zero), u


def _keep_if_nonfinite(g: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(g.isfinite(), new, old)


def _power(base: float, exponent: int) -> float:
    """``base ** exponent`` by repeated squaring, as the kernels compute it: the last bit of a library's power differs between libraries."""
    product = 1.0
    while exponent:
        product = product * base if exponent & 1 else product
        base *= base
        exponent >>= 1
    return product


def _sqrt(x: Tensor) -> Tensor:
    """Correctly rounded, as the kernels' is: in float32 torch's own may be wrong in the last bit, where it asks a library."""
    return x.double().sqrt().to(x.dtype)


def _in_precision(x: float, like: Tensor) -> float:
    return float(torch.tensor(x, dtype=like.dtype))


def _lower_adamw(state: State, g: Tensor, h: Hyper) -> tuple[Tensor, Tensor, Tensor]:
    """AdamW (Loshchilov and Hutter 2019) on ``theta`` under the mask: theta, and the running means of ``m*g`` and of its square."""
    (beta1, beta2), t = h.betas, state.t + 1
    lr, weight_decay = (_in_precision(x, g) for x in (h.lr, h.weight_decay))
    d = masked(state.m, g)
    a = beta1 * state.v + (1 - beta1) * d
    b = beta2 * (torch.zeros_like(d) if state.b is None else state.b) + (1 - beta2) * (d * d)
    size, root = lr / (1 - _power(beta1, t)), 1 / math.sqrt(1 - _power(beta2, t))
    theta = state.theta * (1 - lr * weight_decay) - size * (a / (_sqrt(b) * root + h.eps))
    return theta, a, b


def lower(state: State, g: Tensor, h: Hyper, optimizer: str = "sgd") -> State:
    """Lower step: retrain ``theta`` under the mask, by "sgd" or "adamw". Entries whose ``g`` is not finite stay."""
    if optimizer == "adamw":
        theta, v, b = _lower_adamw(state, g, h)
        state = state._replace(b=_keep_if_nonfinite(g, b, torch.zeros_like(b) if state.b is None else state.b), t=state.t + 1)
    else:
        theta, v = _lower_theta(state.theta, state.v, state.m, g, h)
    return state._replace(theta=_keep_if_nonfinite(g, theta, state.theta), v=_keep_if_nonfinite(g, v, state.v))


def upper(state: State, g: Tensor, h: Hyper, k: int, variant: Variant = PAPER) -> State:
    """Upper step: move the scores, project onto the masks of exactly ``k`` ones."""
    moved, u = _upper_scores(state, g, h, variant)
    u = _keep_if_nonfinite(g, u, state.u)
    theta = _keep_if_nonfinite(g, moved, state.theta) if variant.shared else state.theta
    s = start_scores(theta) if variant.shared else _keep_if_nonfinite(g, moved, state.s)
    return state._replace(theta=theta, s=s, u=u, m=topk_mask(s, k))


def joint(state: State, g: Tensor, h: Hyper, k: int, variant: Variant = PAPER, optimizer: str = "sgd") -> State:
    """Joint step: both levels from one gradient, every right-hand side at the old values."""
    if variant.shared:
        raise ValueError("variant must not be shared in a joint step, where both levels would move the same numbers")
    below, above = lower(state, g, h, optimizer), upper(state, g, h, k, variant)
    return below._replace(s=above.s, u=above.u, m=above.m)

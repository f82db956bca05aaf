"""BiP in plain torch, written to be read beside the paper: the oracle of every test.

One function per formula, on flat tensors, out of place. In float32 the results equal the kernels' bit for bit, because every
product and sum is its own torch operation and so rounds as the kernels do; in float64 they are the mathematics.

Symbols: ``theta`` dense weights, ``s`` scores in [0, 1], ``m`` boolean mask, ``z = m*theta``, ``g = dloss/dz``, ``v`` momentum of
``theta``, ``u`` momentum of ``s``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Hyper", "State", "kept", "start", "topk_mask", "lower", "upper", "joint", "masked"]


class Hyper(NamedTuple):
    """Hyper-parameters of both levels; the defaults are those of `FastBiP`."""

    lr: float = 1e-2
    mask_lr: float = 1e-1
    gamma: float = 1.0
    momentum: float = 0.9
    mask_momentum: float = 0.0
    weight_decay: float = 1e-4
    nesterov: bool = False


class State(NamedTuple):
    """All of one selection group: flat tensors of one length."""

    theta: Tensor
    v: Tensor
    s: Tensor
    u: Tensor
    m: Tensor


def kept(n: int, sparsity: float) -> int:
    """Number of weights kept out of ``n`` at a ``sparsity`` in [0, 1)."""
    return n - round(sparsity * n)


def masked(m: Tensor, x: Tensor) -> Tensor:
    """``m*x`` with exact +0 where the mask is 0, whatever ``x`` holds there."""
    return torch.where(m, x, torch.zeros((), dtype=x.dtype, device=x.device))


def topk_mask(scores: Tensor, k: int) -> Tensor:
    """Mask of exactly ``k`` ones: larger score first, equal scores by ``(i * 2654435761) mod 2**32``, lowest first.

    ``i`` is the position in ``scores.flatten()``. NaN is smaller than every number, and -0 equals +0.
    """
    flat = scores.flatten().double()  # every float32 is a double; the order is the same
    flat = torch.where(flat.isnan(), torch.full_like(flat, -torch.inf), flat)
    lowest = scores.flatten().isnan().long()  # -inf still beats NaN
    index = torch.arange(flat.numel(), device=flat.device)
    tie = (index * 2654435761) % 2**32
    # Sort by the least significant criterion first; every later sort is stable and keeps it among equals.
    order = tie.argsort(stable=True)
    order = order[lowest[order].argsort(stable=True)]
    order = order[flat[order].argsort(stable=True, descending=True)]
    mask = torch.zeros(flat.numel(), dtype=torch.bool, device=flat.device)
    mask[order[:k]] = True
    return mask.view(scores.shape)


def start(theta: Tensor, k: int) -> State:
    """Start of BiP: ``s = min(|theta|, 1)``, so the first mask is magnitude pruning; momenta are 0."""
    s = theta.abs().clamp(max=1)
    return State(theta, torch.zeros_like(theta), s, torch.zeros_like(theta), topk_mask(s, k))


def _lower_theta(theta: Tensor, v: Tensor, m: Tensor, g: Tensor, h: Hyper) -> tuple[Tensor, Tensor]:
    """A3: gradient step on ``theta`` under the mask, with the momentum of `torch.optim.SGD`."""
    d = masked(m, g) + h.weight_decay * theta
    v = h.momentum * v + d
    direction = d + h.momentum * v if h.nesterov else v
    return theta - h.lr * direction, v


def _upper_scores(state: State, g: Tensor, h: Hyper) -> tuple[Tensor, Tensor]:
    """A4, A5: implicit gradient ``h = (theta - m*g/gamma) * g``, then the projected step on ``s``."""
    theta, _, s, u, m = state
    gradient = (theta - masked(m, g) * (1 / h.gamma)) * g
    if h.mask_momentum > 0:
        u = h.mask_momentum * u + gradient
        gradient = u
    x = s - h.mask_lr * gradient
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    # clip(x, 0, 1), except that a NaN becomes 0 and does not enter the order
    return torch.where(x > 0, torch.where(x < 1, x, one), zero), u


def _keep_if_nonfinite(g: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(g.isfinite(), new, old)


def lower(state: State, g: Tensor, h: Hyper) -> State:
    """Lower step: retrain ``theta`` under the mask. Entries whose ``g`` is not finite stay."""
    theta, v = _lower_theta(state.theta, state.v, state.m, g, h)
    return state._replace(theta=_keep_if_nonfinite(g, theta, state.theta), v=_keep_if_nonfinite(g, v, state.v))


def upper(state: State, g: Tensor, h: Hyper, k: int) -> State:
    """Upper step: move the scores, project onto the masks of exactly ``k`` ones."""
    s, u = _upper_scores(state, g, h)
    s, u = _keep_if_nonfinite(g, s, state.s), _keep_if_nonfinite(g, u, state.u)
    return state._replace(s=s, u=u, m=topk_mask(s, k))


def joint(state: State, g: Tensor, h: Hyper, k: int) -> State:
    """Joint step: both levels from one gradient, every right-hand side at the old values."""
    below, above = lower(state, g, h), upper(state, g, h, k)
    return State(below.theta, below.v, above.s, above.u, above.m)

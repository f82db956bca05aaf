"""The same steps in plain torch, as a user who knows torch would write them: in place, no copies, no loops over weights.

`lower`, `upper` and `joint` follow the formulas of `bip_fast.reference` with `torch.topk` for the mask (ties as it likes): as it
comes, and, for those who know that it sorts what it selects unless told otherwise, with `sorted=False`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

LR, MASK_LR, GAMMA, MOMENTUM, WEIGHT_DECAY = 1e-2, 1e-1, 1.0, 0.9, 1e-4


@dataclass
class PlainState:
    """Lists with one tensor per layer; `z` is what the model's parameters hold."""

    theta: list[Tensor]
    v: list[Tensor]
    s: list[Tensor]
    m: list[Tensor]  # float 0 and 1, so that one multiplication applies it
    z: list[Tensor]
    kept: list[int]  # one number for a global mask, otherwise one per layer
    sorted: bool = True  # the default of torch.topk


def plain_state(weights: list[Tensor], density: float, scope: str) -> PlainState:
    sizes = [weight.numel() for weight in weights]
    kept = [n - round((1 - density) * n) for n in (sizes if scope == "layer" else [sum(sizes)])]
    state = PlainState(
        theta=[weight.clone() for weight in weights],
        v=[torch.zeros_like(weight) for weight in weights],
        s=[weight.abs().clamp_(max=1) for weight in weights],
        m=[torch.zeros_like(weight) for weight in weights],
        z=[torch.zeros_like(weight) for weight in weights],
        kept=kept,
    )
    select(state)
    return state


def select(state: PlainState) -> None:
    """Mask of the largest scores, then z = m*theta."""
    if len(state.kept) == len(state.s):
        for s, m, k in zip(state.s, state.m, state.kept, strict=True):
            m.zero_().view(-1)[torch.topk(s.view(-1), k, sorted=state.sorted).indices] = 1
    else:
        scores = torch.cat([s.view(-1) for s in state.s])
        mask = torch.zeros_like(scores)
        mask[torch.topk(scores, state.kept[0], sorted=state.sorted).indices] = 1
        for m, part in zip(state.m, mask.split([m.numel() for m in state.m]), strict=True):
            m.copy_(part.view_as(m))
    for z, m, theta in zip(state.z, state.m, state.theta, strict=True):
        torch.mul(m, theta, out=z)


def lower(state: PlainState, gradients: list[Tensor]) -> None:
    for theta, v, m, z, g in zip(state.theta, state.v, state.m, state.z, gradients, strict=True):
        v.mul_(MOMENTUM).addcmul_(m, g).add_(theta, alpha=WEIGHT_DECAY)
        theta.sub_(v, alpha=LR)
        torch.mul(m, theta, out=z)


def move_scores(state: PlainState, gradients: list[Tensor]) -> None:
    for theta, s, m, g in zip(state.theta, state.s, state.m, gradients, strict=True):
        h = torch.addcmul(theta, m, g, value=-1 / GAMMA).mul_(g)
        s.sub_(h, alpha=MASK_LR).clamp_(0, 1)


def upper(state: PlainState, gradients: list[Tensor]) -> None:
    move_scores(state, gradients)
    select(state)


def joint(state: PlainState, gradients: list[Tensor]) -> None:
    move_scores(state, gradients)  # first, at the old theta and m
    for theta, v, m, g in zip(state.theta, state.v, state.m, gradients, strict=True):
        v.mul_(MOMENTUM).addcmul_(m, g).add_(theta, alpha=WEIGHT_DECAY)
        theta.sub_(v, alpha=LR)
    select(state)


STEPS: dict[str, Callable[[PlainState, list[Tensor]], None]] = {"lower": lower, "upper": upper, "joint": joint}


def mask_by_topk(scores: Tensor, k: int, sorted: bool = True) -> Tensor:
    mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    mask[torch.topk(scores, k, sorted=sorted).indices] = True
    return mask


def mask_by_kthvalue(scores: Tensor, k: int) -> Tensor:
    """Not exactly k: everything that ties with the k-th largest is kept as well."""
    return scores >= torch.kthvalue(scores, scores.numel() - k + 1).values


def mask_by_sort(scores: Tensor, k: int) -> Tensor:
    mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    mask[torch.sort(scores, descending=True).indices[:k]] = True
    return mask


MASKS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "torch.topk": mask_by_topk,
    "torch.topk(sorted=False)": partial(mask_by_topk, sorted=False),
    "torch.kthvalue": mask_by_kthvalue,
    "torch.sort": mask_by_sort,
}

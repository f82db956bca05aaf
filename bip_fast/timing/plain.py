"""Lower, upper and joint steps in plain torch, as a user who knows torch would write them: what benchmarks compare the kernels with.

In place, no copies, no loops over weights. The formulas are those of `bip_fast.reference`. The mask is made by `torch.topk`, which breaks
ties in any order. It also sorts what it selects, unless called with ``sorted=False``; both ways are measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

LR, MASK_LR, GAMMA, MOMENTUM, WEIGHT_DECAY = 1e-2, 1e-1, 1.0, 0.9, 1e-4


@dataclass
class PlainState:
    """Lists with one tensor per layer, fp32 but for `z`, which is what the model's parameters hold."""

    theta: list[Tensor]
    v: list[Tensor]
    s: list[Tensor]
    m: list[Tensor]  # float 0 and 1, so that one multiplication applies it
    z: list[Tensor]
    kept: list[int]  # one number for a global mask, otherwise one per layer
    sorted: bool = True  # the default of torch.topk


def plain_state(weights: list[Tensor], density: float, scope: str = "global", z: list[Tensor] | None = None) -> PlainState:
    """State for the weights of a trained network, its first mask selected. Writes ``z``, which may be the network's parameters."""
    sizes = [weight.numel() for weight in weights]
    kept = [n - round((1 - density) * n) for n in (sizes if scope == "layer" else [sum(sizes)])]
    theta = [weight.float().clone() for weight in weights]
    state = PlainState(
        theta=theta,
        v=[torch.zeros_like(x) for x in theta],
        s=[x.abs().clamp_(max=1) for x in theta],
        m=[torch.zeros_like(x) for x in theta],
        z=z or [torch.zeros_like(weight) for weight in weights],
        kept=kept,
    )
    select(state)
    return state


def select(state: PlainState) -> None:
    """Mask of the largest scores, ties broken as torch.topk does, then z = m*theta."""
    if len(state.kept) == len(state.s):
        for s, m, k in zip(state.s, state.m, state.kept, strict=True):
            m.zero_().view(-1)[torch.topk(s.view(-1), k, sorted=state.sorted).indices] = 1
    else:
        scores = torch.cat([s.view(-1) for s in state.s]) if len(state.s) > 1 else state.s[0].view(-1)
        mask = torch.zeros_like(scores)
        mask[torch.topk(scores, state.kept[0], sorted=state.sorted).indices] = 1
        for m, part in zip(state.m, mask.split([m.numel() for m in state.m]), strict=True):
            m.copy_(part.view_as(m))
    for z, m, theta in zip(state.z, state.m, state.theta, strict=True):
        torch.mul(m, theta, out=z)


def move_weights(state: PlainState, gradients: list[Tensor]) -> None:
    for theta, v, m, g in zip(state.theta, state.v, state.m, gradients, strict=True):
        v.mul_(MOMENTUM).addcmul_(m, g.float()).add_(theta, alpha=WEIGHT_DECAY)
        theta.sub_(v, alpha=LR)


def move_scores(state: PlainState, gradients: list[Tensor]) -> None:
    for theta, s, m, g in zip(state.theta, state.s, state.m, gradients, strict=True):
        h = torch.addcmul(theta, m, g.float(), value=-1 / GAMMA).mul_(g)
        s.sub_(h, alpha=MASK_LR).clamp_(0, 1)


def lower(state: PlainState, gradients: list[Tensor]) -> None:
    """Lower step (A3)."""
    move_weights(state, gradients)
    for z, m, theta in zip(state.z, state.m, state.theta, strict=True):
        torch.mul(m, theta, out=z)


def upper(state: PlainState, gradients: list[Tensor]) -> None:
    """Upper step (A4, A5)."""
    move_scores(state, gradients)
    select(state)


def joint(state: PlainState, gradients: list[Tensor]) -> None:
    """Both from one gradient."""
    move_scores(state, gradients)  # first, at the old theta and m
    move_weights(state, gradients)
    select(state)


STEPS: dict[str, Callable[[PlainState, list[Tensor]], None]] = {"lower": lower, "upper": upper, "joint": joint}

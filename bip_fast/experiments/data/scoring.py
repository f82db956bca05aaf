"""The loss and the right answers of a batch, also where every position of a text has a label of its own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["IGNORED", "counted", "loss_of", "right_answers"]

IGNORED = -100  # a label that asks for nothing, such as that of padding


def loss_of(logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy, of logits (..., classes) against int64 labels (...), of those that are not `IGNORED`; taken in float32 at least."""
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction=reduction)


def right_answers(logits: Tensor, labels: Tensor) -> Tensor:
    """How many of the labels (...) have the largest of their logits (..., classes): int64, one number."""
    return (logits.detach().argmax(-1) == labels).sum()


def counted(labels: Tensor) -> Tensor:
    """How many labels ask for something: int64, one number, on their device."""
    return (labels != IGNORED).sum()

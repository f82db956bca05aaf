"""A trial of a model before its run, so that an error that would come after hours comes at once."""

from __future__ import annotations

import copy

import torch
from torch import nn

from ...errors import UserError, one_line
from ..data.kinds import LANGUAGE
from ..data.parts import AnyData
from ..methods.begin import pruner
from ..models.heads import candidates
from ..settings import Settings

__all__ = ["check_model"]


def check_model(model: nn.Module, settings: Settings, data: AnyData) -> bool:
    """UserError unless ``model`` makes logits of two items of the data set, learns, and can be pruned and saved. Works on a copy.

    Returns:
        Whether some of the parameters that could learn get no gradient.
    """
    name, items, blank = settings.model, data.kind.items, torch.zeros_like(data.example(), device="cpu")
    shape = tuple(blank.shape)
    try:
        with torch.no_grad():
            logits = model.eval()(blank)
    except Exception as error:  # the user's code may raise anything
        raise UserError(f"--model {name} failed on {items} of shape {shape}: {one_line(error, named=True)}") from error
    expected: tuple[int, ...] = (2, data.classes)
    if data.kind is LANGUAGE and isinstance(logits, torch.Tensor):  # for every token as many as the network has words
        expected = (*shape, *logits.shape[-1:])
    if not isinstance(logits, torch.Tensor) or logits.shape != expected:
        found = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise UserError(f"--model {name} must give logits of shape {expected} for {items} of shape {shape}, got {found}")
    if not candidates(model):
        raise UserError(
            f"--model {name} has no weights to prune: no matrix of a convolution, Linear layer, attention, recurrent layer or experts"
        )
    try:
        trial = copy.deepcopy(model).train()
        optimizer = pruner(trial, settings, data)
        trial(blank).sum().backward()
        unused = any(p.requires_grad and p.grad is None for p in trial.parameters())
        optimizer.step()
        if not all(isinstance(x, torch.Tensor) for x in trial.state_dict().values()):
            raise TypeError("its state_dict() holds more than tensors")
    except Exception as error:  # the user's code may raise anything
        raise UserError(f"--model {name} cannot be trained and pruned: {one_line(error, named=True)}") from error
    return unused

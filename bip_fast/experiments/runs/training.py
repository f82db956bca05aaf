"""The one training loop: dense training and pruning differ in the optimizer they are given and in nothing else.

An epoch passes over the training images or texts once, one forward and one backward pass a batch. With alternating levels the optimizer
takes a lower step on one batch and an upper step on the next. Step sizes are functions of the position alone, so nothing but the model, the
optimizer and a `Cursor` is needed to continue at any batch with the same bits. On CUDA an iteration is a graph.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...errors import UserError
from ...graphs import GraphedIteration
from ..data.batches import Position
from ..data.parts import AnyData
from ..data.scoring import counted, loss_of, right_answers
from ..methods.stage import Recipe
from ..models.heads import candidates, head_of
from ..ranks import all_reduce_sum, share

__all__ = ["Cursor", "Score", "check_finite", "evaluate", "kept_flags", "train"]


@dataclass
class Cursor:
    """Where a stage stands. Sums are over the epoch that has begun; ``history`` has one row for each finished epoch."""

    epoch: int = 0
    step: int = 0
    sums: Tensor = field(default_factory=lambda: torch.zeros(3, dtype=torch.float64))  # loss, right answers, labels
    seconds: float = 0.0
    flags: dict[str, Tensor] = field(default_factory=dict)  # which weights were kept when the epoch began
    history: list[dict[str, float]] = field(default_factory=list)
    began: float = 0.0  # when the time that is not in ``seconds`` yet began

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What happens inside does not count as time of the stage. First waits for the device, whose work does count."""
        self.sums.cpu()
        self.seconds += time.perf_counter() - self.began
        try:
            yield
        finally:
            self.began = time.perf_counter()

    def running(self) -> tuple[float, float]:
        """Mean loss and accuracy of the epoch so far, or of the last one; waits for the device."""
        if not self.step and self.history:
            return self.history[-1]["loss"], self.history[-1]["accuracy"]
        loss, right, images = self.sums.tolist()
        return loss / max(images, 1), right / max(images, 1)

    def end_epoch(self, model: nn.Module, lr: float) -> None:
        loss, accuracy = self.running()
        check_finite(loss, "training", f" in epoch {self.epoch + 1}")
        flags = kept_flags(model)
        changed = sum(int((flags[name] != self.flags[name]).sum()) for name in self.flags)
        total = sum(x.numel() for x in flags.values())
        self.epoch, self.step = self.epoch + 1, 0
        row = {"epoch": self.epoch, "loss": loss, "accuracy": accuracy, "lr": lr, "mask_changes": changed / max(total, 1)}
        self.history.append({**row, "seconds": self.seconds})
        self.sums.zero_()
        self.flags = flags

    def state_dict(self) -> dict[str, Any]:
        state = {**vars(self), "sums": self.sums.cpu(), "flags": {name: x.cpu() for name, x in self.flags.items()}}
        del state["began"]
        return state

    @classmethod
    def from_state(cls, state: dict[str, Any], device: torch.device) -> Cursor:
        flags = {name: x.to(device) for name, x in state["flags"].items()}
        return cls(**{**state, "sums": state["sums"].to(device), "flags": flags})


def check_finite(loss: float, part: str, when: str = "") -> None:
    """Raises UserError for the loss of a network that has diverged."""
    if not math.isfinite(loss):
        raise UserError(f"the {part} loss is {loss}{when}; smaller --lr, --pretrain-lr or --mask-lr may help")


class Score(NamedTuple):
    """Accuracy in [0, 1] and mean loss on the test part."""

    accuracy: float
    loss: float


def kept_flags(model: nn.Module) -> dict[str, Tensor]:
    """Boolean tensor of every weight that competes: which entries are not 0."""
    return {name: x.detach() != 0 for name, x in candidates(model)}


def evaluate(model: nn.Module, data: AnyData) -> Score:
    """Score on the test part of ``data``, in eval mode; leaves the model in it. Ranks share the batches."""
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=data.test_labels.device)
    with torch.no_grad():
        for inputs, labels in data.test_batches(share()):
            logits = model(inputs)
            sums += torch.stack([right_answers(logits, labels), loss_of(logits, labels, "sum"), counted(labels)]).double()
    right, loss, count = all_reduce_sum(sums).tolist()
    return Score(right / count, loss / count)


def rate_at(recipe: Recipe, done: int, total: int) -> float:
    """The factor of all step sizes in the step after ``done`` of ``total``: it grows in equal steps to 1, then decays to 0 at the end."""
    warmup = round(recipe.warmup * total)
    return (done + 1) / warmup if done < warmup else recipe.decays((done - warmup) / (total - warmup))


def set_rates(optimizer: torch.optim.Optimizer, recipe: Recipe, factor: float, head: Collection[Tensor] = ()) -> float:
    """All step sizes times ``factor``; returns that of the weights. ``head``: parameters with a step size of their own."""
    for group in optimizer.param_groups:
        in_head = recipe.head_lr and group["params"][0] in head
        group["lr"] = (recipe.head_lr if in_head else recipe.lr) * factor
        if "mask_lr" in group:
            group["mask_lr"] = recipe.mask_lr * factor
    return recipe.lr * factor


@contextmanager
def clipped(model: nn.Module, optimizer: torch.optim.Optimizer, norm: float) -> Iterator[None]:
    """Inside, the norm of all gradients together is at most ``norm`` when a step reads them; 0: they are as they are."""
    if not norm:
        yield
        return
    params = [p for p in model.parameters() if p.requires_grad]

    def clip(*_: Any) -> None:
        torch.nn.utils.clip_grad_norm_(params, norm)

    hook = optimizer.register_step_pre_hook(clip)
    try:
        yield
    finally:
        hook.remove()


def measured(logits: Tensor, labels: Tensor, divisor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The loss of a batch, and what it adds to the sums of a `Cursor`. ``divisor``: of the losses of a part (`batches.targets_of`)."""
    count = counted(labels)
    if divisor is None:
        loss = loss_of(logits, labels)
        total = loss.detach() * count
    else:
        total = loss_of(logits, labels, "sum")
        loss = total / divisor
    return loss, torch.stack([total.detach(), right_answers(logits, labels), count]).double()


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: AnyData,
    recipe: Recipe,
    cursor: Cursor,
    after_step: Callable[[Cursor], None] = lambda cursor: None,
    *,
    before_step: Callable[[int, int], None] = lambda done, total: None,
    network: nn.Module | None = None,
    amp: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> None:
    """Run a stage from ``cursor`` to its end.

    Args:
        optimizer: of torch, or `FastBiP`, whose masks are frozen at ``recipe.freeze``.
        cursor: moved in place.
        after_step: may raise to stop between two batches; its time counts, but for what it does in `Cursor.aside`.
        before_step: is told the batches done and all batches of the schedule; may change the optimizer's options and scores.
        network: runs ``model`` together with other ranks; None: there are none.
        amp: bfloat16 autocast.
        say: is told once, and why, when the iterations cannot be graphs although the device has them.
    """
    steps = data.steps(recipe.batch_size)
    total = recipe.epochs * steps
    frozen = recipe.freeze >= 1 or not hasattr(optimizer, "freeze_masks")
    cursor.sums = cursor.sums.to(data.train_labels.device)
    if not cursor.flags:
        cursor.flags = kept_flags(model)
    iteration = GraphedIteration(network or model, optimizer, measured, autocast=torch.bfloat16 if amp else None)
    said = iteration.reason is not None  # a device without graphs is no news
    head = set(head_of(model).values())
    model.train()
    while cursor.epoch < recipe.epochs:
        cursor.began = time.perf_counter()
        batches = data.epoch(recipe.batch_size, Position(recipe.seed, recipe.stage, cursor.epoch, cursor.step), share())
        while cursor.step < steps:
            done = cursor.epoch * steps + cursor.step
            before_step(done, total)
            if not frozen and done >= recipe.freeze * total:
                optimizer.freeze_masks()  # type: ignore[attr-defined]
                frozen = True
            lr = set_rates(optimizer, recipe, rate_at(recipe, done, total), head)
            with clipped(model, optimizer, recipe.clip):
                _, sums = iteration(*batches.batch(cursor.step))
            cursor.sums += all_reduce_sum(sums)
            if iteration.reason is not None and not said:
                say(f"no CUDA graphs: {iteration.reason}")
                said = True
            cursor.step += 1
            if cursor.step < steps:
                after_step(cursor)
                continue
            with cursor.aside():
                cursor.end_epoch(model, lr)
            after_step(cursor)
            break

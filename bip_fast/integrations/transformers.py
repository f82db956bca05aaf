"""`FastBiP` in the Trainer of Hugging Face transformers (5 and later).

    trainer = Trainer(model=model, args=args, train_dataset=data)
    add_pruning(trainer, sparsity=0.9)
    trainer.train()

The Trainer makes its optimizer when training begins, by a call of ``optimizer_cls_and_kwargs`` with the model, so layers and names are
known. It saves and loads the optimizer's state with its checkpoints: ``trainer.train(resume_from_checkpoint=True)`` goes on bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from ..optimizer import FastBiP
from ..presets import grows
from .wrapped import PREFIX, check_share, numbers, unwrapped

__all__ = ["BiPCallback", "add_pruning", "fast_bip"]

DEFAULTS = {"optimizer": "adamw", "preset": "joint"}


class _Factory:
    """What ``optimizer_cls_and_kwargs`` takes in place of a class: the Trainer calls it for what it then calls with the model."""

    def __init__(self, args: TrainingArguments, steps: Callable[[], int]) -> None:
        self.args, self.steps = args, steps

    def __call__(self) -> Callable[..., FastBiP]:
        return self.make

    def make(self, model: nn.Module, **options: Any) -> FastBiP:
        options = {**DEFAULTS, **options}
        if "steps" not in options and grows(options["preset"], options["optimizer"]):
            options["steps"] = self.steps()
        if callable(options["optimizer"]):
            return FastBiP(model, **options)
        args = self.args
        own: dict[str, Any] = {"lr": args.learning_rate, "weight_decay": args.weight_decay}
        if options["optimizer"] == "adamw":
            own |= {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
        if options.get("weight_decay", args.weight_decay):  # none for biases and norms, as in the Trainer
            vectors = [name for name, p in model.named_parameters() if p.requires_grad and p.dim() < 2]
            options["overrides"] = {name: {"weight_decay": 0.0} for name in vectors} | dict(options.get("overrides") or {})
        return FastBiP(model, **{**own, **options})


def fast_bip(args: TrainingArguments, **options: Any) -> tuple[Callable[[], Any], dict[str, Any]]:
    """The argument ``optimizer_cls_and_kwargs`` of a Trainer. `add_pruning` does more, in one line.

    Args:
        args: of the Trainer: ``learning_rate``, ``weight_decay`` (not of biases and norms), ``adam_beta1``, ``adam_beta2`` and
            ``adam_epsilon`` are for `FastBiP` too.
        options: of `FastBiP`; they win. ``optimizer="adamw"`` and ``preset="joint"`` if not given. A bias or a norm that ``overrides``
            names has the weight decay of all others again, unless they say 0.

    Raises:
        ValueError: the sparsity of the preset grows, and neither ``steps`` nor ``args.max_steps`` says how long the run is.
    """
    given = {**DEFAULTS, **options}
    if "steps" not in given and args.max_steps <= 0 and grows(given["preset"], given["optimizer"]):
        raise ValueError(
            f"steps must be given with preset={given['preset']!r}, whose sparsity grows, as args.max_steps does not say how long the run "
            "is: a number, or None to prune at once; add_pruning(trainer, ...) finds the number itself"
        )
    return _Factory(args, lambda: args.max_steps), options


class BiPCallback(TrainerCallback):
    """Adds `FastBiP.metrics` to what a Trainer logs with its loss, freezes the masks for the rest of a run, and finalizes at its end.

    Callbacks are called in order. Those before this one, such as the reports that ``report_to`` asks for, do not see the metrics;
    `add_pruning` puts it first. With ``load_best_model_at_end`` the optimizer's state of the best checkpoint is loaded as well.

    Args:
        freeze_at: share of the run, in [0, 1], after which masks stay as they are; None: never.
        layers: also log the sparsity of every layer.
        prefix: of the names in the logs.
    """

    def __init__(self, *, freeze_at: float | None = None, layers: bool = False, prefix: str = PREFIX) -> None:
        self.freeze_at, self.layers, self.prefix = check_share("freeze_at", freeze_at), layers, prefix

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **found: Any) -> None:
        unwrapped(found["optimizer"])  # another one is an error at once

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **found: Any) -> None:
        if self.freeze_at is not None and state.global_step >= self.freeze_at * state.max_steps:
            unwrapped(found["optimizer"]).freeze_masks()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any] | None = None, **found: Any
    ) -> None:
        if logs is None or "loss" not in logs:  # an evaluation, or the summary of a run
            return
        metrics = numbers(unwrapped(found["optimizer"]), self.prefix, self.layers)
        logs |= metrics
        state.log_history[-1] |= metrics  # a copy of the logs, made before

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **found: Any) -> None:
        opt = unwrapped(found["optimizer"])
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            saved = Path(state.best_model_checkpoint) / "optimizer.pt"
            if not saved.is_file():
                logging.get_logger(__name__).warning(
                    f"the model is that of {state.best_model_checkpoint}, with its zeros. That has no optimizer.pt, so the optimizer is "
                    "not finalized"
                )
                return
            opt.load_state_dict(torch.load(saved, map_location="cpu", weights_only=True))
        opt.finalize()


def add_pruning(
    trainer: Trainer, *, freeze_at: float | None = None, layers: bool = False, prefix: str = PREFIX, **options: Any
) -> BiPCallback:
    """Let a Trainer prune while it trains: `FastBiP` as its optimizer, and a `BiPCallback`, which is returned.

    The arguments of the Trainer say step sizes and weight decay, as for `fast_bip`, and how long the run is: with ``preset="joint"``, the
    default here, the sparsity grows in the first 60 % of it.

    Args:
        trainer: that has not made its optimizer yet; also a subclass, such as those of TRL.
        freeze_at, layers, prefix: of `BiPCallback`.
        options: of `FastBiP`, such as ``sparsity``, ``pattern`` and ``exclude``; they win over the arguments of the Trainer.

    Raises:
        ValueError: the Trainer has an optimizer already, or was told to make one; or it uses DeepSpeed, which hides parameters behind flat
            copies.
    """
    if trainer.is_deepspeed_enabled:
        raise ValueError(
            "trainer must not use DeepSpeed, whose optimizers work on flat copies of parameters: use FSDP2 (fsdp_config version 2)"
        )
    if trainer.optimizer is not None or trainer.optimizer_cls_and_kwargs is not None:
        raise ValueError("trainer must be made without optimizers and optimizer_cls_and_kwargs, and not have trained yet")
    callback = BiPCallback(freeze_at=freeze_at, layers=layers, prefix=prefix)
    trainer.optimizer_cls_and_kwargs = _Factory(trainer.args, lambda: trainer.state.max_steps), options
    trainer.callback_handler.callbacks.insert(0, callback)
    return callback

"""`FastBiP` in Lightning: a callback that logs its numbers, freezes the masks and finalizes. The module makes the optimizer, as any other:

    def configure_optimizers(self):
        return FastBiP(self, sparsity=0.9, preset="joint", steps=self.trainer.estimated_stepping_batches)

    Trainer(max_epochs=10, callbacks=[BiPCallback()]).fit(module, loader)

Lightning saves and loads the optimizer's state with its checkpoints: ``fit(..., ckpt_path="last")`` goes on bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from ..optimizer import FastBiP
from .wrapped import PREFIX, check_share, numbers, unwrapped

__all__ = ["BiPCallback"]


class BiPCallback(Callback):
    """Logs `FastBiP.metrics` every ``log_every_n_steps``, freezes the masks for the rest of a run, and finalizes at its end.

    For every `FastBiP` among the optimizers of the module, under automatic and manual optimization. At the end of training, but not when it
    is interrupted, the model is left with plain parameters and exact zeros, and checkpoints that are saved from then on have no state of
    optimizers. Those saved before, as by ``ModelCheckpoint(save_last=True)``, have it.

    Args:
        freeze_at: share of the run, in [0, 1], after which masks stay as they are; None: never. The run must have ``max_steps``, or
            ``max_epochs`` and a number of batches.
        layers: also log the sparsity of every layer.
        prefix: of the names in the logs.
    """

    def __init__(self, *, freeze_at: float | None = None, layers: bool = False, prefix: str = PREFIX) -> None:
        self.freeze_at, self.layers, self.prefix = check_share("freeze_at", freeze_at), layers, prefix
        self._logged = 0  # the step that was logged last

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not _found(trainer):
            names = ", ".join(type(optimizer).__name__ for optimizer in trainer.optimizers) or "none"
            raise TypeError(f"configure_optimizers must return a FastBiP for BiPCallback, got {names}")
        if self.freeze_at is not None and _share(trainer) is None:
            raise ValueError("freeze_at needs a Trainer with max_steps, or with max_epochs and a loader that has a length")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        share = _share(trainer)
        if self.freeze_at is not None and share is not None and share >= self.freeze_at:
            for opt in _found(trainer):
                opt.freeze_masks()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        every, step = trainer.log_every_n_steps, trainer.global_step
        if every and step % every == 0 and step != self._logged:  # while gradients accumulate, the step stays
            self._logged = step
            found = _found(trainer)
            for number, opt in enumerate(found):
                prefix = self.prefix if len(found) == 1 else f"{self.prefix}{number}/"
                pl_module.log_dict(numbers(opt, prefix, self.layers), on_step=True, on_epoch=False)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        found = _found(trainer)
        for opt in found:
            opt.finalize()
        trainer.optimizers = [opt for opt in trainer.optimizers if opt not in found]

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: Mapping[str, Any]) -> None:
        if checkpoint.get("optimizer_states") == []:
            rank_zero_warn("the checkpoint was saved after the end of a run: masks are learned anew from its weights")


def _found(trainer: Trainer) -> list[FastBiP]:
    return [unwrapped(optimizer) for optimizer in trainer.optimizers if isinstance(optimizer, FastBiP)]


def _share(trainer: Trainer) -> float | None:
    """How much of the run is done; None where its length is not known. It ends at the first of its limits."""
    shares = []
    if trainer.max_steps > 0:
        shares.append(trainer.global_step / trainer.max_steps)
    epochs, batches = trainer.max_epochs, trainer.num_training_batches
    if epochs is not None and epochs > 0 and batches != float("inf"):
        shares.append(trainer.fit_loop.total_batch_idx / (epochs * batches))
    return max(shares, default=None)

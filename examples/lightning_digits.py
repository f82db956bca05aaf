"""Prune a network in Lightning, with one backward pass for both levels, or with a loader for each.

    python3 examples/lightning_digits.py                   weights and masks learn from the same batches
    python3 examples/lightning_digits.py --two-loaders     weights learn from one half of the images, masks from the other

Needs `pip install 'bip_fast[lightning]' scikit-learn`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split

from bip_fast import FastBiP
from bip_fast.integrations.lightning import BiPCallback


class Digits(LightningModule):
    """One batch a step."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))

    def configure_optimizers(self):
        steps = self.trainer.estimated_stepping_batches
        opt = FastBiP(self, sparsity=0.9, preset="joint", optimizer="adamw", lr=3e-3, steps=steps)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps)
        return {"optimizer": opt, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def loss(self, batch):
        x, y = batch
        return F.cross_entropy(self.layers(x), y)

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def test_step(self, batch, batch_idx):
        x, y = batch
        self.log("accuracy", (self.layers(x).argmax(1) == y).float().mean())


class TwoLevels(Digits):
    """A batch for each level, as in the paper, with manual optimization."""

    automatic_optimization = False

    def configure_optimizers(self):
        steps = 2 * self.trainer.estimated_stepping_batches  # two a batch
        return FastBiP(self, sparsity=0.9, preset="joint", levels="alternating", optimizer="adamw", lr=1e-3, steps=steps)

    def training_step(self, batch, batch_idx):
        opt = self.optimizers()
        for level in ("lower", "upper"):  # in this order, as steps do; once the masks are frozen, all steps are lower ones
            opt.zero_grad()
            self.manual_backward(self.loss(batch[level]))
            opt.step()


def main(arguments: list[str] | None = None) -> float:
    """Returns the accuracy of the pruned network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--two-loaders", action="store_true")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("runs/lightning"))
    options = parser.parse_args(arguments)

    seed_everything(0, verbose=False)
    images, labels = (torch.tensor(x) for x in load_digits(return_X_y=True))
    train, test = random_split(TensorDataset(images.float() / 16, labels), [1200, len(labels) - 1200])
    if options.two_loaders:
        halves = random_split(train, [0.5, 0.5])
        loaders = {level: DataLoader(own, batch_size=50, shuffle=True) for level, own in zip(("lower", "upper"), halves, strict=True)}
        module = TwoLevels()
    else:
        loaders = DataLoader(train, batch_size=50, shuffle=True)
        module = Digits()
    trainer = Trainer(
        max_epochs=options.epochs,
        callbacks=[BiPCallback(freeze_at=0.8)],  # the last fifth of the run only fine-tunes
        logger=CSVLogger(options.out),
        log_every_n_steps=10,
        enable_progress_bar=sys.stderr.isatty(),
        enable_model_summary=False,
    )
    trainer.fit(module, loaders)
    trainer.save_checkpoint(options.out / "pruned.ckpt")

    accuracy = trainer.test(module, DataLoader(test, batch_size=200), verbose=False)[0]["accuracy"]
    zeros = sum(int((p == 0).sum()) for p in module.parameters() if p.dim() == 2)
    total = sum(p.numel() for p in module.parameters() if p.dim() == 2)
    print(f"{zeros:,} of {total:,} weights are zero; accuracy on {len(test)} test images: {accuracy:.3f}")
    return accuracy


if __name__ == "__main__":
    main()

"""Lightning: both kinds of optimization, logs, masks that freeze, checkpoints, the end."""

import csv
import logging
import warnings

import pytest
import torch
from helpers import assert_bits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from bip_fast import FastBiP

pytest.importorskip("lightning", reason="needs lightning: pip install 'bip_fast[lightning]'")
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from bip_fast.integrations.lightning import BiPCallback

EPOCHS, BATCHES = 4, 3
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::FutureWarning", "ignore::DeprecationWarning:torch")


@pytest.fixture(autouse=True)
def quiet():
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def loader(seed=0):
    random = torch.Generator().manual_seed(seed)
    x, y = torch.randn(12, 6, generator=random), torch.randint(3, (12,), generator=random)
    return DataLoader(TensorDataset(x, y), batch_size=4)


class Network(LightningModule):
    def __init__(self, seed=0, **options):
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
        self.options = {"sparsity": 0.8} | options

    def configure_optimizers(self):
        return FastBiP(self, **self.options)

    def loss(self, batch):
        x, y = batch
        return nn.functional.cross_entropy(self.layers(x), y)

    def training_step(self, batch, batch_idx):
        return self.loss(batch)


class Growing(Network):
    def configure_optimizers(self):
        steps = self.trainer.estimated_stepping_batches
        opt = FastBiP(self, preset="joint", optimizer="adamw", lr=1e-2, steps=steps, **self.options)
        schedule = torch.optim.lr_scheduler.LinearLR(opt, 1.0, 0.1, steps)
        return {"optimizer": opt, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class TwoLoaders(Network):
    """A lower step on a batch of one loader, an upper step on one of the other."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        opt = self.optimizers()
        for phase in ("lower", "upper"):
            opt.zero_grad()
            self.manual_backward(self.loss(batch[phase]))
            with getattr(opt, phase)():
                opt.step()


def fit(module, folder, *callbacks, loaders=None, epochs=EPOCHS, **options):
    checkpoint = options.pop("ckpt_path", None)
    common = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    trainer = Trainer(max_epochs=epochs, default_root_dir=folder, callbacks=list(callbacks), **common | options)
    trainer.fit(module, loaders or loader(), ckpt_path=checkpoint)
    return trainer


class StopAt(Callback):
    """Ends the run as early stopping does."""

    def __init__(self, epochs):
        self.epochs = epochs

    def on_train_epoch_end(self, trainer, module):
        trainer.should_stop = trainer.current_epoch + 1 >= self.epochs


@pytest.mark.parametrize("kind", [Growing, TwoLoaders])
def test_a_resumed_run_has_the_bits_of_one_that_was_never_interrupted(tmp_path, kind):
    loaders = {"lower": loader(0), "upper": loader(1)} if kind is TwoLoaders else loader()
    whole, first, second = kind(), kind(), kind(seed=1)
    fit(whole, tmp_path, BiPCallback(), loaders=loaders, enable_checkpointing=False)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        saved = ModelCheckpoint(tmp_path / "files", save_last=True)
        fit(first, tmp_path, BiPCallback(), StopAt(2), saved, loaders=loaders)
    assert any("before the sparsity had grown" in str(warning.message) for warning in told) == (kind is Growing)
    trainer = fit(second, tmp_path, BiPCallback(), loaders=loaders, ckpt_path=saved.last_model_path, enable_checkpointing=False)
    assert trainer.global_step == EPOCHS * BATCHES * (2 if kind is TwoLoaders else 1)
    for (name, p), expected in zip(second.named_parameters(), whole.parameters(), strict=True):
        assert_bits(p.detach(), expected.detach(), name)
    zeros = sum(int((p == 0).sum()) for p in whole.parameters() if p.dim() == 2)
    assert zeros == round(0.8 * (6 * 16 + 16 * 3))


def test_metrics_reach_the_logger_and_the_end_is_a_plain_file(tmp_path):
    module, logger = Network(), CSVLogger(tmp_path, name="logs")
    trainer = fit(module, tmp_path, BiPCallback(layers=True), logger=logger, log_every_n_steps=2, enable_checkpointing=False)
    with open(logger.experiment.metrics_file_path) as file:
        logged = list(csv.DictReader(file))
    assert [int(row["step"]) for row in logged] == [1, 3, 5, 7, 9, 11]
    assert {float(row["pruning/kept"]) for row in logged} == {144 - round(0.8 * 144)}
    assert "pruning/layer_sparsity/layers.0.weight" in logged[0]
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    saved = torch.load(tmp_path / "end.ckpt", weights_only=True)
    assert saved["optimizer_states"] == []
    assert_bits(saved["state_dict"]["layers.0.weight"], module.layers[0].weight.detach())
    with pytest.warns(UserWarning, match="masks are learned anew"):
        fit(Network(), tmp_path, BiPCallback(), epochs=EPOCHS + 1, ckpt_path=tmp_path / "end.ckpt", enable_checkpointing=False)


def test_metrics_are_read_once_a_step_while_gradients_accumulate(tmp_path, monkeypatch):
    steps, metrics = [], FastBiP.metrics
    module = Network()
    monkeypatch.setattr(FastBiP, "metrics", lambda opt, **own: steps.append(module.trainer.global_step) or metrics(opt, **own))
    fit(module, tmp_path, BiPCallback(), epochs=2, accumulate_grad_batches=2, log_every_n_steps=1, enable_checkpointing=False)
    assert steps == [1, 2, 3, 4]  # of three batches an epoch the last is a step of its own


@pytest.mark.parametrize("options", [{}, {"max_steps": EPOCHS * BATCHES, "epochs": -1}])
def test_masks_freeze(tmp_path, options):
    masks = []

    class Masks(Callback):
        def on_train_batch_end(self, trainer, module, *_):
            masks.append(module.layers[0].weight.detach() != 0)

    module = Network(levels="joint", mask_lr=30.0)
    fit(module, tmp_path, Masks(), BiPCallback(freeze_at=0.5), enable_checkpointing=False, **options)
    half = EPOCHS * BATCHES // 2
    assert not torch.equal(masks[half - 1], masks[half - 2])
    assert all(torch.equal(mask, masks[half - 1]) for mask in masks[half:])


def test_finalize_through_the_wrapper_of_lightning_reaches_the_optimizer(tmp_path):
    class Own(Network):
        def on_train_end(self):
            self.optimizers().finalize()

    module = Own()
    trainer = fit(module, tmp_path, enable_checkpointing=False)
    assert trainer.optimizers[0].report().sparsity == pytest.approx(0.8, abs=0.01)
    with pytest.raises(RuntimeError, match="finalize"):
        trainer.optimizers[0].step()


def test_what_cannot_work_is_an_error(tmp_path):
    class Plain(Network):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    with pytest.raises(TypeError, match="must return a FastBiP for BiPCallback, got SGD"):
        fit(Plain(), tmp_path, BiPCallback(), enable_checkpointing=False)
    with pytest.raises(ValueError, match="freeze_at needs a Trainer with max_steps"):
        fit(Network(), tmp_path, BiPCallback(freeze_at=0.5), epochs=-1, enable_checkpointing=False)

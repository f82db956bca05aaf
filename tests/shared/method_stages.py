"""A small network at the beginning of a stage, for the tests of methods."""

from dataclasses import replace

import torch

from bip_fast.engine.layers import weights
from bip_fast.experiments.methods import begin as optimizers
from bip_fast.experiments.methods.table import stages
from bip_fast.experiments.models import names as models
from bip_fast.experiments.runs.settings import Settings
from bip_fast.experiments.runs.training import Cursor, train


def network(seed=0, width=2):
    torch.manual_seed(seed)
    return models.build("resnet20", 1, 10, width=width)


def settings_of(method, **given):
    return Settings.of({"method": method, "width": 2, "batch_size": 200, "pretrain_epochs": 2, "epochs": 3, "sparsity": 0.8, **given})


def begun(method, digits, model, number=0, **given):
    """The first stage of a method that prunes, begun on ``model``."""
    settings = settings_of(method, **given)
    stage = [stage for stage in stages(settings) if stage.sparsity is not None][number]
    return stage, optimizers.begin(stage, model, settings, digits)


def flat_weights(model):
    return torch.cat([x.detach().flatten() for _, x in weights(model)])


def run_stage(stage, opt, model, digits, epochs=1):
    recipe = replace(stage.recipe, epochs=epochs)
    with optimizers.moving(stage, opt):
        train(model, opt, digits, recipe, Cursor(), before_step=optimizers.before_step(stage, opt))

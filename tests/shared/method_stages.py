"""A small network at the beginning of a stage, for the tests of methods."""

from dataclasses import replace

import torch

from bip_fast.engine.layers import weights
from bip_fast.experiments.methods import begin
from bip_fast.experiments.methods.table import stages
from bip_fast.experiments.models.names import build
from bip_fast.experiments.runs.resolve import resolve
from bip_fast.experiments.runs.training import Cursor, train


def network(seed=0, width=2):
    torch.manual_seed(seed)
    return build("resnet20", 1, 10, width=width)


def settings_of(method, **given):
    return resolve({"method": method, "width": 2, "batch_size": 200, "pretrain_epochs": 2, "epochs": 3, "sparsity": 0.8, **given})


def begun(method, digits, model, number=0, **given):
    """The first stage of a method that prunes, begun on ``model``."""
    settings = settings_of(method, **given)
    stage = [stage for stage in stages(settings) if stage.sparsity is not None][number]
    return stage, begin.begin(stage, model, settings, digits)


def flat_weights(model):
    return torch.cat([x.detach().flatten() for _, x in weights(model)])


def run_stage(stage, opt, model, digits, epochs=1):
    recipe = replace(stage.recipe, epochs=epochs)
    with begin.moving(stage, opt):
        train(model, opt, digits, recipe, Cursor(), before_step=begin.before_step(stage, opt))

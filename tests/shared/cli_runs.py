"""Shared by the tests of the command line: a tiny run, a display that interrupts, models of the user's own."""

import os
import signal

from bip_fast.commands import cli
from bip_fast.experiments.runs import display

OWN = """
from torch import nn
def norm(channels, classes):
    return nn.Sequential(nn.BatchNorm2d(channels), nn.Flatten(), nn.AdaptiveAvgPool1d(classes))
def narrow(channels, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
def random(channels, classes):
    return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, classes))
def frozen(channels, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, classes)).requires_grad_(False)
def normed(channels, classes):
    return nn.Sequential(nn.Flatten(), nn.utils.parametrizations.weight_norm(nn.Linear(64, classes)))
def double(channels, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, classes).double())
def large(channels, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(784, classes))
"""


SMALL = ["--width", "2", "--batch-size", "200", "--pretrain-epochs", "2", "--epochs", "3", "--sparsity", "0.8"]
FILES = {"config.json", "checkpoint.pt", "dense.safetensors", "model.safetensors", "curves.png", "report.json", ".lock"}


def load_weights(path):
    from safetensors.torch import load_file

    return load_file(path)


def prune(out, *options):
    return cli.main(["prune", *SMALL, "--out", str(out), *options])


def one_line(text):
    assert text.endswith("\n")
    assert text.count("\n") == 1, text
    return text


class Interrupting(display.Display):
    """Sends a real SIGINT to this process after so many batches."""

    def __init__(self, after):
        self.after = after

    def wants(self):
        self.after -= 1
        if self.after == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return False

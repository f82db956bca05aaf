"""Run by test_together.py under torchrun, on every rank of a job: commands one after another, and how each ended. In the last one a rank
fails.

Usage: torchrun --nproc-per-node N together.py FOLDER
"""

import json
import shutil
import sys
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

from cli_runs import Interrupting

from bip_fast.commands import cli
from bip_fast.errors import UserError
from bip_fast.experiments import ranks
from bip_fast.experiments.compare import cell
from bip_fast.experiments.runs import display
from bip_fast.experiments.runs.folder import DamagedCheckpoint, RunFolder

OWN = """
import torch
from torch import nn
def plain(channels, classes):
    layers = nn.Conv2d(channels, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 16), nn.ReLU(), nn.Linear(16, classes)
    model = nn.Sequential(*layers)
    model.register_parameter("unused", nn.Parameter(torch.ones(3)))
    return model
def noisy(channels, classes):
    first = nn.Sequential(nn.Conv2d(channels, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2))
    return nn.Sequential(first, nn.Linear(144, 64), nn.ReLU(), nn.Linear(64, 144), nn.ReLU(), nn.Linear(144, classes))
def fails(channels, classes):
    return nn.Sequential(nn.Flatten(), Fails(64, classes))
class Fails(nn.Linear):
    calls = 0
    def forward(self, x):
        import os
        Fails.calls += os.environ["RANK"] == "1"
        if Fails.calls > 6:
            raise ValueError("what rank 1 says")
        return super().forward(x)
"""
GRID = """
model: {model}
batch_size: 200
pretrain_epochs: 1
epochs: 1
sparsity: 0.8
methods:
  snip:
  imp: {{rewind: 1, per_round: 0.6}}
  diverges: {{method: dense, lr: 1.0e+30}}
"""


run = cli._run


def options(folder, model, out):
    """Of `prune`: 10 batches of dense training, then 15 of pruning."""
    settings = ["--batch-size", "200", "--pretrain-epochs", "2", "--epochs", "3", "--sparsity", "0.8"]
    return ["--model", f"{folder / 'own.py'}:{model}", *settings, "--out", str(out)]


def ended(command, *arguments, stop_after=None):
    """The exit code. ``stop_after``: rank 1 alone is interrupted after so many batches."""
    shown = Interrupting(stop_after) if stop_after and ranks.rank() == 1 else display.Display()
    with patch.object(display, "make", lambda: shown), patch.object(cell._Telling, "wants", lambda _: shown.wants()):
        try:
            return run(command, [command, *map(str, arguments)])
        except UserError as error:
            return str(error)


def missing(folder):
    ranks.agree(True)


def damaged(folder):
    ranks.agree(True)
    raise DamagedCheckpoint(folder.path / "checkpoint.pt", "is damaged")


def with_config_alone(folder, run):
    """A folder on another machine, which has only seen the run begin."""
    if ranks.rank() == 1:
        shutil.copy(run / "config.json", folder)
    return folder if ranks.rank() == 1 else run


def ended_where_rank_1_reads(checkpoint, *command):
    with patch.object(RunFolder, "load_checkpoint", checkpoint) if ranks.rank() == 1 else nullcontext():
        return ended(*command)


def main(folder):
    grid = folder / "grid.yaml"
    if not ranks.rank():
        (folder / "elsewhere").mkdir()
        (folder / "own.py").write_text(OWN)
        grid.write_text(GRID.format(model=f"{folder / 'own.py'}:plain"))
    ranks.broadcast_object(None)
    return {
        "plain": ended("prune", *options(folder, "plain", folder / "plain")),
        "whole": ended("prune", *options(folder, "noisy", folder / "whole")),
        "stopped": ended("prune", *options(folder, "noisy", folder / "stopped"), stop_after=7),
        "resumed": ended("prune", "--resume", folder / "stopped"),
        "left": ended("prune", *options(folder, "noisy", folder / "left"), stop_after=12),
        "compare": ended("compare", grid, "--out", folder / "grid", stop_after=7),
        "stale": ended_where_rank_1_reads(missing, "prune", "--resume", folder / "left"),
        "elsewhere": ended("prune", "--resume", with_config_alone(folder / "elsewhere", folder / "left")),
        "compare again": ended_where_rank_1_reads(damaged, "compare", grid, "--out", folder / "grid"),
        "jobs": ended("compare", grid, "--out", folder / "grid", "--jobs", 2),
    }


def everything(command, arguments):
    """In the place of a single command."""
    folder = Path(sys.argv[1])
    (folder / f"ended-{ranks.rank()}.json").write_text(json.dumps(main(folder)))
    return run("prune", ["prune", *options(folder, "fails", folder / "fails")])


if __name__ == "__main__":
    with patch.object(cli, "_run", everything):
        sys.exit(cli.main(["prune"]))

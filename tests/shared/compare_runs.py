"""Comparisons that take seconds, for the tests of `bip-fast compare`."""

import csv
import errno
from pathlib import Path

import pytest

from bip_fast.commands import cli
from bip_fast.experiments.compare import cluster

TINY = """
data: digits
model: resnet20
width: 2
batch_size: 200
pretrain_epochs: 2
epochs: 2
sparsity: [0.8, 0.5]
seed: [0, 1]
methods:
  dense: {epochs: 0}
  BiP: {method: bip, levels: joint}
  imp: {rewind: 1, per_round: 0.5}
  random:
"""

SHORT = """
data: digits
model: resnet20
width: 2
train_images: 200
batch_size: 200
pretrain_epochs: 1
epochs: 1
methods:
"""


needs_ray = pytest.mark.skipif(not cluster.available(), reason=f"needs Ray: {cluster.INSTALL}")
JOBS = ["1", pytest.param("2", marks=needs_ray)]


def written(folder, text=TINY, name="tiny.yaml"):
    path = folder / name
    path.write_text(text)
    return path


def compare(config, out, *options):
    """In this process, one run after another, unless ``options`` say another number of jobs."""
    return cli.main(["compare", str(config), "--out", str(out), "--device", "cpu", "--jobs", "1", *options])


def rows_of(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def unreadable(monkeypatch, path):
    """The machine cannot open the file ``path``, which is whole."""
    open_file = Path.open

    def fail(self, *args, **more):
        if self == path:
            raise OSError(errno.EMFILE, "Too many open files", str(self))
        return open_file(self, *args, **more)

    monkeypatch.setattr(Path, "open", fail)

"""Prune half of the filters of a residual network, cut them out, and run what is left in ONNX Runtime.

    python3 examples/filters_to_onnx.py --out small.onnx

Filters whose outputs are added in a residual join are pruned together, so the smaller network has ordinary, thinner layers.
Needs `pip install 'bip_fast[export]' scikit-learn`.
"""

from __future__ import annotations

import argparse
import copy
import logging
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from bip_fast import FastBiP
from bip_fast.export import coupled_filters, measure, shrink

BATCH, TRAIN = 100, 1200


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.norm1, self.norm2 = (nn.BatchNorm2d(width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm2(self.second(F.relu(self.norm1(self.first(x))))))


def train(model: nn.Module, opt: torch.optim.Optimizer, epochs: int, images: Tensor, labels: Tensor) -> None:
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, epochs * TRAIN // BATCH)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(TRAIN).split(BATCH):
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            opt.step()
            opt.zero_grad()
            schedule.step()


def main(arguments: list[str] | None = None) -> float:
    """Returns the share of its parameters that the smaller network has."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("small.onnx"))
    parser.add_argument("--epochs", type=int, default=8, help="of dense training, and again of pruning")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    images, labels = (torch.tensor(x) for x in load_digits(return_X_y=True))
    images = images.float().view(-1, 1, 8, 8) / 16
    model = nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), Block(32), Block(32)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)),
    )
    train(model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), options.epochs, images, labels)
    dense = copy.deepcopy(model)

    steps = options.epochs * TRAIN // BATCH
    coupled = coupled_filters(model, images[:1])
    opt = FastBiP(model, sparsity=0.5, pattern="filter", scope="layer", coupled=coupled, preset="joint", lr=0.05, steps=steps)
    train(model, opt, options.epochs, images, labels)
    opt.finalize()
    model.eval()

    small = shrink(model, images[:1])
    print(small)
    test = [(images[TRAIN:], labels[TRAIN:])]
    result = measure(model, images[:1], dense=dense, data=test, batch_sizes=(32,), seconds=0.5, runtime="onnxruntime")
    print(result)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    torch.onnx.export(small.model, (images[:1],), options.out, dynamo=True, verbose=False, external_data=False)
    print(f"written: {options.out}, {options.out.stat().st_size:,} bytes")
    return sum(p.numel() for p in small.model.parameters()) / sum(p.numel() for p in dense.parameters())


if __name__ == "__main__":
    main()

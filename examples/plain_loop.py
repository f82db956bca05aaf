"""Train a small network on handwritten digits, then prune 95 % of its weights: two plain training loops, of which the second has FastBiP.

    python3 examples/plain_loop.py

Needs `pip install bip_fast scikit-learn`.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from bip_fast import FastBiP

torch.manual_seed(0)
images, labels = (torch.tensor(x) for x in load_digits(return_X_y=True))
images = images.float() / 16
train, test = slice(0, 1200), slice(1200, None)
loader = DataLoader(TensorDataset(images[train], labels[train]), batch_size=100, shuffle=True)
model = nn.Sequential(nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))


def run(optimizer: torch.optim.Optimizer, epochs: int) -> float:
    """Train for so many epochs under a cosine schedule; returns the accuracy on the test images."""
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(loader))
    for _ in range(epochs):
        for x, y in loader:
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    with torch.no_grad():
        return float((model(images[test]).argmax(1) == labels[test]).float().mean())


epochs = 15
dense = run(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), epochs)
opt = FastBiP(model, sparsity=0.95, preset="joint", steps=epochs * len(loader))  # the sparsity grows in the first half of the steps
pruned = run(opt, epochs)
opt.finalize()  # a plain model with exact zeros
print(opt.report())
print(f"accuracy on {len(labels[test])} test images: dense {dense:.3f}, pruned {pruned:.3f}")

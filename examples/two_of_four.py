"""Prune a network to 2:4, the pattern that NVIDIA GPUs multiply faster (Ampere and later): two of every four neighbours are zero.

    python3 examples/two_of_four.py

On such a GPU the matrices then become semi-structured tensors of torch. Elsewhere this says why they cannot, and the zeros stay.
Needs `pip install bip_fast scikit-learn`.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from bip_fast import FastBiP
from bip_fast.export import to_semi_structured

EPOCHS, BATCH = 10, 128


def main() -> float:
    """Returns the accuracy of the pruned network."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    images, labels = (torch.tensor(x, device=device) for x in load_digits(return_X_y=True))
    images = images.float() / 16
    train, test = slice(0, 1200), slice(1200, None)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)).to(device)

    # 2:4 has a sparsity of its own. Of the first layer all 64 inputs have a neighbour; the last layer is small, so it stays dense.
    opt = FastBiP(model, pattern="2:4", exclude=["4"], optimizer="adamw", preset="joint", lr=3e-3, steps=EPOCHS * (1200 // BATCH))
    for _ in range(EPOCHS):
        for batch in torch.randperm(1200, device=device).split(BATCH)[: 1200 // BATCH]:
            F.cross_entropy(model(images[train][batch]), labels[train][batch]).backward()
            opt.step()
            opt.zero_grad()
    print(opt.report())
    opt.finalize()

    for name in ("0", "2"):  # no four neighbours keep more than two
        weight = model.get_submodule(name).weight
        assert int((weight.view(-1, 4) != 0).sum(1).max()) == 2
    accuracy = float((model(images[test]).argmax(1) == labels[test]).float().mean())
    print(f"accuracy on {len(labels[test])} test images: {accuracy:.3f}")

    result = to_semi_structured(model.half() if device == "cuda" else model)
    print(result)
    return accuracy


if __name__ == "__main__":
    main()

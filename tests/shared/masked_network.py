"""A network with layers of every kind, its pruned form, and a few steps of training."""

import warnings

import torch
from torch import nn


class Network(nn.Module):
    """Conv in channels_last, Linear, norms, a tied pair, a layer without weights, one that is never pruned."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3, padding=1)
        self.norm = nn.BatchNorm2d(5)
        self.fc = nn.Linear(5, 7)
        self.tied = nn.Linear(7, 7)
        self.tied_too = nn.Linear(7, 7)
        self.tied_too.weight = self.tied.weight
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Initializing zero-element tensors is a no-op")
            self.empty = nn.Linear(0, 4, bias=False)
        self.whole = nn.Linear(7, 2)

    def forward(self, x):
        x = self.fc(torch.relu(self.norm(self.conv(x))).mean((2, 3)))
        return self.whole(self.tied_too(torch.relu(self.tied(x))))


def pruned(seed=0, dtype=torch.float32, keep=0.4):
    torch.manual_seed(seed)
    model = Network().to(memory_format=torch.channels_last)
    with torch.no_grad():
        for name in ("conv", "fc", "tied"):
            p = getattr(model, name).weight
            p.mul_(torch.rand(p.shape) < keep)
    return model.to(dtype)


def dead(model, masks):
    """The entries that must be zero, all in one tensor."""
    params = dict(model.named_parameters(remove_duplicate=False))
    return torch.cat([params[name].detach()[~mask.to(params[name].device)].flatten().float() for name, mask in masks.items()])


def train(model, optimizer, steps, after=lambda: None):
    dtype = model.whole.weight.dtype
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(6, 3, 4, 4).to(dtype)).square().sum().backward()
        after()
        optimizer.step()


def with_filters(seed=0):
    """Layers whose filters take a batch-norm and biases along; behind SiLU a constant of a dead filter would be felt."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.SiLU(), nn.ConvTranspose2d(8, 6, 3, groups=2), nn.SiLU(), nn.Flatten(), nn.Linear(96, 4)
    )
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() < 2:
                p.copy_(torch.rand(p.shape) + (0.5 if name != "1.bias" else -1))
    return model

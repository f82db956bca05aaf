"""`topk_mask` alone: keep the k largest of any number of scores, exactly, with one result on every device.

    python3 examples/topk.py

Here the score of a weight is its magnitude times the norm of its input (as in Wanda), relative to the mean of its layer, and the weights of
two layers compete with each other.
"""

from __future__ import annotations

import time

import torch
from torch import nn

from bip_fast import topk_mask


def main() -> int:
    """Returns how many weights are kept."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layers = nn.Sequential(nn.Linear(512, 1024), nn.ReLU(), nn.Linear(1024, 512)).to(device)
    x = torch.randn(256, 512, device=device)
    norms = [x.norm(dim=0), layers[:2](x).norm(dim=0)]
    weights = [layers[0].weight, layers[2].weight]
    scores = [w.detach().abs() * norm for w, norm in zip(weights, norms, strict=True)]
    scores = torch.cat([(own / own.mean()).flatten() for own in scores])

    k = scores.numel() // 10
    mask = topk_mask(scores, k)  # bool, exactly k ones; nothing waits for the device
    with torch.no_grad():
        for w, own in zip(weights, mask.split([w.numel() for w in weights]), strict=True):
            w.mul_(own.view_as(w))
    kept = sum(int(w.count_nonzero()) for w in weights)
    print(f"kept {kept:,} of {scores.numel():,} weights: {[int(w.count_nonzero()) for w in weights]} of the two layers")

    # Scores that are equal are the rule where a score is clipped. The mask is still exact, spread out evenly, and the same everywhere.
    equal = topk_mask(torch.full((1000, 100), 0.5, device=device), 30_000)
    rows = equal.sum(1)
    print(f"of 100,000 equal scores {int(equal.sum()):,} are kept, between {int(rows.min())} and {int(rows.max())} in each row of 100")

    times = {}
    large = torch.rand(4_000_000, device=device)
    for name, method in {"topk_mask": lambda: topk_mask(large, 400_000), "torch.topk": lambda: torch.topk(large, 400_000)}.items():
        method()
        start = time.perf_counter()
        for _ in range(3):
            method()
        if device == "cuda":
            torch.cuda.synchronize()
        times[name] = (time.perf_counter() - start) / 3
    print(f"of 4,000,000 scores: {', '.join(f'{name} {1e3 * t:.1f} ms' for name, t in times.items())}")
    return kept


if __name__ == "__main__":
    main()

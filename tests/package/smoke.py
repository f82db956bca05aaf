"""An installed bip_fast by itself, as its users have it: a few steps against the reference, and the build it says it is.

python tests/package/smoke.py         needs torch and numpy only; run it outside of the source tree, or that would be imported
"""

from __future__ import annotations

import copy
import sys

import torch
from torch import nn

import bip_fast
from bip_fast import FastBiP, reference, topk_mask


def check_masks() -> None:
    for n, k in ((1, 0), (1, 1), (4097, 1000), (300_000, 299_999)):
        scores = torch.randn(n, generator=torch.Generator().manual_seed(n)).round(decimals=2)  # with many ties
        assert torch.equal(topk_mask(scores, k), reference.topk_mask(scores, k)), (n, k)


def check_steps() -> None:
    """The invariant of every step, exactly the zeros that were asked for, and a resume that changes no bit."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 10))
    opt = FastBiP(model, sparsity=0.9)
    weights = [model[0].weight, model[3].weight]

    def step(model: nn.Module, opt: FastBiP, seed: int) -> None:
        x = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
        model(x).square().mean().backward()
        opt.step()
        opt.zero_grad()

    for seed in range(4):
        step(model, opt, seed)
        for weight in weights:
            assert torch.equal(weight, opt.weight_of(weight) * opt.mask_of(weight))
    n = sum(weight.numel() for weight in weights)
    assert sum(int(opt.mask_of(weight).sum()) for weight in weights) == n - round(0.9 * n)
    again = copy.deepcopy(model)
    resumed = FastBiP(again, sparsity=0.9)
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    for seed in range(4, 8):
        step(model, opt, seed)
        step(again, resumed, seed)
    for (name, one), other in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    opt.finalize()
    assert sum(int((weight == 0).sum()) for weight in weights) == round(0.9 * n)


def main() -> None:
    check_masks()
    check_steps()
    info = bip_fast.build_info()
    cuda = info["cuda_toolkit"] if info["cuda"] else "no"
    python = ".".join(map(str, sys.version_info[:2]))
    print(f"bip_fast {bip_fast.__version__} ({info['simd']}, CUDA: {cuda}) works with torch {torch.__version__} on Python {python}")


if __name__ == "__main__":
    main()

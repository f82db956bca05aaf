"""Run by test_vector_widths.py in a new process, whose BIP_FAST_SIMD says how wide vectors may be: prints the width and digests of states.

Usage: python simd_child.py
"""

import hashlib
import itertools

import torch
from helpers import fill_gradients, make_params
from torch import Tensor, nn

import bip_fast

EDGES = [1, 31, 32, 33, 127, 129, 1023, 1024, 1025, 3000]
LARGE = 4097 * 1024 + 77  # from 4096 tiles on, kStreamFrom in cpu/stream.h, z is written past the caches


def digest(params: list[nn.Parameter], phases: tuple[str, ...], **options: object) -> str:
    """Of all parameters and their state, after a step of every phase."""
    opt = bip_fast.FastBiP(params, sparsity=0.7, mask_lr=0.3, gamma=0.7, weight_decay=0.013, lr=0.03, **options)
    for i, phase in enumerate(phases):
        fill_gradients(params, i)
        with getattr(opt, phase)():
            opt.step()
    found = hashlib.sha256()
    for x in [*params, *(x for state in opt.state.values() for x in state.values() if isinstance(x, Tensor))]:
        found.update(x.detach().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def main() -> None:
    torch.set_num_threads(2)
    print(bip_fast.build_info()["simd"])
    for rule, dtype in itertools.product(("sgd", "adamw"), (torch.float32, torch.bfloat16, torch.float16)):
        params = make_params(EDGES, dtype=dtype) + make_params([70], 1, dtype=dtype, pruned=False)
        print(rule, dtype, digest(params, ("lower", "upper", "joint", "lower"), optimizer=rule, mask_momentum=0.5))
        if dtype != torch.float16:
            # one begins where a cache line does, one does not
            flat = torch.randn(LARGE, generator=torch.Generator().manual_seed(2)).to(dtype)
            parts = [nn.Parameter(part.view(1, -1)) for part in flat.split([LARGE // 2 // 64 * 64 + 1, LARGE - LARGE // 2 // 64 * 64 - 1])]
            print("large", rule, dtype, digest(parts, ("lower", "joint", "lower"), optimizer=rule))


if __name__ == "__main__":
    main()

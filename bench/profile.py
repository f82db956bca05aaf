"""A few warm steps and masks, and nothing else: what a profiler is pointed at.

    ncu --clock-control none --set full -k regex:step_ -c 12 python3 -m bench.profile --n 25.6e6

Upper steps come warm, and then with no window to start from.
"""

from __future__ import annotations

import argparse

import torch

from bench.peers import fastbip
from bench.workload import Case, scores_of, workload_of
from bip_fast import topk_mask


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=float, nargs="+", default=[25.6e6], help="weights, in one tensor")
    parser.add_argument("--steps", nargs="+", default=["lower", "upper", "joint"], choices=["lower", "upper", "joint"])
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    device = torch.device(options.device)
    for n in map(int, options.n):
        for step, state in [*((step, "warm") for step in options.steps), ("upper", "no window")]:
            case = Case(step, n, state=state)
            row = fastbip(workload_of(case, device), case)
            for _ in range(2):
                if row.before:
                    row.before()
                row.call()
        scores = scores_of("trained-like", n, device)
        topk_mask(scores, n // 10)
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()

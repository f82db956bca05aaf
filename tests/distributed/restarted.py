"""Run by test_together.py under torchrun, on both ranks of a job that is started again once: each time both fail.

Usage: torchrun --max-restarts 1 --nproc-per-node 2 restarted.py FOLDER
"""

import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from bip_fast.experiments import ranks

ranks.FAIL_TOGETHER = timedelta(seconds=1)


def main(attempt, folder):
    ranks.all_reduce_sum(torch.ones(1))
    alike = ranks.all_failed()
    if ranks.rank():
        dist.all_reduce(torch.ones(1), async_op=True)  # as in a backward pass that one rank alone has begun
    apart = ranks.all_failed()
    (folder / f"{attempt}-{ranks.rank()}").write_text(f"{alike} {apart}")
    raise ValueError(f"what attempt {attempt} says")


if __name__ == "__main__":
    with ranks.opened():
        main(os.environ["TORCHELASTIC_RESTART_COUNT"], Path(sys.argv[1]))

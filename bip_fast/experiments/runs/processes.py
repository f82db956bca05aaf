"""What a checkpoint knows of the processes that train: how many, and the random state of each; and a check that all read the same one.

Rank 0 draws what a single process would draw (for dropout and the like), and the others numbers of their own.
"""

from __future__ import annotations

from typing import Any

import torch

from ...errors import UserError
from .. import ranks
from ..data.batches import Position

__all__ = ["at_one_place", "load_processes", "processes_state", "seed_process"]


def at_one_place(done: int) -> int:
    """How many batches the run has done. Every rank must call this.

    Raises:
        UserError: (on all ranks) not all have done as many.
    """
    if not ranks.agree(done):
        raise UserError("all processes must go on from the same batch, but some have read another checkpoint")
    return done


def seed_process(seed: int, stage: str = "", epoch: int = 0, step: int = 0) -> None:
    """Seed torch: rank 0 with the seed of the run, every other with one of its own, which depends on where the run stands."""
    position, rank = Position(seed, stage, epoch, step), ranks.rank()
    torch.manual_seed(position.generator(1 + rank).initial_seed() if rank else seed)  # 0 and 1 draw the batches


def processes_state(device: torch.device, counts: list[int]) -> dict[str, Any]:
    """For a checkpoint: ``counts`` of processes, one after another, and the states of all ranks, uint8 (ranks, bytes). Every rank must call
    this."""
    cuda = ranks.all_gather(torch.cuda.get_rng_state(device)) if device.type == "cuda" else None
    return {"processes": counts, "rng": ranks.all_gather(torch.get_rng_state()), "cuda_rng": cuda}


def load_processes(state: dict[str, Any], device: torch.device, *where: Any) -> list[int]:
    """Take up the random state of this rank. If there were more or fewer ranks, all but rank 0 are seeded by ``where`` the run stands
    (`seed_process`). Returns the counts with that of now."""
    rng, cuda = (torch.atleast_2d(x) if x is not None else None for x in (state["rng"], state["cuda_rng"]))  # once (bytes,), of one process
    assert rng is not None
    if len(rng) != ranks.count() and ranks.rank():
        seed_process(*where)
    else:
        torch.set_rng_state(rng[ranks.rank()].clone())  # torch reads a view from the wrong place
        if device.type == "cuda" and cuda is not None:
            torch.cuda.set_rng_state(cuda[ranks.rank()].clone(), device)
    before: list[int] = state.get("processes", [1])
    return before if before[-1] == ranks.count() else [*before, ranks.count()]

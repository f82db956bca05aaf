"""What all ranks of a job do, or none does. A check of what one rank has may fail on that rank alone, and the others would wait for it in
the next collective for ever."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist

from .shards import Ranks

__all__ = ["check_same", "number_of", "together"]


def number_of(x: Any) -> int:
    """62 bits that stand for a value, by its repr."""
    return int.from_bytes(hashlib.blake2b(repr(x).encode(), digest_size=8).digest(), "big") >> 2


@contextmanager
def together(ranks: Ranks, what: str) -> Iterator[None]:
    """Inside, each rank works for itself, without collectives. Where an error stops some, all ranks raise: these their own error, and the
    others one that quotes it. One small collective, so not for every step.

    Args:
        ranks: that must go on together.
        what: is done inside, for the error: the name of a call.

    Raises:
        ValueError: the error of another rank is one.
        RuntimeError: it is of any other kind.
    """
    try:
        yield
    except Exception as error:
        _errors(ranks, error)
        raise
    for rank, kind, text in _errors(ranks, None):
        raised = ValueError if kind == "ValueError" else RuntimeError
        raise raised(f"{what} failed on rank {rank}, so no rank did it. The error there is {kind}: {text}")


def _errors(ranks: Ranks, error: Exception | None) -> list[tuple[int, str, str]]:
    """Rank, kind and text of the errors on all ranks."""
    if not ranks.everyone:
        return []
    failed = torch.tensor(int(error is not None), device=ranks.device)
    for group in ranks.everyone:
        dist.all_reduce(failed, dist.ReduceOp.MAX, group=group)
    if not failed:
        return []
    kind = "ValueError" if isinstance(error, ValueError) else type(error).__name__
    known = [] if error is None else [(dist.get_rank(), kind, str(error))]
    for group in ranks.everyone:
        told: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(told, known, group=group)
        known = sorted({*chain.from_iterable(told)})
    return known


def check_same(ranks: Ranks, what: str, value: Any) -> None:
    """ValueError, on all ranks, unless all have the same ``value``, by its repr. One small collective."""
    if not ranks.everyone:
        return
    own = number_of(value)
    ends = torch.tensor([own, -own], device=ranks.device)
    for group in ranks.everyone:
        dist.all_reduce(ends, dist.ReduceOp.MAX, group=group)
    if int(ends[0]) != -int(ends[1]):
        raise ValueError(f"{what} must be the same on all ranks, got different ones")

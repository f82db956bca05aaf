"""Several processes that train one network together, as `torchrun` starts them: the only room that opens and ends their group.

Every rank goes the same way through a run and takes its own part of every batch (`Share`); DistributedDataParallel averages the gradients.
Rank 0 alone speaks and writes files. In a single process all of this does nothing, and needs no `torch.distributed`.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

__all__ = [
    "WHOLE",
    "Share",
    "agree",
    "all_failed",
    "all_gather",
    "all_reduce_max",
    "all_reduce_sum",
    "broadcast_",
    "broadcast_object",
    "count",
    "count_here",
    "on_rank_0",
    "opened",
    "rank",
    "rank_here",
    "replicated",
    "share",
]

T = TypeVar("T")
P = ParamSpec("P")

FAIL_TOGETHER = timedelta(seconds=10)  # ranks that fail for the same reason are at most a step apart
_stores: list[Any] = []  # that of the group while it is open, to talk where collectives do not work any more
_failures = itertools.count()


class Share(NamedTuple):
    """What one of several ranks takes: of ``n`` things the first, the one after ``ranks`` others, and so on."""

    rank: int = 0
    ranks: int = 1

    def every(self, batches: Iterable[T]) -> Iterator[T]:
        """Of whole batches, those of this rank."""
        return itertools.islice(batches, self.rank, None, self.ranks)


WHOLE = Share()

# --- the group -----------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def opened() -> Iterator[None]:
    """Inside, the processes that `torchrun` has started belong together, and all but rank 0 are silent.

    Of an error that leaves the context, on one rank or on all, the first rank that has it tells it: the others, which may only have lost
    the connection, go silently.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get("WORLD_SIZE", "1") == "1":
        yield
        return
    import torch.distributed as dist
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]
    from torch.distributed.rendezvous import rendezvous

    here, cuda = int(os.environ["LOCAL_RANK"]), torch.cuda.is_available()
    if cuda and here < torch.cuda.device_count():
        torch.cuda.set_device(here)
    store, own, ranks = next(iter(rendezvous("env://")))
    store = PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)  # torchrun --max-restarts keeps its store
    # What hosts decide together goes over gloo also where there are GPUs, which would have to be waited for.
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=PrefixStore("group", store), rank=own, world_size=ranks)
    _stores.append(store)
    silence = contextlib.ExitStack()
    nowhere = open(os.devnull, "w")  # noqa: SIM115
    if own:
        silence.enter_context(contextlib.redirect_stdout(nowhere))
        silence.enter_context(contextlib.redirect_stderr(nowhere))
    print(f"training on {ranks} processes", file=sys.stderr, flush=True)
    try:
        with silence:
            yield
    except BaseException:  # no destroy_process_group: NCCL would wait for ranks that are gone
        if store.add("ended", 1) > 1:
            sys.stdout = sys.stderr = nowhere
        raise
    finally:
        _stores.clear()
    if not own:
        store.add("ended", 1)
    dist.destroy_process_group()


def count() -> int:
    """How many processes train together."""
    return torch.distributed.get_world_size() if _stores else 1


def count_here() -> int:
    """How many of them are on this machine."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if _stores else 1


def rank_here() -> int:
    """The number of this process among those of this machine that see the same GPUs: 0 with ``torchrun --virtual-local-rank``."""
    return int(os.environ["LOCAL_RANK"]) if _stores else 0


def rank() -> int:
    """The number of this process among them."""
    return torch.distributed.get_rank() if _stores else 0


def share() -> Share:
    """The part of this process."""
    return Share(rank(), count())


def on_rank_0(method: Callable[P, None]) -> Callable[P, None]:
    """The same on rank 0, and nothing on the others."""

    @functools.wraps(method)
    def call(*args: P.args, **named: P.kwargs) -> None:
        if not rank():
            method(*args, **named)

    return call


# --- what they tell each other: every rank must call these, in the same order ----------------------------------------------------------


def broadcast_object(x: T) -> T:
    """What rank 0 has, any picklable object."""
    if not _stores:
        return x
    box = [x]
    torch.distributed.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def all_reduce_max(*numbers: int) -> list[int]:
    """The largest that any rank has, of each number."""
    if not _stores:
        return list(numbers)
    x = torch.tensor([int(number) for number in numbers])
    torch.distributed.all_reduce(x, torch.distributed.ReduceOp.MAX)
    return [int(number) for number in x.tolist()]


def all_reduce_sum(x: Tensor) -> Tensor:
    """The sum over ranks, in place."""
    if _stores:
        torch.distributed.all_reduce(x)
    return x


def all_gather(x: Tensor) -> Tensor:
    """What every rank has, (ranks, *x.shape)."""
    if not _stores:
        return x[None]
    found = [torch.empty_like(x) for _ in range(count())]
    torch.distributed.all_gather(found, x)
    return torch.stack(found)


def agree(x: int) -> bool:
    """Whether all ranks have the same number."""
    low, high = all_reduce_max(-x, x)
    return -low == high


@torch.no_grad()
def broadcast_(tensors: Iterable[Tensor]) -> None:
    """Give every rank the values of rank 0, in place."""
    for x in tensors if _stores else ():
        own = x.contiguous()
        torch.distributed.broadcast(own, src=0)
        x.copy_(own)


def all_failed() -> bool:
    """Whether every rank has failed and calls this too, after the same collectives: then all may go on with something else. Waits for the
    others ten seconds."""
    if not _stores:
        return True
    store, key = _stores[0], f"failed/{next(_failures)}/{_collectives()}"
    if store.add(f"{key}/ranks", 1) == count():
        store.set(key, "")
    try:
        store.wait([key], FAIL_TOGETHER)
    except RuntimeError:
        return False
    return True


def _collectives() -> str:
    """How many collectives this rank has started. One that runs out of memory in a backward pass may have sent gradients that the others
    never send; they would be mixed up with what all send next."""
    from torch.distributed.distributed_c10d import _get_default_group

    group: Any = _get_default_group()
    kinds = sorted(group._device_types, key=str)
    return " ".join(f"{kind.type} {group._get_backend(kind)._get_sequence_number_for_group()}" for kind in kinds)


# --- the network -----------------------------------------------------------------------------------------------------------------------


def replicated(model: nn.Module, example: Tensor, *, unused: bool) -> nn.Module:
    """``model`` in DistributedDataParallel: it has the weights of rank 0, and a backward pass leaves the mean gradient of all ranks.

    Buffers, such as the running statistics of batch-norm, are those of rank 0 before every forward pass in training; in the pass itself
    every rank normalises by its own part of the batch.

    Args:
        model: in its place, on the device of ``example``; the weights stay shared with it. One process gets it back as it is.
        example: a batch, of which only the shape matters.
        unused: whether some parameters get no gradient.
    """
    if not _stores:
        return model
    network = nn.parallel.DistributedDataParallel(model, find_unused_parameters=unused)
    # After its first backward pass DDP orders the gradients anew, which may change the order of sums over ranks. That pass is made here,
    # so that a run that goes on has the bits of one that was never stopped.
    buffers = [x.clone() for x in model.buffers()]
    with torch.random.fork_rng([example.device] if example.device.type == "cuda" else []):
        network.train()(example).sum().backward()
    with torch.no_grad():
        for x, before in zip(model.buffers(), buffers, strict=True):
            x.copy_(before)
    for p in model.parameters():
        p.grad = None
    return network

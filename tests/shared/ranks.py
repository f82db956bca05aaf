"""Several processes that are the ranks of a job, over gloo, for tests of sharded parameters."""

import gc
import os
import subprocess
import sys
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.nn.parallel import DistributedDataParallel

ROOT = Path(__file__).parents[2]


def torchrun(ranks, *command):
    """A job as a user starts it, on this machine: what it printed, and how it ended."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = {"GLOO_SOCKET_IFNAME": "lo"} | os.environ
    environment |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'shared'}", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([*launcher, *map(str, command)], env=environment, capture_output=True, text=True, timeout=240)


def _rank(rank, world, folder, function, arguments):
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = dist.FileStore(str(Path(folder) / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    try:
        torch.save(function(*arguments), Path(folder) / f"{rank}.pt")
    except BaseException:
        (Path(folder) / f"{rank}.error").write_text(traceback.format_exc())
        raise
    finally:
        dist.destroy_process_group()


def alone(folder, function, *arguments):
    """What ``function(*arguments)`` returns in this process, as the only rank of a job.

    It must leave no DistributedDataParallel behind: as the last to hold a group that ends gloo's threads while it holds the lock of the
    interpreter, for which they may wait.
    """
    dist.init_process_group("gloo", store=dist.FileStore(str(Path(folder) / "store"), 1), rank=0, world_size=1)
    try:
        found = function(*arguments)
        assert not [x for x in gc.get_objects() if type(x) is DistributedDataParallel]
        return found
    finally:
        dist.destroy_process_group()


def run_on(world, function, *arguments):
    """What ``function(*arguments)`` returns on every rank of a job of ``world`` processes. It must be at the top of a module."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            torch.multiprocessing.spawn(_rank, (world, folder, function, arguments), nprocs=world)
        except Exception:
            errors = [path.read_text() for path in sorted(Path(folder).glob("*.error"))]
            raise AssertionError("\n".join(errors) or "a rank ended without a word") from None
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _rank_to_be_lost(*arguments):
    try:
        _rank(*arguments)
    except Exception:
        sys.exit(1)  # the file has the error, and a terminal needs no more of it


def run_and_lose(world, function, *arguments):
    """The same for a job in which a rank is lost: how every process has ended (None: not within 90 seconds), and the errors."""
    context = torch.multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        ranks = [context.Process(target=_rank_to_be_lost, args=(rank, world, folder, function, arguments)) for rank in range(world)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(90)
        codes = [rank.exitcode for rank in ranks]
        for rank in ranks:
            rank.kill()
        return codes, [path.read_text() for path in sorted(Path(folder).glob("*.error"))]

"""Processes that run cells of a comparison, several at a time on one device, without Ray.

Why processes: a run has state of its process (seeds, signals, the kernels that cuDNN has chosen), and its host work of some 0.4 ms a batch
would share one interpreter lock with all others. A GPU gives them turns: while one prepares a batch, reads a loss or saves, another one
computes. Their kernels do not overlap, unless `multi_process_service` is there, so more than a few processes gain nothing without it.
A process lives as long as the pool; the data set stays loaded. What a process says comes through a pipe of its own, so that one that dies
harms no other.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

from bip_fast.experiments.compare.cell import CellTask

__all__ = ["Letter", "Pool", "multi_process_service"]

STOPPED = "it was stopped"


class Letter(NamedTuple):
    """What a process has to say.

    Args:
        worker: its number.
        kind: "ready"; those of `compare.cell.Tell`; "ended": ``what`` is why the run failed, `STOPPED`, or None; "lost": ``what`` is the
            exit code of the process.
        at: when, on the clock of `time.monotonic`, which all processes of a machine share.
    """

    worker: int
    kind: str
    address: str
    what: Any
    at: float


def work(number: int, pipe: Any, halt: Any, device: str) -> None:
    """A process: run what comes through ``pipe``, until None comes. While ``halt`` is set, runs save and end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that has the pool, which then halts this one
    import torch

    from bip_fast.experiments.compare.cell import run_cell
    from bip_fast.experiments.runs.signals import Stop, interruptible

    def tell(kind: str, address: str, what: object) -> bool:
        pipe.send(Letter(number, kind, address, what, time.monotonic()))
        return kind in ("begin", "progress") and bool(halt.is_set())  # what comes at other times comes from no batch

    if device != "cpu":
        torch.backends.cudnn.benchmark = True  # every batch has one shape
        torch.zeros(1, device=device)
    tell("ready", "", None)
    while (task := pipe.recv()) is not None:
        try:
            with interruptible():
                why = run_cell(task, tell)
        except Stop:
            why = STOPPED
        tell("ended", task.address, why)


class Pool:
    """``jobs`` processes.

    Attributes:
        running: number of the process, and the address of its run; processes that are not ready yet have none and are not free.
    """

    def __init__(self, jobs: int, device: str) -> None:
        self.device, self.jobs = device, jobs
        self.context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        self.halt = self.context.Event()
        self.processes: dict[int, tuple[Any, Any]] = {}
        self.running: dict[int, str] = {}
        self.free: set[int] = set()
        for number in range(jobs):
            self._begin(number)

    def _begin(self, number: int) -> None:
        here, there = self.context.Pipe()
        process = self.context.Process(target=work, args=(number, there, self.halt, self.device), daemon=True)
        process.start()
        there.close()  # so that the end of the process is the end of the pipe
        self.processes[number] = process, here

    def submit(self, task: CellTask, worker: int | None = None) -> None:
        """Run a cell in a free process, or in this one."""
        worker = min(self.free) if worker is None else worker
        self.free.remove(worker)
        self.running[worker] = task.address
        self.processes[worker][1].send(task)

    def letters(self, timeout: float) -> list[Letter]:
        """What has come within ``timeout`` seconds; a process that was lost is replaced."""
        pipes = {pipe: number for number, (_, pipe) in self.processes.items()}
        found = []
        for pipe in multiprocessing.connection.wait(list(pipes), timeout):
            number = pipes[pipe]
            try:
                letter = pipe.recv()
            except (EOFError, OSError):
                letter = self._lost(number)
            if letter.kind in ("ready", "ended"):
                self.running.pop(number, None)
                self.free.add(number)
            found.append(letter)
        return found

    def _lost(self, number: int) -> Letter:
        process, pipe = self.processes[number]
        process.join(5)
        pipe.close()
        self.free.discard(number)
        self._begin(number)
        return Letter(number, "lost", self.running.pop(number, ""), process.exitcode, time.monotonic())

    def close(self, patience: float) -> bool:
        """End all processes within ``patience`` seconds, by force if it must be; returns whether all are gone."""
        end = time.monotonic() + patience
        for number, (_, pipe) in self.processes.items():
            if number not in self.running:
                with suppress(OSError):
                    pipe.send(None)
        processes = [process for process, _ in self.processes.values()]
        for give_up, force in ((end, "terminate"), (end + 1, "kill")):
            for process in processes:
                process.join(max(0.0, give_up - time.monotonic()))
            for process in processes:
                if process.is_alive():
                    getattr(process, force)()
        for process in processes:
            process.join(0.5)
        return not any(process.is_alive() for process in processes)


@contextmanager
def multi_process_service() -> Iterator[str | None]:
    """NVIDIA's multi-process service (MPS) for the processes that are started inside: their kernels share the GPU at the same time.

    It is a daemon of this user, under a folder of its own, and ends with the context. Changes no setting of the GPU. Yields why there is
    none, or None.
    """
    if shutil.which("nvidia-cuda-mps-control") is None:
        yield "there is no nvidia-cuda-mps-control"
        return
    before = dict(os.environ)
    with tempfile.TemporaryDirectory(prefix="mps-") as folder:
        os.environ |= {"CUDA_MPS_PIPE_DIRECTORY": folder, "CUDA_MPS_LOG_DIRECTORY": folder}
        try:
            subprocess.run(["nvidia-cuda-mps-control", "-d"], check=True, capture_output=True, timeout=10)
            why = None
        except (OSError, subprocess.SubprocessError) as error:
            why = f"nvidia-cuda-mps-control -d failed: {error}"
            os.environ.pop("CUDA_MPS_PIPE_DIRECTORY")
        try:
            yield why
        finally:
            if why is None:
                with suppress(OSError, subprocess.SubprocessError):
                    subprocess.run(["nvidia-cuda-mps-control"], input=b"quit\n", capture_output=True, timeout=5)
            os.environ.clear()
            os.environ |= before

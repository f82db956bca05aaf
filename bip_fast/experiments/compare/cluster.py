"""Cells at the same time, on Ray: one task for each, whose arguments are the tasks it starts from.

Ray orders the tasks, places them, and runs one again whose process was lost. What happens when something dies:

    a worker           Ray runs its task again in another one, `LOST` times; the run goes on from its checkpoint
    one of many nodes  the same, on another node; if the lost process still lives, the new one waits for the lock of the run folder
    this node          this process says so and ends: the `Mailbox` is here
    this process       Ray ends the workers; the same command goes on from the checkpoints, which are at most a minute old

Ctrl-C: this process tells the `Mailbox`; every run hears it as the answer to its next report, saves and ends.
"""

from __future__ import annotations

import logging
import os
import platform
import socket
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from ...errors import UserError, one_line
from ..runs.signals import STOP_SIGNALS, Stop, stop_requests
from .cell import CellTask, run_cell
from .execution import Comparison, run_here
from .grid import Cell

__all__ = ["available", "run_on_ray"]

INSTALL = "pip install 'bip_fast[cluster]'"
LOST = 1  # times that a run whose process was lost is begun again
LOOK = 0.5  # seconds between two looks at the mailbox


def available() -> bool:
    """Whether Ray is installed."""
    try:
        import ray  # noqa: F401
    except ImportError:
        return False
    return True


class Mailbox:
    """Where runs tell how far they are, and hear that they shall stop. An actor on the node of the process that reads it."""

    def __init__(self) -> None:
        self.letters: list[tuple[str, str, object]] = []
        self.stopping = False

    def post(self, kind: str, address: str, what: object) -> bool:
        """Leave a letter; returns whether runs shall stop."""
        self.letters.append((kind, address, what))
        return self.stopping

    def collect(self) -> list[tuple[str, str, object]]:
        letters, self.letters = self.letters, []
        return letters

    def stop(self) -> None:
        self.stopping = True


def work(task: CellTask, folder: str, mailbox: Any, *parents: str | None) -> str | None:
    """In a worker: run a cell, when its ``parents`` have ended, with relative paths from ``folder``. Returns why it failed or was not
    begun, None when it is done.

    Raises:
        Stop: somebody else asked this process to stop, so Ray begins the task again.
    """
    import ray

    if any(why is not None for why in parents):
        return "the run that it starts from has not ended well"

    # While the main thread of a task waits for an answer, Ray gives its CPUs to another task, and does not take them back from that.
    waiting = ThreadPoolExecutor(1)

    def tell(kind: str, address: str, what: object) -> bool:
        with suppress(ray.exceptions.RayActorError):  # the mailbox is gone, as the process that reads it will see
            return bool(waiting.submit(ray.get, mailbox.post.remote(kind, address, what)).result())
        return False

    os.chdir(folder)
    if tell("started", task.address, os.getpid()):
        return STOPPED
    try:
        return run_cell(task, tell)
    except Stop:
        if tell("stopped", task.address, None):
            return STOPPED
        raise


STOPPED = "it was stopped"
GONE = "Ray has lost this node, which listens to all runs, or the last one; the same command goes on from the checkpoints"


# --- Ray itself ----------------------------------------------------------------------------------------------------------------------


@contextmanager
def _ray(address: str | None, cpus: int, gpus: int) -> Iterator[Any]:
    """Join the cluster at ``address``, or start a Ray on this machine, which ends with the context."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise UserError(f"--{'address' if address else 'jobs'} needs Ray: {INSTALL}") from error
    _check_answers(address)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.CRITICAL}
    try:
        if address is None:
            # Only this machine can reach it. Nothing but small messages goes through its memory.
            ray.init(
                "local",
                num_cpus=cpus,
                num_gpus=gpus,
                include_dashboard=False,
                _node_ip_address="127.0.0.1",
                object_store_memory=2**27,
                **quiet,
            )
        else:
            ray.init(address, **quiet)
    except Exception as error:  # ConnectionError, RuntimeError or ValueError, as the case may be
        where = "start Ray on this machine" if address is None else f"join the cluster at --address {address}"
        raise UserError(f"cannot {where}: {one_line(error, 300)}") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _on(node_id: str) -> Any:
    """Places a task or an actor on one node, or nowhere."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node_id, soft=False)


def _check_answers(address: str | None) -> None:
    """UserError when nothing listens at ``HOST:PORT``, for which Ray itself would wait many minutes."""
    host, colon, port = (address or "").rpartition(":")
    if not colon or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except OSError as error:
        raise UserError(f"nothing answers at --address {address}: {error.strerror or error}; `ray start --head` makes one") from error


def run_on_ray(comparison: Comparison, jobs: int | None, address: str | None = None) -> None:
    """Run all that is not finished, as many at the same time as there is room for.

    Args:
        jobs: runs at the same time on this machine; None with an ``address``, whose nodes say how many.
        address: of a cluster, whose nodes share the folder of the comparison.

    Raises:
        Stop: a signal came; every run has saved where it stands.
        UserError: Ray is not there, a node of the cluster lacks something, or the last node was lost.
    """
    cells = comparison.grid.cells.values()
    if all(map(comparison.is_finished, cells)):
        run_here(comparison)  # nothing is left to run
        return
    threads = max(cell.settings.threads or 1 for cell in cells)
    on_gpu = comparison.device.startswith("cuda")
    gpus = 0 if not on_gpu else 1 if ":" in comparison.device else torch.cuda.device_count()
    with _visible(comparison.device), _ray(address, threads * (jobs or 1), gpus) as ray:
        if address is not None:
            _check_nodes(ray, comparison)
        device = "cuda" if on_gpu else comparison.device  # Ray shows a task only its own GPU
        _Run(comparison, ray, device, jobs).run()


@contextmanager
def _visible(device: str) -> Iterator[None]:
    """With "cuda:N": the processes that Ray starts see only that GPU."""
    before, number = os.environ.get("CUDA_VISIBLE_DEVICES"), device.partition(":")[2]
    if number:
        seen = before.split(",") if before else [str(i) for i in range(torch.cuda.device_count())]
        os.environ["CUDA_VISIBLE_DEVICES"] = seen[int(number)]
    try:
        yield
    finally:
        if number:
            os.environ.pop("CUDA_VISIBLE_DEVICES")
            os.environ |= {} if before is None else {"CUDA_VISIBLE_DEVICES": before}


class _Run:
    """The tasks of one comparison."""

    def __init__(self, comparison: Comparison, ray: Any, device: str, jobs: int | None) -> None:
        self.comparison, self.ray, self.device = comparison, ray, device
        there = ray.cluster_resources().get("GPU", 0.0)
        self.gpus = comparison.grid.gpus or (min(1.0, there / jobs) if jobs else 1.0)
        # Anywhere else, the loss of another node would end the comparison.
        here = _on(ray.get_runtime_context().get_node_id())
        self.mailbox = ray.remote(num_cpus=0, scheduling_strategy=here)(Mailbox).remote()
        self.started: dict[str, object] = {}  # the process of every run that has begun, by address

    def run(self) -> None:
        comparison = self.comparison
        with stop_requests(STOP_SIGNALS) as signals, comparison.shown:
            comparison.begin()
            running = self._submit()
            try:
                while running:
                    if signals:
                        self._stop(running)
                        raise Stop(signals[0])
                    self._collect(running)
            except (
                self.ray.exceptions.RayActorError,  # the mailbox is gone with its node
                self.ray.exceptions.RaySystemError,
                self.ray.exceptions.LocalRayletDiedError,
            ) as error:
                raise UserError(GONE) from error

    def options(self, cell: Cell) -> dict[str, Any]:
        """What a task asks Ray for."""
        return {
            "num_cpus": cell.settings.threads or 1,
            "num_gpus": self.gpus if self.device == "cuda" else 0,
            "max_retries": LOST,
            "retry_exceptions": [Stop],
            "name": cell.folder,
        }

    def _submit(self) -> dict[Any, Cell]:
        """Hand all cells to Ray; returns them by the references of their results."""
        by_address: dict[str, Any] = {}
        work_on_ray = self.ray.remote(work)
        for cell in self.comparison.waiting:
            parents = [by_address[c.address] for c in (cell.parent, cell.dense) if c is not None and c.address in by_address]
            task = self.comparison.task(cell, self.device, alone=False)
            by_address[cell.address] = work_on_ray.options(**self.options(cell)).remote(task, os.getcwd(), self.mailbox, *parents)
        return {by_address[cell.address]: cell for cell in self.comparison.waiting}

    def _collect(self, running: dict[Any, Cell]) -> None:
        """Hear what runs tell, and take the results of those that have ended."""
        done, _ = self.ray.wait(list(running), timeout=LOOK)
        self._listen()
        for reference in done:
            cell = running.pop(reference)
            if cell.address not in self.comparison.failed:  # with one that it starts from
                self.comparison.ended(cell, self._result(reference))
        if not any(node["Alive"] for node in self.ray.nodes()):
            raise UserError(GONE)

    def _result(self, reference: Any) -> str | None:
        try:
            return self.ray.get(reference)
        except (self.ray.exceptions.WorkerCrashedError, self.ray.exceptions.NodeDiedError, self.ray.exceptions.OutOfMemoryError):
            return f"its process was lost {LOST + 1} times; the next start continues it"
        except self.ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, Stop):
                return f"its process was stopped by somebody else {LOST + 1} times; the next start continues it"
            return one_line(error.cause or error, 300, named=True)

    def _listen(self) -> None:
        for kind, address, what in self.ray.get(self.mailbox.collect.remote()):
            if kind == "started":
                if address in self.started:
                    self.comparison.heard("note", address, "its process was lost; another one goes on with it")
                self.started[address] = what
            elif kind != "stopped":
                self.comparison.heard(kind, address, what)

    def _stop(self, running: dict[Any, Cell]) -> None:
        """Ask every run to save and stop, and wait for them. A second signal ends this process and leaves the last checkpoints."""
        self.comparison.shown.say("stopping: every run saves where it stands")
        self.ray.get(self.mailbox.stop.remote())
        left: Sequence[Any] = list(running)
        while left and any(node["Alive"] for node in self.ray.nodes()):
            _, left = self.ray.wait(left, num_returns=len(left), timeout=LOOK)


# --- a cluster of others -------------------------------------------------------------------------------------------------------------


def look(folders: Sequence[Path]) -> dict[str, Any]:
    """On a node: which of the folders it does not see, and its versions."""
    import bip_fast

    return {
        "missing": next((folder for folder in folders if not folder.exists()), None),
        "bip_fast": bip_fast.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _check_nodes(ray: Any, comparison: Comparison) -> None:
    """UserError that names the first node that does not see the folders or has other versions."""
    threads = max(cell.settings.threads or 1 for cell in comparison.grid.cells.values())
    if threads > max((node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]), default=0):
        raise UserError(f"no node has the {threads} CPUs that a run of {threads} threads takes")
    token = comparison.out.resolve() / f".shared-{uuid.uuid4().hex}"
    folders = [token, Path.cwd(), *([comparison.data_dir.resolve()] if comparison.data_dir else [])]
    token.touch()
    try:
        here = look(folders)
        look_on_ray = ray.remote(num_cpus=0, max_retries=0)(look)
        for node in ray.nodes():
            if not node["Alive"]:
                continue
            name = f"node {node['NodeManagerAddress']} ({node['NodeManagerHostname']})"
            strategy = _on(node["NodeID"])
            try:
                there = ray.get(look_on_ray.options(scheduling_strategy=strategy).remote(folders), timeout=120)
            except Exception as error:  # bip_fast or torch cannot be imported there, or the node does not answer
                raise UserError(f"{name} cannot run bip_fast: {one_line(getattr(error, 'cause', None) or error, 200)}") from error
            if there["missing"] is not None:
                folder = token.parent if there["missing"] == token else there["missing"]
                raise UserError(f"{name} does not see the folder {folder}: all nodes must share the folders of a comparison")
            for what in ("python", "torch", "bip_fast"):
                if there[what] != here[what]:
                    raise UserError(f"{name} has {what} {there[what]}, and this machine {here[what]}: results must not depend on the node")
    finally:
        token.unlink(missing_ok=True)

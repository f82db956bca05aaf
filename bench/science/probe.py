"""How long an epoch takes: runs that are thrown away, with all that a real one does (reports, checkpoints), at the start of a study."""

from __future__ import annotations

import math
import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bip_fast.experiments.compare import grid
from bip_fast.experiments.compare.cell import CellTask

from .plan import Times
from .pool import STOPPED, Letter, Pool

__all__ = ["measure", "speed"]

EPOCHS = 100_000  # of a probe: never reached
PATIENCE = 120.0  # seconds for processes to start, and for runs to make their first steps


def speed(letters: Sequence[Letter], after: float) -> float:
    """Seconds for an epoch, from the progress that a probe told after that moment; inf where that is not enough."""
    told = [(letter.at, letter.what[0] * EPOCHS) for letter in letters if letter.kind == "progress" and letter.at >= after]
    if len(told) < 2 or told[-1][1] <= told[0][1]:
        return math.inf
    return (told[-1][0] - told[0][0]) / (told[-1][1] - told[0][1])


def measure(
    pool: Pool,
    settings: Mapping[str, Any],
    work: Path,
    data_dir: Path,
    seconds: float,
    deadline: float,
    stopped: Callable[[], bool],
    say: Callable[[str], None],
) -> Times:
    """Times of runs with these settings in this pool, which is left as free as before.

    First all processes train at once, with steps under a mask, as nearly all runs take them; then one alone, dense.

    Args:
        work: folder for the folders of the probes.
        seconds: that each of the two is measured for.
        deadline: on the clock of `time.monotonic`.

    Raises:
        TimeoutError: there was nothing to measure in time, or ``stopped`` says so.
        RuntimeError: a probe failed.
    """
    probe = _Probe(pool, settings, work, data_dir, seconds, deadline, stopped)
    probe.wait(lambda: len(pool.free) == pool.jobs, "the processes did not start", [])
    say(f"{pool.jobs} processes are there; measuring an epoch")
    together, _ = probe.run(range(pool.jobs), {"method": "random", "sparsity": 0.9, "epochs": EPOCHS})
    alone, start = probe.run([0], {"method": "dense", "sparsity": 0.0, "epochs": 0, "pretrain_epochs": EPOCHS})
    times = Times(alone, max(alone, together), pool.jobs, start + 1.0)  # at its end a run writes its network and a picture
    say(
        f"an epoch takes {times.alone:.3f} s alone and {times.together:.3f} s beside {pool.jobs - 1} others, so "
        f"{pool.jobs / times.together:.2f} epochs/s; a run needs {times.start:.1f} s to start and end"
    )
    return times


class _Probe:
    def __init__(
        self,
        pool: Pool,
        settings: Mapping[str, Any],
        work: Path,
        data_dir: Path,
        seconds: float,
        deadline: float,
        stopped: Callable[[], bool],
    ) -> None:
        self.pool, self.settings, self.work, self.data_dir = pool, settings, work, data_dir
        self.seconds, self.deadline, self.stopped = seconds, deadline, stopped

    def run(self, workers: Sequence[int], own: dict[str, Any]) -> tuple[float, float]:
        """Mean seconds for an epoch of runs at the same time, and from the beginning of a run to its first steps."""
        content = {**self.settings, **own}
        method = content.pop("method")
        (cell,) = grid.build(Path("probe"), {**content, "methods": {method: {}}}, self.data_dir).cells.values()
        folders = {f"probe-{number}": self.work / f"probe-{number}" for number in workers}
        heard: list[Letter] = []
        begun = time.monotonic()
        for number, (address, folder) in zip(workers, folders.items(), strict=True):
            shutil.rmtree(folder, ignore_errors=True)
            task = CellTask(address, cell.settings, folder, None, None, 0.0, frozenset(), self.data_dir, self.pool.device, False)
            self.pool.submit(task, number)

        def progress(address: str) -> list[Letter]:
            return [letter for letter in heard if (letter.address, letter.kind) == (address, "progress")]

        # The second report: the first one comes before graphs are recorded.
        self.wait(lambda: all(len(progress(address)) > 1 for address in folders), "the probe made no steps", heard)
        going, start = time.monotonic(), max(progress(address)[1].at for address in folders) - begun

        def enough() -> bool:
            return time.monotonic() > going + self.seconds and not math.isinf(max(speed(progress(a), going) for a in folders))

        self.wait(enough, "the probe made no steps", heard)
        self.pool.halt.set()
        self.wait(lambda: not self.pool.running, "the probe did not end", [])
        self.pool.halt.clear()
        for folder in folders.values():
            shutil.rmtree(folder, ignore_errors=True)
        return statistics.mean(speed(progress(address), going) for address in folders), start

    def wait(self, until: Callable[[], bool], why: str, heard: list[Letter]) -> None:
        """Keep letters in ``heard`` until it is so."""
        end = min(time.monotonic() + PATIENCE, self.deadline)
        while not until():
            if time.monotonic() > end or self.stopped():
                raise TimeoutError(f"{why} within the time")
            for letter in self.pool.letters(0.2):
                if letter.kind == "lost" or (letter.kind == "ended" and letter.what not in (None, STOPPED)):
                    raise RuntimeError(f"a probe ended: {letter.what}")
                heard.append(letter)

"""The study on its way: how long an epoch takes, the plan for that, the runs, and what is written whenever one has ended.

Nothing here touches the device: the processes of the pool do. So whatever happens there, this process ends in time.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bip_fast.experiments.compare import grid as grids
from bip_fast.experiments.compare import results
from bip_fast.experiments.compare.execution import Comparison
from bip_fast.experiments.compare.grid import Cell
from bip_fast.experiments.runs.folder import RunFolder

from . import outcome
from .plan import DENSE, Plan, Run, Times, Wish, finish_times, fit
from .pool import STOPPED, Letter, Pool
from .probe import measure

__all__ = ["CIFAR10", "METHODS", "Study"]

# Settings of the paper where it has some. GMP and OMP are rivals at their best: OMP trains its weights on under the whole schedule of
# dense training, as BiP starts from trained weights too (the paper's goes back to random ones, and is worse); GMP has the step size of
# joint BiP, so that these two differ in how masks are chosen. None was searched on CIFAR-10.
METHODS: dict[str, dict[str, Any]] = {
    "BiP, as in the paper": {"method": "bip-paper", "weight_decay": 1e-4},
    "BiP joint": {"method": "bip"},
    "OMP, retrained": {"method": "omp-finetune", "rewind": "lr"},
    "GMP": {"method": "gmp", "lr": 0.2},
}
CIFAR10 = {
    "data": "cifar10", "model": "resnet20", "batch_size": 128, "pretrain_lr": 0.1, "pretrain_weight_decay": 5e-4, "weight_decay": 5e-4,
}  # fmt: skip
MARGIN = 0.94  # share of the time that is planned for; the rest is for runs that are slower than the probe
WRITE_EVERY = 45.0  # seconds between two pictures and archives
TELL_EVERY = 15.0


class _Silent:
    """For `Comparison`: what happens is told by `Study`, but for what it says itself."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say

    def begin(self, cells: object, done: object) -> None:
        pass


@dataclass
class Study:
    """All that one call does.

    Args:
        wish: what is wanted.
        work: folder of the run folders, which is taken up again.
        out: folder of the results, a few files.
        changes: settings of all runs that differ from `CIFAR10`.
        began, deadline: on the clock of `time.monotonic`; at the deadline runs stop.
        probe: seconds that each of the two probes measures.
        stopped: whether somebody wants this process to end.
    """

    wish: Wish
    work: Path
    out: Path
    data_dir: Path
    device: str
    changes: dict[str, Any]
    began: float
    deadline: float
    probe: float
    stopped: Callable[[], bool] = lambda: False
    times: Times | None = None
    plan: Plan | None = None
    failed: dict[Run, str] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)  # of runs on their way
    handed: dict[str, float] = field(default_factory=dict)  # when a run was begun
    took: list[float] = field(default_factory=list)  # seconds of pruned runs
    lost: set[str] = field(default_factory=set)
    written: float = -math.inf
    told: float = -math.inf

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.began:4.0f} s] {text}", flush=True)

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()

    # --- cells -------------------------------------------------------------------------------------------------------------------------

    def use(self, dense: int, prune: int) -> None:
        """The cells of all runs that are wanted, with these epochs."""
        own = {"pretrain_epochs": dense, "epochs": prune, "sparsity": sorted(self.wish.sparsities), "seed": list(self.wish.seeds)}
        methods = {DENSE: {"epochs": 0}, **{label: METHODS[label] for label in self.wish.methods}}
        made = grids.build(Path("science"), {**CIFAR10, **self.changes, **own, "methods": methods}, self.data_dir)
        self.comparison = Comparison(made, self.work, self.data_dir, self.device, _Silent(self.say))  # type: ignore[arg-type]
        self.cells: dict[Run, Cell] = {Run(c.label, c.settings.sparsity, c.settings.seed): c for c in made.rows}
        self.runs = {cell.address: run for run, cell in self.cells.items()}
        self.comparison.begin()

    def finished(self) -> set[Run]:
        return {run for run, cell in self.cells.items() if self.comparison.is_finished(cell)}

    def settled(self) -> tuple[int | None, int | None]:
        """Epochs of dense and pruned runs that runs of an earlier call have begun with, and this one goes on with."""
        path = self.work / "plan.json"
        stored = json.loads(path.read_text()) if path.exists() else {}
        if stored.get("for") != self._purpose():
            return None, None
        self.use(stored["dense"], stored["prune"])
        begun = {run for run, cell in self.cells.items() if RunFolder(self.work / cell.folder).begun}
        dense = stored["dense"] if begun else None
        return dense, stored["prune"] if any(run.method != DENSE for run in begun) else None

    def _purpose(self) -> dict[str, Any]:
        return {"dense": self.wish.dense, "prune": self.wish.prune, "changes": self.changes}

    def decide(self, times: Times, dense: int | None, prune: int | None) -> Plan:
        """Make the plan for the time that is left, and its cells.

        Raises:
            ValueError: there is too little time for anything.
        """
        if dense is not None:
            self.use(dense, prune or 1)
        finished = self.finished() if dense is not None else set()
        self.plan = plan = fit(times, MARGIN * self.left, self.wish, dense=dense, prune=prune, finished=finished)
        self.times = times
        self.use(plan.dense, plan.prune)
        outcome.write_json(self.work / "plan.json", {"for": self._purpose(), "dense": plan.dense, "prune": plan.prune})
        cut = "" if not plan.left_out else f"; no time for {len(plan.left_out)} of {len(self.wish.runs())} runs"
        self.say(
            f"plan: dense {plan.dense} epochs, every pruned run {plan.prune} epochs (passes over the images), {len(plan.runs)} runs, "
            f"{len(finished)} of them finished, in {plan.seconds:.0f} of {self.left:.0f} s that are left{cut}"
        )
        return plan

    # --- runs --------------------------------------------------------------------------------------------------------------------------

    def measure(self, pool: Pool) -> Times:
        """How long an epoch takes; raises as `probe.measure` does."""
        return measure(pool, {**CIFAR10, **self.changes}, self.work, self.data_dir, self.probe, self.deadline, self.stopped, self.say)

    def run(self, pool: Pool) -> None:
        """Measure, plan, and do what fits; returns when all is done, or at the deadline.

        Raises:
            TimeoutError, RuntimeError, ValueError: it did not get as far as a plan.
        """
        dense, prune = self.settled()
        if dense is not None:  # what is there is a result, whatever follows
            self.plan = Plan(dense, prune or 1, (), 0.0, tuple(self.wish.runs()))
            self.write(set(), last=True)
            if self.finished() >= set(self.wish.runs()):
                self.say("everything is finished")
                return
        times = self.measure(pool)
        plan = self.decide(times, dense, prune)
        todo = [run for run in plan.runs if run not in self.finished()]
        expected = finish_times(plan.runs, plan.dense, plan.prune, times, self.finished())
        first, began, again = Run(DENSE, 0.0, self.wish.seeds[0]), time.monotonic(), prune is None
        while self.left > 0 and not self.stopped():
            if again and first in self.finished():
                # Now it is known how long a run really takes, and no pruned one has begun: share out the rest of the time once more.
                again = False
                really = (time.monotonic() - began) / expected[first] if first in expected else 1.0
                self.say(f"dense training took {really:.2f} times as long as planned")
                try:
                    plan = self.decide(times.slower(min(max(really, 0.9), 2.0)), plan.dense, None)
                except ValueError as error:
                    self.say(f"{error}; the plan stays")
                    self.use(plan.dense, plan.prune)
                todo = [run for run in plan.runs if run not in self.finished() and self.cells[run].address not in pool.running.values()]
            self._hand_out(pool, todo, only_dense=again)
            if pool.free and not pool.running:
                break  # nothing is left, or nothing that could begin
            ended = set()
            for letter in pool.letters(0.5):
                self._hear(letter, todo)
                if letter.kind == "ended" and letter.what is None:
                    ended.add(self.runs[letter.address])
            if ended:
                self._hand_out(pool, todo, only_dense=again)  # before it writes, which takes a while
                self.write(ended)
            self._tell()
        self._stop(pool)

    def _stop(self, pool: Pool) -> None:
        if pool.running:
            self.say(f"{'told to stop' if self.stopped() else 'the time is over'}: {len(pool.running)} runs save and stop")
        pool.halt.set()
        end = time.monotonic() + 5
        while pool.running and time.monotonic() < end:
            for letter in pool.letters(0.2):
                self._hear(letter, [])
        self.write(self.finished(), last=True)

    def _hand_out(self, pool: Pool, todo: list[Run], *, only_dense: bool) -> None:
        """Give every free process the first run whose dense network is there; drop those that could not end in time."""
        done = self.finished()
        for run in list(todo):
            if not pool.free:
                return
            if run != run.dense and (only_dense or run.dense not in done):
                continue
            todo.remove(run)
            if (needs := self._needs(run, len(pool.running) + 1)) > self.left:
                self.say(f"no time for {run}, which needs {needs:.0f} s")
                continue
            cell = self.cells[run]
            self.handed[cell.address] = time.monotonic()
            pool.submit(self.comparison.task(cell, self.device, alone=False))

    def _needs(self, run: Run, active: int) -> float:
        """Seconds that a run will take, by those that have ended or by the plan, on the bright side."""
        assert self.plan is not None
        assert self.times is not None
        if run.method != DENSE and self.took:
            return 0.95 * statistics.mean(self.took[-active:])
        return 0.9 * (self.times.start + self.plan.epochs(run) * self.times.epoch(active))

    def _hear(self, letter: Letter, todo: list[Run]) -> None:
        run = self.runs.get(letter.address)
        if letter.kind in ("begin", "progress"):
            self.shares[letter.address] = letter.what[0] if letter.kind == "progress" else letter.what
        elif letter.kind == "note":
            self.say(f"{run}: {letter.what}")
        elif letter.kind in ("ended", "lost"):
            self.shares.pop(letter.address, None)
            if letter.what is None and run is not None and run.method != DENSE:
                self.took.append(letter.at - self.handed[letter.address])
            elif letter.kind == "lost" and run is not None and letter.address not in self.lost:
                self.lost.add(letter.address)
                self.say(f"the process of {run} ended with exit code {letter.what}; the run begins again")
                todo.insert(0, run)
            elif letter.what not in (None, STOPPED) and run is not None:
                self.failed[run] = f"{letter.what}" if letter.kind == "ended" else f"its process ended twice, exit code {letter.what}"
                self.say(f"failed: {run}: {self.failed[run]}")

    def _tell(self) -> None:
        if time.monotonic() - self.told >= TELL_EVERY:
            self.told = time.monotonic()
            running = "; ".join(f"{self.runs[a]}: {100 * share:.0f} %" for a, share in self.shares.items() if a in self.runs)
            assert self.plan is not None
            self.say(f"{len(self.finished() & set(self.plan.runs))} of {len(self.plan.runs)} runs; {running}")

    # --- results -----------------------------------------------------------------------------------------------------------------------

    def write(self, ended: set[Run], *, last: bool = False) -> None:
        """The rows of what has ended, table and summary; picture and archive at the end and from time to time."""
        assert self.plan is not None
        rows = results.collect(self.comparison)
        for row in rows:
            row |= {"dense_epochs": self.plan.dense, "epochs": self.plan.dense if row["method"] == DENSE else self.plan.prune}
            if row["method"] == DENSE or row["lr"] is None:  # goes by the schedule of dense training
                row["lr"] = CIFAR10["pretrain_lr"]
        outcome.append_rows(self.out / "runs.csv", rows)
        for run in ended:
            accuracy = next((row["accuracy"] for row in rows if row["folder"] == self.cells[run].folder), None)
            if accuracy is not None and not last:
                self.say(f"finished: {run}: {100 * accuracy:.2f} %")
        title = f"dense {self.plan.dense} epochs, every pruned run {self.plan.prune} passes over the images from it"
        labels = [DENSE, *self.wish.methods]
        outcome.write(
            self.out / "table.md", f"CIFAR-10 / ResNet-20, {title}.\n\n{outcome.table(rows, labels, sorted(self.wish.sparsities))}\n"
        )
        outcome.write_json(self.out / "summary.json", self._summary(rows))
        if rows and (last or time.monotonic() - self.written > WRITE_EVERY):
            self.written = time.monotonic()
            outcome.picture(self.out / "accuracy.png", rows, labels, f"ResNet-20 on CIFAR-10: {title}")
            outcome.archive(self.out / "runs.tar.gz", self.work, [row["folder"] for row in rows], ["plan.json"])

    def _summary(self, rows: list[results.Row]) -> dict[str, Any]:
        assert self.plan is not None
        done = self.finished()
        notes = {RunFolder(self.work / row["folder"]).read_report().get("note", "") for row in rows}
        return {
            "seconds": round(time.monotonic() - self.began, 1),
            "device": next((row["device"] for row in rows), None),
            "torch": next((row["torch"] for row in rows), None),
            "data": "; ".join(sorted(notes - {""})) or ("official files" if rows else None),
            "times": self.times and vars(self.times),
            "epochs": {DENSE: self.plan.dense, "prune": self.plan.prune},
            "finished": [str(run) for run in self.wish.runs() if run in done],
            "not_finished": [str(run) for run in self.plan.runs if run not in done],
            "left_out": [str(run) for run in self.plan.left_out],
            "failed": {str(run): why for run, why in self.failed.items()},
            "accuracy": outcome.summary(rows),
            "settings": {**CIFAR10, **self.changes, "methods": {label: METHODS[label] for label in self.wish.methods}},
            "paper": {"percent": outcome.PERCENT, **outcome.PAPER},
        }

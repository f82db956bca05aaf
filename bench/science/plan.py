"""What fits into the time that is left. Pure: from measured times to a plan, with no clock and no device.

A run is a dense network, or one method at one sparsity that starts from the dense network of its seed. All dense runs have the same number
of epochs, and so have all pruned ones. What gives way, in this order, until the rest fits:

    1. further seeds, the last one first, and of a seed the columns (one sparsity, all methods) of least value
    2. epochs, of dense and pruned runs in proportion, down to ``Wish.least``
    3. columns of the first seed, those of least value first
    4. epochs again, for what cannot be less: a dense network and one column
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

__all__ = ["DENSE", "Plan", "Run", "Times", "Wish", "finish_times", "fit"]

DENSE = "dense"


class Run(NamedTuple):
    """One run; a dense one has the sparsity 0."""

    method: str
    sparsity: float
    seed: int

    @property
    def dense(self) -> Run:
        """The run whose network it starts from."""
        return Run(DENSE, 0.0, self.seed)

    def __str__(self) -> str:
        return f"{self.method}, seed {self.seed}" if self == self.dense else f"{self.method}, {100 * self.sparsity:.4g} %, seed {self.seed}"


@dataclass(frozen=True)
class Wish:
    """What is wanted if there is time: methods, and seeds and sparsities by value, the most valuable first.

    Args:
        dense, prune: epochs of dense and of pruned runs, at most.
        least: epochs of pruned runs below which columns are left out instead.
    """

    methods: tuple[str, ...]
    sparsities: tuple[float, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    dense: int = 200
    prune: int = 100
    least: int = 15

    def column(self, sparsity: float, seed: int) -> list[Run]:
        return [Run(method, sparsity, seed) for method in self.methods]

    def runs(self) -> list[Run]:
        return [run for seed in self.seeds for run in (Run(DENSE, 0.0, seed), *(r for s in self.sparsities for r in self.column(s, seed)))]


@dataclass(frozen=True)
class Times:
    """Measured, in seconds.

    Args:
        alone: an epoch of a run that has the device for itself.
        together: an epoch of each of ``jobs`` runs at the same time.
        start: of a run, apart from its epochs: its process builds the network, records graphs, writes its files.
    """

    alone: float
    together: float
    jobs: int
    start: float = 0.0

    def epoch(self, active: int) -> float:
        """An epoch of each of ``active`` runs: as when alone, until they have to share."""
        return max(self.alone, self.together * active / self.jobs)

    def slower(self, factor: float) -> Times:
        return replace(self, alone=self.alone * factor, together=self.together * factor)


class Plan(NamedTuple):
    """Epochs of dense and of pruned runs, the runs in their order, how long all of it should take, and what was wanted but has no time."""

    dense: int
    prune: int
    runs: tuple[Run, ...]
    seconds: float
    left_out: tuple[Run, ...]

    def epochs(self, run: Run) -> int:
        return self.dense if run.method == DENSE else self.prune


def finish_times(runs: Sequence[Run], dense: int, prune: int, times: Times, finished: Collection[Run] = ()) -> dict[Run, float]:
    """When each run ends that is not ``finished``, if every free process takes the first run in order whose dense network is there."""
    waiting = [run for run in runs if run not in finished]
    active: dict[Run, list[float]] = {}  # seconds until its epochs begin, epochs left
    ended: dict[Run, float] = {}
    now = 0.0
    while waiting or active:
        for run in list(waiting):
            if len(active) < times.jobs and (run == run.dense or run.dense in finished or run.dense in ended):
                waiting.remove(run)
                active[run] = [times.start, float(dense if run == run.dense else prune)]
        if not active:
            raise ValueError(f"runs must hold the dense run of every seed, got none for {waiting[0]}")
        epoch = times.epoch(sum(not start for start, _ in active.values()))
        step = min(start or left * epoch for start, left in active.values())
        now += step
        for run, (start, left) in list(active.items()):
            # What is left of a step by rounding would be steps of no length without end.
            later = [max(0.0, start - step), left] if start else [0.0, left - step / epoch]
            active[run] = [x if x > 1e-9 else 0.0 for x in later]
            if not any(active[run]):
                del active[run]
                ended[run] = now
    return ended


def fit(
    times: Times,
    seconds: float,
    wish: Wish,
    *,
    dense: int | None = None,
    prune: int | None = None,
    finished: Collection[Run] = (),
) -> Plan:
    """The plan for the ``seconds`` that are left.

    Args:
        dense, prune: epochs that are settled, because runs have begun with them.
        finished: runs that need no time any more.

    Raises:
        ValueError: not even a dense network of one epoch and one column of one epoch fit, where both numbers are open.
    """

    def of_dense(epochs: int) -> int:
        return dense if dense is not None else max(1, round(wish.dense * epochs / wish.prune))

    def needs(runs: Sequence[Run], epochs: int) -> float:
        return max(finish_times(runs, of_dense(epochs), epochs, times, finished).values(), default=0.0)

    def most(runs: Sequence[Run], limit: int) -> int:
        """The largest number of epochs at which all of ``runs`` fit; 0 if there is none."""
        return next((epochs for epochs in range(limit, 0, -1) if needs(runs, epochs) <= seconds), 0)

    first = [run for run in wish.runs() if run.seed == wish.seeds[0]]
    settled = prune is not None
    if prune is None:
        prune = most(first, wish.prune)
        if prune < min(wish.least, wish.prune):
            prune = min(wish.least, wish.prune)
            least = first[: 1 + len(wish.methods)]
            if needs(least, prune) > seconds:
                prune = most(least, prune)
    if not prune:
        raise ValueError(
            f"seconds must be at least {needs(first[: 1 + len(wish.methods)], 1):.0f} for one column of one epoch, got {seconds:.0f}"
        )
    runs: list[Run] = [run for run in wish.runs() if run in finished] if settled else []
    for column in _columns(wish):
        more = [*runs, *(run for run in column if run not in runs)]
        if needs(more, prune) > seconds:
            break
        runs = more
    left_out = tuple(run for run in wish.runs() if run not in runs)
    return Plan(of_dense(prune), prune, tuple(runs), needs(runs, prune), left_out)


def _columns(wish: Wish) -> Iterator[list[Run]]:
    """What is added at a time: one sparsity with all methods, and the dense network before it."""
    for seed in wish.seeds:
        for sparsity in wish.sparsities:
            yield [Run(DENSE, 0.0, seed), *wish.column(sparsity, seed)]

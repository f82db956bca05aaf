"""What the GPU study does with the time that it has, for invented times of an epoch."""

from pathlib import Path

import pytest

METHODS = ("BiP", "GMP")
SPARSITIES = (0.9, 0.95, 0.5)


@pytest.fixture
def plan(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    from bench.science import plan

    return plan


@pytest.fixture
def wish(plan):
    return plan.Wish(METHODS, SPARSITIES, seeds=(0, 1), dense=20, prune=10, least=3)


def names(runs):
    return [f"{run.method} {run.sparsity:g} {run.seed}" for run in runs]


def test_runs_that_share_the_device(plan, wish):
    """Three processes; two epochs at a time cost no more than one, three cost half as much again."""
    times = plan.Times(alone=1.0, together=1.5, jobs=3)
    dense, *columns = wish.runs()[:7]
    assert plan.finish_times([dense], 20, 10, times) == {dense: 20.0}
    ended = plan.finish_times([dense, *columns], 20, 10, times)
    # Two waves of three for 15 seconds each.
    assert list(ended.values()) == [20.0, *[35.0] * 3, *[50.0] * 3]
    assert plan.finish_times([dense, *columns], 20, 10, times, finished={dense, *columns[:4]}) == dict.fromkeys(columns[4:], 10.0)


def test_the_start_of_a_run_takes_no_share_of_the_device(plan, wish):
    times = plan.Times(alone=1.0, together=2.0, jobs=2, start=5.0)
    dense, first, second = wish.runs()[:3]
    assert plan.finish_times([dense, first, second], 20, 10, times) == {dense: 25.0, first: 50.0, second: 50.0}


def test_a_run_waits_for_the_dense_network_of_its_seed(plan, wish):
    times = plan.Times(alone=1.0, together=1.0, jobs=4)
    other = plan.Run("dense", 0.0, 1)
    ended = plan.finish_times([*wish.runs()[:3], other], 20, 10, times)
    assert ended[other] == 20.0  # free processes train it beside the first one
    with pytest.raises(ValueError, match="dense run of every seed"):
        plan.finish_times([plan.Run("BiP", 0.9, 1)], 20, 10, times)


TIMES = {"alone": 1.0, "together": 1.0, "jobs": 1}  # a dense network takes 20 s, a column 20 s, a seed 80 s


@pytest.mark.parametrize(
    ("seconds", "dense", "prune", "runs"),
    [
        (1000, 20, 10, 14),  # everything
        (160, 20, 10, 14),
        (159, 20, 10, 12),  # the last column of the last seed goes first
        (119, 20, 10, 7),  # a dense network alone says nothing, so the second seed goes as a whole
        (80, 20, 10, 7),
        (79, 18, 9, 7),  # one epoch less for all
        (40, 10, 5, 7),
        (24, 6, 3, 7),
        (23, 6, 3, 5),  # not below three epochs: a column goes
        (12, 6, 3, 3),
        (11, 4, 2, 3),  # nothing is left to go
        (4, 2, 1, 3),
    ],
)
def test_what_gives_way(plan, wish, seconds, dense, prune, runs):
    found = plan.fit(plan.Times(**TIMES), seconds, wish)
    assert (found.dense, found.prune, len(found.runs)) == (dense, prune, runs)
    assert found.seconds <= seconds
    assert names([*found.runs, *found.left_out]) == names(wish.runs())  # in the order of value, nothing lost
    assert found.epochs(found.runs[0]) == dense
    assert found.epochs(found.runs[1]) == prune


def test_too_little_time_is_an_error_that_says_how_much_it_takes(plan, wish):
    with pytest.raises(ValueError, match="seconds must be at least 4 for one column of one epoch, got 3"):
        plan.fit(plan.Times(**TIMES), 3, wish)


def test_epochs_that_are_settled_stay(plan, wish):
    """After a restart: what is finished costs nothing, and other epochs would not be comparable."""
    done = set(wish.runs()[:5])
    found = plan.fit(plan.Times(**TIMES), 25, wish, dense=12, prune=8, finished=done)
    assert (found.dense, found.prune, found.seconds) == (12, 8, 16.0)
    assert len(found.runs) == 7
    none = plan.fit(plan.Times(**TIMES), 5, wish, dense=12, prune=8, finished=done)
    assert (set(none.runs), none.seconds) == (done, 0.0)


def test_dense_epochs_that_are_settled_leave_those_of_pruning_open(plan, wish):
    """As soon as the dense network is there, the rest of the time is shared out among the pruned runs."""
    found = plan.fit(plan.Times(**TIMES), 42, wish, dense=20, finished={plan.Run("dense", 0.0, 0)})
    assert (found.dense, found.prune, len(found.runs)) == (20, 7, 7)
    slower = plan.fit(plan.Times(**TIMES).slower(1.5), 42, wish, dense=20, finished={plan.Run("dense", 0.0, 0)})
    assert (slower.dense, slower.prune) == (20, 4)


def test_the_wish_of_a_gpu_in_nine_minutes(plan):
    """Four at a time on a device that two would fill: 0.3 s for an epoch alone, 0.25 s of the device for each."""
    wish = plan.Wish(("a", "b", "c", "d"), (0.893, 0.956, 0.79, 0.672))
    times = plan.Times(alone=0.3, together=1.0, jobs=4, start=3.0)
    found = plan.fit(times, 470, wish)
    assert (found.dense, found.prune) == (196, 98)
    assert {run.seed for run in found.runs} == {0}
    assert 455 < found.seconds <= 470
    twice = plan.fit(plan.Times(alone=0.2, together=0.4, jobs=4, start=3.0), 470, wish)
    assert (twice.dense, twice.prune) == (200, 100)
    assert {run.sparsity for run in twice.runs if run.seed == 1} >= {0.893, 0.956}

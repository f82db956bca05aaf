"""The protocols by which blocks hand results to each other, read from the C++ and checked in every order that CUDA's memory model allows.

What no GPU test can show and no simulator has: that every fence and every barrier of a protocol is needed, and that together they are
enough. Each is taken out in turn, and that must be found.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from memory_model import Op, Stage, executions, parse, without

CUDA = Path(__file__).resolve().parents[2] / "csrc" / "cuda"


def body(file: str, first: str, last: str) -> str:
    """The lines of a source from the one after ``first`` up to ``last``, which is the first line behind them that begins so."""
    text = (CUDA / file).read_text()
    assert text.count(first) == 1, f"{file} has not one line {first!r}"
    lines = text.partition(first)[2].splitlines()[1:]
    end = next(i for i, line in enumerate(lines) if line.startswith(last))
    return "\n".join(lines[:end])


BARRIER, FENCE = Op("barrier"), Op("fence")
COMMON = {"__syncthreads();": [BARRIER], "__syncwarp();": [BARRIER], "fence();": [FENCE], "__threadfence();": [FENCE]}

# --- the last block (histogram.cuh) -------------------------------------------------------------------------------------------------

PUBLISH = COMMON | {
    "if (room.above) atomicAdd(&progress.above, room.above);": [Op("read", "room.above"), Op("add", "above", some=True)],
    "room.last = room.entries != 0 && atomicAdd(&progress.seen, room.entries) + room.entries == total;": [
        Op("read", "room.entries"),
        Op("add", "seen", some=True),
        Op("write", "room.last"),
    ],
    "room.entries = room.above = 0;": [Op("write", "room.entries"), Op("write", "room.above")],
    "progress.seen = 0;": [Op("write", "seen")],
    "return room.last;": [Op("read", "room.last")],
}
# A thread reads the window, then counts in the bins of the group, lists a candidate, and adds up its entries (step.cu, judge.cuh).
WORK = [
    Op("read", "window"),
    Op("add", "bin {thread}"),
    Op("add", "bin {other}"),
    Op("write", "candidate of thread {thread} in block {block}, stage {stage}"),
    Op("add", "room.entries"),
    Op("add", "room.above"),
]


def conclusion(blocks: list[tuple[int, ...]]) -> list[Op]:
    """What the last block does: it reads all of that, clears it, and sets the next window (conclude.cuh)."""
    places = [(block, thread, stage) for block, amounts in enumerate(blocks) for thread in (0, 1) for stage, n in enumerate(amounts) if n]
    candidates = [f"candidate of thread {thread} in block {block}, stage {stage}" for block, thread, stage in places]
    return [
        *(Op(kind, "bin {thread}", last=True) for kind in ("read", "write")),
        *(Op("read", name, last=True) for name in candidates),
        Op("read", "above", last=True),
        BARRIER._replace(last=True),
        *(Op("write", name, last=True, lead=True) for name in ("above", "window")),
    ]


# Entries that each block brings. A block of two numbers publishes twice, as one does that comes back to a group. One that brings nothing
# has got no tile: it has read a window too, maybe the next one, and used it for nothing.
GRIDS = [[(1,), (1,)], [(3,), (1,), (2,)], [(2, 1), (1,)], [(1, 1), (2,), (1,)], [(2,), (0,), (1,)]]


def publishing(grid: list[tuple[int, ...]], protocol: list[Op]) -> list[str]:
    """What goes wrong in any execution."""
    after, total = conclusion(grid), sum(map(sum, grid))
    blocks = [[Stage(WORK if amount else [], protocol, after, amount) for amount in amounts] for amounts in grid]
    faults, number = [], 0
    for number, execution in enumerate(executions(blocks, "seen", total), 1):  # noqa: B007
        faults += execution.faults()
        if execution.values["seen"] != 0:
            faults.append("the counter is not 0 for the next launch")
        windows = [i for i, event in enumerate(execution.events) if event.op == Op("write", "window", last=True, lead=True)]
        for i, event in enumerate(execution.events):
            place = event.place
            if place == "window" and event.op.kind == "read" and set(windows) & execution.seen_by(i):
                faults.append("the window of the next step is read in this one")
            if event.op.last and event.op.kind == "read" and (place.startswith(("bin", "candidate")) or place == "above"):
                wanted = {j for j, other in enumerate(execution.events) if other.place == place and other.op.kind in ("add", "write")}
                wanted -= {j for j in wanted if execution.events[j].op.last}  # what the last block itself writes afterwards
                if not wanted or not wanted <= execution.seen_by(i):
                    faults.append(f"the last block may miss something: {event}")
    assert number, "no execution at all"
    return faults


def publish() -> list[Op]:
    return parse(body("histogram.cuh", "inline bool publish_is_last(", "}"), PUBLISH)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_last_block_sees_everything(grid):
    assert publishing(grid, publish()) == []


@pytest.mark.parametrize("kind", ["fence", "barrier"])
def test_every_fence_and_barrier_of_the_last_block_is_needed(kind):
    found = {number: publishing(GRIDS[1], protocol) for number, protocol in without(publish(), kind)}
    assert len(found) == 2
    assert all(found.values()), f"without {kind} {[number for number, faults in found.items() if not faults]} nothing is wrong"


def test_publishing_before_the_fence_is_found():
    ops = publish()
    add, fence = next(i for i, op in enumerate(ops) if op.place == "seen"), ops.index(FENCE._replace(lead=True))
    assert fence < add
    ops.insert(add - 1, ops.pop(fence))  # behind the read of what is added: still in front of the addition
    assert publishing(GRIDS[1], ops) == []
    ops.insert(add, ops.pop(add - 1))
    assert publishing(GRIDS[1], ops)


def test_a_block_that_brings_nothing_and_adds_it_is_found():
    """It may see the total before the counter is put back, and take itself for the last too."""
    ops = [op._replace(some=False) for op in publish()]
    assert publishing(GRIDS[0], ops) == []
    assert any("2 blocks believe to be the last" in fault for fault in publishing(GRIDS[4], ops))


def test_an_addition_that_is_not_atomic_is_found():
    ops = [op._replace(kind="write") if op.kind == "add" and op.place == "above" else op for op in publish()]
    assert publishing(GRIDS[0], ops)


# --- the last warp (units.cuh) ---------------------------------------------------------------------------------------------------

LIFT = COMMON | {
    "uint32_t before = 0;": [],
    "set.best[tile.first / kTile] = best;": [Op("write", "best of {block}")],
    "before = atomicAdd(set.seen, 1u);": [Op("add", "seen")],
    "before = __shfl_sync(kAllLanes, before, 0);": [],  # a value goes through registers; memory is not ordered
    "if (before + 1 != ceil_div(tile.tensor.numel, kTile)) continue;": [],
    "if (lane_id() == 0) *set.seen = 0;": [Op("write", "seen", lead=True, last=True)],
}


def lifting(protocol: list[Op], warps: int = 3) -> list[str]:
    """Warps in the place of blocks, lanes in that of threads."""
    reads = [Op("read", f"{what} {warp}", last=True) for warp in range(warps) for what in ("best of", "score 0 of", "score 1 of")]
    blocks = [[Stage([Op("write", "score {thread} of {block}")], protocol, reads)] for _ in range(warps)]
    return [fault for execution in executions(blocks, "seen", warps) for fault in execution.faults()]


def lift() -> list[Op]:
    return parse(body("units.cuh", "= best;\n      continue;\n    }", "    lift_needed("), LIFT)


def test_the_last_warp_sees_everything():
    assert [op.kind for op in lift()] == ["barrier", "write", "fence", "add", "fence", "barrier", "write"]
    assert lifting(lift()) == []


@pytest.mark.parametrize("kind", ["fence", "barrier"])
def test_every_fence_and_barrier_of_the_last_warp_is_needed(kind):
    assert all(lifting(protocol) for _, protocol in without(lift(), kind))


# --- a barrier of all blocks -----------------------------------------------------------------------------------------------------

GRID = COMMON | {
    "atomicAdd(arrived, 1u);": [Op("add", "arrived")],
    "while (load_volatile(arrived) < target) continue;": [Op("wait", "arrived")],
    "const bool last = atomicAdd(arrived, 1u) == gridDim.x - 1;": [Op("add", "arrived")],
    "*arrived = 0;": [Op("write", "arrived")],
    "atomicAdd(generation, 1u);": [Op("add", "generation")],
    "while (load_volatile(generation) < target) continue;": [Op("wait", "generation")],
}
# Counts up for good: the target is the number of blocks, then twice that, and so on.
COUNTING = """
  __syncthreads();
  if (thread_id() == 0) {
    fence();
    atomicAdd(arrived, 1u);
    while (load_volatile(arrived) < target) continue;
    fence();
  }
  __syncthreads();
"""
# Begins at 0 again: the last block to arrive opens the next generation.
GENERATIONS = """
  __syncthreads();
  if (thread_id() == 0) {
    fence();
    const bool last = atomicAdd(arrived, 1u) == gridDim.x - 1;
    if (last) {
      *arrived = 0;
      fence();
      atomicAdd(generation, 1u);
    }
    while (load_volatile(generation) < target) continue;
    fence();
  }
  __syncthreads();
"""


def meeting(protocol: list[Op], blocks: int, counter: str) -> list[str]:
    """Everybody writes, meets, reads what all others wrote, meets again, writes again, meets a third time."""
    write = [Op("write", "data of thread {thread} in block {block}")]
    read = [Op("read", f"data of thread {thread} in block {block}") for block in range(blocks) for thread in (0, 1)]
    step = 1 if counter else blocks
    grid = [[Stage(work, protocol, [], target=step * (i + 1)) for i, work in enumerate((write, read, write))] for _ in range(blocks)]
    faults = []
    for execution in executions(grid, counter, blocks if counter else 0, 3):
        faults += execution.faults()
        for i, event in enumerate(execution.events):
            if event.op.kind == "read" and len(execution.seen_by(i)) != 1:
                faults.append(f"{len(execution.seen_by(i))} writes come before: {event}")
    return faults


@pytest.mark.parametrize("blocks", [2, 3])
@pytest.mark.parametrize(("text", "counter"), [(COUNTING, ""), (GENERATIONS, "arrived")], ids=["counting", "generations"])
def test_a_grid_barrier_is_a_barrier(text, counter, blocks):
    assert meeting(parse(text, GRID), blocks, counter) == []


@pytest.mark.parametrize("kind", ["fence", "barrier"])
@pytest.mark.parametrize(("text", "counter"), [(COUNTING, ""), (GENERATIONS, "arrived")], ids=["counting", "generations"])
def test_every_fence_and_barrier_of_a_grid_barrier_is_needed(text, counter, kind):
    protocol = parse(text, GRID)
    assert {op.kind for op in protocol} >= {"fence", "barrier", "wait"}
    assert all(meeting(mutated, 2, counter) for _, mutated in without(protocol, kind))


def test_a_grid_barrier_that_does_not_wait_or_waits_for_too_many_is_found():
    protocol = parse(COUNTING, GRID)
    assert meeting([op for op in protocol if op.kind != "wait"], 2, "")
    one = [Stage([], protocol, [], target=3)]
    assert any("wait for ever" in fault for execution in executions([one, one]) for fault in execution.faults())


# --- the model itself ------------------------------------------------------------------------------------------------------------


def message(writer: list[Op], reader: list[Op], *, hop: list[Op] | None = None) -> bool:
    """Whether data that one block writes is certain to be there for a block that waits for its flag; ``hop``: a block between them."""
    write, read = [Op("write", "data", lead=True)], [Op("read", "data", lead=True)]
    blocks = [[Stage(write, writer, [])], [Stage([], reader, read, target=2 if hop else 1)]]
    if hop:
        blocks.append([Stage([], hop, [])])
    return not any(execution.faults() for execution in executions(blocks))


RAISE, WAIT, BETWEEN = Op("add", "flag", lead=True), Op("wait", "flag", lead=True), Op("fence", lead=True)


def test_a_message_needs_a_fence_on_both_sides():
    assert message([BETWEEN, RAISE], [WAIT, BETWEEN])
    assert not message([RAISE], [WAIT, BETWEEN])
    assert not message([BETWEEN, RAISE], [WAIT])
    assert not message([RAISE, BETWEEN], [WAIT, BETWEEN])
    assert not message([BETWEEN, RAISE], [BETWEEN, WAIT])


def test_a_message_goes_through_the_addition_of_a_third_block():
    assert message([BETWEEN, RAISE], [WAIT, BETWEEN], hop=[RAISE])


def test_a_fence_serves_the_thread_that_makes_it():
    """Thread 1 writes and fences; without a fence of its own, what thread 0 adds does not carry that."""
    write = [Op("write", "data {thread}"), FENCE]
    read = [Op("read", "data 0", lead=True), Op("read", "data 1", lead=True)]
    for protocol, certain in (([BARRIER, RAISE], False), ([BARRIER, BETWEEN, RAISE], True), ([BETWEEN, RAISE], False)):
        blocks = [[Stage(write, protocol, [])], [Stage([], [WAIT, BETWEEN], read, target=1)]]
        assert certain == (not any(execution.faults() for execution in executions(blocks)))


def test_a_statement_that_is_not_known_is_refused():
    with pytest.raises(ValueError, match=r"does not know this statement: 'progress.seen \+= room.entries;'"):
        parse("progress.seen += room.entries;", PUBLISH)

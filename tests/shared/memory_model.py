"""All executions of a protocol between blocks under the memory model of PTX, as far as the kernels use it.

A protocol is the text of the C++ itself: `parse` turns each statement into operations on memory by a table, and refuses a statement that is
not in the table. `executions` runs blocks of two threads through it, in every order of what blocks can observe of each other (atomic
additions, and waits for a value). `Execution.faults` then says what is not certain in such an execution.

What orders memory (PTX, "memory consistency model"), and nothing else does:

    program order   within a thread
    a barrier       all that came before it in the block, and all that comes after it
    fences          a fence, later in its thread an atomic addition, in another thread an addition or a read that sees it (itself, or
                    through further additions), and later in that thread a fence: the first fence comes before the second
    observation     an addition, before whatever follows one that has seen it

Two accesses of one place by two threads, at least one of them a write and at least one not atomic, must be ordered by these. Where they
are not, a read may give any of the values, early or stale, and that is a fault. This is no stronger than PTX: a fence counts as acquire and
release only, and plain accesses have no order of their own, not even of one place.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

THREADS = 2  # of a block


class Op(NamedTuple):
    """One operation on memory by a thread."""

    kind: str  # barrier | fence | read | write | add: atomic | wait: atomic reads until the value is there
    place: str = ""  # one that begins with "room." is in shared memory, so every block has its own
    lead: bool = False  # only thread 0 does it
    last: bool = False  # only in the block whose addition to the counter completed the total
    some: bool = False  # only in a block that brings something


Table = Mapping[str, Sequence[Op]]


def parse(text: str, table: Table) -> list[Op]:
    """Operations of C++ statements, one a line. What stands in the braces of an `if` of thread 0 or of the last block is only theirs.

    Raises:
        ValueError: a statement is not in the table.
    """
    ops: list[Op] = []
    inside: list[dict[str, bool]] = []
    for line in text.splitlines():
        statement = line.partition("//")[0].strip()
        if statement == "}":
            inside.pop()
        elif statement in ("if (thread_id() == 0) {", "if (lane_id() == 0) {"):
            inside.append({"lead": True})
        elif statement == "if (last) {":
            inside.append({"last": True})
        elif statement == "if (room.last) {":
            ops.append(Op("read", "room.last", **{name: True for flags in inside for name in flags}))
            inside.append({"last": True})
        elif statement and statement not in table:
            raise ValueError(
                f"the memory model does not know this statement: {statement!r}; say what it does to memory in the test's table"
            )
        elif statement:
            ops += [op._replace(**{name: True for flags in inside for name in flags}) for op in table[statement]]
    return ops


def without(ops: Sequence[Op], kind: str) -> Iterator[tuple[int, list[Op]]]:
    """The protocol without one of its operations of a kind, for each of them."""
    for number, i in enumerate(i for i, op in enumerate(ops) if op.kind == kind):
        yield number, [*ops[:i], *ops[i + 1 :]]


class Stage(NamedTuple):
    """What a block does around one run of the protocol."""

    before: Sequence[Op]
    protocol: Sequence[Op]
    after: Sequence[Op]
    amount: int = 1  # that its addition to the counter brings
    target: int = 0  # that it waits for


class Event(NamedTuple):
    block: int
    thread: int  # -1: a barrier, of all threads
    op: Op
    place: str
    stage: int  # of the block

    def __str__(self) -> str:
        return f"{self.op.kind} {self.place} by thread {self.thread} of block {self.block}, stage {self.stage}"


@dataclass
class Execution:
    """Events in an order that agrees with what comes before what."""

    counter: str
    total: int
    times: int  # that the total is completed
    events: list[Event] = field(default_factory=list)
    before: list[int] = field(default_factory=list)  # bit i: event i comes before this one
    accesses: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))  # events by place
    observed: dict[int, int] = field(default_factory=dict)  # bit i: this addition or wait has seen the addition that is event i
    completed: list[tuple[int, int]] = field(default_factory=list)  # (block, stage)
    values: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    stuck: bool = False

    def comes_before(self, a: int, b: int) -> bool:
        """In causality order: by what `before` holds, or because something before `b` has observed `a`."""
        known = self.before[b]
        return bool(known >> a & 1) or any(known >> z & 1 and seen >> a & 1 for z, seen in self.observed.items())

    def faults(self) -> list[str]:
        """What is left to chance: accesses without an order, a total that more or less than one block completed, a wait without end."""
        faults = ["blocks wait for ever"] if self.stuck else []
        if self.counter and len(self.completed) != self.times:
            faults.append(f"{len(self.completed)} blocks believe to be the last, {self.times} should")
        for where in self.accesses.values():
            for n, b in enumerate(where):
                for a in where[:n]:
                    x, y = self.events[a], self.events[b]
                    kinds = {x.op.kind, y.op.kind}
                    if kinds == {"read"} or kinds <= {"add", "wait"} or (x.block, x.thread) == (y.block, y.thread):
                        continue
                    if not self.comes_before(a, b) and not self.comes_before(b, a):
                        faults.append(f"not ordered: {x}; {y}")
        return faults

    def seen_by(self, reader: int) -> set[int]:
        """Writes and additions to the place of a read that come before it."""
        return {
            i
            for i in self.accesses[self.events[reader].place]
            if self.events[i].op.kind in ("write", "add") and self.comes_before(i, reader)
        }


class _Run:
    """Replays one order of the additions and writes that are observed: which block makes the next one."""

    def __init__(self, blocks: Sequence[Sequence[Stage]], counter: str, total: int, times: int) -> None:
        self.done = Execution(counter, total, times)
        self.counter = counter
        waited_for = {op.place for stages in blocks for stage in stages for op in stage.protocol if op.kind == "wait"}
        self.observable = waited_for | ({counter} if counter else set())
        self.latest: dict[tuple[int, int], int] = {}  # event of each thread
        self.fence: dict[tuple[int, int], int] = {}  # latest of each thread
        self.released: dict[str, tuple[frozenset[int], int]] = defaultdict(lambda: (frozenset(), 0))  # fences; additions, as bits
        self.acquirable: dict[tuple[int, int], frozenset[int]] = defaultdict(frozenset)
        self.threads = [self._block(number, stages) for number, stages in enumerate(blocks)]
        self.pending = [next(thread, None) for thread in self.threads]
        self._end_waits()

    def enabled(self) -> list[int]:
        values = self.done.values
        return [b for b, p in enumerate(self.pending) if p and (p[0].kind != "wait" or values[p[0].place] >= p[1])]

    def advance(self, block: int) -> None:
        """Lets a block go on. Waits that this ends, end at once: one that ends later has seen more, so more is certain."""
        self.pending[block] = next(self.threads[block], None)
        self._end_waits()

    def _end_waits(self) -> None:
        while ends := [b for b in self.enabled() if self.pending[b][0].kind == "wait"]:
            self.pending[ends[0]] = next(self.threads[ends[0]], None)

    def _event(self, block: int, thread: int, op: Op, stage: int) -> int:
        done, number = self.done, len(self.done.events)
        place = f"{op.place} of block {block}" if op.place.startswith("room.") else op.place
        done.events.append(Event(block, thread, op, place, stage))
        who = [(block, thread)] if thread >= 0 else [(block, t) for t in range(THREADS)]
        earlier = {self.latest[w] for w in who if w in self.latest}
        if op.kind == "fence":
            earlier |= self.acquirable[block, thread]
            self.fence[block, thread] = number
        if place:
            done.accesses[place].append(number)
        done.before.append(0)
        for i in earlier:
            done.before[number] |= done.before[i] | 1 << i
        for w in who:
            self.latest[w] = number
        return number

    def _observe(self, block: int, thread: int, op: Op, event: int, amount: int) -> None:
        """An access of a place that other blocks observe."""
        fences, additions = self.released[op.place]
        if op.kind in ("add", "wait"):
            self.done.observed[event] = additions
            self.acquirable[block, thread] |= fences
        if op.kind == "add":
            mine = {self.fence[block, thread]} if (block, thread) in self.fence else set()
            self.released[op.place] = fences | mine, additions | 1 << event
            self.done.values[op.place] += amount
        elif op.kind == "write":  # plain: nothing is released by it
            self.released[op.place] = frozenset(), 0
            self.done.values[op.place] = 0

    def _block(self, block: int, stages: Sequence[Stage]) -> Iterator[tuple[Op, int]]:
        """Makes the events of a block; stops in front of each that other blocks observe, and yields it and the value it waits for."""
        for number, stage in enumerate(stages):
            last = False
            for op in (*stage.before, *stage.protocol, *stage.after):
                if (op.last and not last) or (op.some and stage.amount == 0):
                    continue
                if op.kind == "barrier":
                    self._event(block, -1, op, number)
                    continue
                for thread in range(1 if op.lead else THREADS):
                    own = op._replace(place=op.place.format(block=block, thread=thread, other=1 - thread, stage=number))
                    observable = own.place in self.observable and own.kind != "read"
                    if observable:
                        yield own, stage.target
                    event = self._event(block, thread, own, number)
                    if observable:
                        self._observe(block, thread, own, event, stage.amount)
                    if own.place == self.counter and own.kind == "add" and self.done.values[self.counter] == self.done.total:
                        last = True
                        self.done.completed.append((block, number))


def executions(blocks: Sequence[Sequence[Stage]], counter: str = "", total: int = 0, times: int = 1) -> Iterator[Execution]:
    """Every execution of blocks that run their stages one after the other.

    Args:
        counter: the place whose additions, once they make the total, tell a block that it is the last, so many times in all.
    """
    orders: list[tuple[int, ...]] = [()]
    while orders:
        order = orders.pop()
        run = _Run(blocks, counter, total, times)
        for block in order:
            run.advance(block)
        enabled = run.enabled()
        orders += [(*order, block) for block in enabled]
        if not enabled:
            run.done.stuck = any(run.pending)
            yield run.done

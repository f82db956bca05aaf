"""The loops of disassembled CUDA kernels (SASS, as cuobjdump prints it), and what one turn of a loop takes.

A turn has many ways; each is told by what is wanted of it, such as the bytes it loads. Of the ways that have the same, the one with the
fewest instructions counts. Loops inside are passed through once.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import NamedTuple

INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P[0-9T])\s+)?([A-Z][A-Z0-9_.]*)\s*(.*?)\s*;", re.MULTILINE)
ROOT = -1  # comes before all entries of a kernel

Counts = tuple[int, ...]
Graph = dict[int, list[int]]


class Instruction(NamedTuple):
    address: int
    predicate: str
    opcode: str
    operands: str

    def is_conditional(self) -> bool:
        return self.predicate not in ("", "PT")

    def target(self) -> int | None:
        found = re.findall(r"0x([0-9a-f]+)", self.operands)
        return int(found[-1], 16) if found else None

    def width(self) -> int:
        """Bytes of a load or store."""
        size = re.search(r"\.(128|64|U8|S8|U16|S16)\b", self.opcode)
        return {"128": 16, "64": 8, "U8": 1, "S8": 1, "U16": 2, "S16": 2}[size.group(1)] if size else 4


def kernels(text: str) -> dict[str, list[Instruction]]:
    """The instructions of every kernel, by its mangled name, functions that it calls behind it."""
    parts = re.split(r"^\s*Function : (\S+)$", text, flags=re.MULTILINE)[1:]
    return {
        name: [Instruction(int(address, 16), *rest) for address, *rest in INSTRUCTION.findall(body)]
        for name, body in zip(parts[::2], parts[1::2], strict=True)
    }


def _cases(code: list[Instruction], i: int, end: int, direct: set[int | None]) -> list[int]:
    """Where a jump by a table leads, which is not printed: to places that nothing else leads to, up to where the cases meet again."""
    return [i + 1, *(j for j in range(i + 2, end) if code[j - 1].opcode == "BRA" and not code[j - 1].predicate and j not in direct)]


def _successors(code: list[Instruction]) -> tuple[set[int], Graph]:
    """Where a kernel and its functions begin, and the instructions that may follow each one that can be reached, by their numbers.

    Lanes that wait for each other (BSYNC) go on where the BSSY before it says; which one that was is carried along every way.
    """
    at = {instruction.address: i for i, instruction in enumerate(code)}
    jumps = ("BRA", "BSSY", "CALL", "WARPSYNC.COLLECTIVE")
    direct = {at.get(instruction.target()) for instruction in code if instruction.opcode.startswith(jumps)}
    entries = {0} | {
        at[instruction.target()] for instruction in code if instruction.opcode.startswith("CALL") and instruction.target() in at
    }
    barriers: list[dict[str, frozenset[int]] | None] = [None] * len(code)
    following: Graph = {}
    waiting: list[tuple[int, dict[str, frozenset[int]]]] = [(entry, {}) for entry in entries]
    while waiting:
        i, new = waiting.pop()
        known = barriers[i]
        joined = dict(known or {})
        for barrier, places in new.items():
            joined[barrier] = joined.get(barrier, frozenset()) | places
        if known is not None and joined == known:
            continue
        barriers[i] = joined
        instruction = code[i]
        kind = instruction.opcode.split(".")[0]
        after = [i + 1] if instruction.is_conditional() else []
        if kind == "BRA":
            plain = instruction.opcode == "BRA" and not re.match(r"!?U?P\d", instruction.operands)
            after = [at[instruction.target()], *(after if plain else [i + 1])]
        elif kind == "BSYNC":
            after += joined.get(instruction.operands.split()[0], ())
        elif kind == "BRX":
            end = min((place for places in joined.values() for place in places if place > i), default=i)
            after += _cases(code, i, end, direct)
        elif kind not in ("RET", "EXIT", "BPT"):
            after = [i + 1]
        if kind == "BSSY":
            barrier, place = re.match(r"(B\d+), (0x[0-9a-f]+)", instruction.operands).groups()
            joined = {**joined, barrier: frozenset({at[int(place, 16)]})}
        following[i] = [j for j in after if j < len(code)]
        waiting += [(j, joined) for j in following[i]]
    return entries, following


def _in_order(graph: Graph) -> list[int]:
    """Blocks that can be reached from ROOT, each before those that it alone leads to (reverse postorder)."""
    order, seen, stack = [], {ROOT}, [(ROOT, iter(graph[ROOT]))]
    while stack:
        node, rest = stack[-1]
        following = next((other for other in rest if other not in seen), None)
        if following is None:
            order.append(node)
            stack.pop()
        else:
            seen.add(following)
            stack.append((following, iter(graph[following])))
    return order[::-1]


class Loops:
    """The natural loops of a kernel: ``bodies`` has the blocks of each, by the block that it begins with."""

    def __init__(self, code: list[Instruction]) -> None:
        entries, following = _successors(code)
        leading = defaultdict(list)
        for i, others in following.items():
            for other in others:
                leading[other].append(i)
        begins = {i for i in following if i in entries or leading[i] != [i - 1] or len(following[i - 1]) != 1}
        self.blocks: dict[int, list[Instruction]] = {}
        self.graph: Graph = {ROOT: sorted(entries)}
        for begin in begins:
            end = begin
            while end + 1 in following and end + 1 not in begins and following[end] == [end + 1]:
                end += 1
            self.blocks[begin] = code[begin : end + 1]
            self.graph[begin] = following[end]
        self.order = _in_order(self.graph)
        self.number = {block: i for i, block in enumerate(self.order)}
        self.leading: Graph = defaultdict(list)
        for block in self.order:
            for other in self.graph[block]:
                self.leading[other].append(block)
        self._find_dominators()
        self.bodies: dict[int, set[int]] = defaultdict(set)
        for block in self.order[1:]:
            for header in self.graph[block]:
                if self._dominates(header, block):
                    self.bodies[header] |= self._body(header, block)

    def _find_dominators(self) -> None:
        self.dominator = {ROOT: ROOT}
        changed = True
        while changed:
            changed = False
            for block in self.order[1:]:
                known = [other for other in self.leading[block] if other in self.dominator]
                nearest = known[0]
                for other in known[1:]:
                    while nearest != other:
                        if self.number[other] > self.number[nearest]:
                            other = self.dominator[other]
                        else:
                            nearest = self.dominator[nearest]
                changed |= self.dominator.get(block) != nearest
                self.dominator[block] = nearest

    def _dominates(self, above: int, block: int) -> bool:
        while block not in (above, ROOT):
            block = self.dominator[block]
        return block == above

    def _body(self, header: int, last: int) -> set[int]:
        body, waiting = {header}, [last]
        while waiting:
            block = waiting.pop()
            if block not in body:
                body.add(block)
                waiting += self.leading[block]
        return body

    def turns(self, header: int, weigh: Callable[[Iterable[Instruction]], Counts]) -> dict[Counts, int]:
        """The ways of one turn: what ``weigh`` adds up over the instructions, and how few instructions have that."""
        body = self.bodies[header]
        reached: dict[int, dict[Counts, int]] = defaultdict(dict)
        turns: dict[Counts, int] = {}
        for block in sorted(body, key=self.number.__getitem__):
            code = self.blocks[block]
            more, issued = weigh(code), sum(instruction.opcode != "NOP" for instruction in code)
            before = {tuple(0 for _ in more): 0} if block == header else reached[block]
            ways = {tuple(x + y for x, y in zip(counts, more, strict=True)): few + issued for counts, few in before.items()}
            for other in self.graph[block]:
                to = turns if other == header else reached[other]
                if other == header or (other in body and self.number[other] > self.number[block]):
                    for counts, few in ways.items():
                        to[counts] = min(few, to.get(counts, few))
        return turns

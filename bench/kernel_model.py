"""What a weight costs in the loops of the CUDA kernels that go over entries: bytes of memory, and instructions.

Bytes are those of the arrays, as the design has them. Instructions are counted in what nvcc 13.0 makes for compute capability 9.0, on the
way of full tiles of aligned fp32 arrays where no entry is near the threshold and none flips. In a step with a window nearly all turns are
so. Where the window is from a sample, most turns have an entry near it: there they are the least that a turn takes. What a tile needs once,
every 4 or 8 turns, is left out, and so are mask momentum, N:M, and what goes over units, candidates or the sums of ranks.
tests/kernels/test_resources.py counts both again in the compiled kernels.
"""

from __future__ import annotations

from typing import NamedTuple

# Of an H200: bytes a second that a copy moves (bench/NOTES.md), and what 132 multiprocessors of 4 schedulers can issue at 1.98 GHz.
COPY_BANDWIDTH = 4.3e12
ISSUED = 132 * 4 * 1.98e9
WARP = 32


class Loop(NamedTuple):
    """One turn of a loop, by one lane.

    ``reads``, ``writes``: the arrays, of which the mask has one bit for an entry, a mask byte one byte, every other array 4 bytes.
    ``vectors``: they are moved by the quad; where they are not, every load counts. ``additions``: to shared memory. ``votes``: of the warp,
    which tell the usual way from that where nothing is judged.
    """

    source: str
    kernel: str
    what: str
    reads: str
    writes: str
    entries: int
    instructions: int
    additions: int = 0
    votes: int = 0
    vectors: bool = True
    others: tuple[int, ...] = ()  # instructions of other loops that move as much: N:M; other shapes of units; counting inside a window

    def bytes_read(self) -> int:
        """In a turn, by accesses of a quad; those of mask words, which eight lanes share, are not among them."""
        return 4 * self.entries * len([name for name in self.reads.split() if name != "mask"])

    def bytes_written(self) -> int:
        return sum(self.entries * (1 if name == "byte" else 4) for name in self.writes.split())

    def bytes_per_weight(self) -> float:
        return (self.bytes_read() + self.bytes_written()) / self.entries + ("mask" in self.reads.split()) / 8

    def issue_share(self) -> float:
        """Share of all that an H200 can issue while it moves these bytes at the speed of a copy. Above 1 instructions are the limit."""
        return self.instructions / self.entries / WARP / ISSUED / (self.bytes_per_weight() / COPY_BANDWIDTH)


LOOPS = (
    Loop("pass.cu", "step_lower", "lower step, SGD", "g theta v mask", "theta v z", 8, 275),
    Loop("pass.cu", "step_lower_adamw", "lower step, AdamW", "g theta a b mask", "theta a b z", 8, 478),
    Loop("pass.cu", "step_lower_gradient", "lower step, your own optimizer", "g mask", "m*g", 8, 110),
    Loop("pass.cu", "step_mask", "z after your own optimizer", "theta mask", "z", 4, 46),
    Loop("pass.cu", "step_upper", "upper step", "g theta s mask", "s", 8, 267, votes=2, others=(328,)),
    Loop("pass.cu", "step_joint", "joint step, SGD", "g theta v s mask", "theta v s z", 8, 447, votes=2),
    Loop("pass.cu", "step_joint_adamw", "joint step, AdamW", "g theta a b s mask", "theta a b s z", 8, 644, votes=2),
    Loop("pass.cu", "step_joint_gradient", "joint step, your own optimizer", "g theta s mask", "s m*g", 8, 342, votes=2),
    Loop("pass.cu", "step_scores", "sums of units", "g theta", "", 12, 376, vectors=False, others=(402, 404)),
    Loop("step.cu", "step_finish", "judging by a sample's window, at least", "s mask", "", 8, 119, votes=2),
    Loop("step.cu", "step_finish", "counting digits where no sample served", "s", "", 16, 487, additions=16),
    Loop("pass.cu", "step_upper", "counting first digits, up to 0.5M weights", "s", "", 16, 689, additions=16, others=(479,)),
    Loop("topk.cu", "topk_mask", "`topk_mask`, judging, at least", "s", "byte", 16, 201, votes=4),
)  # fmt: skip


def table() -> str:
    """A line for each loop."""
    lines = [
        "| kernel | what | reads | writes | bytes per weight | instructions per weight | issue slots in the time of a copy |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| `{loop.kernel}_kernel` | {loop.what} | {loop.reads} | {loop.writes or '-'} | {loop.bytes_per_weight():.4g} "
        f"| {loop.instructions / loop.entries:.1f} | {100 * loop.issue_share():.0f} % |"
        for loop in LOOPS
    ]
    return "\n".join(lines)

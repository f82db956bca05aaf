"""What the compiler says of the CUDA kernels: nothing spills, and as many blocks fit on a multiprocessor as they were written for."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"
# blocks of 256 threads on a multiprocessor with 64 K registers; the bytes in flight that follow are checked in update.cuh
BLOCKS = {"step_lower": 3, "step_upper": 3, "step_joint": 2, "step_finish": 3}
BLOCKS |= {"step_sums": 2, "step_scores": 3, "step_spread": 3}
BLOCKS |= {"topk_mask": 3, "topk_few": 3}


def report(source: str) -> str:
    """The assembler's report for compute capability 9.0."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("needs nvcc on the path")
    flags = ["-std=c++17", "-O3", "--fmad=false", "-gencode=arch=compute_90,code=sm_90", "-Xptxas", "-v", "-cubin", "-o", "/dev/null"]
    done = subprocess.run(
        [nvcc, *flags, f"-I{CSRC}", f"-I{CSRC / 'cuda'}", str(CSRC / "cuda" / source)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("source", ["step.cu", "topk.cu"])
def test_nothing_spills_and_the_blocks_fit(source):
    text = report(source)
    spills = re.findall(r"Function properties for (\S+)\s+\d+ bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", text)
    assert len(spills) >= 3
    # None of these is in a loop over entries: a hundred candidates are flushed at once, step_upper's few bytes are of its loop over tiles of
    # 1024 entries, those of topk_mask of its stages (judge_all reloads one value a tile), and narrow_all is the way of scores that a sample does not tell apart.
    allowed = {"flush_pending": 8, "step_upper": 20, "topk_mask": 40, "narrow_all": 16, "judge_all": 4}
    assert not [
        (function, stores, loads)
        for function, stores, loads in spills
        if max(int(stores), int(loads)) > max((room for name, room in allowed.items() if name in function), default=0)
    ]
    parts = list(text.split("Compiling entry function")[1:])
    found = [re.match(r" '\S*?\d+((?:step|topk)_[a-z]+)_kernel", part) for part in parts]
    kernels = [
        (name.group(1), re.search(r"Used (\d+) registers", part).group(1), (re.search(r"(\d+) bytes smem", part) or [0, 0])[1])
        for name, part in zip(found, parts, strict=True)
        if name
    ]
    assert {name for name, _, _ in kernels} >= {name for name in BLOCKS if name.startswith(source[:4])}
    for name, registers, shared in kernels:
        if name in BLOCKS:
            granted = -(-int(registers) // 8) * 8  # in units of 8
            assert BLOCKS[name] * 256 * granted <= 65536, (name, registers)
            assert BLOCKS[name] * (int(shared or 0) + 1024) <= 227 * 1024, (name, shared)

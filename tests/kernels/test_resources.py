"""What the compiler says of the CUDA kernels: nothing spills, and as many blocks fit on a multiprocessor as they were written for.

What can be too much                            where it is checked
  registers x threads x blocks   65,536          here, of the built module for each of its architectures, and of the sources for 9.0
  shared memory x blocks         PROCESSORS      here, likewise; of one block at most 48 KB, which is all that static arrays may have
  bytes of kernel parameters     4,096           here, and by a static_assert in launch.cuh
  blocks in a grid               resident ones   launch.cuh asks the device
  bytes and instructions of a weight             here, against bench/kernel_model.py
  alignment of vector accesses                   static_asserts (block.cuh, histogram.cuh); `vectorizes` and `quad_aligned` decide who may
                                                 make them; every test on the simulator, built with -fsanitize=alignment
"""

from __future__ import annotations

import functools
import glob
import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import pytest
import sass

from bench.kernel_model import LOOPS, Loop
from bip_fast.engine import native
from bip_fast.timing.steps import step_bytes

pytestmark = pytest.mark.slow

CSRC = Path(__file__).resolve().parents[2] / "csrc"
# blocks of 256 threads on a multiprocessor with 64 K registers; the bytes in flight that follow are checked in update.cuh
SOURCES = {
    "pass.cu": {
        "step_lower": 3, "step_upper": 3, "step_joint": 2, "step_lower_adamw": 2, "step_joint_adamw": 2, "step_lower_gradient": 3,
        "step_joint_gradient": 2, "step_mask": 3, "step_scores": 2, "step_spread": 3,
    },
    "step.cu": {"step_finish": 3},
    "shards.cu": {"shards_count": 3, "shards_read": 3, "shards_end": 3},
    "topk.cu": {"topk_mask": 3, "topk_few": 3},
}  # fmt: skip
BLOCKS = {name: blocks for kernels in SOURCES.values() for name, blocks in kernels.items()}
# KB of shared memory of a multiprocessor, of which every resident block takes 1 KB besides its own; and bytes of constant memory in front
# of the parameters of a kernel.
PROCESSORS = {"80": (164, 352), "86": (100, 352), "89": (100, 352), "90": (228, 528), "100": (228, 896), "120": (100, 896)}
# Where a multiprocessor has 100 KB, the kernels that keep candidates in shared memory have one block less than they were written for.
FEWER = {"step_upper": 2, "step_finish": 2, "topk_mask": 2, "topk_few": 2}


def compiled(source: str, *flags: str) -> str:
    """What nvcc prints of a source, for compute capability 9.0."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("needs nvcc on the path")
    command = [nvcc, "-std=c++17", "-O3", "--fmad=false", f"-I{CSRC}", f"-I{CSRC / 'cuda'}", *flags, str(CSRC / "cuda" / source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


class Assembled(NamedTuple):
    report: str  # of the assembler
    cubin: Path


@pytest.fixture(scope="module")
def assembled(tmp_path_factory) -> Callable[[str], Assembled]:
    """A source for compute capability 9.0, assembled once."""
    folder = tmp_path_factory.mktemp("assembled")

    @functools.cache
    def assemble(source: str) -> Assembled:
        cubin = folder / f"{source}.cubin"
        return Assembled(compiled(source, "-gencode=arch=compute_90,code=sm_90", "-Xptxas", "-v", "-cubin", "-o", str(cubin)), cubin)

    return assemble


def test_only_the_mutation_leaves_out_the_fences(tmp_path):
    """BIP_FAST_MUTATION=no-fences, which tests/large/stress.py must find to be wrong."""

    def fences(*flags: str) -> int:
        compiled("topk.cu", "-arch=compute_90", "-ptx", "-o", str(tmp_path / "topk.ptx"), *flags)
        return len(re.findall(r"\bmembar\.|\bfence\.", (tmp_path / "topk.ptx").read_text()))

    assert fences() >= 2  # those of publish_is_last; barriers over a grid are the toolkit's, and have no such instruction
    assert fences("-DBIP_WITHOUT_FENCES") == 0


@pytest.mark.parametrize("source", SOURCES)
def test_nothing_spills_and_the_blocks_fit(assembled, source):
    text = assembled(source).report
    spills = re.findall(r"Function properties for (\S+)\s+\d+ bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", text)
    assert len(spills) >= 1
    # None of these is in a loop over entries: a hundred candidates are flushed at once, step_upper's few bytes are of its loop over tiles,
    # those of topk_mask and step_finish of their stages, those of judge_run and what calls it of their runs of tiles, and narrow_all is for
    # scores that a sample does not tell apart.
    allowed = {
        "flush_pending": 8, "step_upper": 20, "topk_mask": 40, "narrow_all": 16, "judge_all": 4, "step_finish": 8, "finish_groups": 40,
        "sample_edges": 8, "judge_run": 12, "judge_by_samples": 56, "conclude_sampled": 8, "judge_again": 44,
    }  # fmt: skip
    assert not [
        (function, stores, loads)
        for function, stores, loads in spills
        if max(int(stores), int(loads)) > max((room for name, room in allowed.items() if name in function), default=0)
    ]
    parts = list(text.split("Compiling entry function")[1:])
    found = [re.match(r" '\S*?\d+((?:step|topk|shards)_[a-z_]+)_kernel", part) for part in parts]
    kernels = [
        (name.group(1), re.search(r"Used (\d+) registers", part).group(1), (re.search(r"(\d+) bytes smem", part) or [0, 0])[1])
        for name, part in zip(found, parts, strict=True)
        if name
    ]
    assert {name for name, _, _ in kernels} >= SOURCES[source].keys()
    for name, registers, shared in kernels:
        if name in BLOCKS:
            granted = -(-int(registers) // 8) * 8  # in units of 8
            assert BLOCKS[name] * 256 * granted <= 65536, (name, registers)
            assert BLOCKS[name] * (int(shared or 0) + 1024) <= 227 * 1024, (name, shared)


def cuobjdump(*arguments: str) -> str:
    """What it prints. It calls nvdisasm, which is beside it in a toolkit and in packages alike."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    packages = glob.glob(os.path.join(sysconfig.get_path("purelib"), "nvidia", "*", "bin"))
    folders = [os.environ.get("PATH", ""), *(os.path.join(home, "bin") for home in homes if home), "/usr/local/cuda/bin", *packages]
    path = os.pathsep.join(folders)
    found = shutil.which("cuobjdump", path=path)
    if found is None or shutil.which("nvdisasm", path=path) is None:
        pytest.skip(
            "needs cuobjdump and nvdisasm: they are in the CUDA toolkit, and in the packages nvidia-cuda-cuobjdump, nvidia-cuda-nvdisasm"
        )
    return subprocess.run([found, *arguments], env={**os.environ, "PATH": path}, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def built() -> dict[str, dict[str, tuple[int, int, int]]]:
    """Of each architecture that the module was built for, if its limits are known: registers, shared and constant bytes of each kernel."""
    module = native.kernels()
    if not native.build_info()["cuda"]:
        pytest.skip("needs bip_fast built for CUDA: BIP_FAST_CUDA=1 pip install .")
    text = cuobjdump("--dump-resource-usage", module.__file__)
    found: dict[str, dict[str, tuple[int, int, int]]] = {}
    for part in re.split(r"^arch = sm_", text, flags=re.MULTILINE)[1:]:
        usage = re.findall(
            r"Function \S*?\d+((?:step|topk|shards)_[a-z_]+)_kernel\S*:\s+REG:(\d+) .*?SHARED:(\d+) .*?CONSTANT\[0\]:(\d+)", part
        )
        architecture = re.match(r"\d+", part)[0]
        found.setdefault(architecture, {}).update({name: tuple(map(int, numbers)) for name, *numbers in usage})
    return {architecture: kernels for architecture, kernels in found.items() if architecture in PROCESSORS}


def test_the_blocks_fit_on_every_architecture(built):
    assert built
    for architecture, kernels in built.items():
        assert kernels.keys() >= BLOCKS.keys()
        kilobytes, before_parameters = PROCESSORS[architecture]
        for name, (registers, shared, constants) in kernels.items():
            where = f"{name} on {architecture}"
            blocks = BLOCKS.get(name, 1)
            if kilobytes == 100:
                blocks = FEWER.get(name, blocks)
            own = shared - (1024 if int(architecture) >= 90 and shared else 0)  # there the compiler counts the 1 KB of the system too
            assert blocks * 256 * (-(-registers // 8) * 8) <= 65536, where
            assert own <= 48 * 1024, where
            assert blocks * (own + 1024) <= kilobytes * 1024, where
            assert constants - before_parameters <= 4096, where


def test_the_numbers_of_cuobjdump_are_what_they_are_taken_for(built):
    """The parameters of the finish are one `Args`, which is as large everywhere."""
    assert len({kernels["step_finish"][2] - PROCESSORS[architecture][1] for architecture, kernels in built.items()}) == 1
    assert len({kernels["step_upper"][1] - 1024 * (int(architecture) >= 90) for architecture, kernels in built.items()}) == 1


def weighed(loop: Loop) -> Callable[[Iterable[sass.Instruction]], sass.Counts]:
    """What a way through the loop must have: bytes read and written, additions to shared memory, votes, and no call."""

    def weigh(code: Iterable[sass.Instruction]) -> sass.Counts:
        wide = [instruction for instruction in code if not loop.vectors or "STRONG" in instruction.opcode]  # __ldcg and __stwb are
        return (
            sum(instruction.width() for instruction in wide if instruction.opcode.startswith(("LDG.", "LD.E"))),
            sum(instruction.width() for instruction in wide if instruction.opcode.startswith(("STG.", "ST.E"))),
            sum(instruction.opcode.startswith(("ATOMS.ADD", "ATOMS.POPC")) for instruction in code),
            sum(instruction.opcode.startswith("VOTE") for instruction in code),
            sum(instruction.opcode.startswith("CALL") for instruction in code),
        )

    return weigh


@pytest.fixture(scope="module")
def loops_of(assembled) -> Callable[[str, str], sass.Loops]:
    @functools.cache
    def disassembled(source: str) -> dict[str, list[sass.Instruction]]:
        return sass.kernels(cuobjdump("-sass", str(assembled(source).cubin)))

    @functools.cache
    def loops(source: str, kernel: str) -> sass.Loops:
        (code,) = [code for name, code in disassembled(source).items() if re.search(rf"\d{kernel}_kernel", name)]
        return sass.Loops(code)

    return loops


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: f"{loop.kernel}-{loop.what}".replace(" ", "-"))
def test_a_turn_has_the_bytes_and_instructions_of_the_model(loops_of, loop):
    """Other versions of nvcc may need some more or fewer instructions."""
    loops = loops_of(loop.source, loop.kernel)
    wanted = (loop.bytes_read(), loop.bytes_written(), loop.additions, loop.votes, 0)
    turns = {header: loops.turns(header, weighed(loop)) for header in loops.bodies}
    all_that_do = {header for header, ways in turns.items() if wanted in ways}
    innermost = [header for header in all_that_do if len(loops.bodies[header] & all_that_do) == 1]
    found, expected = sorted(turns[header][wanted] for header in innermost), sorted([loop.instructions, *loop.others])
    assert len(found) == len(expected), found
    assert all(abs(few - usual) <= 0.05 * usual for few, usual in zip(found, expected, strict=True)), found


@pytest.mark.parametrize(("phase", "rule"), [("lower", "sgd"), ("lower", "adamw"), ("upper", "sgd"), ("joint", "sgd"), ("joint", "adamw")])
def test_the_model_has_the_bytes_that_steps_are_compared_with(phase, rule):
    kernel = f"step_{phase}" + ("_adamw" if rule == "adamw" else "")
    loop = next(loop for loop in LOOPS if loop.kernel == kernel)
    flips = 0.15 if phase != "lower" else 0
    assert loop.bytes_per_weight() + flips == pytest.approx(step_bytes(phase, 1.0, rule=rule))

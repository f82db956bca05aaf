"""The simulator finds what it promises to find and runs correct kernels correctly; the project's kernels pass in any order it makes."""

import ctypes
import signal
import subprocess
import sys

import numpy as np
import pytest
from sim import build

THREADS = 256


@pytest.fixture(scope="module")
def library():
    return ctypes.CDLL(str(build.build("_faults", [build.HERE / "faults.cu"])))


@pytest.fixture
def sim(library):
    """Steers the simulator that runs faults.cu."""
    simulator = build.Simulator(library)
    yield simulator
    simulator.set_seed(0)
    simulator.set_max_grid(4)


@pytest.fixture
def run(library, sim):
    def run(name, *arrays, n=0):
        message = ctypes.create_string_buffer(4096)
        pointers = [array.ctypes.data_as(ctypes.c_void_p) for array in arrays] + [None] * (3 - len(arrays))
        if library.run_kernel(name.encode(), *pointers, n, message, ctypes.c_size_t(len(message))):
            raise RuntimeError(message.value.decode())

    return run


# --- correct kernels -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_block_sum(run, sim, seed):
    sim.set_seed(seed)
    data = np.random.default_rng(seed).integers(-1000, 1000, 7 * THREADS).astype(np.int32)
    sums = np.zeros(7, np.int32)
    run("sum", data, sums, n=7)
    np.testing.assert_array_equal(sums, data.reshape(7, THREADS).sum(1))


@pytest.mark.parametrize("seed", range(4))
def test_collectives(run, sim, seed):
    sim.set_seed(seed)
    data = np.zeros(THREADS, np.int32)
    run("collectives", data)
    lane = np.arange(THREADS) % 32
    ballot = sum(1 << i for i in range(32) if i % 3 == 0)
    expected = np.where(lane % 2 == 0, ballot ^ 30, ballot) + np.where(lane >= 4, lane - 4, lane)
    np.testing.assert_array_equal(data, expected)


@pytest.mark.parametrize("seed", range(8))
def test_last_block_sees_all(run, sim, seed):
    sim.set_seed(seed)
    parts, arrived, total = np.zeros(9, np.int32), np.zeros(1, np.int32), np.zeros(1, np.int32)
    run("last_block", parts, arrived, total, n=9)
    assert total[0] == 9 * THREADS


def test_seed_changes_the_order_of_blocks_and_warps(run, sim):
    orders = []
    for seed in (0, 0, 1, 1, 2):
        sim.set_seed(seed)
        order = np.zeros(5 * 8, np.int32)
        run("order", order, np.zeros(1, np.int32), n=5)
        assert sorted(order) == list(range(40))
        orders.append(order.tolist())
    assert orders[0] == orders[1] == list(range(40))  # 0 is the natural order
    assert orders[2] == orders[3]  # a seed says it all
    assert orders[2] != orders[0]
    assert orders[2] != orders[4]
    blocks = [i // 8 for i in orders[2]]
    assert blocks[::8] != [0, 1, 2, 3, 4]
    assert any(orders[2][i : i + 8] != sorted(orders[2][i : i + 8]) for i in range(0, 40, 8))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("blocks", [1, 2, 12])
def test_a_barrier_over_the_grid(run, sim, seed, blocks):
    sim.set_seed(seed)
    sim.set_max_grid(12)
    parts, sums = np.zeros(blocks, np.int32), np.zeros(blocks, np.int32)
    run("grid_sums", parts, sums, n=blocks)
    np.testing.assert_array_equal(sums, 3 * blocks * (blocks + 1) // 2)


def test_more_blocks_than_are_resident_at_once(run, sim):
    """A launch whose blocks wait for each other then has half as many."""
    for most, blocks in ((4, 2), (1, 1)):
        sim.set_max_grid(most)
        parts, sums = np.zeros(5, np.int32), np.zeros(5, np.int32)
        run("too_many_together", parts, sums)
        np.testing.assert_array_equal(sums, [3 * blocks * (blocks + 1) // 2] * blocks + [0] * (5 - blocks))


def test_launches_are_counted(run, sim):
    sim.launches()
    run("collectives", np.zeros(THREADS, np.int32))
    run("collectives", np.zeros(THREADS, np.int32))
    assert sim.launches(reset=False) == 2
    assert sim.launches() == 2
    assert sim.launches() == 0


# --- planted faults --------------------------------------------------------------------------------------------------------------

FAULTS = {
    "divergent_barrier": r"block 0, thread \d+: divergent barrier: .*waits at __syncthreads \(.*faults.cu:\d+\), but thread \d+ waits at",
    "exit_before_barrier": r"divergent barrier: .* but thread 77 has exited",
    "shuffle_by_exited_lane": r"not reached by all lanes of its mask: thread \d+ waits at __shfl_sync .* but thread 5 has exited",
    "mismatched_mask": r"not reached by all lanes of its mask: .*__ballot_sync with mask",
    "lane_outside_mask": r"__shfl_sync reads lane 20, which is not in the mask",
    "barrier_in_half_a_warp": r"not reached by all lanes of its mask: thread \d+ waits at __shfl_sync .* waits at __syncthreads",
    "misaligned": r"misaligned access at address 0x[0-9a-f]+ \(.*\)",
    "null": r"block 0, thread 200: access to memory that is not mapped",
    "endless_barriers": r"no end in sight: thread 0 waits at __syncthreads",
    "deep_stack": r"access to memory that is not mapped",
    "missing_block": r"block \d waits at a barrier over the grid \(.*faults.cu:\d+\), but block 1 has ended",
    "missing_thread": r"block 1, thread \d+: divergent barrier: .*waits at a barrier over the grid .* but thread 40 has exited",
    "divergent_grid_barrier": r"divergent barrier over the grid: block \d waits at .*, but block \d waits at",
    "not_together": r"a barrier over the grid in a launch whose blocks need not be resident \(.*faults.cu:\d+\)",
    "empty_grid": r"invalid configuration: 0 blocks of 256 threads",
}


@pytest.mark.parametrize("seed", [0, 3])
@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_found_and_the_simulator_goes_on(run, sim, name, seed):
    sim.set_seed(seed)
    data = sim.guarded(THREADS, np.int32)
    with pytest.raises(RuntimeError, match=FAULTS[name]):
        run(name, data, data)
    data = np.ones(THREADS, np.int32)
    sums = np.zeros(1, np.int32)
    run("sum", data, sums, n=1)
    assert sums[0] == THREADS


@pytest.mark.parametrize("past", [1, -1, 10000])
def test_shared_index_out_of_range(run, past):
    with pytest.raises(RuntimeError, match=rf"thread {THREADS - 1 if past == 1 else 0}: index .* is out of bounds \(.*faults.cu"):
        run("shared_index", np.zeros(THREADS, np.int32), n=past)
    run("shared_index", np.zeros(THREADS, np.int32), n=0)


@pytest.mark.parametrize("n", [1, 3, 255, 256, 257, 4096])
def test_global_access_past_the_end(run, sim, n):
    data = sim.guarded(n, np.int32, align=4)
    with pytest.raises(RuntimeError, match=rf"access to memory that is not mapped at address {data.ctypes.data + 4 * n:#x}"):
        run("global_write", data, n=n)
    with pytest.raises(RuntimeError, match="access to memory that is not mapped"):
        run("global_read", data, np.zeros(1, np.int32), n=n)
    run("global_write", data, n=n - 1)
    assert (data == 1).all()


def test_shared_memory_starts_poisoned(run):
    data = np.zeros(THREADS, np.int32)
    for _ in range(2):  # not what the launch before left there
        run("uninitialized", data)
        np.testing.assert_array_equal(data[::2].view(np.uint32), 0xA5A5A5A5)
        assert (data[1::2] == 7).all()


def test_missing_barrier_shows_under_some_seed(run, sim):
    expected = (np.arange(THREADS) - 1) % THREADS
    wrong = 0
    for seed in range(8):
        sim.set_seed(seed)
        data = np.zeros(THREADS, np.int32)
        run("missing_barrier", data)
        wrong += bool((data != expected).any())
    assert wrong


def test_a_race_between_blocks_shows_under_some_seed(run, sim):
    missed = 0
    for seed in range(9):
        sim.set_seed(seed)
        parts, arrived, total = np.zeros(9, np.int32), np.zeros(1, np.int32), np.zeros(1, np.int32)
        run("early_arrival", parts, arrived, total, n=9)
        missed += total[0] != 9 * THREADS
        assert seed or not missed  # block after block
    assert missed


def test_a_missing_barrier_over_the_grid_shows_under_some_seed(run, sim):
    wrong = 0
    for seed in range(1, 12):
        sim.set_seed(seed)
        parts, sums = np.zeros(4, np.int32), np.zeros(4, np.int32)
        run("missing_grid_barrier", parts, sums, n=4)
        wrong += bool((sums != 30).any())
    assert wrong


def test_faults_outside_kernels_are_not_swallowed(library):
    """The signal handlers are there while a kernel runs, and no longer."""
    code = f"""
import ctypes
library = ctypes.CDLL({library._name!r})
message = ctypes.create_string_buffer(4096)
assert library.run_kernel(b"null", None, None, None, 0, message, ctypes.c_size_t(4096)) == 1
print("found", flush=True)
ctypes.string_at(0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "found\n", done.stderr
    assert done.returncode == -signal.SIGSEGV


def test_no_compiler_is_a_clear_error(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(RuntimeError, match=r"needs a C\+\+ compiler"):
        build.compiler()

"""The simulator finds what it promises to find and runs correct kernels correctly; the project's kernels pass in any order it makes."""

import ctypes
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from sim import build
from sim.network import Network

from bip_fast import reference

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


@pytest.fixture
def run(library, sim):
    def run(name, *arrays, n=0):
        message = ctypes.create_string_buffer(4096)
        pointers = [array.ctypes.data_as(ctypes.c_void_p) for array in arrays] + [None] * (3 - len(arrays))
        if library.run_kernel(name.encode(), *pointers, n, message, ctypes.c_size_t(len(message))):
            raise RuntimeError(message.value.decode())

    return run


@pytest.fixture
def module():
    """The project's kernels on the simulator, put back to its natural order afterwards."""
    module = build.load()
    yield module
    module.sim.set_seed(0)
    module.sim.set_max_grid(4)


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


# --- the project's kernels, at the level of bip.h --------------------------------------------------------------------------------


def topk(module, scores, k):
    """`topk` between guard pages, with a workspace full of rubbish."""
    sim, n = module.sim, len(scores)
    given, mask = sim.guarded(n, align=4), sim.guarded(n, np.uint8, align=1)
    given[:] = scores
    workspace = sim.guarded(module.cuda.topk_workspace_bytes(n), np.uint8)
    workspace[:] = 0xCD
    module.cuda.topk(scores=given.ctypes.data, n=n, k=k, mask=mask.ctypes.data, workspace=workspace.ctypes.data, where=0)
    return torch.from_numpy(mask.copy()).bool()


@pytest.mark.parametrize("seed", range(4))
def test_topk_in_any_order_of_blocks_and_warps(module, seed):
    module.sim.set_seed(seed)
    scores = torch.randn(40_001, generator=torch.Generator().manual_seed(seed))
    scores[::3] = 0.25
    for grid in (1, 3, 100):
        module.sim.set_max_grid(grid)
        for k in (1, 9_000, 20_000, 40_000):
            assert torch.equal(topk(module, scores.numpy(), k), reference.topk_mask(scores, k)), (grid, k)


def test_topk_fallback(module):
    """Two neighbouring atoms, each too large for the candidate list after three digits: the last block narrows alone."""
    bits = 0x3F000000 + np.arange(300_000, dtype=np.int32) % 2
    scores = torch.from_numpy(bits.view(np.float32).copy())
    for k in (70_000, 220_000):
        assert torch.equal(topk(module, scores.numpy(), k), reference.topk_mask(scores, k))


@pytest.mark.parametrize(("n", "k", "launches"), [(0, 0, 0), (5000, 100, 1), (20_000, 0, 1), (20_000, 20_000, 1), (20_000, 100, 3)])
def test_topk_launches(module, n, k, launches):
    module.sim.launches()
    assert int(topk(module, np.arange(n, dtype=np.float32), k).sum()) == k
    assert module.sim.launches() == launches


ALONE_TILES = 512  # kAloneTiles in workspace.cuh: up to so many, one launch does all
F32, BF16, F16 = 0, 1, 2
LOWER, UPPER, JOINT = 0, 1, 2
# dense and pruned, full and short tiles, two groups whose tensors alternate, empty tensors and groups
MIXED = [(3000, 0, F32), (64, -1, F32), (9000, 1, BF16), (0, 0, F32), (33, -1, F16), (4097, 0, F16), (1024, 1, F32), (1, 1, F32)]
MIXED.append((70, 2, F32))


def assert_equal_to_cpu(module, specs, kept, phases, seeds=(0,), grids=(4,), options=None, **network):
    """Every byte of the state is that of the CPU kernels, after every step."""
    options = options or {}
    expected, states = Network(module, specs, kept, **network), []
    for i, phase in enumerate(phases):
        expected.step(module.cpu, phase, seed=i, **options)
        states.append(expected.state())
    for seed in seeds:
        for grid in grids:
            module.sim.set_seed(seed)
            module.sim.set_max_grid(grid)
            given = Network(module, specs, kept, **network)
            for i, phase in enumerate(phases):
                given.step(module.cuda, phase, seed=i, **options)
                state = given.state()
                wrong = [name for name in state if state[name] != states[i][name]]
                assert not wrong, (seed, grid, i, phase, wrong)
            if UPPER in phases or JOINT in phases:
                assert given.kept() == sum(kept)


@pytest.mark.parametrize("dtypes", [(F32,), (BF16,), (F16,), (F32, BF16, F16)], ids=str)
@pytest.mark.parametrize("mask_momentum", [0.0, 0.8])
def test_steps_of_every_kind(module, dtypes, mask_momentum):
    for options in ({"scale": 1024.0}, {"align": 1}, {"without": (0, 1, 2)}):
        assert_equal_to_cpu(
            module, MIXED, [500, 9100, 0, 0], [UPPER, LOWER, JOINT, UPPER, JOINT], mask_momentum=mask_momentum,
            options={"dtypes": dtypes} | options,
        )  # fmt: skip


@pytest.mark.parametrize("seed", range(6))
def test_steps_in_any_order_of_blocks_and_warps(module, seed):
    assert_equal_to_cpu(module, MIXED, [500, 9100, 3, 0], [JOINT, LOWER, UPPER, JOINT], [seed], grids=[1, 2, 5, 64], nesterov=1)


ATOMS = {
    "zeros": np.zeros,
    "ones": np.ones,
    "halves": lambda n: np.full(n, 0.5),
    "zeros and ones": lambda n: np.arange(n) % 2,
    "neighbours": lambda n: (0x3F000000 + np.arange(n, dtype=np.int32) % 2).view(np.float32),
    "subnormals": lambda n: (np.arange(n, dtype=np.int32) % 100).view(np.float32),
}


@pytest.mark.parametrize("atoms", ATOMS)
@pytest.mark.parametrize("kept", [1, 20_000, 110_000, 199_999])
def test_atoms(module, atoms, kept):
    """Scores that do not move: the tie order decides, in the window of a histogram and, for neighbours, in the fallback."""
    assert_equal_to_cpu(module, [(150_000, 0, F32), (50_000, 0, F32)], [kept], [UPPER, JOINT], mask_lr=0.0, scores=ATOMS[atoms])


@pytest.mark.parametrize("k", [1, 10_000, 39_999])
def test_projection_without_gradients(module, k):
    """The scores are selected as they are, also where the first digit does not resolve them."""
    for seed in range(3):
        scores = np.random.default_rng(seed).random(40_000).astype(np.float32)
        scores[seed::7] = (0.0, 1.0, 0.5)[seed]
        network = Network(module, [(40_000, 0, F32)], [k])
        network.arrays["scores"][:40_000] = scores
        network.step(module.cuda, UPPER, without=(0,))
        mask = np.unpackbits(network.arrays["mask"].view(np.uint8), bitorder="little")[:40_000]
        assert torch.equal(torch.from_numpy(mask).bool(), reference.topk_mask(torch.from_numpy(scores), k))


def test_more_tensors_than_kernel_parameters_hold(module):
    specs = [(100 + i % 50, i % 3 - 1, i % 3) for i in range(850)]
    assert_equal_to_cpu(module, specs, [9000, 17_000], [UPPER, LOWER, JOINT], options={"dtypes": (F32, F16), "without": (5, 405, 806)})


def test_more_than_a_thousand_groups(module):
    specs = [(90 + i % 50, i, F32) for i in range(1030)]
    assert_equal_to_cpu(module, specs, [i % 91 for i in range(1030)], [UPPER, LOWER, JOINT], seeds=[1], grids=[7])


def test_groups_with_histograms_of_their_own(module):
    specs = [(2500 + i, i % 7, F32) for i in range(21)]
    assert_equal_to_cpu(module, specs, [0, 1, 2000, 4000, 7000, 7536, 7538], [UPPER, LOWER, JOINT, UPPER], seeds=[0, 2], grids=[3, 30])


def test_twenty_steps_on_one_workspace(module):
    assert_equal_to_cpu(module, MIXED, [500, 9100, 3, 0], [LOWER, UPPER] * 10)
    assert_equal_to_cpu(module, MIXED, [500, 9100, 3, 0], [JOINT] * 20)


@pytest.mark.parametrize("phase", [LOWER, UPPER, JOINT])
def test_found_inf_skips_everything(module, phase):
    network = Network(module, MIXED, [500, 9100, 3, 0])
    network.step(module.cuda, JOINT)
    before, workspace = network.state(), network.workspaces[module.cuda].tobytes()
    network.step(module.cuda, phase, seed=1, found_inf=1.0)
    assert network.state() == before
    assert network.workspaces[module.cuda].tobytes() == workspace
    network.step(module.cuda, phase, seed=1, found_inf=0.0)
    assert network.state() != before


@pytest.mark.parametrize(("tensors", "further"), [(1, 0), (400, 0), (401, 1), (800, 1), (801, 2)])
def test_launches_of_a_step(module, tensors, further):
    network = Network(module, [(40, 0, F32)] * tensors, [10])
    alone = tensors <= ALONE_TILES
    for phase, launches in ((LOWER, 1), (UPPER, 1 if alone else 4), (JOINT, 1 if alone else 4)):
        module.sim.launches()
        network.step(module.cuda, phase)
        assert module.sim.launches() == launches + further

"""The CUDA kernels on the simulator at the level of bip.h: equal to the CPU kernels byte for byte, in any order of blocks and warps."""

import numpy as np
import pytest
import torch
from sim.network import Network

from bip_fast import reference


def topk(module, scores, k):
    """`topk` between guard pages, with a workspace full of rubbish."""
    sim, n = module.sim, len(scores)
    given, mask = sim.guarded(n, align=4), sim.guarded(n, np.uint8, align=1)
    given[:] = scores
    workspace = sim.guarded(module.cuda.topk_workspace_bytes(n), np.uint8)
    workspace[:] = 0xCD
    module.cuda.topk(scores=given.ctypes.data, n=n, k=k, mask=mask.ctypes.data, workspace=workspace.ctypes.data, where=0)
    topk.fell_back = bool(workspace[0]) if n else False  # the first field of TopkWorkspace in topk.cu
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


def _misleading(n):
    """The runs of 32 that topk.cu samples hold other scores than all the rest."""
    scores = np.random.default_rng(0).random(n, dtype=np.float32) * 0.5
    stride = int(np.cbrt(n) / 4)
    turns = np.arange(n // 32 // stride, dtype=np.uint64)
    with np.errstate(over="ignore"):
        places = (turns * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(32)) % np.uint64(stride)
    for run in (turns * np.uint64(stride) + places).astype(int):
        scores[32 * run : 32 * run + 32] += 0.5
    return scores


N = 300_000
SELECTIONS = {
    # scores, and whether the sample serves
    "uniform": (lambda: np.random.default_rng(1).random(N, dtype=np.float32), True),
    "normal": (lambda: np.random.default_rng(2).standard_normal(N, dtype=np.float32), True),
    "all equal": (lambda: np.full(N, 0.25, np.float32), True),
    "half zeros": (lambda: np.maximum(np.random.default_rng(3).standard_normal(N, dtype=np.float32), 0), True),
    "sorted": (lambda: np.arange(N, dtype=np.float32), True),
    "a sample that misleads": (lambda: _misleading(N), False),
    "two neighbours": (lambda: (0x3F000000 + np.arange(N, dtype=np.int32) % 2).view(np.float32), False),
}


@pytest.mark.parametrize("name", SELECTIONS)
def test_topk_by_a_sample_or_by_digits(module, name):
    make, serves = SELECTIONS[name]
    scores = make()
    for seed, k in ((0, 70_000), (1, 220_000), (2, 30_000)):
        module.sim.set_seed(seed)
        assert torch.equal(topk(module, scores, k), reference.topk_mask(torch.from_numpy(scores), k)), k
        assert topk.fell_back != serves, k


@pytest.mark.parametrize("k", [1, 5, N - 5, N - 1])
def test_topk_at_the_ends(module, k):
    """The window has no edge on one side."""
    scores = np.random.default_rng(4).random(N, dtype=np.float32)
    assert torch.equal(topk(module, scores, k), reference.topk_mask(torch.from_numpy(scores), k))
    assert not topk.fell_back


@pytest.mark.parametrize(("n", "k", "launches"), [(0, 0, 0), (5000, 100, 1), (20_000, 0, 1), (20_000, 20_000, 1), (20_000, 100, 1)])
def test_topk_launches(module, n, k, launches):
    module.sim.launches()
    assert int(topk(module, np.arange(n, dtype=np.float32), k).sum()) == k
    assert module.sim.launches() == launches


ALONE_TILES = 512  # kAloneTiles in workspace.cuh: up to so many, one launch does all
F32, BF16, F16 = 0, 1, 2
LOWER, UPPER, JOINT = 0, 1, 2
NONE, SGD, ADAMW, GRADIENT = range(4)  # bip::Rule
RULES = pytest.mark.parametrize("rule", [SGD, ADAMW, GRADIENT], ids=["sgd", "adamw", "gradient"])
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


@RULES
@pytest.mark.parametrize("dtypes", [(F32,), (BF16,), (F16,), (F32, BF16, F16)], ids=str)
@pytest.mark.parametrize("mask_momentum", [0.0, 0.8])
def test_steps_of_every_kind(module, dtypes, mask_momentum, rule):
    for options in ({"scale": 1024.0}, {"align": 1}, {"without": (0, 1, 2)}):
        assert_equal_to_cpu(
            module, MIXED, [500, 9100, 0, 0], [UPPER, LOWER, JOINT, UPPER, JOINT], mask_momentum=mask_momentum, rule=rule,
            options={"dtypes": dtypes} | options,
        )  # fmt: skip


@RULES
@pytest.mark.parametrize("seed", range(6))
def test_steps_in_any_order_of_blocks_and_warps(module, seed, rule):
    phases = [JOINT, LOWER, UPPER, JOINT]
    assert_equal_to_cpu(module, MIXED, [500, 9100, 3, 0], phases, [seed], grids=[1, 2, 5, 64], nesterov=1, rule=rule)


def test_z_alone(module):
    """A lower step in which theta stays gives z the values that theta and mask have, whoever wrote them."""
    for seed in range(2):
        networks = [Network(module, MIXED, [500, 9100, 3, 0], rule=NONE, seed=seed) for _ in range(2)]
        for network, backend in zip(networks, (module.cpu, module.cuda), strict=True):
            network.arrays["mask"][:] = np.random.default_rng(seed).integers(0, 2**32, len(network.arrays["mask"]), dtype=np.uint32)
            before = network.arrays["theta"].copy()
            network.step(backend, LOWER, without=range(len(MIXED)))
            assert np.array_equal(network.arrays["theta"], before)
            bits = np.unpackbits(network.arrays["mask"].view(np.uint8), bitorder="little")[:3000]
            kept = (bits.reshape(-1)[: 3000 // 32 * 32].reshape(-1, 32).any(1).repeat(32), bits[: 3000 // 32 * 32] == 1)
            z = network.arrays["param 0"][: 3000 // 32 * 32]
            assert np.array_equal(z[kept[1]], before[: len(z)][kept[1]])
            assert not z[kept[0] & ~kept[1]].any()
        assert networks[0].state() == networks[1].state()


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


@RULES
def test_more_tensors_than_kernel_parameters_hold(module, rule):
    specs = [(100 + i % 50, i % 3 - 1, i % 3) for i in range(850)]
    assert_equal_to_cpu(
        module, specs, [9000, 17_000], [UPPER, LOWER, JOINT], options={"dtypes": (F32, F16), "without": (5, 405, 806)}, rule=rule
    )


def test_more_than_a_thousand_groups(module):
    specs = [(90 + i % 50, i, F32) for i in range(1030)]
    assert_equal_to_cpu(module, specs, [i % 91 for i in range(1030)], [UPPER, LOWER, JOINT], seeds=[1], grids=[7])


def test_groups_with_histograms_of_their_own(module):
    specs = [(2500 + i, i % 7, F32) for i in range(21)]
    assert_equal_to_cpu(module, specs, [0, 1, 2000, 4000, 7000, 7536, 7538], [UPPER, LOWER, JOINT, UPPER], seeds=[0, 2], grids=[3, 30])


@RULES
def test_twenty_steps_on_one_workspace(module, rule):
    assert_equal_to_cpu(module, MIXED, [500, 9100, 3, 0], [LOWER, UPPER] * 10, rule=rule)
    assert_equal_to_cpu(module, MIXED, [500, 9100, 3, 0], [JOINT] * 20, rule=rule)


@RULES
@pytest.mark.parametrize("phase", [LOWER, UPPER, JOINT])
def test_found_inf_skips_everything(module, phase, rule):
    network = Network(module, MIXED, [500, 9100, 3, 0], rule=rule)
    network.step(module.cuda, JOINT)
    before, workspace = network.state(), network.workspaces[module.cuda].tobytes()
    network.step(module.cuda, phase, seed=1, found_inf=1.0)
    assert network.state() == before
    assert network.workspaces[module.cuda].tobytes() == workspace
    network.step(module.cuda, phase, seed=1, found_inf=0.0)
    assert network.state() != before


@RULES
@pytest.mark.parametrize(("tensors", "further"), [(1, 0), (400, 0), (401, 1), (800, 1), (801, 2)])
def test_launches_of_a_step(module, tensors, further, rule):
    network = Network(module, [(40, 0, F32)] * tensors, [10], rule=rule)
    alone = tensors <= ALONE_TILES
    for phase, launches in ((LOWER, 1), (UPPER, 1 if alone else 2), (JOINT, 1 if alone else 2)):
        module.sim.launches()
        network.step(module.cuda, phase)
        assert module.sim.launches() == launches + further

"""The window of the streaming pass: every path that a selection can take ends at the same mask, and the counters say which it took."""

import os

import numpy as np
import pytest
import torch
from helpers import fill_gradients, make_params
from lockstep import Lockstep
from sim.network import Network

from bip_fast import _C, FastBiP
from bip_fast.engine.units import unpack_mask

F32, BF16 = 0, 1
LOWER, UPPER, JOINT = 0, 1, 2
# More tiles than one launch does alone: a large group of two tensors with a dense one between, a middle one, and one that is all listed.
SPECS = [(400_000, 0, F32), (150_001, 1, F32), (777, -1, F32), (130_033, 0, BF16), (1000, 1, F32), (900, 2, F32)]
KEPT = [53_000, 75_000, 100]
# Of the workspace of CUDA kernels (workspace.cuh): the states of the groups begin behind the Queue; of each the Memory comes first.
CUDA_STATES, CUDA_STATE_BYTES, COUNTED = 48, 176, 92


class Twins:
    """The same network on the CPU kernels and on the simulator, equal byte for byte after every step."""

    def __init__(self, module, specs=SPECS, kept=KEPT, **network):
        self.module = module
        self.networks = {backend: Network(module, specs, kept, **network) for backend in (module.cpu, module.cuda)}
        self.seed = 0

    def step(self, phase=UPPER, **options):
        for backend, network in self.networks.items():
            network.step(backend, phase, seed=self.seed, **options)
        self.seed += 1
        cpu, cuda = (network.state() for network in self.networks.values())
        assert not [name for name in cpu if cpu[name] != cuda[name]]

    def set(self, name, values):
        for network in self.networks.values():
            values(network.arrays[name])

    def set_kept(self, kept):
        for network in self.networks.values():
            network.groups["kept"] = kept

    def counters(self, group=0, backend="cuda"):
        backend = getattr(self.module, backend)
        return {
            name: self.networks[backend].counters[backend][group][name].item()
            for name in ("steps", "first", "missed", "crowded", "candidates")
        }

    def counted(self, group=0):
        """Steps in which a sample did not serve the group and its digits were counted, on the simulator."""
        place = CUDA_STATES + group * CUDA_STATE_BYTES + COUNTED
        return self.networks[self.module.cuda].workspaces[self.module.cuda][place : place + 4].view(np.uint32).item()


def gained(before, after):
    return {name: after[name] - before[name] for name in after}


PATHS = {
    "one pass": {"mask_lr": 1e-4},
    "one pass in most steps": {"mask_lr": 0.01},
    "missed in most steps": {"mask_lr": 0.3},
    "all equal": {"mask_lr": 0.0, "scores": lambda n: np.full(n, 0.5)},
    "zeros and ones": {"mask_lr": 0.3, "scores": lambda n: np.arange(n) % 2},
    "momentum of scores": {"mask_lr": 1e-3, "mask_momentum": 0.9},
    "few are kept": {"mask_lr": 0.3, "kept": [530, 150, 100]},
}


@pytest.mark.parametrize("seed", [0, 3])
@pytest.mark.parametrize("path", PATHS)
def test_every_path_ends_at_the_same_mask(module, path, seed):
    module.sim.set_seed(seed)
    module.sim.set_max_grid(6 if seed else 1)
    twins = Twins(module, **PATHS[path])
    for phase in [UPPER, UPPER, LOWER, UPPER, JOINT, UPPER, JOINT]:
        twins.step(phase)
    counters = twins.counters()
    assert counters["steps"] == 6
    assert counters["first"] == 1
    if path in ("one pass", "all equal", "momentum of scores"):
        assert counters["missed"] == counters["crowded"] == 0
    if path == "missed in most steps":
        assert counters["missed"] >= 4
    assert twins.counters(group=2)["first"] == 0  # so few entries that all are listed
    assert twins.counted(0) == twins.counted(1) == 0, "a sample serves all of these"


def test_candidates_too_many_for_one_block(module):
    """After the first step the window is wide: its candidates are left to all blocks together."""
    twins = Twins(module, mask_lr=1e-5)
    twins.step()
    before = twins.counters()
    twins.step()
    more = gained(before, twins.counters())
    assert more["candidates"] > 2048  # kAloneUpTo in workspace.cuh
    assert more["missed"] == more["crowded"] == 0


def test_candidates_with_one_score(module):
    """Most of them in one bin, more than kFew in workspace.cuh: the tie order decides inside of the window."""
    twins = Twins(module, mask_lr=0.0)
    twins.step()
    threshold = float(twins.networks[module.cuda].counters[module.cuda][0]["threshold"])

    def pile_up(scores):
        part = scores[:400_000]
        near = np.argsort(np.abs(part - threshold))[:1500]
        part[near] = threshold

    twins.set("scores", pile_up)
    before = twins.counters()
    twins.step()
    more = gained(before, twins.counters())
    assert more["candidates"] > 2048
    assert more["missed"] == more["crowded"] == 0


def test_a_crowded_window_falls_back(module):
    """Scores that all come to lie where the window is, on one atom or spread."""
    for spread in (0.0, 1e-4):
        twins = Twins(module, mask_lr=0.0)
        twins.step()
        threshold = float(twins.networks[module.cuda].counters[module.cuda][0]["threshold"])

        def gather(scores, threshold=threshold, spread=spread):
            scores[:400_000] = threshold + spread * (np.arange(400_000) / 400_000 - 0.5)

        twins.set("scores", gather)
        before = twins.counters()
        twins.step()
        assert gained(before, twins.counters())["crowded"] + gained(before, twins.counters())["missed"] == 1
        twins.step()
        assert gained(before, twins.counters())["steps"] == 2


def test_what_a_sample_cannot_tell_apart_is_counted(module):
    """Scores that differ in their last bits only: two digits of a sample leave too many inside. The other group is served by its sample."""
    for grid in (1, 5):
        module.sim.set_max_grid(grid)
        twins = Twins(module, kept=[300_000, *KEPT[1:]], mask_lr=0.0)
        twins.set("scores", lambda scores: scores[:400_000].view(np.uint32).__setitem__(slice(None), 0x3F000000 + np.arange(400_000) % 7))
        twins.step()
        assert [twins.counters(group)["first"] for group in range(3)] == [1, 1, 0]
        assert [twins.counted(group) for group in range(3)] == [1, 0, 0]
        twins.step()
        twins.step(JOINT)
        assert twins.counters()["first"] == 1


def sampled(n, stride):
    """The entries of a single tensor that a sample of every so many runs sees (sampled_run in sample.cuh)."""
    turns = np.arange(-(-n // (32 * stride)), dtype=np.uint64)
    with np.errstate(over="ignore"):
        runs = turns * np.uint64(stride) + (turns * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(32)) % np.uint64(stride)
    seen = np.zeros(-(-n // 32), bool)
    seen[runs[runs < seen.size].astype(np.int64)] = True
    return np.repeat(seen, 32)[:n]


@pytest.mark.parametrize("grid", [1, 5])
@pytest.mark.parametrize("high", [True, False])
def test_a_sample_that_is_not_like_the_rest(module, high, grid):
    """All that it sees is high, or low: the threshold is far from its window, on either side."""
    n, kept = 600_000, 60_000
    module.sim.set_max_grid(grid)
    twins = Twins(module, [(n, 0, F32)], [kept], mask_lr=1e-6)
    seen = sampled(n, 2)  # sample_stride in sample.cuh: n / (20480 + 2560000 * 0.1 * 0.9), rounded down
    assert 0.4 < seen.mean() < 0.6

    def separate(scores):
        uniform = np.random.default_rng(1).random(n, dtype=np.float32)
        scores[:n] = np.where(seen == high, 0.9, 0.1) + 0.05 * uniform

    twins.set("scores", separate)
    twins.step()
    assert (twins.counters()["first"], twins.counted()) == (1, 1)
    twins.step()
    twins.step(JOINT)
    assert (twins.counters()["missed"], twins.counters()["crowded"]) == (0, 0), "the counting set a window"


def test_one_group_is_finished_while_another_falls_back(module):
    """Both have more candidates than one block settles: those of the group that is sampled join the list of what is to be finished."""
    twins = Twins(module, [(1_100_000, 0, F32), (530_000, 1, F32)], [110_000, 53_000], mask_lr=1e-5)
    twins.step()
    twins.set("scores", lambda scores: np.clip(scores[:1_100_000] + np.float32(0.05), 0, 1, out=scores[:1_100_000]))
    before = [twins.counters(group) for group in range(2)]
    twins.step()
    shifted, warm = (gained(before[group], twins.counters(group)) for group in range(2))
    assert (shifted["missed"], twins.counted(0)) == (1, 0)
    assert (warm["missed"], warm["crowded"]) == (0, 0)
    assert warm["candidates"] > 2048
    twins.step()
    assert twins.counters()["missed"] == shifted["missed"]


def test_a_window_far_off_falls_back_and_finds_its_way(module):
    twins = Twins(module, mask_lr=1e-5)
    twins.step()
    for shift in (0.05, -0.1, 0.04):
        twins.set("scores", lambda scores, shift=shift: np.clip(scores + np.float32(shift), 0, 1, out=scores))
        before = twins.counters()
        twins.step()
        assert gained(before, twins.counters())["missed"] == 1
        twins.step()
        twins.step()
        assert gained(before, twins.counters())["missed"] == 1


def test_the_number_kept_may_change_where_it_stands(module):
    """A little: the window follows. Much: as if none were known. Nothing, or everything: no selection is needed."""
    twins = Twins(module, mask_lr=1e-5)
    for kept in (KEPT, [53_100, 75_050, 90], [30_000, 140_000, 0], [0, 151_001, 900], [1, 151_000, 1], [529_000, 10, 899]):
        twins.set_kept(kept)
        twins.step()
        assert all(network.kept() == sum(kept) for network in twins.networks.values())
    counters = twins.counters()
    assert counters["first"] + counters["missed"] >= 3, "the first step, 30,000 and 529,000"


@pytest.mark.parametrize("change", [-2000, 2000])
def test_a_window_follows_the_number_kept(module, change):
    """By more ranks in each step than it reaches to either side, so that one that stays would miss."""
    twins = Twins(module, mask_lr=1e-5)
    twins.step()
    twins.step()
    before = {backend: twins.counters(backend=backend) for backend in ("cpu", "cuda")}
    for step in range(1, 6):
        twins.set_kept([KEPT[0] + step * change, *KEPT[1:]])
        twins.step()
    for backend, counters in before.items():
        new = gained(counters, twins.counters(backend=backend))
        assert (new["steps"], new["first"] + new["missed"] + new["crowded"]) == (5, 0), backend


def test_windows_with_negative_ends(module):
    """Nearly everything is kept and the lowest scores are 0: the window reaches below them."""
    twins = Twins(module, kept=[530_000, 150_990, 899], mask_lr=1e-3)
    for _ in range(4):
        twins.step()
    twins.step(JOINT)


def test_without_gradients_scores_are_judged_as_they_are(module):
    twins = Twins(module, mask_lr=1e-3)
    twins.step()
    twins.step(without=(0, 3))
    twins.step(JOINT, without=(0, 1))
    twins.step(without=tuple(range(6)))


def test_two_hundred_groups(module):
    """A window each; most are small, some are larger than one launch's share."""
    random = np.random.default_rng(0)
    sizes = [int(n) for n in random.integers(1, 3000, 200)]
    sizes[7], sizes[100] = 300_000, 140_000
    twins = Twins(module, [(n, i, F32) for i, n in enumerate(sizes)], [n // 3 for n in sizes], mask_lr=1e-3)
    for phase in (UPPER, UPPER, JOINT, UPPER):
        twins.step(phase)


def test_an_old_window_is_no_rule(module):
    """Any content that a step could have left in the workspace: a window for other scores, too narrow, empty, or of everything."""
    for memory in ([0, 2**64 - 1], [2**63, 2**63], [2**64 - 1, 2**64 - 1], [0, 0], [2**62, 2**63 + 5], [3 << 62, (3 << 62) + 1]):
        twins = Twins(module, [(600_000, 0, F32)], [60_000], mask_lr=1e-3)
        twins.step()
        for backend, offset in ((module.cuda, CUDA_STATES), (module.cpu, 0)):  # of the first group's Memory
            twins.networks[backend].workspaces[backend][offset : offset + 16].view(np.uint64)[:] = memory
        twins.step()
        twins.step()


@pytest.mark.skipif(not os.environ.get("BIP_FAST_LARGE_TESTS"), reason="needs 14 GB of memory and BIP_FAST_LARGE_TESTS=1")
def test_one_group_of_a_billion():
    """Two upper steps of the CPU kernels: exactly k are kept, no dropped score is above a kept one, and the second step is one pass."""
    n, k = 10**9, 10**8
    scores = torch.empty(n).uniform_(generator=torch.Generator().manual_seed(0))
    theta, words = torch.full((n,), 0.01), torch.zeros(-(-n // 32), dtype=torch.int32)
    z, g = torch.zeros(n, dtype=torch.bfloat16), torch.full((n,), 1e-3, dtype=torch.bfloat16)
    tensors, groups = np.zeros(1, _C.tensor_dtype), np.zeros(1, _C.group_dtype)
    row = tensors[0]
    for name, x in {"param": z, "theta": theta, "momentum": theta, "scores": scores, "mask": words}.items():
        row[name] = x.data_ptr()
    row["numel"], row["dtype"] = n, BF16
    groups["numel"], groups["kept"] = n, k
    hypers, gradients = np.zeros(1, _C.hyper_dtype), np.zeros(1, _C.gradient_dtype)
    hypers["mask_lr"] = hypers["inv_gamma"] = 1.0
    gradients["data"], gradients["dtype"] = g.data_ptr(), BF16
    tiles = np.zeros(-(-n // _C.TILE), np.int32)
    workspace = torch.zeros(_C.cpu.step_workspace_bytes(1, 1, len(tiles)), dtype=torch.uint8)
    counters, nonfinite = np.zeros(1, _C.counters_dtype), np.zeros(1, np.int64)
    for step in (1, 2):
        _C.cpu.step(
            phase=UPPER, rule=0, tensors=tensors.ctypes.data, num_tensors=1, tile_tensor=tiles.ctypes.data, num_tiles=len(tiles),
            num_scored_tiles=len(tiles), groups=groups.ctypes.data, num_groups=1, unit_sets=0, num_unit_sets=0, unit_tile_begin=0,
            unit_tile_end=0, parts=0, num_parts=0, num_items=0, hypers=hypers.ctypes.data, gradients=gradients, grad_scale=0, found_inf=0,
            num_nonfinite=nonfinite.ctypes.data, counters=counters.ctypes.data, workspace=workspace.data_ptr(), where=2,
        )  # fmt: skip
        kept, lowest, highest = 0, 2.0, -1.0
        for i, part in enumerate(scores.split(2**24)):
            mask = unpack_mask(words[i * 2**19 : (i + 1) * 2**19], part.numel())
            assert torch.equal(z[i * 2**24 :][: part.numel()] != 0, mask)
            kept += int(mask.sum())
            lowest = min(lowest, float(part[mask].min()))
            highest = max(highest, float(part[~mask].max()))
        assert kept == k
        assert highest <= lowest
        assert counters["steps"][0] == step
    assert counters["missed"][0] == counters["crowded"][0] == 0


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_report_says_how_selections_went(backend, scope):
    params = make_params([3000, 5000], device=backend.device)
    run = Lockstep(params, lambda: FastBiP(params, sparsity=0.5, scope=scope, mask_lr=1e-6, levels="joint"))
    run.random_steps(6)
    masks = [run.opt.mask_of(p) for p in params]
    report = run.opt.report()
    assert [row.kept for row in report.selections] == ([4000] if scope == "global" else [1500, 2500])
    for row in report.selections:
        assert row.steps == 7  # the first mask, and one for every joint step
        assert row.first <= 1  # the CPU takes a sample for the first mask, and needs no second pass
        assert (row.missed, row.crowded, row.fallbacks) == (0, 0, row.first)
        assert row.candidates > 0
        assert row.flips >= row.kept
    if scope == "global":
        scores = torch.cat([run.opt.scores_of(p).flatten() for p in params])
        kept = torch.cat([mask.flatten() for mask in masks])
        assert float(scores[kept].min()) >= report.selections[0].threshold
        assert float(scores[~kept].max()) <= report.selections[0].threshold
        first = report.selections[0].first
        assert f"selections: 7, in one pass {7 - first}; fell back: {first} without a window" in str(report)
    assert report.as_dict()["selections"][0]["steps"] == 7
    run.opt.finalize()
    assert run.opt.report().selections == report.selections


@pytest.mark.parametrize(("sparsity", "threshold"), [(0.0, -np.inf), (0.9999, np.inf)])
def test_nothing_to_select(backend, sparsity, threshold):
    params = make_params([3000], device=backend.device)
    opt = FastBiP(params, sparsity=sparsity, levels="joint")
    fill_gradients(params, 0)
    opt.step()
    (row,) = opt.report().selections
    assert (row.threshold, row.fallbacks) == (threshold, 0)
    assert row.as_dict()["threshold"] is None


def test_counters_name_one_reason_for_a_step(module):
    """A sample that misleads: the CPU then takes more passes, and says so once."""
    twins = Twins(module, [(600_000, 0, F32)], [60_000], mask_lr=0.0)
    blocks = np.arange(600_000 // 32)
    stride = round(600_000 ** (1 / 3))

    def mislead(scores):
        turns = blocks // stride
        places = (turns.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(32)) % np.uint64(stride)
        sampled = turns * stride + places.astype(np.int64)
        scores[:600_000].reshape(-1, 32)[np.unique(sampled[sampled < len(blocks)])] = 0.0

    twins.set("scores", mislead)
    twins.step()
    for backend in ("cpu", "cuda"):
        counters = twins.counters(backend=backend)
        assert counters["first"] + counters["missed"] + counters["crowded"] <= counters["steps"] == 1


def test_flips_are_counted(backend):
    params = make_params([4000], device=backend.device)
    opt = FastBiP(params, sparsity=0.5, mask_lr=0.002, levels="joint")
    flips = opt.report().selections[0].flips
    assert flips == 2000
    for i in range(4):
        before = opt.mask_of(params[0])
        fallbacks = opt.report().selections[0].fallbacks
        fill_gradients(params, i)
        opt.step()
        changed = int((opt.mask_of(params[0]) != before).sum())
        row = opt.report().selections[0]
        if row.fallbacks == fallbacks:
            assert row.flips - flips == changed
        flips = row.flips


@pytest.mark.parametrize("which", ["cpu", "cuda"])
@pytest.mark.parametrize("phase", [LOWER, UPPER, JOINT])
def test_offsets_beyond_31_bits(module, which, phase):
    """The last tiles of a tensor of 2**31 entries and more, beside the same entries as a tensor of their own. A pointer so far in front of
    memory is all that makes the one from the other: who cuts an offset to 32 bits touches what is not there."""
    backend, numel = getattr(module, which), 600 * module.TILE + 300
    near, far = (Network(module, [(numel, 0, F32)], [numel // 10], mask_lr=1e-3, mask_momentum=0.5) for _ in range(2))
    far.begin_at(2**31 + 5 * module.TILE)
    for i, step in enumerate((UPPER, phase, phase, UPPER)):
        near.step(backend, step, seed=i)
        far.step(backend, step, seed=i)
        assert near.state() == far.state()
    assert near.kept() == numel // 10


def test_a_threshold_inside_an_atom_stays_in_the_window(backend):
    """The threshold is among scores of 1, while all others move: the window lies between tie keys of that atom."""
    params = make_params([20_000], device=backend.device)
    run = Lockstep(params, lambda: FastBiP(params, sparsity=0.9, levels="joint", mask_lr=0.3))
    run.random_steps(20)
    (row,) = run.opt.report().selections
    assert row.threshold == 1.0
    assert row.steps == 21
    assert row.missed <= 4

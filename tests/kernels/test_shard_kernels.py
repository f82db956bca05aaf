"""Selection over several ranks, its kernels alone: all ranks in one process, whose sums are added up between the calls."""

import numpy as np
import pytest
from helpers import load_simulator

from bip_fast.engine.native import kernels

MULTIPLIER = 2654435761


@pytest.fixture(params=["cpu", "sim"])
def shards(request):
    """The kernels for the CPU, and those for CUDA on the host simulator."""
    if request.param == "cpu":
        yield kernels().cpu_shards
        return
    module = load_simulator()
    module.sim.set_seed(1)
    yield module.cuda_shards
    module.sim.set_seed(0)


class Rank:
    """What one rank has of a single selection group: tensors of scores, each with the index of its first entry.

    Args:
        shards: the module of the kernels.
        pieces: scores (values in [0, 1]), index, row_length and row_stride of every tensor.
        total, kept: of the group, over all ranks.
    """

    def __init__(self, shards, pieces, total, kept):
        module = kernels()
        self.kernels, self.pieces = shards, pieces
        self.scores = [np.ascontiguousarray(scores, np.float32) for scores, *_ in pieces]
        self.theta = [np.ones_like(scores) for scores in self.scores]
        self.z = [np.zeros_like(scores) for scores in self.scores]
        self.mask = [np.zeros(max(-(-len(scores) // 32), 1), np.uint32) for scores in self.scores]
        self.tensors = np.zeros(len(pieces), module.tensor_dtype)
        tiles = [-(-len(scores) // module.TILE) for scores in self.scores]
        for i, (row, (_, index, length, stride)) in enumerate(zip(self.tensors, pieces, strict=True)):
            row["param"], row["theta"] = self.z[i].ctypes.data, self.theta[i].ctypes.data
            row["scores"], row["mask"], row["numel"] = self.scores[i].ctypes.data, self.mask[i].ctypes.data, len(self.scores[i])
            row["index"], row["row_length"], row["row_stride"], row["first_tile"] = index, length, stride, sum(tiles[:i])
        self.tiles = np.repeat(np.arange(len(pieces), dtype=np.int32), tiles)
        self.groups = np.zeros(1, module.group_dtype)
        self.groups["numel"], self.groups["kept"], self.groups["tile_end"] = total, kept, len(self.tiles)
        self.groups["entries"] = sum(map(len, self.scores))
        self.hypers = np.zeros(1, module.hyper_dtype)
        self.gradients = np.zeros(len(pieces), module.gradient_dtype)
        self.counters = np.zeros(1, module.counters_dtype)
        self.sums = np.zeros((1, self.kernels.sums(1)), np.int64)
        self.workspace = np.zeros(self.kernels.workspace_bytes(len(pieces), 1, len(self.tiles)), np.uint8)
        self.nonfinite = np.zeros(1, np.int64)
        self.found_inf = np.zeros(1, np.float32)
        self.where = 2 if shards is module.cpu_shards else 0  # threads, or the stream

    def call(self, name, turn=0):
        return getattr(self.kernels, name)(
            phase=1, rule=0, tensors=self.tensors.ctypes.data, num_tensors=len(self.tensors), tile_tensor=self.tiles.ctypes.data,
            num_tiles=len(self.tiles), num_scored_tiles=len(self.tiles), groups=self.groups.ctypes.data, num_groups=1, unit_sets=0,
            num_unit_sets=0, unit_tile_begin=0, unit_tile_end=0, parts=0, num_parts=0, num_items=0, hypers=self.hypers.ctypes.data,
            gradients=self.gradients, grad_scale=0, found_inf=self.found_inf.ctypes.data, num_nonfinite=self.nonfinite.ctypes.data,
            counters=self.counters.ctypes.data, workspace=self.workspace.ctypes.data, where=self.where, sums=self.sums.ctypes.data,
            turn=turn,
        )  # fmt: skip

    def bits(self):
        unpacked = [np.unpackbits(mask.view(np.uint8), bitorder="little") for mask in self.mask]
        return np.concatenate([bits[: len(scores)] for bits, scores in zip(unpacked, self.scores, strict=True)])

    def indices(self):
        """int64: the index in the group of every entry of this rank."""
        found = []
        for scores, index, length, stride in self.pieces:
            entries = np.arange(len(scores), dtype=np.int64)
            found.append(index + (entries // length * stride + entries % length if length else entries))
        return np.concatenate(found)


def select(ranks):
    """One upper step without gradients, and how often the ranks added up."""
    for rank in ranks:
        rank.call("begin")
    rounds = 0
    while True:
        total = sum(rank.sums for rank in ranks)
        rounds += 1
        for rank in ranks:
            rank.sums[:] = total
        going = {rank.call("narrow", rounds - 1) for rank in ranks}
        assert len(going) == 1
        if not going.pop():
            break
    for rank in ranks:
        rank.call("end")
    return rounds


def expected(ranks, kept):
    """Of all ranks together: 1 for the ``kept`` that come first by score, then by (index * multiplier) mod 2**32, then by index / 2**32."""
    scores = np.concatenate([scores for rank in ranks for scores in rank.scores])
    indices = np.concatenate([rank.indices() for rank in ranks])
    ties = indices.astype(np.uint64) * np.uint64(MULTIPLIER) % 2**32  # the product is taken mod 2**64, which changes nothing
    order = np.lexsort((indices >> 32, ties, -scores))  # its last key counts first
    bits = np.zeros(len(scores), np.uint8)
    bits[order[:kept]] = 1
    return bits


def check(ranks, kept):
    bits = np.concatenate([rank.bits() for rank in ranks])
    np.testing.assert_array_equal(bits, expected(ranks, kept))
    values = np.concatenate([z for rank in ranks for z in rank.z])
    np.testing.assert_array_equal(values, bits.astype(np.float32))


SCORES = {
    "different": lambda random, n: random.random(n),
    "equal": lambda random, n: np.full(n, 0.5),
    "atoms": lambda random, n: np.clip(random.normal(0.5, 1.0, n), 0, 1),
    "close": lambda random, n: 0.5 + random.integers(0, 3, n) * 2.0**-24,
}
LAYOUTS = {
    "contiguous": [[(700, 0, 0, 0)], [(701, 700, 0, 0)], [(0, 1401, 0, 0), (33, 1401, 0, 0)]],
    "columns": [[(60 * 11, 0, 11, 40)], [(60 * 29, 11, 29, 40)]],
    "beyond 32 bits": [[(900, 2**32 - 300, 0, 0)], [(900, 2**33 + 5, 0, 0)], [(55, 2**39 + 1, 0, 0)]],
    "one key on two ranks": [[(600, 7, 0, 0)], [(600, 2**32 + 7, 0, 0)], [(600, 2**38 + 7, 0, 0)], [(64, 2**33 + 200, 0, 0)]],
    "columns beyond 32 bits": [[(50 * 9, 2**31, 9, 2**27 + 9)], [(50 * 9, 2**31 + 9, 9, 2**27 + 9)]],
}


@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_rank_finds_its_part_of_the_one_mask(shards, layout, kind):
    random = np.random.default_rng(0)
    total = sum(piece[0] for rank in LAYOUTS[layout] for piece in rank)
    for kept in (0, 1, 2, total // 3, total // 2, total - 1, total):
        ranks = [Rank(shards, [(SCORES[kind](random, n), *place) for n, *place in pieces], total, kept) for pieces in LAYOUTS[layout]]
        for step in range(4):  # the first has no window, the others have
            select(ranks)
            check(ranks, kept)
            for rank in ranks:
                for scores in rank.scores:
                    scores += np.float32(1e-3 * step) * random.standard_normal(len(scores)).astype(np.float32)
                    np.clip(scores, 0, 1, out=scores)


@pytest.mark.parametrize("jump", ["small", "large", "to one rank"])
def test_windows_that_are_right_wrong_and_crowded(shards, jump):
    """Long enough for a list that is shorter than the entries."""
    random = np.random.default_rng(1)
    sizes, kept = (90_000, 110_000, 3), 41_000
    starts = np.cumsum([0, *sizes[:-1]])
    ranks = [Rank(shards, [(random.random(n), int(start), 0, 0)], sum(sizes), kept) for n, start in zip(sizes, starts, strict=True)]
    select(ranks)
    check(ranks, kept)
    for step in range(6):
        for number, rank in enumerate(ranks):
            (scores,) = rank.scores
            if jump == "small":
                scores += np.float32(1e-5) * random.standard_normal(len(scores)).astype(np.float32)
            elif jump == "large":
                scores[:] = random.random(len(scores)) * (0.3 + 0.1 * step)
            else:
                scores[:] = 0.5 + 1e-6 * random.random(len(scores)) if number == step % 2 else random.random(len(scores)) * 0.4
            np.clip(scores, 0, 1, out=scores)
        rounds = select(ranks)
        check(ranks, kept)
        assert rounds <= (7 if shards is kernels().cpu_shards else 8), (
            "a pass, the digits of a key of 64 bits, and on a GPU that of the index"
        )
    rows = {name: int(ranks[0].counters[name][0]) for name in ("steps", "first", "missed", "crowded", "candidates")}
    assert rows["steps"] == 7
    if jump == "small":
        assert rows["first"] == 1
        assert rows["missed"] == rows["crowded"] == 0
        assert 0 < rows["candidates"] < 6 * sum(sizes) / 100
    else:
        assert rows["missed"] + rows["crowded"] > 0


@pytest.mark.parametrize("total", [400, 9000])
@pytest.mark.parametrize("known", ["nothing", "an older window"])
def test_ranks_that_remember_different_windows_find_the_mask(shards, total, known):
    """As after an error that only one of them had; a small group is listed whole where nothing is known."""
    random = np.random.default_rng(4)
    kept, sizes = total // 4, (total // 2, total // 3, total - total // 2 - total // 3)
    starts = np.cumsum([0, *sizes[:-1]])
    ranks = [Rank(shards, [(random.random(n), int(start), 0, 0)], total, kept) for n, start in zip(sizes, starts, strict=True)]
    select(ranks)
    select(ranks)
    for wrong in (0, 1, 2):
        ranks[wrong].workspace[:] = 0 if known == "nothing" else older(ranks, wrong)
        for rank in ranks:
            rank.scores[0] += np.float32(0.2 / total)
        before = ranks[0].counters["first"][0]
        select(ranks)
        check(ranks, kept)
        assert ranks[0].counters["first"][0] == before + 1, "as if no window were known"
        for expected_rounds in (2, 2):
            assert select(ranks) <= expected_rounds if shards is kernels().cpu_shards else True
        check(ranks, kept)
        assert ranks[0].counters["first"][0] == before + 1


def older(ranks, number):
    """The workspace of a rank before a step in which all others went on, by far."""
    kept = ranks[number].workspace.copy()
    for rank in ranks:
        rank.scores[0] *= np.float32(0.5)
    select(ranks)
    return kept


def test_where_a_rank_is_absent_all_masks_stay(shards):
    """Its row of the sums says so. The next step selects anew."""
    random = np.random.default_rng(5)
    ranks = [Rank(shards, [(random.random(3000), 3000 * i, 0, 0)], 6000, 1500) for i in range(2)]
    select(ranks)
    select(ranks)
    masks = [rank.bits() for rank in ranks]
    for rank in ranks:
        rank.scores[0] += 1e-6 * random.standard_normal(3000).astype(np.float32)
    ranks[0].call("begin")
    rounds = 0
    while True:
        ranks[0].sums[0, shards.ABSENT] += 1
        rounds += 1
        if not ranks[0].call("narrow", rounds - 1):
            break
    ranks[0].call("end")
    assert rounds == shards.rounds(1)
    apart = ranks[0].bits() != masks[0]
    assert apart.sum() < 30, "what the pass was sure of"
    np.testing.assert_array_equal(ranks[0].z[0], ranks[0].bits())
    select(ranks)
    check(ranks, 1500)


def test_a_window_follows_the_number_of_kept(shards):
    """As a sparsity grows along the cubic curve: a window that stays would miss in 23 of these steps, more than half of the growth."""
    random = np.random.default_rng(6)
    total, steps = 30_000, 40
    ranks = [Rank(shards, [(random.random(n), start, 0, 0)], total, total) for n, start in ((18_000, 0), (12_000, 18_000))]
    for step in range(steps + 3):
        kept = total - round(0.9 * total * (1 - (1 - min(step / steps, 1)) ** 3))
        for rank in ranks:
            rank.groups["kept"] = kept
            rank.scores[0] += 1e-5 * random.standard_normal(len(rank.scores[0])).astype(np.float32)
            np.clip(rank.scores[0], 0, 1, out=rank.scores[0])
        select(ranks)
        if step % 10 == 5:
            check(ranks, kept)
    wrong = {name: int(ranks[0].counters[name][0]) for name in ("first", "missed", "crowded")}
    assert sum(wrong.values()) <= 8, wrong


def test_many_groups_tell_less_of_each(shards):
    one, many = 8 * shards.sums(1), 300 * 8 * shards.sums(300)
    assert one == (32_832 if shards is kernels().cpu_shards else 16_448)
    assert many == 633_600
    assert shards.rounds(300) == (1 if shards is kernels().cpu_shards else 10)


def test_what_is_on_several_ranks_is_counted_once(shards):
    random = np.random.default_rng(2)
    own = [random.random(5000), random.random(5000)]
    again = random.random(3000)
    ranks = [Rank(shards, [(scores, 5000 * i, 0, 0), (again, 10_000, 0, 0)], 13_000, 4000) for i, scores in enumerate(own)]
    ranks[1].tensors["elsewhere"][1] = 1
    for _ in range(3):
        select(ranks)
        bits = [rank.bits() for rank in ranks]
        np.testing.assert_array_equal(bits[0][5000:], bits[1][5000:])
        whole = Rank(shards, [(np.concatenate([*own, again]), 0, 0, 0)], 13_000, 4000)
        np.testing.assert_array_equal(np.concatenate([bits[0][:5000], bits[1]]), expected([whole], 4000))


def test_a_step_that_is_skipped_changes_nothing(shards):
    random = np.random.default_rng(3)
    ranks = [Rank(shards, [(random.random(2000), 2000 * i, 0, 0)], 4000, 900) for i in range(2)]
    select(ranks)
    for rank in ranks:
        rank.scores[0][:] = random.random(2000)
        rank.found_inf[:] = 1
    before = [(rank.mask[0].copy(), rank.z[0].copy(), rank.counters.copy()) for rank in ranks]
    select(ranks)
    for rank, (mask, z, counters) in zip(ranks, before, strict=True):
        assert (rank.mask[0] == mask).all()
        assert (rank.z[0] == z).all()
        assert (rank.counters == counters).all()
    for rank in ranks:
        rank.found_inf[:] = 0
    select(ranks)
    check(ranks, 900)

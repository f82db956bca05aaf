"""What every rank of a job takes for granted about the parts of the others. No processes: each rank is looked at alone."""

from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from sharded_runs import mesh_of, placed

from bip_fast.engine.coverage import _parts_are_aligned
from bip_fast.engine.layers import Layer
from bip_fast.engine.shards import Ranks, shard_of, units_of
from bip_fast.reference import Blocks

if not dist.is_available():
    pytest.skip("needs torch.distributed", allow_module_level=True)


@contextmanager
def rank_of(rank, sizes):
    """As if this were a rank of a job: nothing is sent."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=torch.Size(sizes).numel())
    try:
        yield mesh_of(sizes)
    finally:
        dist.destroy_process_group()


def on_every_rank(sizes, dims, shape, look):
    from torch.distributed.tensor import Shard

    found = []
    for rank in range(torch.Size(sizes).numel()):
        with rank_of(rank, sizes) as mesh:
            found.append(look(placed(torch.zeros(shape), mesh, [Shard(dim) for dim in dims])))
    return found


@pytest.mark.parametrize("size", [1, 5, 10, 12, 17])
@pytest.mark.parametrize("sizes", [(4,), (3, 2), (2, 3)])
def test_every_part_begins_at_a_multiple_of_the_step(sizes, size):
    """Also where a dimension is cut twice, and not evenly."""
    rows = on_every_rank(sizes, [0] * len(sizes), (size, 6), lambda p: shard_of(p, Ranks([p])).spans[0])
    assert sorted(row for span in rows for row in range(span.start, span.start + span.length)) == list(range(size))
    assert len({span.step for span in rows}) == 1, "all ranks decide alike"
    assert all(span.start % span.step == 0 for span in rows if span.length)


def error_of_blocks(p):
    try:
        units_of(shard_of(p, Ranks([p])), Blocks(*p.shape, 2, 2))
    except ValueError as error:
        return str(error)
    return ""


def test_units_that_are_split_on_one_rank_are_refused_on_all():
    """Of 10 rows the last ranks have one each: a block of two rows is cut there only."""
    for error in on_every_rank((3, 2), (0, 0), (10, 6), error_of_blocks):
        assert "its units of 2 rows or columns are split over the ranks, which have 1 each" in error


def test_all_ranks_find_alike_whether_matrices_are_aligned():
    """Two matrices of two rows, of which one rank has 64 columns and the other 63."""
    looked = on_every_rank((2,), (1,), (4, 127), lambda p: _parts_are_aligned(shard_of(p, Ranks([p])), Layer(matrices=2)))
    assert looked == [False, False]
    assert all(on_every_rank((2,), (1,), (4, 128), lambda p: _parts_are_aligned(shard_of(p, Ranks([p])), Layer(matrices=2))))

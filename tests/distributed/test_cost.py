"""What ranks tell each other in a step, and what a rank holds."""

import pytest
import torch
import torch.distributed as dist
from ranks import run_on
from sharded_runs import mesh_of, placed, placements_of
from torch import nn

from bip_fast import FastBiP

pytestmark = pytest.mark.slow

KINDS = (
    "all_reduce",
    "all_gather",
    "all_gather_into_tensor",
    "broadcast",
    "reduce_scatter_tensor",
    "all_to_all_single",
    "gather",
    "scatter",
)
SUMS = 8 * 4104  # bytes of a selection group: eight counts, and a histogram


def _counted(found):
    """Let all collectives note their kind and bytes."""
    before = {kind: getattr(dist, kind) for kind in KINDS}

    def noting(kind):
        def call(x, *args, **kwargs):
            found.append((kind, x.numel() * x.element_size() if isinstance(x, torch.Tensor) else -1))
            return before[kind](x, *args, **kwargs)

        return call

    for kind in KINDS:
        setattr(dist, kind, noting(kind))


def told(rows, scope, pattern="unstructured"):
    """(kind, bytes) of the collectives in each of some upper, lower and joint steps."""
    mesh, made = mesh_of((dist.get_world_size(),)), torch.Generator().manual_seed(0)
    shapes = [(rows, 64), (rows // 2, 32), (9,)]
    params = [
        nn.Parameter(placed(torch.randn(shape, generator=made) / 8, mesh, placements_of("0", torch.empty(shape)))) for shape in shapes
    ]
    groups = [{"params": params[:2]}, {"params": params[2:], "prune": False}]
    opt = FastBiP(groups, sparsity=0.9, scope=scope, pattern=pattern, mask_lr=1e-5, gamma=1.0)
    steps = []
    for step in range(6):
        for p in params:
            g = torch.randn(tuple(p.shape), generator=made)
            p.grad = placed(g, mesh, placements_of("0", g))
        found = []
        kept = {kind: getattr(dist, kind) for kind in KINDS}
        _counted(found)
        try:
            with opt.lower() if step == 3 else opt.upper() if step < 3 else opt.joint():
                opt.step()
        finally:
            for kind, call in kept.items():
                setattr(dist, kind, call)
        steps.append(found)
    return steps


CASES = [  # scope, pattern, selection groups, collectives besides their sums
    ("global", "unstructured", 1, 0),
    ("layer", "unstructured", 2, 0),
    ("global", "filter", 1, 1),  # the best filters of the sets, which are kept whatever the scores of others
]


def told_of_all():
    return [(case, told(rows, *case[:2])) for case in CASES for rows in (64, 1024)]


def test_what_a_step_tells_does_not_depend_on_the_number_of_weights():
    """A window that is right: the sums of the pass, rarely one digit more. A lower step tells nothing."""
    for (_, pattern, groups, others), steps in (row for rank in run_on(2, told_of_all) for row in rank):
        assert steps[3] == [], "a lower step"
        for number, found in enumerate(steps):
            if number == 3:
                continue
            sums = [size for kind, size in found if size == SUMS * groups]
            assert [kind for kind, _ in found] == ["all_reduce"] * len(found)
            assert 1 <= len(sums) <= 7
            assert len(found) - len(sums) == others
            if number > 0 and pattern == "unstructured":
                assert len(sums) <= 2, "scores that differ"


def held(world):
    """Bytes of the optimizer's flat arrays and tables on this rank."""
    mesh = mesh_of((dist.get_world_size(),))
    x = torch.randn(4096, 512, generator=torch.Generator().manual_seed(0))
    p = nn.Parameter(placed(x, mesh, placements_of("0", x)))
    opt = FastBiP([p], sparsity=0.9, optimizer="adamw")
    arena, plan = opt._engine.arena, opt._engine.plan
    state = sum(x.numel() * x.element_size() for x in (arena.theta, arena.scores, arena.mask, *arena._moments))
    return state, sum(x.numel() * x.element_size() for x in plan._memory) + plan._sums.numel() * 8


def test_a_rank_of_four_holds_a_quarter():
    whole = 4096 * 512 * (4 * 4 + 1 / 8)  # theta, scores and two moments; the mask
    for state, tables in run_on(4, held, 4):
        assert state == whole / 4
        assert tables < 0.05 * state

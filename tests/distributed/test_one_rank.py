"""A job of one rank, made to take the way of many: their kernels and their collectives, on every backend. Over NCCL on a GPU."""

import pytest
import torch
import torch.distributed as dist
from sharded_runs import gradient, mesh_of, placed, placements_of, run, state_of, weights
from test_sharded import COLUMNS, PLAIN, ROWS, SHAPES, differences
from torch import nn

from bip_fast import FastBiP
from bip_fast.engine import shards


@pytest.fixture
def job(backend, monkeypatch, tmp_path):
    """The backend, of a process group that counts although nothing is shared out."""
    options = {"device_id": backend.device} if backend.name == "cuda" else {}
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("nccl" if backend.name == "cuda" else "gloo", store=store, rank=0, world_size=1, **options)
    monkeypatch.setattr(shards, "_groups_of", lambda p: [p.device_mesh.get_group(0)])
    yield backend
    dist.destroy_process_group()


CASES = {"global": PLAIN["global"], "layer, adamw": PLAIN["layer, adamw"], "few filters": ROWS["few filters"], "2:4": COLUMNS["2:4"]}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_way_of_many_ranks_gives_the_bits_of_one(job, case):
    expected = run(case, steps=6, device=job.device.type)
    assert not differences(run(case, (1,), "0", 6, job.device.type), expected)


def test_all_memory_of_a_plan_is_held(job):
    """What the ranks tell each other too, for streams that the memory was not allocated on."""
    mesh = mesh_of((1,), job.device.type)
    opt = FastBiP([nn.Parameter(placed(x.to(job.device), mesh, placements_of("0", x))) for x in weights(SHAPES)], sparsity=0.7)
    plan = opt._engine.plan
    assert plan._ranks.groups
    assert {name for name, x in vars(plan).items() if isinstance(x, torch.Tensor) and not any(x is y for y in plan._memory)} == set()


@pytest.mark.parametrize("backend", ["cuda"], indirect=True)
def test_a_step_with_its_collectives_is_captured(job):
    """Masks, scores and weights after replays of one graph for each phase are those of steps."""

    def train(captured):
        mesh = mesh_of((1,), "cuda")
        made = [placed(x.cuda(), mesh, placements_of("0", x)) for x in weights(SHAPES)]
        params = [nn.Parameter(x) for x in made]
        opt = FastBiP(params, sparsity=0.7, lr=0.03, mask_lr=0.3)
        for p in params:
            p.grad = placed(torch.empty(tuple(p.shape), device="cuda"), mesh, placements_of("0", p))
        graphs = {}
        for step in range(12):
            for number, p in enumerate(params):
                p.grad.to_local().copy_(gradient(tuple(p.shape), step, number))
            phase = ("upper", "joint", "lower")[step % 3]
            if captured and step >= 3:
                if phase not in graphs:
                    graphs[phase] = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graphs[phase]), getattr(opt, phase)():
                        opt.step()
                graphs[phase].replay()
            else:
                with getattr(opt, phase)():
                    opt.step()
        torch.cuda.synchronize()
        return state_of(opt, params[:-1], params[-1])

    assert not differences(train(True), train(False))

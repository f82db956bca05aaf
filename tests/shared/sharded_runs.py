"""Runs of an optimizer whose weights are shared out over ranks, and the same run in one process.

Gradients are seeded by step and parameter and are made whole before they are cut, so they do not depend on the layout.
"""

import math

import torch
import torch.distributed as dist
from helpers import simulated
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from bip_fast import FastBiP

PHASES = ("upper", "joint", "lower", "joint", "upper")


def whole(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def weights(shapes, kind="normal"):
    """fp32 weights, of which many are alike if ``kind`` says so."""
    random = torch.Generator().manual_seed(0)
    made = [torch.randn(shape, generator=random) for shape in shapes]
    if kind == "equal":
        made = [torch.full_like(x, 0.5) for x in made]
    if kind == "atoms":
        made = [torch.where(x > 0.5, 2.0, torch.where(x < -0.5, 0.0, x)) for x in made]
    return made


def gradient(shape, step, number, kind="normal"):
    random = torch.Generator().manual_seed(1000 * step + number)
    g = torch.randn(shape, generator=random)
    if kind == "equal":
        g = torch.zeros(shape)
    g[torch.rand(shape, generator=random) < 0.01] = math.nan
    if kind == "one rank":  # the first rows, which one rank has
        g[: max(shape[0] // 4, 1)] = math.nan
    return g


def placed(x, mesh, placements):
    return distribute_tensor(x, mesh, placements, src_data_rank=None) if mesh is not None else x


def mesh_of(sizes, device="cpu"):
    return init_device_mesh(device, sizes) if sizes else None


def placements_of(layout, x):
    """Of a layout such as "0": dimension 0 over the only mesh dimension; "r0": replicas outside. "01": FSDP by tensor parallelism."""
    return [Replicate() if c == "r" or int(c) >= x.dim() else Shard(int(c)) for c in layout]


def run(case, sizes=(), layout="", steps=20, device="cpu"):
    """The whole state after ``steps`` mixed steps."""
    mesh = mesh_of(sizes, device)
    made = [x.to(device) for x in weights(case["shapes"], case.get("weights", "normal"))]
    dtype = case.get("dtype", torch.float32)
    params = [nn.Parameter(placed(x.to(dtype, copy=True), mesh, placements_of(layout, x))) for x in made]
    dense = nn.Parameter(placed(torch.linspace(-1, 1, 77).to(device), mesh, placements_of(layout, torch.empty(77))))
    groups = [{"params": params}, {"params": [dense], "prune": False}]
    options = {"lr": 0.03, "mask_lr": 0.3, "gamma": 0.7, "weight_decay": 0.013} | case["options"]
    opt = FastBiP(groups, **options)
    for step in range(steps):
        for number, p in enumerate([*params, dense]):
            g = gradient(tuple(p.shape), step, number, case.get("gradients", "normal")).to(device, p.dtype)
            p.grad = placed(g, mesh, placements_of(layout, g))
        with getattr(opt, PHASES[step % len(PHASES)])():
            opt.step()
        opt.zero_grad()
    return state_of(opt, params, dense)


def state_of(opt, params, dense):
    """Values, masks, scores and all states, whole and on the CPU, and how selections went."""
    found = {}
    for number, p in enumerate([*params, dense]):
        found[f"{number}.value"] = whole(p.detach())
        if number < len(params):
            look = {"mask": opt.mask_of, "scores": opt.scores_of, "theta": opt.weight_of}
            found |= {f"{number}.{name}": whole(of(p)) for name, of in look.items()}
        found |= {
            f"{number}.{name}": whole(x)
            for name, x in opt.state[p].items()
            if name == "step" or (name != "bip" and tuple(x.shape) == tuple(p.shape))
        }
    report = opt.report()
    found["kept"] = torch.tensor([[row.kept, row.total] for row in report.rows])
    metrics = opt.metrics()
    names = ("kept", "sparsity", "nonfinite", "selections")
    found["metrics"] = torch.tensor([metrics[name] for name in names if name in metrics], dtype=torch.float64)
    found["selections"] = torch.tensor([[row.steps, row.first, row.missed, row.crowded] for row in report.selections])
    return {name: x.cpu() for name, x in found.items()}


def run_cases(cases, sizes, layout, steps=20, simulator=False):
    """`run` of several cases, on every rank, with the CUDA kernels on the ``simulator`` if asked for; None on all but the first."""
    if simulator:
        for table, kernels in simulated():
            table["cpu"] = kernels  # for as long as this process lives
    found = [run(case, sizes, layout, steps) for case in cases]
    return found if dist.get_rank() == 0 else None

"""Runs under DistributedDataParallel, for `ranks.run_on`: what a rank has at the end."""

import copy
from unittest.mock import patch

import torch
import torch.distributed as dist
from sharded_runs import whole
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from bip_fast import FastBiP

PHASES = ("lower", "upper", "joint", "joint", "lower", "upper")


class Branches(nn.Module):
    """A network of which a rank may leave a part unused."""

    def __init__(self):
        super().__init__()
        self.body, self.side, self.head = nn.Linear(12, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x, side=True):
        h = self.body(x).relu()
        return self.head(h + self.side(h) if side else h)


def network():
    torch.manual_seed(0)
    return Branches()


def run(made, options, accumulate=1, unused=False, late=False):
    """The state of this rank after mixed steps on batches of its own."""
    rank = dist.get_rank()
    model = DistributedDataParallel(network(), **made)
    opt = FastBiP(model.module if late else model, **options)
    if late:
        assert not (model.module.body.weight == 0).any()
        opt.bind()
    random = torch.Generator().manual_seed(rank)
    for step in range(12):
        for part in range(accumulate):
            x, y = torch.randn(8, 12, generator=random), torch.randn(8, 4, generator=random)
            side = not unused or (step + rank) % 2 == 0
            if part < accumulate - 1:
                with model.no_sync():
                    ((model(x, side) - y) ** 2).mean().backward()
            else:
                ((model(x, side) - y) ** 2).mean().backward()
        with getattr(opt, PHASES[step % len(PHASES)])():
            opt.step()
        opt.zero_grad()
    found = {name: x.clone() for name, x in model.module.state_dict().items()}
    pruned = set(opt.pruned_params)
    for p, name in ((p, name) for name, p in model.module.named_parameters() if p in pruned):
        found |= {f"{name} mask": opt.mask_of(p), f"{name} scores": opt.scores_of(p), f"{name} theta": opt.weight_of(p)}
    return found


def errors(options):
    """What every rank is told that is given its own of these options."""
    model = DistributedDataParallel(network())
    try:
        FastBiP(model, **options[dist.get_rank()])
    except ValueError as error:
        return str(error)
    return None


def different_models():
    """Ranks that train networks of their own need not agree."""
    torch.manual_seed(0)
    model = nn.Linear(8 + dist.get_rank(), 4)
    opt = FastBiP(model, sparsity=0.5 + 0.25 * dist.get_rank())
    model(torch.ones(2, model.in_features)).sum().backward()
    opt.step()
    return int(opt.mask_of(model.weight).sum())


def train(model, opt, steps=6):
    for step in range(steps):
        for number, p in enumerate(model.parameters()):
            g = torch.randn(tuple(p.shape), generator=torch.Generator().manual_seed(100 * step + number))
            p.grad = g if not hasattr(p, "placements") else distribute_tensor(g, p.device_mesh, p.placements, src_data_rank=None)
        opt.step()
    return {name: whole(p.detach()) for name, p in model.named_parameters()} | {
        f"{number} {look.__name__}": whole(look(p)) for number, p in enumerate(opt.pruned_params) for look in (opt.mask_of, opt.weight_of)
    }


def sharded_later(options, how):
    """The model is sharded after the optimizer was made: nobody tells the groups, or they are told as accelerate does."""
    model = network()
    if how == "pruned before":
        with patch("bip_fast.binding.world_size", lambda: 1):
            opt = FastBiP(model, **options)
    else:
        opt = FastBiP(model, **options)
        assert not (model.body.weight == 0).any()
    if how != "untold":
        opt.load_state_dict(copy.deepcopy(opt.state_dict()))
        names = {p: name for name, p in model.named_parameters()}
        held = [[names[p] for p in group["params"]] for group in opt.param_groups]
        for group in opt.param_groups:
            group["params"] = [torch.empty(1) for _ in group["params"]]
        del names
    fully_shard(model.side)
    fully_shard(model)
    if how != "untold":
        for group, own in zip(opt.param_groups, held, strict=True):
            group["params"] = [model.get_parameter(name) for name in own]
    return train(model, opt)

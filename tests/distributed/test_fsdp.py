"""Real `fully_shard` and tensor parallelism: after every step the mask is the top-k of all scores, and parameters are m*theta."""

import pytest
import torch
import torch.distributed as dist
from ranks import run_on
from sharded_runs import whole
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import bip_fast
from bip_fast import FastBiP

pytestmark = pytest.mark.slow

pytest.importorskip("torch.distributed.fsdp", reason="needs a torch with torch.distributed.fsdp")
WIDTH, TOKENS = 65, 50  # rows that no number of ranks divides


class Net(nn.Module):
    def __init__(self, tie):
        super().__init__()
        self.embed = nn.Embedding(TOKENS, WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 5, batch_first=True)
        layers = [nn.Sequential(nn.Linear(WIDTH, 3), nn.ReLU(), nn.Linear(3, WIDTH), nn.LayerNorm(WIDTH)) for _ in range(2)]
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(WIDTH, TOKENS, bias=False)
        if tie:
            self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


def check(opt):
    params = opt.pruned_params
    scores, mask = (torch.cat([whole(of(p)).flatten() for p in params]) for of in (opt.scores_of, opt.mask_of))
    assert int(mask.sum()) == mask.numel() - round(0.9 * mask.numel())
    assert torch.equal(mask, bip_fast.topk_mask(scores, int(mask.sum())))
    for p in params:
        theta = whole(opt.weight_of(p))
        assert torch.equal(whole(p.detach()).float(), torch.where(whole(opt.mask_of(p)), theta, 0.0).to(p.dtype).float())


def adam(groups):
    return torch.optim.Adam(groups, lr=0.01)


def compiled(backend):
    """Names and states of a network under `fully_shard` after some steps; ``backend`` of torch.compile, or None: it is not compiled."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 33), nn.ReLU(), nn.Linear(33, 20))
    for layer in (model[0], model[2]):
        fully_shard(layer)
    fully_shard(model)
    network = model if backend is None else torch.compile(model, backend=backend)
    opt = FastBiP(network, sparsity=0.9, preset="joint", mask_lr=1.0)
    for step in range(5):
        x = torch.randn(8, 24, generator=torch.Generator().manual_seed(10 * step + dist.get_rank()))
        network(x).square().mean().backward()
        opt.step()
        opt.zero_grad()
        check(opt)
    return [row.name for row in opt.report().rows], [whole(x) for p in opt.pruned_params for x in (opt.mask_of(p), opt.weight_of(p))]


def policies():
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

    bf16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return {
        "": {},
        "keep whole": {"reshard_after_forward": False},
        "bf16": {"mp_policy": bf16},
        "offload": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
    }


CASES = [  # policy, tied, what else, options
    ("", False, "", {}),
    ("keep whole", True, "clip", {"preset": "joint", "optimizer": "adamw"}),
    ("bf16", False, "frozen", {"preset": "joint", "optimizer": adam, "mask_lr": 1.0}),
    ("offload", False, "checkpointed", {"preset": "joint", "mask_lr": 1.0}),
    ("", False, "meta", {"preset": "joint", "optimizer": "adamw"}),
    ("", False, "scaler", {"preset": "joint", "mask_lr": 1.0}),
]


def train(policy, tie, extra, options):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    with torch.device("meta" if extra == "meta" else "cpu"):
        model = Net(tie)
    if extra == "frozen":
        model.layers[0].requires_grad_(False)
    for number, layer in enumerate(model.layers):
        model.layers[number] = layer = checkpoint_wrapper(layer) if extra == "checkpointed" else layer
        fully_shard(layer, **policies()[policy])
    fully_shard(model, **policies()[policy])
    opt = FastBiP(model, sparsity=0.9, **options)
    if extra == "meta":
        model.to_empty(device="cpu")
        set_model_state_dict(model, Net(tie).state_dict(), options=StateDictOptions(full_state_dict=True))
        opt.bind()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=extra == "scaler")
    check(opt)
    for step in range(5):
        tokens = torch.randint(TOKENS, (4, 12), generator=torch.Generator().manual_seed(10 * step + dist.get_rank()))
        loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1).float(), tokens.flatten())
        scaler.scale(loss).backward()
        if extra == "clip":
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if extra == "scaler" and step == 2:
            before = [whole(of(p)).clone() for p in opt.pruned_params for of in (opt.scores_of, opt.weight_of)]
            if dist.get_rank() == 1:
                model.layers[0][0].weight.grad.to_local().fill_(float("inf"))
        scaler.step(opt)
        scaler.update()
        if extra == "scaler" and step == 2:
            assert all(map(torch.equal, before, [whole(of(p)) for p in opt.pruned_params for of in (opt.scores_of, opt.weight_of)]))
        opt.zero_grad()
        check(opt)
    names = [row.name for row in opt.report().rows]
    opt.finalize()
    return names, {name: whole(p.detach()) for name, p in model.named_parameters()}


def train_all():
    return [train(*case) for case in CASES]


@pytest.mark.parametrize("world", [2, 4])  # a layer of 3 rows leaves a rank of 4 without any
def test_fully_shard(world):
    found = run_on(world, train_all)
    for number, (policy, tie, extra, _) in enumerate(CASES):
        names, values = found[0][number]
        assert all(found[rank][number][0] == names for rank in range(world)), policy
        for rank in range(1, world):
            assert all(torch.equal(x, values[name]) for name, x in found[rank][number][1].items())
        assert ("head.weight" in names) == (not tie)
        assert "attention.in_proj_weight" in names
        assert ("layers.0.0.weight" in names) == (extra != "frozen")
        if extra == "checkpointed":
            assert "layers.0.0.weight" in names, "without the wrapper's prefix"


def compiled_or_not():
    return [compiled(backend) for backend in (None, "aot_eager")]


def test_a_compiled_network_has_the_same_masks():
    """Bit for bit, as "aot_eager" runs the same kernels in the same order."""
    for (names, expected), (again, given) in run_on(2, compiled_or_not):
        assert names == again == ["0.weight", "2.weight"], "without the wrapper's prefix"
        assert all(torch.equal(x, y) for x, y in zip(expected, given, strict=True))


def parallel(names):
    """Tensor parallelism by columns and rows, sharded by FSDP2 besides: both cut dimension 0 of the first layer."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 48), nn.ReLU(), nn.Linear(48, 20))
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=names)
    parallelize_module(model, mesh[names[1]], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    fully_shard(model, mesh=mesh[names[0]])
    opt = FastBiP(model, sparsity=0.9, preset="joint", mask_lr=1.0)
    check(opt)
    for step in range(5):
        x = torch.randn(8, 24, generator=torch.Generator().manual_seed(10 * step + dist.get_rank() // 2))
        model(x).square().mean().backward()
        opt.step()
        opt.zero_grad()
        check(opt)
    return [str(p.placements) for p in opt.pruned_params]


def test_tensor_parallelism_beside_fsdp():
    first, second = run_on(4, parallel, ("data", "tensor"))[0]
    assert "Strided" in first
    assert "Shard(dim=1)" in second

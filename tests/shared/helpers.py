"""Shared by the tests: backends, tolerances, inputs built from bit patterns, models, and comparison bit for bit."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from bip_fast import reference

# --- backends --------------------------------------------------------------------------------------------------------------------


class Backend(NamedTuple):
    """Which kernels run, and where the tensors live."""

    name: str  # cpu | sim | cuda
    device: torch.device

    def generator(self, seed: int) -> torch.Generator:
        """Random numbers are always drawn on the CPU, so that every backend sees the same ones."""
        return torch.Generator().manual_seed(seed)


BACKEND_NAMES = ["cpu", "sim", "cuda"]


def load_simulator():
    """The CUDA kernels compiled for the host. Cannot be built: the tests fail, they do not skip."""
    from sim.build import load

    return load()


def simulated():
    """The tables of `bip_fast.engine.native`, and what they have for CPU tensors in place of the CPU's own kernels: the simulator's."""
    from bip_fast.engine import native

    module = load_simulator()
    return [(native.BACKENDS, module.cuda), (native.SHARD_BACKENDS, module.cuda_shards)]


def use_backend(name: str, monkeypatch) -> Backend:
    """Route `bip_fast` to a backend for the length of ``monkeypatch``."""
    import bip_fast.engine.native

    if name == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("needs an NVIDIA GPU that torch can use")
        if bip_fast.engine.native.BACKENDS.get("cuda") is None:
            pytest.skip("needs bip_fast built for CUDA: BIP_FAST_CUDA=1 pip install .")
        return Backend(name, torch.device("cuda", torch.cuda.current_device()))
    if name == "sim":
        for table, kernels in simulated():
            monkeypatch.setitem(table, "cpu", kernels)
    return Backend(name, torch.device("cpu"))


# --- the one tolerance table -----------------------------------------------------------------------------------------------------

# Between backends and against the fp32 reference nothing is tolerated: those tests compare bits. These are for comparisons with
# other people's arithmetic.
TOLERANCE = {
    # a handful of float64 operations in another order
    "float64": {"rtol": 1e-12, "atol": 1e-14},
    # a difference of two scores near 0.5, divided by a step of 1e-3: 2**-53 / 1e-3 absolute
    "float64 difference": {"rtol": 1e-11, "atol": 1e-12},
    # 25 or so steps beside torch.optim.SGD, which fuses lr*v into its subtraction where the CPU can: one rounding less a step
    "float32 trajectory": {"rtol": 1e-5, "atol": 1e-6},
    "float64 trajectory": {"rtol": 1e-12, "atol": 1e-14},
    # gradients of one network taken in another order of summation (channels_last, two half batches)
    "float32 gradient": {"rtol": 1e-4, "atol": 1e-5},
}

# --- inputs ----------------------------------------------------------------------------------------------------------------------

_EDGES = [0, 1, 31, 32, 33, 255, 256, 257, 1023, 1024, 1025]
# k at 0, 1, the middle and the end of every n, and every edge as k inside the longest n: a list, not a product
BOUNDARY_NK = sorted({(n, k) for n in _EDGES for k in (0, 1, n // 2, n - 1, n) if 0 <= k <= n} | {(1025, k) for k in _EDGES})

_ONE = 0x3F800000  # the bits of 1.0f


def from_bits(bits: Tensor) -> Tensor:
    """float32 tensor from integer bit patterns."""
    return bits.to(torch.int32).view(torch.float32)


def _one_distinct(n: int, value: float) -> Tensor:
    scores = torch.full((n,), 0.5)
    if n:
        scores[n // 3] = value
    return scores


def _atoms_and_a_few(n: int) -> Tensor:
    """Zeros and ones, every fiftieth somewhere between: how scores look in a long run."""
    index = torch.arange(n)
    return torch.where(index % 50 == 7, index / max(n, 1), (index % 3 == 0).float())


# name -> scores in [0, 1] of length n: what the upper step can hold
ADVERSARIAL_UNIT = {
    "all equal": lambda n: torch.full((n,), 0.37),
    "all zero": torch.zeros,
    "all one": torch.ones,
    "half and half": lambda n: (torch.arange(n) % 2).float(),
    "first half one": lambda n: (torch.arange(n) < n // 2).float(),
    "one larger": lambda n: _one_distinct(n, 0.75),
    "one smaller": lambda n: _one_distinct(n, 0.25),
    "neighbouring bits": lambda n: from_bits(_ONE - 1 - torch.arange(n) % 5),
    "low byte only": lambda n: from_bits(0x3F000000 + torch.arange(n) * 37 % 256),
    "third byte only": lambda n: from_bits(0x3E000000 + (torch.arange(n) * 37 % 256 << 8)),
    "every exponent": lambda n: from_bits(torch.arange(n) % 128 << 23),
    "subnormals": lambda n: from_bits(torch.arange(n) * 7 % 100),
    "ascending": lambda n: torch.arange(n) / max(n, 1),
    "descending": lambda n: 1 - torch.arange(n) / max(n, 1),
    "atoms and a few between": _atoms_and_a_few,
}
# any bit pattern: what topk_mask can be given
ADVERSARIAL = ADVERSARIAL_UNIT | {
    "minus zero": lambda n: torch.where(torch.arange(n) % 2 == 0, -0.0, 0.0),
    "minus zero and subnormals": lambda n: from_bits(torch.arange(n) % 3 - 1 << 31 | torch.arange(n) % 2),
    "all nan": lambda n: torch.full((n,), math.nan),
    "nan of many kinds": lambda n: from_bits(torch.arange(n) % 3999 + 0x7F800001 - 2**31 * (torch.arange(n) % 2)),
    "nan and minus inf": lambda n: torch.where(torch.arange(n) % 2 == 0, math.nan, -math.inf),
    "infinities": lambda n: torch.where(torch.arange(n) % 3 == 0, math.inf, torch.where(torch.arange(n) % 3 == 1, -math.inf, 1e38)),
    "negative": lambda n: -torch.arange(n).float(),
    "any bits": lambda n: from_bits(torch.arange(n) * 2654435761 % 2**32 - 2**31),
}


def random_state(n: int, seed: int, dtype: torch.dtype = torch.float32) -> tuple[reference.State, Tensor]:
    """A state somewhere in the middle of a run, with about a third kept, and a gradient."""
    generator = torch.Generator().manual_seed(seed)
    theta, v, u, g = (torch.randn(n, generator=generator, dtype=dtype) for _ in range(4))
    s = torch.rand(n, generator=generator, dtype=dtype)
    return reference.State(theta, v, s, u, reference.topk_mask(s, n // 3)), g


def fill_gradients(params, seed: int, *, dtype: torch.dtype | None = None, scale: float = 1.0) -> None:
    """Give every parameter a random gradient in its own layout; the same for every backend."""
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        g = torch.randn(p.shape, generator=generator).mul_(scale)
        p.grad = torch.empty_like(p).copy_(g) if dtype in (None, p.dtype) else None
        if p.grad is None:
            if not hasattr(torch.Tensor, "grad_dtype"):
                pytest.skip("needs a torch that lets gradients have another type than their parameter")
            p.grad_dtype = dtype  # torch otherwise refuses a gradient of another type than the parameter
            p.grad = torch.empty_like(p, dtype=dtype).copy_(g)


# --- models ----------------------------------------------------------------------------------------------------------------------


class ConvNet(nn.Module):
    """A convolution, a norm, a grouped convolution, a linear layer: sizes that are no multiples of anything."""

    def __init__(self, width: int = 6):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.depthwise = nn.Conv2d(width, width, 3, groups=width)
        self.head = nn.Linear(width * 4, 5)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x)))
        return self.head(torch.relu(self.depthwise(x)).flatten(1))


class Tied(nn.Module):
    """An autoencoder whose decoder is its encoder, and an embedding that is the output layer."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(12, 12, bias=False), nn.Linear(12, 12)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


def make_model(seed: int = 0, *, device=None, width: int = 6, kind: type[nn.Module] = ConvNet) -> nn.Module:
    torch.manual_seed(seed)
    model = kind(width) if kind is ConvNet else kind()
    return model.to(device)


def make_params(sizes, seed: int = 0, *, device=None, dtype: torch.dtype = torch.float32, pruned: bool = True) -> list[nn.Parameter]:
    """One parameter per size; two-dimensional (pruned from a list) or flat (dense)."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(1, n) if pruned else (n,) for n in sizes]
    return [nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype)) for shape in shapes]


def pruned_of(model: nn.Module) -> set[nn.Parameter]:
    """What `FastBiP` prunes of a Module."""
    return {m.weight for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))}


def batch(seed: int, device=None, n: int = 8) -> tuple[Tensor, Tensor]:
    """Images of 4x4 for `ConvNet`, and labels."""
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(n, 3, 4, 4, generator=generator), torch.randint(5, (n,), generator=generator)
    return x.to(device), y.to(device)


def train_step(model: nn.Module, opt, seed: int, device=None) -> float:
    """The loop of the README, once."""
    x, y = batch(seed, device)
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    opt.step()
    opt.zero_grad()
    return float(loss.detach())


# --- comparison ------------------------------------------------------------------------------------------------------------------

_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(x: Tensor) -> Tensor:
    """The tensor as integers on the CPU: -0 differs from 0. All NaN are one, since hardware chooses their sign and payload."""
    x = x.detach().cpu()
    if x.is_floating_point():
        x = torch.where(x.isnan(), math.nan, x)
    return x.contiguous().view(_INTEGER[x.element_size()])


def assert_bits(given: Tensor, expected: Tensor, what: str = "") -> None:
    assert (given.shape, given.dtype) == (expected.shape, expected.dtype), what
    wrong = (bits(given) != bits(expected)).flatten().nonzero().flatten()
    if wrong.numel():
        i = int(wrong[0])
        values = f"{given.detach().cpu().flatten()[i].item()!r}, not {expected.detach().cpu().flatten()[i].item()!r}"
        raise AssertionError(f"{what}: {wrong.numel()} of {given.numel()} entries differ, first at {i}: {values}")


def flat_like(p: Tensor, x: Tensor) -> Tensor:
    """A copy of ``x``, shaped like ``p``, flat on the CPU in the memory order of ``p``, whatever the layout of ``x``."""
    order = sorted(range(p.dim()), key=lambda dim: (-p.stride(dim), -p.shape[dim]))
    return x.detach().permute(order).reshape(-1).cpu().clone()


def snapshot(opt) -> dict[str, Tensor]:
    """Everything a user can see of an optimizer's state, copied."""
    seen = {}
    params = [(group, p) for group in opt.param_groups for p in group["params"]]
    for i, (group, p) in enumerate(params):
        seen[f"{i} param"] = p.detach().clone()
        if group.get("prune", True) and p.dim() >= 2:
            seen |= {f"{i} mask": opt.mask_of(p), f"{i} weight": opt.weight_of(p), f"{i} scores": opt.scores_of(p)}
    return seen


def whole_state(opt) -> dict[str, Tensor]:
    """Every tensor of an optimizer's parameters and of its saved state, copied."""
    params = [p for group in opt.param_groups for p in group["params"]]
    seen = {f"{i} param": p.detach().clone() for i, p in enumerate(params)}
    for i, state in opt.state_dict()["state"].items():
        own = state | state.get("optimizer", {})
        seen |= {f"{i} {name}": x.clone() for name, x in own.items() if isinstance(x, Tensor)}
    return seen


def assert_same_snapshot(given: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert given.keys() == expected.keys()
    for name in expected:
        assert_bits(given[name], expected[name], name)


def params_of(shapes, device, dtype=torch.float32, channels_last=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    params = []
    for shape in shapes:
        x = (torch.randn(shape, generator=generator) * 0.3).to(dtype)
        if channels_last and x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        params.append(nn.Parameter(x.to(device)))
    return params

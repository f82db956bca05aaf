"""The lower, upper and joint kernels: state equal to the reference bit for bit, at every size where a kernel changes path."""

import math

import pytest
import torch
from helpers import ADVERSARIAL_UNIT, assert_bits, fill_gradients, from_bits, make_params
from lockstep import Lockstep
from torch import nn

from bip_fast import FastBiP

hypothesis = pytest.importorskip("hypothesis", reason="needs the package hypothesis: pip install 'bip-fast[test]'")
st = hypothesis.strategies

EDGE_SIZES = [1, 31, 32, 33, 127, 128, 129, 255, 256, 257, 1023, 1024, 1025, 2049]
PHASES = ["lower", "upper", "joint"]
RULES = ["sgd", "adamw"]
# a mask_lr that moves most scores and clips some, a decay and rates that are not powers of two
MOVING = {"lr": 0.03, "mask_lr": 0.3, "gamma": 0.7, "weight_decay": 0.013}
FORMULAS = [
    {"momentum": 0.0},
    {"momentum": 0.9, "mask_momentum": 0.6},
    {"momentum": 0.9, "nesterov": True},
    {"momentum": 0.8, "nesterov": True, "mask_momentum": 0.9, "weight_decay": 0.0},
    {"optimizer": "adamw"},
    {"optimizer": "adamw", "betas": (0.0, 0.0), "eps": 0.3, "weight_decay": 0.0},
    {"optimizer": "adamw", "betas": (0.83, 0.97), "eps": 1e-30, "mask_momentum": 0.6},
]


def run_of(params, **options):
    options = MOVING | {"sparsity": 0.7} | options
    return Lockstep(params, lambda: FastBiP(params, **options))


def sparsity_for(n, k):
    """A sparsity in [0, 1) that keeps exactly k of n."""
    return min((n - k) / n, 1 - 1e-9)


@pytest.mark.sanitizer
@pytest.mark.parametrize(("scope", "rule"), [("global", "sgd"), ("layer", "sgd"), ("global", "adamw")])
@pytest.mark.parametrize("phase", PHASES)
def test_sizes_at_every_edge(backend, phase, scope, rule):
    """Tensors that end just before, at and after a mask word, an alignment unit and a tile, side by side."""
    params = make_params(EDGE_SIZES, device=backend.device)
    run = run_of(params, scope=scope, optimizer=rule)
    run.random_steps(4, phase=phase)


@pytest.mark.parametrize("formula", FORMULAS, ids=str)
@pytest.mark.parametrize("phase", PHASES)
def test_every_branch_of_the_formulas(backend, phase, formula):
    params = make_params([300, 1100], device=backend.device) + make_params([70], 1, device=backend.device, pruned=False)
    run = run_of(params, **formula)
    run.random_steps(6, phase=phase)


@pytest.mark.parametrize("k", [0, 1, 2, 31, 32, 33, 255, 256, 257, 1023, 1024, 1025, 1296, 1297])
def test_every_edge_of_k(backend, k):
    """1297 weights over five tensors, k of them kept."""
    params = make_params([33, 1024, 1, 128, 111], device=backend.device)
    run = run_of(params, sparsity=sparsity_for(1297, k))
    assert sum(int(run.opt.mask_of(p).sum()) for p in params) == k
    run.random_steps(2, phase="joint")
    run.random_steps(2, phase="upper", seed=1)


@pytest.mark.sanitizer
@pytest.mark.parametrize("name", ADVERSARIAL_UNIT)
def test_adversarial_scores(backend, name):
    """Scores start at min(|theta|, 1), so weights of these values are scores of these values; a zero gradient leaves them."""
    for scope, sizes in (("global", (257, 6100, 40)), ("layer", (257, 1025, 40))):
        params = [nn.Parameter(ADVERSARIAL_UNIT[name](n).reshape(1, n).to(backend.device)) for n in sizes]
        run = run_of(params, scope=scope, sparsity=0.6)
        for i in range(3):
            fill_gradients(params, i)
            for p in params:
                p.grad.mul_(torch.rand(p.shape, generator=backend.generator(i)).gt(0.9).to(p.device))  # nine of ten stay in the tie
            run.step("upper" if i < 2 else "joint")


@pytest.mark.sanitizer
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("phase", PHASES)
def test_gradients_that_are_not_finite(backend, phase, rule):
    """The entry keeps theta, its moments, u and s, and is counted; its neighbours move."""
    params = make_params([500, 1030], device=backend.device) + make_params([40], 1, device=backend.device, pruned=False)
    run = run_of(params, mask_momentum=0.5, levels="joint", optimizer=rule)
    run.random_steps(2)
    assert run.opt.num_nonfinite == 0
    fill_gradients(params, 5)
    for p, column, bad in ((params[0], 3, math.nan), (params[0], 499, math.inf), (params[1], 1029, -math.inf)):
        p.grad[0, column] = bad
    run.step(phase)
    assert run.opt.num_nonfinite == 3
    run.step(phase)
    assert run.opt.num_nonfinite == 6
    run.random_steps(2, seed=1)
    assert run.opt.num_nonfinite == 6


@pytest.mark.parametrize("phase", PHASES)
def test_all_gradients_not_finite(backend, phase):
    params = make_params([100, 1025], device=backend.device)
    run = run_of(params)
    run.random_steps(2, phase="joint")
    for p in params:
        p.grad = torch.full_like(p, math.nan)
    run.step(phase)
    assert run.opt.num_nonfinite == 1125


@pytest.mark.parametrize("rule", RULES)
def test_extreme_gradients(backend, rule):
    """Finite gradients whose products overflow, vanish or are subnormal: infinities and NaN inside h do not reach the scores."""
    extremes = [0.0, -0.0, 1e-45, -1e-38, 1e-20, 1e20, -1e25, 3e38, -3.4e38]
    params = make_params([900], device=backend.device)
    run = run_of(params, lr=1e-30, levels="joint", mask_momentum=0.5, optimizer=rule)
    for i in range(3):
        params[0].grad = torch.tensor(extremes, device=backend.device).repeat(100).roll(i).reshape(1, 900)
        run.step()
        assert bool(run.opt.scores_of(params[0]).isfinite().all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("scope", "rule"), [("global", "sgd"), ("layer", "sgd"), ("global", "adamw")])
def test_half_precision_parameters(backend, dtype, scope, rule):
    """Parameters and gradients of half precision; theta, scores and momentum stay fp32. Dense parameters keep an fp32 copy too."""
    params = make_params([33, 1025, 200], device=backend.device, dtype=dtype)
    params += make_params([70], 1, device=backend.device, dtype=dtype, pruned=False)
    run = run_of(params, scope=scope, optimizer=rule)
    run.random_steps(8)
    run.random_steps(4, phase="joint", seed=1)
    assert run.opt.weight_of(params[0]).dtype == torch.float32
    assert run.opt.scores_of(params[0]).dtype == torch.float32


def test_parameters_of_several_dtypes(backend):
    sizes = [[129, 1000], [300], [77]]
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    params = [p for s, dtype in zip(sizes, dtypes, strict=True) for p in make_params(s, device=backend.device, dtype=dtype)]
    run = run_of(params)
    run.random_steps(8)


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="needs torch >= 2.10, where a gradient may have its own dtype")
@pytest.mark.parametrize("dtypes", [("bfloat16", "float32"), ("float32", "float16"), ("float32", "bfloat16")], ids="-".join)
def test_gradients_of_another_dtype(backend, dtypes):
    of_param, of_gradient = (getattr(torch, name) for name in dtypes)
    params = make_params([33, 1025], device=backend.device, dtype=of_param)
    run = run_of(params)
    run.random_steps(6, dtype=of_gradient)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_that_start_anywhere(backend, dtype):
    """Views into a larger buffer, as DistributedDataParallel makes them: aligned to their own dtype and no more."""
    params = make_params([33, 1025, 130], device=backend.device, dtype=dtype)
    run = run_of(params)
    for i in range(6):
        buffer = torch.randn(3000, generator=backend.generator(i)).to(backend.device, dtype)
        start = 1 + i
        for p in params:
            p.grad = buffer[start : start + p.numel()].view_as(p)
            start += p.numel()
        run.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_that_start_anywhere(backend, dtype):
    """Parameters that share one buffer, as flattened modules do: aligned to their own dtype, and the memory between them stays."""
    sizes = [1025, 33, 2048, 70]
    buffer = torch.randn(4000, generator=backend.generator(0)).to(backend.device, dtype)
    starts = [1, 1029, 1063, 3114]
    gaps = torch.ones(4000, dtype=torch.bool)
    for start, n in zip(starts, sizes, strict=True):
        gaps[start : start + n] = False
    before = buffer.cpu()[gaps]
    shapes = [(1, 1025), (1, 33), (1, 2048), (70,)]
    params = [nn.Parameter(buffer[start : start + n].view(shape)) for start, n, shape in zip(starts, sizes, shapes, strict=True)]
    run = run_of(params)
    run.random_steps(6)
    assert_bits(buffer.cpu()[gaps], before, "between the parameters")


@pytest.mark.parametrize(("scope", "rule"), [("global", "sgd"), pytest.param("layer", "sgd", marks=pytest.mark.slow), ("layer", "adamw")])
def test_many_small_tensors(backend, scope, rule):
    """More tensors than a launch takes gradient pointers for by value (400), most tiles nearly empty; some without a gradient."""
    params = make_params([1 + i % 5 for i in range(420)], device=backend.device)
    run = run_of(params, scope=scope, optimizer=rule)
    run.random_steps(4)
    for p in params[::7]:
        p.grad = None
    run.step("joint")
    run.step("lower")


def test_empty_tensors(backend):
    params = make_params([0, 40, 0, 33], device=backend.device)
    run = run_of(params)
    run.random_steps(4)


def test_tiny_groups_keep_their_count(backend):
    """Layers of one to five weights at 70 %: each keeps n - round(0.7 n), also when that is none."""
    params = make_params([1, 2, 3, 4, 5], device=backend.device)
    run = run_of(params, scope="layer")
    run.random_steps(6)
    assert [int(run.opt.mask_of(p).sum()) for p in params] == [0, 1, 1, 1, 1]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads(backend, threads, rule):
    """The reference does not know the number of threads, so equality to it for 1, 2 and 5 is equality among them."""
    torch.set_num_threads(threads)
    sizes = [3001, 77, 5000] if backend.name == "sim" else [50_003, 77, 30_000]
    run = run_of(make_params(sizes, device=backend.device), scope="global", sparsity=0.9, optimizer=rule)
    run.random_steps(4)
    run.random_steps(2, phase="joint", seed=1)


def test_a_zero_gradient_moves_only_by_decay_and_momentum(backend):
    params = make_params([600], device=backend.device)
    run = run_of(params)
    run.random_steps(2)
    scores = run.opt.scores_of(params[0])
    for _ in range(4):
        params[0].grad = torch.zeros_like(params[0])
        run.step()
    assert torch.equal(scores, run.opt.scores_of(params[0]))


@hypothesis.settings(max_examples=30, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(data=st.data())
def test_any_shapes_and_bit_patterns(backend, data):
    """Any shapes; weights and gradients of any finite bits or none; any phases in any order."""
    shapes = data.draw(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=4), label="shapes")
    finite = st.integers(0, 0x7F7FFFFF).flatmap(lambda b: st.sampled_from([b, b - 2**31]))
    weights = data.draw(st.lists(finite, min_size=1, max_size=6), label="weights")
    gradients = data.draw(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=6), label="gradients")
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**16), label="seed"))

    def drawn(palette, shape):
        return from_bits(torch.tensor(palette)[torch.randint(len(palette), shape, generator=generator)]).to(backend.device)

    params = [nn.Parameter(drawn(weights, shape)) for shape in shapes]
    scope = data.draw(st.sampled_from(["global", "layer"]), label="scope")
    options = {"sparsity": data.draw(st.floats(0, 0.999), label="sparsity"), "optimizer": data.draw(st.sampled_from(RULES), label="rule")}
    run = run_of(params, scope=scope, mask_momentum=0.5, **options)
    for phase in data.draw(st.lists(st.sampled_from(PHASES), min_size=1, max_size=4), label="phases"):
        for p in params:
            p.grad = drawn(gradients, p.shape)
        run.step(phase)

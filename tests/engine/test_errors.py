"""Every wrong use gets an error that names the argument, what was expected and what came; and nothing is silently overwritten."""

import math
import subprocess
import sys

import pytest
import torch
from helpers import assert_same_snapshot, fill_gradients, make_model, make_params, snapshot, train_step
from torch import nn

import bip_fast
from bip_fast import FastBiP

# --- arguments ------------------------------------------------------------------------------------------------------------------------

BAD_VALUES = [
    ("sparsity", 1.2, r"\[0, 1\)"),
    ("sparsity", 1.0, r"\[0, 1\)"),
    ("sparsity", -0.1, r"\[0, 1\)"),
    ("sparsity", math.nan, r"\[0, 1\)"),
    ("density", 0.0, r"\(0, 1\]"),
    ("density", 1.5, r"\(0, 1\]"),
    ("lr", -0.1, ""),
    ("lr", math.nan, ""),
    ("mask_lr", -1.0, ""),
    ("gamma", 0.0, ""),
    ("gamma", -1.0, ""),
    ("momentum", -0.5, ""),
    ("mask_momentum", -0.5, ""),
    ("weight_decay", -1e-4, ""),
    ("levels", "both", "alternating.*joint"),
    ("scope", "channel", "global.*layer"),
    ("pattern", "4:2", "unstructured"),
    ("min_kept", -1, "integer of at least 0"),
    ("lower_steps", 0, ""),
    ("lower_steps", -1, ""),
]


@pytest.mark.parametrize(("name", "value", "expected"), BAD_VALUES)
def test_a_value_out_of_range(name, value, expected):
    options = {name: value} if name in ("sparsity", "density") else {"sparsity": 0.5, name: value}
    with pytest.raises(ValueError, match=f"(?s){name}.*{expected}.*got.*{value}"):
        FastBiP(make_params([10]), **options)


@pytest.mark.parametrize(("name", "value", "expected"), [case for case in BAD_VALUES if case[0] not in ("levels", "lower_steps")])
def test_a_value_out_of_range_in_a_group(name, value, expected):
    group = {"params": make_params([10]), name: value}
    options = {} if name in ("sparsity", "density") else {"sparsity": 0.5}
    with pytest.raises(ValueError, match=f"(?s){name}.*{expected}.*got.*{value}"):
        FastBiP([group], **options)


def test_neither_or_both_of_sparsity_and_density():
    with pytest.raises(ValueError, match=r"sparsity.*density"):
        FastBiP(make_params([10]))
    with pytest.raises(ValueError, match=r"sparsity.*density"):
        FastBiP(make_params([10]), sparsity=0.5, density=0.5)


def test_k_is_refused_and_explained():
    with pytest.raises(ValueError, match=r"k.*sparsity"):
        FastBiP(make_params([10]), k=5)
    with pytest.raises(ValueError, match=r"k.*sparsity"):
        FastBiP([{"params": make_params([10]), "k": 5}], sparsity=0.5)


def test_an_unknown_argument():
    with pytest.raises(TypeError, match="sparsty"):
        FastBiP(make_params([10]), sparsty=0.5, sparsity=0.5)


def test_sparsity_is_a_keyword():
    with pytest.raises(TypeError):
        FastBiP(make_params([10]), 0.5)


EXCLUDED_NOTHING = {
    "name": ["hed.weight"],
    "pattern": ["head*", "no*"],
    "module": [nn.Linear(2, 2)],
    "parameter": [nn.Parameter(torch.ones(2, 2))],
}


@pytest.mark.parametrize("exclude", EXCLUDED_NOTHING.values(), ids=EXCLUDED_NOTHING)
def test_an_exclusion_of_nothing(exclude):
    with pytest.raises(ValueError, match="exclude"):
        FastBiP(make_model(), sparsity=0.5, exclude=exclude)


def test_names_cannot_be_excluded_without_names():
    with pytest.raises(ValueError, match=r"exclude.*name"):
        FastBiP(list(make_model().parameters()), sparsity=0.5, exclude=["head*"])


def test_nothing_to_optimize():
    with pytest.raises(ValueError):  # noqa: PT011 - torch's own words
        FastBiP([], sparsity=0.5)
    with pytest.raises(ValueError):  # noqa: PT011
        FastBiP(nn.ReLU(), sparsity=0.5)


@pytest.mark.parametrize("shape", [(0, 5), (4, 0)])
def test_an_empty_matrix_alone(shape):
    with pytest.raises(ValueError, match=r"nothing to prune: .*parameter 0 of shape .* it has no entries"):
        FastBiP([nn.Parameter(torch.empty(shape))], sparsity=0.5)
    assert len(FastBiP([nn.Parameter(torch.empty(shape)), *make_params([10])], sparsity=0.5).pruned_params) == 2


def test_a_parameter_twice():
    p = make_params([10])[0]
    with pytest.raises(ValueError, match="more than one parameter group"):
        FastBiP([{"params": [p]}, {"params": [p]}], sparsity=0.5)


# --- parameters -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_a_dtype_without_kernels(dtype):
    with pytest.raises(ValueError, match=f"(?s)float32.*{dtype}"):
        FastBiP([nn.Parameter(torch.ones(4, 4, dtype=dtype))], sparsity=0.5)


@pytest.mark.parametrize("name", ["slice", "expanded", "overlapping"])
def test_memory_that_is_not_dense(name):
    data = {
        "slice": torch.ones(6, 8)[:, ::2],
        "expanded": torch.ones(1, 8).expand(4, 8),
        "overlapping": torch.ones(20).as_strided((4, 6), (4, 1)),
    }[name]
    with pytest.raises(ValueError, match=r"dense|contiguous|overlap"):
        FastBiP([nn.Parameter(data)], sparsity=0.5)


def test_two_devices():
    with pytest.raises((ValueError, RuntimeError), match="device"):
        FastBiP([nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4, 4, device="meta"))], sparsity=0.5)


def test_a_device_without_kernels():
    opt = FastBiP([nn.Parameter(torch.zeros(40, 40, device="meta"))], sparsity=0.5)  # may get memory yet
    with pytest.raises(RuntimeError, match="meta"):
        opt.step()


def test_a_tensor_that_is_no_leaf():
    with pytest.raises(ValueError, match="leaf"):
        FastBiP([torch.ones(4, 4, requires_grad=True) * 2], sparsity=0.5)


def test_a_rejected_group_leaves_the_optimizer_as_it_was(backend):
    params = make_params([300], device=backend.device)
    opt = FastBiP(params, sparsity=0.5)
    bad = nn.Parameter(torch.ones(4, 4, dtype=torch.float64, device=backend.device))
    before = snapshot(opt)
    with pytest.raises(ValueError, match="float64"):
        opt.add_param_group({"params": [bad]})
    assert len(opt.param_groups) == 1
    fill_gradients(params, 0)
    assert_same_snapshot(snapshot(opt), before)
    opt.step()


# --- questions about the wrong parameter ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("view", ["mask_of", "weight_of", "scores_of"])
def test_a_parameter_that_is_not_pruned(backend, view):
    model = make_model(device=backend.device)
    opt = FastBiP(model, sparsity=0.5)
    for p in (model.norm.weight, nn.Parameter(torch.ones(3, 3))):
        with pytest.raises(ValueError, match="prune"):
            getattr(opt, view)(p)


# --- somebody else wrote ----------------------------------------------------------------------------------------------------------------

WRITES = {
    "in place": lambda model: model.conv.weight.mul_(2),
    "copy": lambda model: model.conv.weight.copy_(torch.ones(())),
    "clip": lambda model: model.conv.weight.clamp_(-0.01, 0.01),
    "init": lambda model: nn.init.zeros_(model.conv.weight),
    "load_state_dict": lambda model: model.load_state_dict(make_model(5).state_dict()),
    "other storage": lambda model: setattr(model.conv.weight, "data", model.conv.weight.data.clone()),
    "other dtype": lambda model: model.to(torch.bfloat16),
    "other shape": lambda model: setattr(model.conv.weight, "data", torch.ones(2, 2, device=model.conv.weight.device)),
    "channels_last": lambda model: model.to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("name", WRITES)
@pytest.mark.parametrize("phase", ["lower", "upper", "joint"])
def test_a_write_by_somebody_else_is_found(backend, name, phase):
    """The next step names the parameter and touches nothing."""
    model = make_model(device=backend.device)
    opt = FastBiP(model, sparsity=0.5)
    train_step(model, opt, 0, backend.device)
    with torch.no_grad():
        WRITES[name](model)
    after = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match=r"conv\.weight"), getattr(opt, phase)():
        opt.step()
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), after, strict=True))


def test_a_moved_device_is_found(backend):
    model = make_model(device=backend.device)
    opt = FastBiP(model, sparsity=0.5)
    torch.utils.swap_tensors(model.conv.weight, nn.Parameter(model.conv.weight.detach().to("meta")))  # as Module.to may do it
    with pytest.raises(RuntimeError, match=r"(?s)conv\.weight.*meta"):
        opt.step()


def test_the_error_says_what_to_do(backend):
    model = make_model(device=backend.device)
    opt = FastBiP(model, sparsity=0.5)
    model.to(torch.bfloat16)
    with pytest.raises(RuntimeError, match="FastBiP") as caught:
        opt.step()
    assert any(word in str(caught.value) for word in ("before", "new", "again"))


@pytest.mark.parametrize("named", [True, False])
def test_a_write_is_named_as_well_as_possible(backend, named):
    """By name if names were given, else by position and shape."""
    model = make_model(device=backend.device)
    opt = FastBiP(model.named_parameters() if named else model.parameters(), sparsity=0.5)
    with torch.no_grad():
        model.head.weight.add_(1)
    with pytest.raises(RuntimeError, match=r"head\.weight" if named else r"(?s)5.*24"):
        opt.step()


def test_dense_parameters_may_be_written(backend):
    """Norms and biases are plain SGD: whoever resets them between steps is heard."""
    model = make_model(device=backend.device)
    opt = FastBiP(model, sparsity=0.5, lr=0.1, momentum=0.0, weight_decay=0.0)
    train_step(model, opt, 0, backend.device)
    with torch.no_grad():
        model.norm.weight.fill_(5.0)
    model.norm.weight.grad = torch.ones_like(model.norm.weight)
    with opt.lower():
        opt.step()
    assert torch.equal(model.norm.weight, torch.full_like(model.norm.weight, 5.0) - 0.1)


def test_a_refused_step_does_not_advance_the_phase(backend):
    model = make_model(device=backend.device)
    opt = FastBiP(model, sparsity=0.5)
    with torch.no_grad():
        model.conv.weight.add_(1)
    with pytest.raises(RuntimeError):
        opt.step()
    assert opt.phase == "lower"


# --- gradients --------------------------------------------------------------------------------------------------------------------------


def test_sparse_gradients(backend):
    embedding = nn.Embedding(20, 8, sparse=True).to(backend.device)
    opt = FastBiP(embedding.parameters(), sparsity=0.5)
    embedding(torch.tensor([1, 2], device=backend.device)).sum().backward()
    with pytest.raises((RuntimeError, TypeError, ValueError), match="sparse"):
        opt.step()


# --- the package --------------------------------------------------------------------------------------------------------------------------


def test_build_info_says_what_was_built():
    info = bip_fast.build_info()
    assert {"compiler", "simd", "cuda", "cuda_toolkit", "cuda_architectures"} <= info.keys()
    assert isinstance(info["cuda"], bool)
    assert ("cuda" in bip_fast.engine.native.BACKENDS) == info["cuda"]


def test_importing_does_not_start_cuda():
    code = "import bip_fast, torch; assert not torch.cuda.is_initialized(); import bip_fast.reference"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)

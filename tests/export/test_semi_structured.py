"""2:4 layers: what is 2:4, what torch can multiply, and why a layer is not converted. What needs sparse tensor cores runs on a GPU only."""

import json

import pytest
import torch
from torch import nn

from bip_fast.export.semi_structured import Conversion, Converted, refusals, to_semi_structured, violations

SIZES = {torch.float16: (32, 64), torch.bfloat16: (32, 64), torch.int8: (16, 128)}  # as of CUTLASS
HALF, GPU = torch.float16, ("cuda", (9, 0), SIZES)


def two_of_four(layer):
    """Zero the first two of every four weights."""
    with torch.no_grad():
        layer.weight.view(-1, 4)[:, :2] = 0
    return layer


# --- the pattern ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "broken"),
    [
        ([1, 2, 0, 0, 0, 0, 3, 4], 0),
        ([0, 0, 0, 0, 0, 0, 0, 0], 0),
        ([1, 2, 3, 0, 0, 0, 3, 4], 1),
        ([0, 1, 2, 0, 3, 0, 1, 0], 0),
        ([0, 0, 1, 2, 3, 4, 0, 0], 0),  # four in a row, but of two groups
        ([1, 1, 1, 1, -1, 0, -1, -1], 2),
        ([1, float("nan"), 1, -0.0, 0, 0, 0, 0], 1),
    ],
)
def test_groups_that_keep_too_many_are_counted(row, broken):
    for dtype in (torch.float32, torch.bfloat16):
        assert violations(torch.tensor([row], dtype=dtype)) == broken
        assert violations(torch.tensor([row, [0] * 8, row], dtype=dtype)) == 2 * broken


def test_groups_lie_along_the_inputs_whatever_the_memory_order():
    weight = torch.zeros(8, 4)
    weight[:, 0] = 1  # one of four in every row, eight in a column
    assert violations(weight) == 0
    assert violations(weight.t().contiguous()) == 2
    assert violations(weight.t().contiguous().t()) == 0
    assert violations(weight, 1, 2) == 0
    assert violations(torch.ones(3, 6), 1, 3) == 6
    assert violations(torch.ones(3, 6), 3, 3) == 0
    assert violations(torch.ones(0, 8)) == 0


def test_what_has_no_groups_is_an_error():
    with pytest.raises(ValueError, match=r"multiple of 4, got shape \(3, 6\)"):
        violations(torch.ones(3, 6))
    with pytest.raises(ValueError, match="0 < n <= m, got 5:4"):
        violations(torch.ones(3, 8), 5, 4)


# --- the reasons ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (((64, 128), HALF, *GPU), []),
        (((64, 128), torch.bfloat16, "cuda", (8, 0), SIZES), []),
        (((16, 128), torch.int8, *GPU), []),
        (((64, 128), HALF, "cuda", (7, 5), SIZES), ["compute capability 7.5: needs 8.0 or newer"]),
        (((64, 128), torch.float32, *GPU), ["float32: needs float16, bfloat16 or int8"]),
        (((64, 128), torch.float8_e4m3fn, *GPU), ["float8_e4m3fn: needs float16, bfloat16 or int8"]),
        (((64, 30), HALF, *GPU), ["in_features 30 is not a multiple of 64"]),
        (((10, 64), HALF, *GPU), ["out_features 10 is not a multiple of 32"]),
        (((16, 64), torch.int8, *GPU), ["in_features 64 is not a multiple of 128"]),
        (((0, 64), HALF, *GPU), ["out_features 0 is not a multiple of 32"]),
        (((64, 128), HALF, "cpu", None, SIZES), ["is on the CPU, needs an NVIDIA GPU of compute capability 8.0 or newer"]),
        (
            ((10, 30), torch.float32, "mps", None, SIZES),
            [
                "is on the MPS, needs an NVIDIA GPU of compute capability 8.0 or newer",
                "float32: needs float16, bfloat16 or int8",
                "out_features 10 is not a multiple of 32",
                "in_features 30 is not a multiple of 64",
            ],
        ),
    ],
)
def test_every_reason_is_named(given, expected):
    assert refusals(*given) == expected


def test_multiples_are_those_of_this_torch():
    """torch's own table, not a copy of it: a weight one entry too wide for it is refused."""
    for dtype in (torch.float16, torch.bfloat16, torch.int8):
        sizes = [kind._DTYPE_SHAPE_CONSTRAINTS[dtype][:2] for kind in (CUTLASS, CUSPARSELT)]
        assert any(refusals(size, dtype, "cuda", (8, 0)) == [] for size in sizes)
        assert all(refusals((rows, cols + 4), dtype, "cuda", (8, 0)) for rows, cols in sizes)


CUTLASS, CUSPARSELT = torch.sparse.SparseSemiStructuredTensorCUTLASS, torch.sparse.SparseSemiStructuredTensorCUSPARSELT


# --- models --------------------------------------------------------------------------------------------------------------------------


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        self.good = two_of_four(nn.Linear(64, 128))
        self.whole = nn.Linear(128, 64)
        self.odd = nn.Linear(64, 30)
        self.narrow = nn.Linear(30, 32)
        self.attention = nn.MultiheadAttention(64, 2)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.tied = nn.Linear(64, 128)
        self.tied.weight = self.good.weight


def reasons(found):
    return {row.name: row.reason for row in found.layers}


def test_on_the_cpu_every_layer_says_why_not():
    model = Network()
    found = to_semi_structured(model)
    said = reasons(found)
    assert found.count == 0
    assert said["conv"] == "torch has no semi-structured convolution"
    assert said["normed"] == "a parametrization computes its weight"
    assert said["attention.out_proj"] == "the fused attention of torch reads it as a dense weight"
    for name in ("good", "whole", "odd", "narrow", "tied"):
        assert said[name].startswith("is on the CPU, needs an NVIDIA GPU"), name
        assert "float32: needs float16" in said[name]
    assert "not 2:4" not in said["good"]
    assert said["whole"].endswith("not 2:4: 2,048 of 2,048 groups keep more than two")
    assert said["narrow"].count("in_features 30") == 1


def test_the_model_is_left_alone_and_the_copy_computes_the_same():
    model = nn.Sequential(two_of_four(nn.Linear(64, 128)), nn.ReLU(), nn.Linear(128, 64))
    before = [p.detach().clone() for p in model.parameters()]
    x = torch.randn(3, 64)
    copied = to_semi_structured(model).model
    assert copied is not model
    assert torch.equal(copied(x), model(x))
    assert all(torch.equal(a, p) for a, p in zip(before, model.parameters(), strict=True))
    assert not set(model.parameters()) & set(copied.parameters())


def test_what_a_backend_raises_is_a_reason(monkeypatch):
    """Everything fits, and then the kernels are not there: here, because there is no GPU."""
    monkeypatch.setattr("bip_fast.export.semi_structured.refusals", lambda *given: [])
    found = to_semi_structured(nn.Sequential(two_of_four(nn.Linear(64, 128))).half())
    assert found.count == 0
    assert reasons(found)["0"].startswith("torch refused it: RuntimeError: Error original_tensor.device= cpu")
    assert type(found.model[0].weight) is nn.Parameter


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_meta_lazy_and_empty_layers_have_reasons():
    model = nn.Sequential(nn.Linear(64, 32, device="meta"), nn.LazyLinear(4), nn.utils.skip_init(nn.Linear, 0, 4))
    said = reasons(to_semi_structured(model))
    assert said["0"].startswith("is on the META")
    assert said["1"] == "has no shape yet"
    assert "in_features 0 is not a multiple" in said["2"]


def test_the_table_is_aligned_and_json():
    found = Converted(nn.ReLU(), (Conversion("a", (64, 128)), Conversion("a.long.name", (4, 4, 1, 1), "torch has none")))
    lines = str(found).splitlines()
    assert lines == [
        "layer        shape    2:4",
        "a            64x128   converted",
        "a.long.name  4x4x1x1  torch has none",
        "1 of 2 layers converted",
    ]
    told = json.loads(json.dumps(found.as_dict()))
    assert told["converted"] == 1
    assert told["layers"][0] == {"name": "a", "shape": [64, 128], "converted": True, "reason": None}
    assert told["layers"][1]["reason"] == "torch has none"


SPARSE_CORES = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


@pytest.mark.gpu
@pytest.mark.skipif(not SPARSE_CORES, reason="needs an NVIDIA GPU of compute capability 8.0 or newer")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_on_a_gpu_two_of_four_layers_are_converted(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(two_of_four(nn.Linear(128, 256)), nn.ReLU(), two_of_four(nn.Linear(256, 128)), nn.Linear(128, 128))
    model = model.to("cuda", dtype).eval()
    found = to_semi_structured(model)
    said = reasons(found)
    assert (said["0"], said["2"]) == ("", ""), said
    assert said["3"] == "not 2:4: 4,096 of 4,096 groups keep more than two"
    for batch in (1, 7, 64):
        x = torch.randn(batch, 128, device="cuda", dtype=dtype)
        with torch.no_grad():
            torch.testing.assert_close(found.model(x), model(x), rtol=0.05, atol=0.02)

"""How a shrunk network is compared with the model that it was: on which inputs, and by what scale."""

from __future__ import annotations

import pytest
import torch
from pruned_networks import assert_same, drop, lively
from torch import nn

pytest.importorskip("torch_pruning", reason="needs the package torch-pruning: pip install 'bip-fast[test]'")

from bip_fast.export import coupled_filters, measure, shrink
from bip_fast.export.same import near


class Normed(nn.Module):
    """A norm over channels that nobody reads: without them it computes something else, which no graph shows. One logit is masked."""

    def __init__(self, fill: float) -> None:
        super().__init__()
        self.a, self.norm, self.h = nn.Linear(6, 8), nn.LayerNorm(8, elementwise_affine=False), nn.Linear(8, 4)
        self.fill = fill

    def forward(self, x):
        return self.h(self.norm(self.a(x))).masked_fill(torch.tensor([False, False, True, False]), self.fill)


LOWEST = torch.finfo(torch.float32).min


@pytest.mark.parametrize("fill", [0.0, -1e4, -1e9, LOWEST, -torch.inf, torch.nan])
def test_a_masked_logit_hides_nothing(fill):
    model = Normed(fill).eval()
    with torch.no_grad():
        model.h.weight[:, 4:] = 0
    result = shrink(model, torch.randn(3, 6))
    assert result.model.a.out_features == 8
    assert "changes what the model computes" in result.kept[0].reason


def noisy(x: torch.Tensor, share: float) -> torch.Tensor:
    return x + share * torch.randn(x.shape, generator=torch.Generator().manual_seed(5)) * x.abs().mean()


OUTPUT = torch.randn(3, 40, generator=torch.Generator().manual_seed(2))
FILLED = OUTPUT.masked_fill(OUTPUT < 0.5, LOWEST)  # most of it
EDGES = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, LOWEST, 1e-40])


@pytest.mark.parametrize(
    ("found", "expected", "equal"),
    [
        (noisy(OUTPUT, 1e-6), OUTPUT, True),
        (noisy(OUTPUT, 1e-3), OUTPUT, False),
        (torch.where(FILLED == OUTPUT, noisy(OUTPUT, 1e-6), FILLED), FILLED, True),
        (torch.where(FILLED == OUTPUT, noisy(OUTPUT, 1e-3), FILLED), FILLED, False),
        (noisy(OUTPUT, 1e-3) - 1e4 * (OUTPUT > 1), OUTPUT - 1e4 * (OUTPUT > 1), False),
        (EDGES, EDGES.clone(), True),
        (EDGES, EDGES.nan_to_num(nan=0), False),
        (EDGES, EDGES.nan_to_num(nan=torch.nan), False),
        (torch.zeros(2), torch.full((2,), 1e-30), False),
        (torch.ones(0), torch.ones(0), True),
        (torch.ones(2), torch.ones(2, 1), False),
        (torch.tensor([1, 2]), torch.tensor([1, 3]), False),
        (OUTPUT.to(torch.complex64), noisy(OUTPUT, 1e-6).to(torch.complex64), True),
        (noisy(OUTPUT, 2e-3).bfloat16(), OUTPUT.bfloat16(), False),
    ],
)
def test_near(found, expected, equal):
    assert near(found, expected, 1e-4) is equal


class Gated(nn.Module):
    """A dead channel is one half wherever the second argument is 1."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.h = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x, k):
        return self.h(torch.sigmoid(self.a(x)) * k.unsqueeze(-1))


@pytest.mark.parametrize("k", [torch.ones(3, 5, dtype=torch.bool), torch.ones(3, 5, dtype=torch.int64), torch.ones(3, 5),
                               torch.zeros(3, 5, dtype=torch.int64), torch.zeros(3, 5, dtype=torch.bool)])  # fmt: skip
def test_a_constant_of_the_example_alone_is_none(k):
    model = Gated().eval()
    drop(model.a, [0, 1, 2])
    result = shrink(model, (torch.randn(3, 5, 6), k))
    assert result.model.a.out_features == 8
    assert [(row.name, row.channels) for row in result.kept] == [("a", 3)]
    assert "not the same everywhere" in result.kept[0].reason
    assert not result.note


class Restricted(nn.Module):
    """Raises on numbers that it does not like."""

    def __init__(self, takes, fed=lambda x: x) -> None:
        super().__init__()
        self.embedding, self.a, self.h = nn.Embedding(7, 6), nn.Linear(6, 8), nn.Linear(8, 4)
        self.takes, self.fed = takes, fed

    def forward(self, x, *more):
        if not self.takes(x, *more):
            raise AssertionError("not such numbers")
        x = self.fed(x)
        return self.h(torch.sigmoid(self.a(x if x.is_floating_point() else self.embedding(x))))


def falls(x, lengths):
    return bool((lengths.diff() <= 0).all()) and int(lengths.max()) <= 5


RESTRICTED = {
    "no negative numbers": (Restricted(lambda x: bool((x >= 0).all())), torch.rand(5, 6)),
    "no negative numbers, and an example of ones": (Restricted(lambda x: bool((x >= 0).all())), torch.ones(5, 6)),
    "images with a mean of 0": (Restricted(lambda x: float(x.abs().max()) <= 1), torch.rand(5, 6) - 0.5),
    "numbers that become indices": (Restricted(lambda x: True, lambda x: x.long()), torch.arange(6.0).view(2, 3)),
    "tokens that are all the first": (Restricted(lambda x: True), torch.zeros(2, 3, dtype=torch.int64)),
    "tokens that are all the last": (Restricted(lambda x: True), torch.full((2, 3), 6)),
    "lengths that fall": (Restricted(falls), (torch.randn(3, 5, 6), torch.tensor([5, 3, 2]))),
    "numbers of which there is a root": (Restricted(lambda x: True, torch.sqrt), torch.rand(5, 6)),
    "half a mask": (Restricted(lambda x, k: bool(k.any()) and not bool(k.all())), (torch.randn(5, 6), torch.arange(5) < 3)),
}


@pytest.mark.parametrize("case", RESTRICTED)
def test_models_that_restrict_their_input_are_shrunk(case):
    model, x = RESTRICTED[case]
    model.eval()
    drop(model.a, [0, 1, 2])
    result = shrink(model, x)
    assert result.model.a.out_features == 5
    assert not result.kept
    assert not result.note


def test_a_model_that_writes_into_its_input_leaves_the_example():
    class Scaled(nn.Sequential):
        def forward(self, x):
            return super().forward(x.mul_(2))

    torch.manual_seed(0)
    model = Scaled(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    x, y = torch.randn(5, 6), torch.tensor([0, 1, 2, 3, 0])
    before = x.clone()
    assert coupled_filters(model, x) == [["0.weight", "0.bias"], ["2.weight", "2.bias", "<outputs>"]]
    assert torch.equal(x, before)
    drop(model[0], [0, 1, 2])
    result = shrink(model, x)
    assert torch.equal(x, before)
    assert result.model[0].out_features == 5
    with torch.no_grad():
        assert torch.allclose(model(x.clone()), result.model(x.clone()), atol=1e-5)
    assert measure(model, x, data=[(x, y)], seconds=0.01, batch_sizes=[1])["shrunk"].measured
    assert torch.equal(x, before)


def test_a_model_that_takes_the_example_alone_is_shrunk_by_what_nobody_reads():
    x = torch.randn(5, 6)
    model = Restricted(lambda y: torch.equal(x, y)).eval()
    drop(model.a, [0, 1, 2])
    with torch.no_grad():
        model.h.weight[:, 7] = 0
    result = shrink(model, x)
    assert result.model.a.out_features == 7
    assert [(row.name, row.channels) for row in result.kept] == [("a", 3)]
    assert "only example_input shows" in result.kept[0].reason
    assert result.note == "checked on example_input alone, as the model takes no other numbers"
    assert result.as_dict()["note"] == result.note == str(result).splitlines()[-1]
    mask = torch.tensor([True, True, False, True, False])
    result = shrink(Restricted(lambda _, k: torch.equal(k, mask)).eval(), (x, mask))
    assert result.note == "checked with tensor 2 of example_input as it is, as the model takes no other numbers there"


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.int64])
def test_integers_of_every_kind_are_taken(dtype):
    """Some have no arithmetic in torch, and one above the largest is no integer."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 2)

        def forward(self, x, n):
            return self.b(torch.relu(self.a(x))) * n.double().sigmoid()

    model = Scaled().double().eval()
    with torch.no_grad():
        model.b.weight[:, :3] = 0
    for n in (torch.tensor([3, 200]), torch.tensor([0, torch.iinfo(dtype).max])):
        assert shrink(model, (torch.randn(5, 6).double(), n.to(dtype))).model.a.out_features == 5


def test_sparse_arguments_stay_as_they_are():
    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 2)

        def forward(self, x, neighbours):
            return self.b(torch.relu(self.a(neighbours.float() @ x)))

    model = Graph().eval()
    with torch.no_grad():
        model.b.weight[:, :3] = 0
    result = shrink(model, (torch.randn(5, 6), torch.eye(5, dtype=torch.float64).to_sparse()))
    assert result.model.a.out_features == 5
    assert "tensor 2 of example_input as it is" in result.note


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_an_index_out_of_range_is_not_tried_on_a_gpu():
    model = Restricted(lambda x: True).cuda().eval()
    model.embedding = nn.Embedding(1, 6, device="cuda")
    drop(model.a, [0, 1, 2])
    tokens = torch.zeros(2, 3, dtype=torch.int64, device="cuda")
    assert "checked on example_input alone" in shrink(model, tokens).note
    model.embedding = nn.Embedding(2, 6, device="cuda")
    assert shrink(model, tokens).model.a.out_features == 5
    torch.cuda.synchronize()


def test_a_constant_of_one_image_size_alone_is_none():
    """Average pooling counts its padding: on 2x2 every place sees as much of it, on 8x8 the border does."""
    model = lively(nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8), nn.AvgPool2d(3, 1, 1), nn.Conv2d(8, 4, 1), nn.ReLU(),
                                 nn.Conv2d(4, 2, 1)))  # fmt: skip
    with torch.no_grad():
        model[0].weight[:3] = 0
    result = shrink(model, torch.randn(2, 3, 2, 2))
    assert "not the same everywhere" in result.kept[0].reason
    assert_same(model, result.model, torch.randn(2, 3, 8, 8))
    flat = nn.Sequential(*model, nn.Flatten(), nn.Linear(8, 3)).eval()  # takes no other size
    result = shrink(flat, torch.randn(2, 3, 2, 2))
    assert result.model[0].out_channels == 5
    assert_same(flat, result.model, torch.randn(2, 3, 2, 2))

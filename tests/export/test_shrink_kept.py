"""What shrink leaves, and the reasons that it gives."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from pruned_networks import assert_same, drop, lively
from torch import nn

pytest.importorskip("torch_pruning", reason="needs the package torch-pruning: pip install 'bip-fast[test]'")

from bip_fast.export import coupled_filters, shrink

X = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("padding", "kernel", "left"), [("valid", 3, 6), ("same", 1, 6), ("same", 3, 8), (0, 3, 6), ((0, 1), 3, 8)])
def test_constants_are_folded_where_nothing_is_padded(padding, kernel, left):
    model = lively(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, kernel, padding=padding), nn.ReLU(),
                                 nn.Conv2d(4, 2, 1)))  # fmt: skip
    with torch.no_grad():
        model[0].weight[:2] = 0
    result = shrink(model, X)
    assert result.model[0].out_channels == left
    assert_same(model, result.model, X)


class Viewed(nn.Module):
    """Knows the width that it had."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        x = self.a(x)
        return self.b(x.view(len(x), 8, 64).view(len(x), 8, 8, 8))


def test_what_the_model_raises_without_channels_is_the_reason():
    model = Viewed().eval()
    drop(model.a, [0, 1])
    result = shrink(model, X)
    assert [(row.name, row.channels) for row in result.kept] == [("a", 2)]
    assert "without them the model fails: shape '[3, 8, 64]' is invalid" in result.kept[0].reason
    assert_same(model, result.model, X)


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError])
@pytest.mark.parametrize("width", [7, 8])
def test_too_little_memory_is_no_reason(error, width):
    class Large(nn.Sequential):
        def forward(self, x):
            if self[0].out_channels <= width:
                raise error("too large")
            return super().forward(x)

    model = Large(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)).eval()
    drop(model[0], [0, 1])
    with pytest.raises(error, match="too large"):
        shrink(model, X)


@pytest.mark.parametrize("slopes", [1, 8])
def test_parametric_relus_let_channels_go(slopes):
    model = lively(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.PReLU(slopes), nn.Conv2d(8, 4, 3, padding=1))).eval()
    with torch.no_grad():
        model[2].weight.copy_(torch.rand(slopes))
    assert ["0.weight", "0.bias", "1.weight", "1.bias"] in coupled_filters(model, X)
    drop(model[0], [0, 5], model[1])
    result = shrink(model, X)
    assert result.model[0].out_channels == 6
    assert not result.kept
    assert_same(model, result.model, X)


class Joined(nn.Module):
    def __init__(self, join) -> None:
        super().__init__()
        self.a, self.b, self.h, self.join = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 4), join

    def forward(self, x):
        return self.h(self.join(self.a(x), self.b(x)))


@pytest.mark.parametrize(
    ("join", "word"),
    [
        (torch.add, "added to"),
        (torch.sub, "added to"),
        (torch.mul, "multiplied with"),
        (lambda a, b: a * torch.sigmoid(b) + b * 2, "added to and multiplied with"),
        (torch.maximum, "joined with"),
    ],
)
def test_what_joins_channels_is_told(join, word):
    model = Joined(join).eval()
    drop(model.a, [0, 1])
    result = shrink(model, torch.randn(5, 6))
    assert [(row.name, row.channels) for row in result.kept] == [("a", 2)]
    assert result.kept[0].reason == f"they are {word} those of b, which are not pruned"


def told(result):
    return {(row.name, "inputs" if row.inputs else "outputs"): row.channels for row in result.kept}


def test_unread_inputs_behind_a_norm_are_listed():
    model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 4)).eval()
    with torch.no_grad():
        model[2].weight[:, ::2] = 0
    result = shrink(model, torch.randn(5, 8))
    assert told(result) == {("2", "inputs"): 8}
    assert str(result).splitlines()[1] == "2: 8 pruned input channels stay: 1, a LayerNorm, goes over these channels"
    assert result.as_dict()["kept"][0]["inputs"] is True


class Convnext(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depthwise = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm, self.up, self.down, self.head = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 4)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.down(torch.relu(self.up(self.norm(self.depthwise(x).permute(0, 2, 3, 1))))).permute(0, 3, 1, 2)
        return self.head(x.mean((2, 3)))


def test_dead_depthwise_filters_before_a_norm_are_listed():
    model = Convnext().eval()
    drop(model.depthwise, [1, 2, 3])
    drop(model.down, [0])
    drop(model.up, [5])
    result = shrink(model, X)
    assert result.model.up.out_features == 15
    assert told(result) == {("depthwise", "outputs"): 3, ("down", "outputs"): 1}
    assert all("LayerNorm" in row.reason for row in result.kept)


def test_dead_depthwise_filters_go_where_they_leave_a_constant_and_are_listed_otherwise():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1)
    ).eval()
    with torch.no_grad():
        model[1].weight[:2] = 0  # what a bias makes of them comes out of the second one as a constant
    result = shrink(model, X)
    assert result.model[0].out_channels == 6
    assert not result.kept
    assert_same(model, result.model, X)
    model[4] = nn.Conv2d(8, 4, 3, padding=1)
    result = shrink(model, X)
    assert told(result) == {("1", "outputs"): 2}
    assert "padding" in result.kept[0].reason


def test_inputs_that_another_layer_reads_are_listed():
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x):
            x = self.a(x)
            return self.c(x + self.b(x))

    model = Residual().eval()
    with torch.no_grad():
        model.a.weight[:, 0] = 0
        model.b.weight[:, :5] = 0
        model.c.weight[:, 4:6] = 0
    result = shrink(model, torch.randn(5, 6))
    assert result.model.a.out_features == 7
    assert told(result) == {("a", "inputs"): 1, ("b", "inputs"): 4, ("c", "inputs"): 1}
    assert {row.reason for row in result.kept if row.name == "b"} == {"they are read by c too"}
    assert "inputs of the model" in next(row.reason for row in result.kept if row.name == "a")
    assert_same(model, result.model, torch.randn(5, 6))


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_channels_of_grouped_convolutions_are_counted_in_all_groups(kind):
    """Input 1 of 8, of the first group, and outputs 0 and 7 of 12, of one group each."""
    model = nn.Sequential(nn.Conv2d(3, 8, 1), kind(8, 12, 3, groups=2), nn.Conv2d(12, 4, 1)).eval()
    weight = model[1].weight.detach()
    parts = [weight[:6, 1], weight[0], weight[7]] if kind is nn.Conv2d else [weight[1], weight[:4, 0], weight[4:, 1]]
    for part in parts:
        part.zero_()
    result = shrink(model, X)
    assert told(result) == {("1", "inputs"): 1, ("1", "outputs"): 2}
    assert all("grouped" in row.reason for row in result.kept)


class Tied(nn.Module):
    def __init__(self, layer) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = layer(6, 12), layer(12, 12), layer(12, 12), layer(12, 4)
        self.c.weight = self.b.weight
        self.view = nn.Identity()

    def forward(self, x):
        x = torch.relu(self.a(self.view(x)))
        return self.d(torch.relu(self.c(torch.relu(self.b(x)))))


class Fixed(nn.Module):
    """Behind it the number of channels must be what it was."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.f = nn.Conv2d(6, 8, 1), nn.Conv2d(8, 6, 1)

    def forward(self, x):
        return self.f(self.e(x).view(len(x), 8, *x.shape[2:]))


@pytest.mark.parametrize("layer", [nn.Linear, lambda *sizes: nn.Conv2d(*sizes, 1)], ids=["linear", "conv"])
def test_a_weight_that_is_shared_is_shared_by_the_shrunk_layers(layer):
    model = Tied(layer).eval()
    x = torch.randn(5, 6) if isinstance(model.a, nn.Linear) else torch.randn(5, 6, 3, 3)
    for own in (model.a, model.b, model.c):
        drop(own, [1, 2, 3])
    small = shrink(model, x).model
    assert small.b.weight is small.c.weight
    assert small.b.weight.shape[:2] == (9, 9)
    assert set(small.state_dict()) == set(model.state_dict())
    assert_same(model, small, x)


def test_a_weight_that_is_shared_is_cut_equally_or_stays():
    model = Tied(nn.Linear).eval()
    drop(model.b, [1, 2, 3])
    drop(model.c, [1, 2, 3])
    result = shrink(model, torch.randn(5, 6))
    assert result.model.b.weight is result.model.c.weight
    assert result.model.b.out_features == 12
    assert told(result) == {("b", "outputs"): 3, ("c", "outputs"): 3}
    assert {row.reason for row in result.kept} == {"b and c share their weight, of which they need different parts then"}


def test_a_set_that_stays_keeps_no_shared_weight_from_being_cut():
    model = Tied(lambda *sizes: nn.Conv2d(*sizes, 1)).eval()
    model.view = Fixed().eval()
    for own in (model.a, model.b, model.c, model.view.e):
        drop(own, [1, 2, 3])
    result = shrink(model, torch.randn(5, 6, 3, 3))
    assert result.model.b.weight is result.model.c.weight
    assert result.model.b.weight.shape[:2] == (9, 9)
    assert told(result) == {("view.e", "outputs"): 3}
    assert "without them the model fails" in result.kept[0].reason


def test_grouped_convolutions_stay_with_the_reason():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=4), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 4)).eval()
    drop(model[0], [1])
    drop(model[2], [2])
    result = shrink(model, X)
    assert {row.name for row in result.kept} == {"0", "2"}
    assert all("grouped" in row.reason for row in result.kept)
    assert_same(model, result.model, torch.randn(5, 3, 8, 8))


def test_what_the_graph_does_not_follow_is_refused_and_listed():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.PixelShuffle(2), nn.ReLU(), nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 1)).eval()
    for i in (0, 3, 5):
        drop(model[i], [0, 3])
    result = shrink(model, X)
    assert result.model[3].out_channels == 4
    assert {row.name: row.channels for row in result.kept} == {"0": 2, "5": 2}
    assert_same(model, result.model, torch.randn(5, 3, 8, 8))

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.rnn, self.out = nn.Conv1d(3, 8, 3), nn.GRU(8, 6, batch_first=True), nn.Linear(6, 2)

        def forward(self, x):
            return self.out(self.rnn(F.relu(self.a(x)).transpose(1, 2))[0][:, -1])

    model = Recurrent().eval()
    drop(model.a, [1])
    result = shrink(model, torch.randn(2, 3, 9))
    assert [(row.name, row.channels) for row in result.kept] == [("a", 1)]
    assert_same(model, result.model, torch.randn(4, 3, 7))


def test_channels_that_the_graph_loses_are_not_taken_for_unread():
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 4)

        def forward(self, x):
            q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 8).permute(2, 0, 3, 1, 4)
            x = (q @ k.transpose(-1, -2)).softmax(-1) @ v
            return self.out(x.transpose(1, 2).flatten(2))

    model = Attention().eval()
    assert not shrink(model, torch.randn(2, 5, 16)).kept
    drop(model.qkv, [8, 24, 40])  # one each of queries, keys and values
    result = shrink(model, torch.randn(2, 5, 16))
    assert sum(row.channels for row in result.kept if row.name == "qkv") == 3
    assert "several of the 48 channels of qkv go together, as queries, keys and values do" in {row.reason for row in result.kept}


def test_channels_that_are_read_nowhere_stay():
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(4, 5, 1)

        def forward(self, x):
            first, second = self.a(x).split([4, 4], dim=1)
            return self.b(first), second

    model = Halves().eval()
    drop(model.a, [1, 5, 6])
    result = shrink(model, X)
    assert ("a", 2, "the graph does not follow them to a layer that reads them") in {row[:3] for row in result.kept}
    with torch.no_grad():
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(model(X), result.model(X), strict=True))

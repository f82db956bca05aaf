"""Networks without their pruned filters and channels: as small as they must be, and the same function."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from pruned_networks import assert_same, drop, lively
from torch import nn

pytest.importorskip("torch_pruning", reason="needs the package torch-pruning: pip install 'bip-fast[test]'")

from bip_fast import FastBiP
from bip_fast.experiments.models.names import build
from bip_fast.export import coupled_filters, shrink


class Plain(nn.Module):
    def __init__(self, act: nn.Module | None = None, padding: int = 1) -> None:
        super().__init__()
        self.a, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.b = nn.Conv2d(8, 6, 3, padding=padding)
        self.act, self.fc = act or nn.ReLU(), nn.Linear(6, 4)

    def forward(self, x):
        return self.fc(F.relu(self.b(self.act(self.bn(self.a(x))))).mean((2, 3)))


X = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def test_filters_without_a_trace_go():
    model = lively(Plain())
    drop(model.a, [0, 3, 5], model.bn)
    drop(model.b, [1])
    result = shrink(model, X)
    assert (result.model.a.out_channels, result.model.bn.num_features, result.model.b.in_channels) == (5, 5, 5)
    assert (result.model.b.out_channels, result.model.fc.in_features) == (5, 5)
    assert {(row.name, row.before, row.after) for row in result.removed} == {("a", 8, 5), ("b", 6, 5)}
    assert not result.kept
    assert model.a.out_channels == 8, "the given model is not changed"
    assert_same(model, result.model, torch.randn(5, 3, 8, 8))
    assert_same(model, result.model, torch.randn(1, 3, 11, 9))


def test_channels_that_nobody_reads_go():
    model = lively(Plain())
    with torch.no_grad():
        model.b.weight[:, [2, 4]] = 0
        model.fc.weight[:, 5] = 0
    small = shrink(model, X).model
    assert (small.a.out_channels, small.b.out_channels) == (6, 5)
    assert_same(model, small, torch.randn(5, 3, 8, 8))


def test_constants_are_folded_where_that_is_exact():
    model = lively(Plain(padding=0))
    with torch.no_grad():
        model.bn.bias.fill_(0.7)
        model.a.weight[[1, 2]] = 0  # batch-norm makes a constant of nothing
        model.b.weight[3] = 0  # a bias does
        model.b.bias[3] = 1.5
    result = shrink(model, X)
    assert (result.model.a.out_channels, result.model.b.out_channels) == (6, 5)
    assert not result.kept
    assert_same(model, result.model, torch.randn(5, 3, 9, 9))


def test_a_constant_before_padding_stays_and_says_so():
    model = lively(Plain())
    with torch.no_grad():
        model.bn.bias.fill_(0.7)
        model.bn.running_mean.zero_()
        model.a.weight[[1, 2]] = 0
    result = shrink(model, X)
    assert result.model.a.out_channels == 8
    assert [(row.name, row.channels) for row in result.kept] == [("a", 2)]
    assert "padding" in result.kept[0].reason
    assert "a: 2 pruned channels stay" in str(result)
    assert_same(model, result.model, torch.randn(5, 3, 8, 8))


@pytest.mark.parametrize(
    "act", [nn.Sigmoid(), nn.SiLU(), nn.GELU(), nn.LeakyReLU(), nn.Tanh(), nn.Softplus()], ids=lambda a: type(a).__name__
)
def test_activations_of_nothing(act):
    model = lively(Plain(act))
    drop(model.a, [0, 3, 5], model.bn)
    result = shrink(model, X)
    silent = not isinstance(act, (nn.Sigmoid, nn.Softplus))
    assert result.model.a.out_channels == (5 if silent else 8)
    assert_same(model, result.model, torch.randn(5, 3, 8, 8))


def test_a_layer_keeps_a_channel():
    model = lively(Plain())
    drop(model.a, list(range(8)), model.bn)
    result = shrink(model, X)
    assert result.model.a.out_channels == 1
    assert any("at least one" in row.reason for row in result.kept)
    assert_same(model, result.model, torch.randn(5, 3, 8, 8))


def test_modes_types_and_gradients_stay():
    model = Plain().double().to(memory_format=torch.channels_last)
    drop(model.a, [0], model.bn)
    model.train()
    model.bn.eval()
    model.fc.weight.requires_grad_(False)
    model.bn.weight.requires_grad_(False)
    small = shrink(model, X.double()).model
    assert small.training
    assert not small.bn.training
    assert not small.fc.weight.requires_grad
    assert not small.bn.weight.requires_grad
    assert small.a.weight.requires_grad
    assert small.a.weight.dtype == torch.float64
    assert small.a.out_channels == 7
    assert small.b.weight.stride() == torch.empty(small.b.weight.shape).to(memory_format=torch.channels_last).stride()
    small(X.double()).sum().backward()
    assert small.a.weight.grad is not None
    assert set(small.state_dict()) == set(model.state_dict())


def test_nothing_to_remove():
    model = lively(Plain())
    result = shrink(model, X)
    assert not result.removed
    assert not result.kept
    assert result.model is not model
    assert str(result) == "nothing removed"
    assert_same(model, result.model, X)


def test_wrong_inputs_are_one_error():
    with pytest.raises(ValueError, match="example_input must be what the model takes"):
        shrink(Plain(), torch.randn(2, 5, 8, 8))


def test_a_model_that_cannot_be_followed_is_not_blamed_on_the_input():
    class Inference(nn.Sequential):
        def forward(self, x):
            if torch.is_grad_enabled():
                raise RuntimeError("for inference only")
            return super().forward(x)

    expected = 'Torch-Pruning cannot follow the model, got: RuntimeError: for inference only; pattern="filter" without coupled prunes it'
    for function in (shrink, coupled_filters):
        with pytest.raises(ValueError, match=expected):
            function(Inference(nn.Linear(4, 8), nn.Linear(8, 3)), torch.randn(2, 4))


def test_what_a_model_returns_beside_tensors_is_no_matter():
    class Told(nn.Sequential):
        def forward(self, x):
            return {"logits": super().forward(x), "by": "a model", "size": 3, "none": None}

    model = Told(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    x = torch.randn(2, 4)
    assert coupled_filters(model, x) == [["0.weight", "0.bias"], ["2.weight", "2.bias", "<outputs>"]]
    drop(model[0], [0, 1])
    small = shrink(model, x).model
    assert small[0].out_features == 6
    assert_same(nn.Sequential(*model), nn.Sequential(*small), x)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_empty_inputs_and_torchscript_are_refused():
    with pytest.raises(ValueError, match=r"example_input must have at least one sample, got shape \(0, 3, 8, 8\)"):
        shrink(Plain(), X[:0])
    for model, name in ((torch.jit.script(Plain()), "RecursiveScriptModule"), (torch.jit.trace(Plain().eval(), X), "TopLevelTracedModule")):
        with pytest.raises(TypeError, match=rf"model must be made of ordinary layers, got a {name} of torch\.jit"):
            shrink(model, X)
        with pytest.raises(TypeError, match=r"of torch\.jit"):
            coupled_filters(model, X)


# --- joins ---------------------------------------------------------------------------------------------------------------------------


class Concat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 5, 3, padding=1)
        self.c, self.fc = nn.Conv2d(11, 4, 1), nn.Linear(4 * 16, 3)

    def forward(self, x):
        a = F.relu(self.a(x))
        return self.fc(F.max_pool2d(F.relu(self.c(torch.cat([a, F.relu(self.b(a))], 1))), 2).flatten(1))


def test_concatenation_and_flatten():
    model = Concat().eval()
    drop(model.a, [0, 4])
    drop(model.b, [2])
    drop(model.c, [1])
    small = shrink(model, X).model
    assert (small.a.out_channels, small.b.in_channels, small.b.out_channels) == (4, 4, 4)
    assert (small.c.in_channels, small.c.out_channels, small.fc.in_features) == (8, 3, 48)
    assert_same(model, small, torch.randn(5, 3, 8, 8))


def test_residual_joins_need_all_their_makers():
    model = lively(build("resnet18", 3, 4, width=8))
    block = model.stages[0][0]
    inner = block.conv1
    drop(inner, [0, 1, 2], block.bn1)
    drop(block.conv2, [5, 6], block.bn2)  # one of those that are added
    for layer, norm in [(model.conv1, model.bn1), (block.conv2, block.bn2), (model.stages[0][1].conv2, model.stages[0][1].bn2)]:
        drop(layer, [7], norm)
    result = shrink(model, X)
    small = result.model
    assert small.stages[0][0].conv1.out_channels == 5
    assert [small.conv1.out_channels, small.stages[0][0].conv2.out_channels, small.stages[0][1].conv1.in_channels] == [7, 7, 7]
    assert [(row.name, row.channels) for row in result.kept] == [("stages.0.0.conv2", 2)]
    assert "added to those of" in result.kept[0].reason
    assert_same(model, small, torch.randn(5, 3, 8, 8))


def test_option_a_shortcuts_only_let_inner_filters_go():
    """The channels of a stage go through a padding that no graph follows: never wrong, and the reason is given."""
    model = lively(build("resnet20", 3, 4, width=4))
    for stage in model.stages:
        for block in stage:
            drop(block.conv1, [0], block.bn1)
            drop(block.conv2, [1], block.bn2)
    result = shrink(model, X)
    assert [block.conv1.out_channels for stage in result.model.stages for block in stage] == [3, 3, 3, 7, 7, 7, 15, 15, 15]
    assert len(result.kept) == 9
    assert all("one to one" in row.reason for row in result.kept)
    assert_same(model, result.model, torch.randn(5, 3, 8, 8))


def test_depthwise_convolutions_go_with_their_channels():
    def block(inputs, outputs):
        return [nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU6(),
                nn.Conv2d(outputs, outputs, 3, padding=1, groups=outputs, bias=False), nn.BatchNorm2d(outputs), nn.ReLU6()]  # fmt: skip

    model = lively(nn.Sequential(*block(3, 8), nn.Conv2d(8, 6, 1), nn.Flatten(), nn.Linear(6 * 64, 4)))
    drop(model[0], [1, 5], model[1])
    drop(model[3], [1, 5], model[4])
    small = shrink(model, X).model
    assert (small[0].out_channels, small[3].groups, small[3].out_channels, small[6].in_channels) == (6, 6, 6, 6)
    assert_same(model, small, torch.randn(5, 3, 8, 8))


def test_transposed_convolutions():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(8, 6, 2, 2), nn.ReLU(), nn.Conv2d(6, 2, 1)).eval()
    drop(model[0], [1, 2])
    drop(model[2], [5])
    small = shrink(model, X).model
    assert (small[0].out_channels, small[2].in_channels, small[2].out_channels, small[4].in_channels) == (6, 6, 5, 5)
    assert_same(model, small, torch.randn(5, 3, 8, 8))


class Attention(nn.Module):
    """A pre-norm transformer block with one Linear for queries, keys and values."""

    def __init__(self, width: int = 12, heads: int = 3) -> None:
        super().__init__()
        self.heads, self.norm = heads, nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 20), nn.Linear(20, width)

    def forward(self, x):
        b, n, c = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c))
        return x + self.down(F.gelu(self.up(x)))


def test_attention_is_right_or_refused():
    model = nn.Sequential(nn.Linear(5, 12), Attention(), Attention(), nn.Linear(12, 4)).eval()
    for block in model[1:3]:
        drop(block.up, [0, 7, 9])
        drop(block.qkv, [4, 16, 30])
        drop(block.out, [3])
    result = shrink(model, torch.randn(2, 6, 5))
    assert [block.up.out_features for block in result.model[1:3]] == [17, 17]
    assert_same(model, result.model, torch.randn(3, 6, 5))
    assert any("qkv" in row.name or "qkv" in row.reason for row in result.kept)


def test_several_arguments():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(3, 6), nn.Linear(6, 2)

        def forward(self, x, y):
            return self.c(F.relu(self.a(x) + self.b(y)))

    model = Two().eval()
    drop(model.a, [1, 2])
    drop(model.b, [1])
    small = shrink(model, (torch.randn(2, 4), torch.randn(2, 3))).model
    assert (small.a.out_features, small.b.out_features, small.c.in_features) == (5, 5, 5)
    assert_same(model, small, torch.randn(5, 4), torch.randn(5, 3))


def test_a_module_that_is_used_twice():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x):
            return self.c(F.relu(self.b(F.relu(self.a(F.relu(self.a(x)))))))

    model = Twice().eval()
    drop(model.a, [2])
    drop(model.b, [1])
    result = shrink(model, torch.randn(3, 6))
    assert result.model.b.out_features == 5
    assert_same(model, result.model, torch.randn(7, 6))


# --- with FastBiP --------------------------------------------------------------------------------------------------------------------


def test_coupled_filters_of_a_residual_network():
    model = build("resnet18", 3, 4, width=4)
    lists = coupled_filters(model, X)
    by_first = {names[0]: set(names) for names in lists}
    stage = next(names for names in lists if "stages.0.1.conv2.weight" in names)
    assert {"conv1.weight", "stages.0.0.conv2.weight", "stages.0.1.conv2.weight"} <= set(stage)
    assert {"bn1.weight", "bn1.bias", "stages.0.0.bn2.weight", "stages.0.1.bn2.bias"} <= set(stage)
    assert by_first["stages.2.1.conv1.weight"] == {"stages.2.1.conv1.weight", "stages.2.1.bn1.weight", "stages.2.1.bn1.bias"}
    assert by_first["fc.weight"] == {"fc.weight", "fc.bias", "<outputs>"}
    flat = [name for names in lists for name in names]
    assert len(flat) == len(set(flat))
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert model.training


@pytest.mark.parametrize("levels", ["alternating", "joint"])
def test_learned_filters_are_removed_without_a_rest(levels):
    torch.manual_seed(0)
    model = build("resnet20b", 3, 4, width=8)
    opt = FastBiP(
        model, sparsity=0.5, pattern="filter", scope="layer", levels=levels, lr=0.05, mask_lr=1.0, coupled=coupled_filters(model, X)
    )
    for step in range(6):
        generator = torch.Generator().manual_seed(step)
        F.cross_entropy(model(torch.randn(8, 3, 8, 8, generator=generator)), torch.arange(8) % 4).backward()
        opt.step()
        opt.zero_grad()
    opt.finalize()
    model.eval()
    result = shrink(model, X)
    assert not result.kept
    widths = [result.model.conv1.out_channels] + [block.conv2.out_channels for stage in result.model.stages for block in stage]
    assert widths == [4, 4, 4, 4, 8, 8, 8, 16, 16, 16]
    assert_same(model, result.model, torch.randn(5, 3, 8, 8))
    again = copy.deepcopy(result.model).train()
    torch.optim.SGD(again.parameters(), 0.1)
    F.cross_entropy(again(X), torch.arange(3)).backward()

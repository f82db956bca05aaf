"""Networks that shuffle channels, roll maps and cut windows: what the graph cannot follow is left, in seconds, and the rest is cut."""

from __future__ import annotations

import io
import sys
import time
import warnings

import pytest
import torch
from pruned_networks import assert_same, drop, lively
from torch import nn

pytest.importorskip("torch_pruning", reason="needs the package torch-pruning: pip install 'bip-fast[test]'")

from bip_fast import FastBiP
from bip_fast.export import coupled_filters, patience, shrink
from bip_fast.export.channels import Channels, Reader
from bip_fast.export.silence import mixed

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def convolution(inputs, outputs, size=1, **options):
    return nn.Sequential(nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False, **options), nn.BatchNorm2d(outputs), nn.ReLU())


class Unit(nn.Module):
    """Half of the channels goes through a branch; then both halves are shuffled (Ma et al. 2018)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(*convolution(width, width), *convolution(width, width, 3, groups=width)[:2], *convolution(width, width))

    def forward(self, x):
        left, right = x.chunk(2, dim=1)
        x = torch.cat((left, self.branch(right)), 1)
        n, c, h, w = x.shape
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


class Shuffled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.units = convolution(3, 16, 3), nn.Sequential(*(Unit(8) for _ in range(3)))
        self.last, self.head = convolution(16, 12), nn.Linear(12, 5)

    def forward(self, x):
        return self.head(self.last(self.units(self.stem(x))).mean((2, 3)))


class Window(nn.Module):
    """Attention within windows of 4x4 of a map that is rolled (Liu et al. 2021), and an MLP."""

    def __init__(self, width: int, shift: int) -> None:
        super().__init__()
        self.shift, self.first, self.second = shift, nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def attention(self, x):
        n, h, w, c = x.shape
        x = torch.roll(x, (-self.shift, -self.shift), (1, 2))
        x = x.view(n, h // 4, 4, w // 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, c)
        q, k, v = self.qkv(x).reshape(len(x), 16, 3, 2, c // 2).permute(2, 0, 3, 1, 4)
        x = self.out(((q @ k.transpose(-1, -2)).softmax(-1) @ v).transpose(1, 2).reshape(-1, 16, c))
        x = x.view(n, h // 4, w // 4, 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(n, h, w, c)
        return torch.roll(x, (self.shift, self.shift), (1, 2))

    def forward(self, x):
        x = x + self.attention(self.first(x))
        return x + self.mlp(self.second(x))


class Merging(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.reduction = nn.LayerNorm(4 * width), nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x):
        return self.reduction(self.norm(torch.cat([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], -1)))


class Windows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 1)
        self.stages = nn.Sequential(Window(16, 0), Window(16, 2), Merging(16), Window(32, 0), Window(32, 2), nn.LayerNorm(32))
        self.head = nn.Linear(32, 5)

    def forward(self, x):
        return self.head(self.stages(self.stem(x).permute(0, 2, 3, 1)).mean((1, 2)))


def test_what_a_channel_shuffle_mixes_is_in_no_list():
    torch.manual_seed(0)
    model = lively(Shuffled())
    lists = [set(names) for names in coupled_filters(model, X)]
    inner = [{f"units.{i}.branch.{j}.{key}" for j in (1, 4) for key in ("weight", "bias")} for i in range(3)]
    inner = [own | {f"units.{i}.branch.{j}.weight" for j in (0, 3)} for i, own in enumerate(inner)]
    assert all(own in lists for own in inner)
    assert {"last.0.weight", "last.1.weight", "last.1.bias"} in lists
    named = set().union(*lists)
    assert not named & {"stem.0.weight", *(f"units.{i}.branch.5.weight" for i in range(3))}


def test_a_network_with_channel_shuffles_is_pruned_and_shrunk():
    torch.manual_seed(0)
    model = lively(Shuffled())
    opt = FastBiP(model, sparsity=0.5, pattern="filter", scope="layer", coupled=coupled_filters(model, X))
    opt.finalize()
    small = shrink(model, X)
    removed = {row.name: (row.before, row.after) for row in small.removed}
    assert {name for name in removed if ".3" not in name} == {*(f"units.{i}.branch.0" for i in range(3)), "last.0"}
    assert set(removed.values()) == {(8, 4), (12, 6)}
    assert_same(model, small.model, X)


def test_sets_that_the_graph_follows_wrongly_keep_no_others_from_being_cut():
    """Filters of the first unit's branch and of the one after it that share a number: the graph takes them for one channel."""
    torch.manual_seed(0)
    model = lively(Shuffled())
    for unit in model.units:
        drop(unit.branch[0], [1, 2], unit.branch[1])
        drop(unit.branch[3], [1, 2], unit.branch[4])
        drop(unit.branch[5], [0, 1, 2, 3], unit.branch[6])
    drop(model.stem[0], [0, 1, 2, 3, 8, 9, 10, 11], model.stem[1])
    small = shrink(model, X)
    assert {row.name for row in small.removed} >= {f"units.{i}.branch.0" for i in range(3)}
    assert all(reason for reason in (row.reason for row in small.kept))
    assert_same(model, small.model, X)


def test_windows_and_rolls_take_seconds_and_warn_of_nothing():
    torch.manual_seed(0)
    model = Windows().eval()
    begin = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lists = coupled_filters(model, X)
        hidden = [{f"stages.{i}.mlp.0.weight", f"stages.{i}.mlp.0.bias"} for i in (0, 1, 3, 4)]
        assert all(own in [set(names) for names in lists] for own in hidden)
        opt = FastBiP(model, sparsity=0.5, pattern="filter", scope="layer", coupled=lists)
        opt.finalize()
        small = shrink(model, X)
    assert time.monotonic() - begin < 60
    assert {row.name: row.after for row in small.removed} == {
        f"stages.{i}.mlp.0": width for i, width in ((0, 32), (1, 32), (3, 64), (4, 64))
    }
    assert_same(model, small.model, X)


def test_sets_with_wrong_places_are_left_out():
    a, b = nn.Linear(6, 8), nn.Linear(8, 4)
    model, inputs = nn.Sequential(a, b).eval(), [(torch.randn(2, 6),), (torch.randn(2, 6),)]
    for shift, refused in ((0, None), (99, "in another order"), (1, None)):
        reader = Reader("1", b, {i: [(i + shift) % 8 if shift < 8 else i + shift] for i in range(8)})
        found = mixed([Channels("0", 8, {"0": a}, readers=[reader], refused=refused)], model, inputs)
        assert found == ({"0": "a shuffle, a slice or a norm mixes them with others before 1"} if shift == 1 else {})


@pytest.mark.parametrize("terminal", [True, False])
def test_long_work_says_so(monkeypatch, terminal):
    class Stderr(io.StringIO):
        def isatty(self):
            return terminal

    now = [0.0]
    monkeypatch.setattr(patience.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(sys, "stderr", Stderr())
    assert list(patience.followed("abc", "{} of {}")) == ["a", "b", "c"]
    assert sys.stderr.getvalue() == ""
    for _ in patience.followed("abcd", "{} of {}"):
        now[0] += 4
    assert sys.stderr.getvalue() == ("\r2 of 4\r3 of 4\r4 of 4\r\033[K" if terminal else "2 of 4\n")

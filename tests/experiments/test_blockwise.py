"""Wanda and SparseGPT against the formulas of their papers, written down naively, and their way through the blocks of a network."""

import copy

import pytest
import torch
from torch import nn

from bip_fast import FastBiP
from bip_fast.engine.patterns import NofM
from bip_fast.experiments.methods.blockwise import Share, blocks_of, counts, share_of
from bip_fast.experiments.methods.sparsegpt import inverse_factor, sparsegpt_, sparsegpt_matrix
from bip_fast.experiments.methods.wanda import wanda_, wanda_mask


def correlated(tokens, inputs, seed=0):
    """Inputs of a few common causes, of very different sizes: float64 (tokens, inputs)."""
    torch.manual_seed(seed)
    causes = torch.randn(tokens, max(inputs // 3, 1), dtype=torch.float64) @ torch.randn(max(inputs // 3, 1), inputs, dtype=torch.float64)
    sizes = torch.logspace(-1, 1, inputs, dtype=torch.float64)[torch.randperm(inputs)]
    return (causes + 0.3 * torch.randn(tokens, inputs, dtype=torch.float64)) * sizes


def damped(x, damp):
    h = x.T @ x
    return h + damp * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)


def error(weight, pruned, x):
    return float((x @ (weight - pruned).T).square().sum())


# --- budgets -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.33, 0.5, 0.9, 0.999])
def test_shares_of_groups_add_up_to_what_the_engine_prunes(sparsity):
    for sizes in ([5] * 7, [128, 128, 44], [1] * 10, [3]):
        found = counts(sizes, sparsity)
        assert sum(found) == round(sparsity * sum(sizes))
        assert all(abs(own - sparsity * size) <= 1 and 0 <= own <= size for own, size in zip(found, sizes, strict=True))


@pytest.mark.parametrize(
    ("sparsity", "pattern", "message"),
    [
        (1.0, "unstructured", r"sparsity must be in \[0, 1\), got 1.0"),
        (None, "unstructured", r"sparsity must be in \[0, 1\), got None"),
        (0.6, "2:4", "sparsity must be 0.5 or None with pattern='2:4', got 0.6"),
        (0.5, "filter", "pattern must be \"unstructured\" or N:M, got 'filter'"),
    ],
)
def test_what_is_no_share_is_refused(sparsity, pattern, message):
    with pytest.raises(ValueError, match=message):
        share_of(sparsity, pattern)


# --- Wanda ---------------------------------------------------------------------------------------------------------------------------


def test_wanda_keeps_in_every_row_what_is_large_times_the_norm_of_its_input():
    torch.manual_seed(1)
    weight, x = torch.randn(7, 20), correlated(50, 20).float()
    mask = wanda_mask(weight, x.norm(dim=0), Share(0.6))
    for row, kept in zip(weight, mask, strict=True):
        scores = [abs(float(w)) * float(x[:, j].norm()) for j, w in enumerate(row)]
        best = sorted(range(20), key=lambda j: -scores[j])[:8]
        assert sorted(best) == kept.nonzero().flatten().tolist()
    assert not torch.equal(mask, wanda_mask(weight, torch.ones(20), Share(0.6)))  # the inputs matter


def test_wanda_keeps_the_two_best_of_four_neighbours():
    torch.manual_seed(1)
    weight, norms = torch.randn(5, 12), torch.rand(12)
    mask = wanda_mask(weight, norms, Share(0.5, NofM(2, 4)))
    scores = (weight.abs() * norms).reshape(-1, 4)
    expected = torch.zeros_like(scores).scatter_(1, scores.topk(2, dim=1).indices, 1.0).bool().reshape(5, 12)
    assert torch.equal(mask, expected)


# --- SparseGPT -----------------------------------------------------------------------------------------------------------------------


def naive(weight, h, share, block):
    """Optimal brain surgeon, one weight after another, with an inverse made anew for what is not fixed yet."""
    weight = weight.clone()
    rows, columns = weight.shape
    mask = torch.ones_like(weight, dtype=torch.bool)
    inverses = [torch.linalg.inv(h[j:, j:]) for j in range(columns)]
    width = share.n_of_m.of if share.n_of_m else block
    go = counts([rows * min(block, columns - first) for first in range(0, columns, block)], share.sparsity)
    for j in range(columns):
        if j % width == 0:
            chosen = range(j, min(j + width, columns))
            loss = torch.stack([weight[:, c].square() / inverses[c][0, 0] for c in chosen], 1)
            if share.n_of_m:
                for i in range(rows):
                    mask[i, loss[i].argsort()[: share.n_of_m.of - share.n_of_m.keep] + j] = False
            else:
                for place in loss.flatten().argsort()[: go[j // block]].tolist():
                    mask[place // len(chosen), j + place % len(chosen)] = False
        for i in range(rows):
            if not mask[i, j]:
                weight[i, j:] -= weight[i, j] / inverses[j][0, 0] * inverses[j][0]
    return weight, mask


@pytest.mark.parametrize("share", [Share(0.5), Share(0.75), Share(0.5, NofM(2, 4)), Share(0.25, NofM(6, 8))])
@pytest.mark.parametrize("block", [8, 16])
def test_sparsegpt_is_optimal_brain_surgery_column_by_column(share, block):
    x = correlated(200, 40)
    torch.manual_seed(2)
    weight = torch.randn(6, 40, dtype=torch.float64)
    expected, expected_mask = naive(weight, damped(x, 0.01), share, block)
    found, mask = sparsegpt_matrix(weight.clone(), x.T @ x, share, block=block, damp=0.01)
    assert torch.equal(mask, expected_mask)
    assert int((~mask).sum()) == round(share.sparsity * weight.numel())
    # The inverses differ in how they are rounded; the condition number of H is about 1e6.
    torch.testing.assert_close(found, expected * mask, rtol=1e-7, atol=1e-9)


def test_blocks_of_columns_change_when_updates_are_made_and_not_what_they_are():
    """Under N:M masks depend on groups alone, so that any size of blocks must give the same."""
    x, weight = correlated(200, 40), torch.randn(6, 40, dtype=torch.float64)
    share = Share(0.5, NofM(2, 4))
    one, mask = sparsegpt_matrix(weight.clone(), x.T @ x, share, block=4)
    other, same = sparsegpt_matrix(weight.clone(), x.T @ x, share, block=128)
    assert torch.equal(mask, same)
    torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("share", [Share(0.5), Share(0.5, NofM(2, 4))])
def test_sparsegpt_loses_less_than_wanda_and_wanda_less_than_magnitude_on_correlated_inputs(share):
    x = correlated(400, 48)
    torch.manual_seed(3)
    weight = torch.randn(16, 48, dtype=torch.float64)
    ours, _ = sparsegpt_matrix(weight.clone(), x.T @ x, share)
    by_wanda = error(weight, weight * wanda_mask(weight, x.norm(dim=0), share), x)
    by_size = error(weight, weight * wanda_mask(weight, torch.ones(48, dtype=x.dtype), share), x)
    assert error(weight, ours, x) < by_wanda
    assert by_wanda < by_size


def test_an_input_that_is_never_there_goes_first_and_hurts_nothing():
    x = correlated(100, 16).float()
    x[:, [3, 7]] = 0
    weight = torch.randn(4, 16)
    found, mask = sparsegpt_matrix(weight.clone(), x.T @ x, Share(0.25))
    assert not mask[:, [3, 7]].any()
    assert found.isfinite().all()


def test_a_matrix_that_is_not_positive_definite_is_told():
    with pytest.raises(ValueError, match="damp must be large enough"):
        inverse_factor(torch.ones(4, 4, dtype=torch.float64), -0.5)
    with pytest.raises(ValueError, match="block must be a multiple of 8"):
        sparsegpt_matrix(torch.randn(2, 16), torch.eye(16), Share(0.5, NofM(4, 8)), block=12)


# --- through the blocks --------------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(size), nn.Linear(size, 2 * size), nn.Linear(2 * size, size)
        self.drop = nn.Dropout(0.5)

    def forward(self, x, scale=1.0):
        return (x + self.drop(self.down(torch.relu(self.up(self.norm(x))))) * scale,)


class Stack(nn.Module):
    """Blocks that return tuples, get an argument by name, and stand between an embedding and an output layer that share a weight."""

    def __init__(self, size=16, depth=3, words=11):
        super().__init__()
        self.embed = nn.Embedding(words, size)
        self.layers = nn.ModuleList(Block(size) for _ in range(depth))
        self.head = nn.Linear(size, words, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        for i, layer in enumerate(self.layers):
            (x,) = layer(x, scale=0.5 + i)
        return self.head(x)


@pytest.fixture
def stack():
    torch.manual_seed(0)
    return Stack().train(), [torch.randint(0, 11, (4, 9)) for _ in range(5)]


def inputs_of(model, layer, batches):
    """What a layer reads when the whole network runs: float32 (tokens, inputs)."""
    seen = []
    hook = layer.register_forward_pre_hook(lambda m, args: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    hook.remove()
    return torch.cat(seen)


@pytest.mark.parametrize("method", [wanda_, sparsegpt_])
def test_every_block_is_pruned_by_what_pruned_blocks_give_it(stack, method):
    """Each block by hand: from the whole network, in which the blocks before it are pruned and it is not."""
    model, batches = stack
    plain = copy.deepcopy(model).eval()
    masks = method(model, batches, 0.5)
    assert model.training
    assert model.layers[0].drop.training
    assert sorted(masks) == sorted(f"layers.{i}.{name}.weight" for i in range(3) for name in ("up", "down"))
    for i in range(3):
        read = {name: inputs_of(plain, plain.layers[i].get_submodule(name), batches) for name in ("up", "down")}
        for name, x in read.items():
            layer = plain.layers[i].get_submodule(name)
            if method is wanda_:
                mask = wanda_mask(layer.weight.detach(), x.square().sum(0).sqrt(), Share(0.5))
                found = layer.weight.detach() * mask
            else:
                found, mask = sparsegpt_matrix(layer.weight.detach().clone(), x.T @ x, Share(0.5))
            assert torch.equal(mask, masks[f"layers.{i}.{name}.weight"])
            torch.testing.assert_close(model.layers[i].get_submodule(name).weight.detach(), found, rtol=1e-4, atol=1e-5)
            layer.weight.data.copy_(model.layers[i].get_submodule(name).weight)


@pytest.mark.parametrize(("method", "pattern"), [(wanda_, "unstructured"), (sparsegpt_, "unstructured"), (sparsegpt_, "2:4")])
@pytest.mark.parametrize("sparsity", [0.5, 0.37])
def test_fastbip_takes_the_masks_over_exactly_and_trains_what_is_left(stack, method, pattern, sparsity):
    model, batches = stack
    sparsity = 0.5 if pattern == "2:4" else sparsity
    masks = method(model, batches, sparsity, pattern=pattern)
    pruned = copy.deepcopy(model)
    model.embed.requires_grad_(False)
    opt = FastBiP(model, sparsity=sparsity, pattern=pattern, scope="layer", optimizer="adamw", lr=1e-2)
    named = dict(model.named_parameters())
    opt.set_scores({named[name]: mask.float() for name, mask in masks.items()})
    opt.freeze_masks()
    for name, mask in masks.items():
        assert torch.equal(opt.mask_of(named[name]), mask)
        assert torch.equal(named[name], pruned.get_parameter(name))
    for batch in batches:
        torch.nn.functional.cross_entropy(model(batch).flatten(0, 1), batch.flatten()).backward()
        opt.step()
        opt.zero_grad()
    for name, mask in masks.items():
        assert torch.equal(named[name] != 0, mask)
        assert not torch.equal(named[name], pruned.get_parameter(name))


def test_only_what_is_named_goes_and_what_does_not_fit_stays(stack):
    model, batches = stack
    assert list(wanda_(copy.deepcopy(model), batches, 0.5, only=["layers.1.up.weight"])) == ["layers.1.up.weight"]
    odd = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    assert list(wanda_(odd, [torch.randn(5, 6)], pattern="2:4")) == ["2.weight"]


def test_arguments_may_be_a_tuple_or_named(stack):
    model, batches = stack
    expected = wanda_(copy.deepcopy(model), batches, 0.5)
    for given in ([(b,) for b in batches], [{"ids": b} for b in batches]):
        found = wanda_(copy.deepcopy(model), given, 0.5)
        assert all(torch.equal(found[name], mask) for name, mask in expected.items())


def test_the_blocks_are_the_longest_chain():
    assert len(blocks_of(Stack(depth=4))) == 4
    assert [type(m) for m in blocks_of(nn.Sequential(nn.Linear(2, 2), nn.Tanh()))] == [nn.Linear, nn.Tanh]
    single = nn.Linear(3, 3)
    assert blocks_of(single) == [single]


def test_what_is_no_chain_is_refused(stack):
    model, batches = stack

    class Parallel(Stack):
        def forward(self, ids):
            x = self.embed(ids)
            return self.head(sum(layer(x)[0] for layer in self.layers))

    with pytest.raises(ValueError, match="hand the output of every block to the next"):
        wanda_(Parallel(), batches, 0.5)
    with pytest.raises(ValueError, match="at least one, got none"):
        wanda_(model, [], 0.5)
    with pytest.raises(ValueError, match="must have matrices"):
        wanda_(model, batches, 0.5, only=["head.weight"])


def test_a_matrix_that_nothing_reaches_is_named(stack):
    model, batches = stack
    model.layers[1].spare = nn.Linear(16, 16)
    with pytest.raises(ValueError, match=r"none that reaches layers\.1\.spare\.weight"):
        wanda_(model, batches, 0.5)

"""The property that defines each pruning criterion, against its paper and not against our code."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bip_fast
from bip_fast.engine.layers import weights
from bip_fast.experiments.methods import at_start, criteria
from bip_fast.experiments.models.names import build


def perceptron(seed=0, sizes=(12, 9, 7, 4), activation=nn.ReLU, bias=True):
    torch.manual_seed(seed)
    layers = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b, bias=bias), activation()]
    return nn.Sequential(*layers[:-1])


def images(n=16, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 12, generator=generator), torch.randint(0, 4, (n,), generator=generator)


def globally(found, sparsity):
    """Masks of the largest scores of all layers together."""
    flat = torch.cat([x.flatten() for x in found.values()])
    mask = bip_fast.topk_mask(flat, flat.numel() - round(sparsity * flat.numel()))
    return {name: own.view_as(x) for (name, x), own in zip(found.items(), mask.split([x.numel() for x in found.values()]), strict=True)}


@pytest.mark.parametrize("shape", [(1, 12), (1, 3, 16, 16)])
def test_synflow_is_conserved_from_layer_to_layer(shape):
    """What flows into a layer flows out of it: the scores of every layer have the same sum (Tanaka et al. 2020, theorem 1)."""
    torch.manual_seed(0)
    model = perceptron(bias=False) if len(shape) == 2 else build("vgg16bn", 3, 10, width=2)
    if len(shape) == 4:
        model.fc.bias.data.zero_()
    for i, module in enumerate(model.modules()):
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 2.0, generator=torch.Generator().manual_seed(i))
    found = at_start.synflow(model, shape[1:], 0.0, globally, rounds=1)
    sums = torch.stack([x.double().sum() for x in found.values()])
    torch.testing.assert_close(sums, sums[:1].expand_as(sums), rtol=1e-4, atol=0)


def test_synflow_needs_no_data_and_leaves_the_model_alone():
    model = build("resnet20", 1, 10, width=2)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    torch.manual_seed(5)
    first = at_start.synflow(model, (1, 8, 8), 0.9, globally)
    torch.manual_seed(6)
    second = at_start.synflow(model, (1, 8, 8), 0.9, globally)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert model.training


def test_synflow_spares_every_layer_where_one_round_does_not():
    """Its reason to be: rounds avoid that a layer loses all of its weights while others keep many."""
    model = perceptron(sizes=(12, 40, 40, 40, 4), bias=False)
    n = sum(x.numel() for _, x in weights(model))
    k = 40

    def kept_in_layers(rounds):
        found = at_start.synflow(model, (12,), 1 - k / n, globally, rounds)
        mask = bip_fast.topk_mask(torch.cat([x.flatten() for x in found.values()]), k)
        return [int(part.sum()) for part in mask.split([x.numel() for x in found.values()])]

    assert min(kept_in_layers(100)) > 0
    assert min(kept_in_layers(1)) < min(kept_in_layers(100))


def test_synflow_scores_of_what_is_gone_are_zero():
    model = perceptron()
    found = torch.cat([x.flatten() for x in at_start.synflow(model, (12,), 0.9, globally).values()])
    n = found.numel()
    gone = int((found == 0).sum())
    assert n - round((1 - 0.1**0.99) * n) >= n - gone >= n - round(0.9 * n)


@pytest.mark.parametrize("batches", [1, 3])
def test_snip_is_theta_times_gradient(batches):
    model = perceptron()
    given = [images(seed=i) for i in range(batches)]
    found = at_start.snip(model, given)
    loss = torch.stack([F.cross_entropy(model(x), y) for x, y in given]).mean()
    loss.backward()
    for name, p in weights(model):
        torch.testing.assert_close(found[name], (p.detach() * p.grad).abs())


def test_grasp_is_theta_times_hessian_times_gradient():
    """The product with the Hessian against finite differences of the gradient, in float64."""
    model = perceptron(activation=nn.Tanh).double()
    x, y = images()
    found = at_start.grasp(model, [(x.double(), y)])
    params = [p for _, p in weights(model)]

    def gradient():
        return torch.autograd.grad(F.cross_entropy(model(x.double()) / 200, y), params)

    g = gradient()
    scale = 1e-4 / max(float(part.norm()) for part in g)
    sides = []
    for sign in (1, -1):
        with torch.no_grad():
            for p, part in zip(params, g, strict=True):
                p.add_(sign * scale * part)
        sides.append(gradient())
        with torch.no_grad():
            for p, part in zip(params, g, strict=True):
                p.sub_(sign * scale * part)
    for (name, p), up, down in zip(weights(model), *sides, strict=True):
        torch.testing.assert_close(found[name], p.detach() * (up - down) / (2 * scale), rtol=1e-5, atol=1e-16)


def test_grasp_over_batches_is_that_of_all_images():
    model = perceptron(activation=nn.Tanh).double()
    x, y = images(32)
    x = x.double()
    parts = at_start.grasp(model, [(x[:16], y[:16]), (x[16:], y[16:])])
    whole = at_start.grasp(model, [(x, y)])
    for name in whole:  # the loss of two halves adds up to twice the mean: four times the product
        torch.testing.assert_close(parts[name], 4 * whole[name])


def test_grasp_of_a_linear_layer_without_curvature():
    class Scaled(nn.Module):
        """The second weight enters no loss that bends."""

        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(12, 4), nn.Linear(12, 4)

        def forward(self, x):
            return self.used(x) + 0 * self.idle(x)

    found = at_start.grasp(Scaled(), [images()])
    assert not found["idle.weight"].any()
    assert found["used.weight"].any()


def test_criteria_leave_gradients_random_state_and_statistics_alone():
    model = nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 4))
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    state = torch.get_rng_state()
    for found in (at_start.snip(model, [images()]), at_start.grasp(model, [images()]), criteria.magnitude(model)):
        assert list(found) == ["0.weight", "3.weight"]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert (model[0].weight.grad == 1).all()


def test_random_scores_come_from_the_generator():
    model = perceptron()
    first, again, other = (at_start.random(model, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    for name, x in first.items():
        assert torch.equal(x, again[name])
        assert not torch.equal(x, other[name])


def test_unit_interval_keeps_the_order():
    generator = torch.Generator().manual_seed(0)
    large = {"a": torch.rand(500, generator=generator) * 37, "b": torch.rand(300, generator=generator) ** 8}
    found = criteria.to_unit_interval(large)
    flat, mapped = (torch.cat(list(of.values())) for of in (large, found))
    assert torch.equal(mapped, flat / 64), "a power of two, which is exact"
    signed = {"a": torch.randn(500, generator=generator)}
    mapped = criteria.to_unit_interval(signed)["a"]
    assert (mapped.min(), mapped.max()) == (0, 1)
    assert torch.equal(mapped.argsort(), signed["a"].argsort())
    assert not criteria.to_unit_interval({"a": torch.zeros(3)})["a"].any()
    assert criteria.to_unit_interval({}) == {}

"""Movement pruning against the formulas of its paper in plain torch."""

import pytest
import torch
from method_stages import begun, flat_weights, network, run_stage, settings_of
from torch import nn
from torch.nn import functional as F

from bip_fast.engine.report import report
from bip_fast.experiments.methods import begin
from bip_fast.experiments.methods.table import stages


class Plain:
    """Section 4 and 5 of Sanh et al. 2020 for a linear network: scores from 0, S = -a * sum of dL/dW * W, W' = W * Top_v(S)."""

    def __init__(self, weights, rate, final, start, end, total):
        self.weights = [w.clone() for w in weights]
        self.scores = [torch.zeros_like(w) for w in weights]
        self.rate, self.final, self.start, self.end, self.total = rate, final, start, end, total

    def kept(self, t):
        """v(t): 1 in the warm-up, a cubic, and its last value in the cool-down."""
        first, last = round(self.start * self.total), round(self.end * self.total)
        t = min(max(t, first), last)
        return self.final + (1 - self.final) * (1 - (t - first) / (last - first)) ** 3

    def masks(self, t):
        flat = torch.cat([s.flatten() for s in self.scores])
        k = flat.numel() - round((1 - self.kept(t)) * flat.numel())
        threshold = flat.sort(descending=True).values[k - 1]
        return [s >= threshold for s in self.scores], float(threshold), k

    def step(self, gradients, masks, lr, momenta, momentum):
        for i, (w, g) in enumerate(zip(self.weights, gradients, strict=True)):
            self.scores[i] -= self.rate * w * g
            momenta[i] = momentum * momenta[i] + g * masks[i]
            self.weights[i] = w - lr * momenta[i]


def test_scores_masks_and_weights_are_those_of_the_paper(digits):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 20, bias=False), nn.Tanh(), nn.Linear(20, 10, bias=False))
    settings = settings_of("movement", sparsity=0.8, mask_lr=0.25, lr=0.1, weight_decay=0.0)
    (stage,) = (stage for stage in stages(settings) if stage.sparsity is not None)
    layers = [model[1].weight, model[3].weight]
    total = 60
    plain = Plain([w.detach() for w in layers], 0.25, 0.2, stage.ramp_start, stage.ramp, total)
    momenta = [torch.zeros_like(w) for w in layers]
    opt = begin.begin(stage, model, settings, digits)
    grow = begin.before_step(stage, opt)
    generator = torch.Generator().manual_seed(1)
    flips = 0
    masks = [torch.ones_like(w, dtype=torch.bool) for w in layers]
    for done in range(total):
        grow(done, total)
        for group in opt.param_groups:
            group["lr"] = 0.1
        x, y = torch.randn(32, 1, 8, 8, generator=generator), torch.randint(0, 10, (32,), generator=generator)
        F.cross_entropy(model(x), y).backward()
        gradients = [w.grad.clone() for w in layers]
        masked = [(w * m).requires_grad_() for w, m in zip(plain.weights, masks, strict=True)]
        own = torch.autograd.grad(F.cross_entropy(torch.tanh(x.flatten(1) @ masked[0].T) @ masked[1].T, y), masked)
        for a, b in zip(gradients, own, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)
        opt.step()
        opt.zero_grad()
        plain.step(own, masks, 0.1, momenta, 0.9)
        before = masks
        masks, threshold, kept = plain.masks(done)
        flips += sum(int((a != b).sum()) for a, b in zip(before, masks, strict=True))
        assert sum(int(opt.mask_of(w).sum()) for w in layers) == kept
        for w, s, m, theta in zip(layers, plain.scores, masks, plain.weights, strict=True):
            # scores are stored around 0.5 in float32, and their sums round otherwise than sums around 0
            torch.testing.assert_close(opt.scores_of(w) - 0.5, s, rtol=0, atol=2e-6)
            unequal = opt.mask_of(w) != m
            assert bool(((s - threshold).abs()[unequal] < 4e-6).all()), "other than the paper's only at the threshold"
            torch.testing.assert_close(opt.weight_of(w), theta, rtol=1e-3, atol=1e-5)
        masks = [opt.mask_of(w) for w in layers]  # go on from one mask
    assert flips > 1000, "the masks did move"


def test_its_schedule_waits_grows_and_cools_down(digits):
    model = network()
    stage, opt = begun("movement", digits, model, ramp_start=0.25, ramp=0.75)
    assert (stage.moves, stage.ramp_start, stage.ramp) == ("joint", 0.25, 0.75)
    assert opt.param_groups[0]["gamma"] == 1e30
    assert {float(opt.scores_of(p).min()) for p in opt.pruned_params} == {0.5}
    grow, n = begin.before_step(stage, opt), flat_weights(model).numel()
    seen = []
    for done in range(40):
        grow(done, 40)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(done))
        opt.step()
        seen.append(sum(int(opt.mask_of(p).sum()) for p in opt.pruned_params))
    expected = [n - round(0.8 * (1 - (1 - min(max(done - 10, 0), 20) / 20) ** 3) * n) for done in range(40)]
    assert seen == expected


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_it_reaches_its_sparsity(digits, optimizer):
    model = network()
    stage, opt = begun("movement", digits, model, optimizer=optimizer)
    run_stage(stage, opt, model, digits)
    result = report(model)
    assert result.kept == result.total - round(0.8 * result.total)

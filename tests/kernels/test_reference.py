"""The reference itself, which every other test trusts: against autograd, closed forms, a loop over plain Python numbers and
`torch.optim.SGD`. Nothing here touches a kernel."""

import itertools
import math

import pytest
import torch
from helpers import ADVERSARIAL, BOUNDARY_NK, TOLERANCE, random_state

from bip_fast import reference
from bip_fast.reference import Hyper, State

# (momentum, nesterov, mask_momentum, gamma): every branch of the two formulas
VARIANTS = [(0.0, False, 0.0, 1.0), (0.9, False, 0.0, 1.0), (0.9, True, 0.0, 0.3), (0.9, False, 0.5, 2.0), (0.8, True, 0.9, 10.0)]


def hyper_of(variant, **others):
    momentum, nesterov, mask_momentum, gamma = variant
    return Hyper(momentum=momentum, nesterov=nesterov, mask_momentum=mask_momentum, gamma=gamma, **others)


# --- the order -------------------------------------------------------------------------------------------------------------------


def naive_topk(scores: list[float], k: int) -> list[bool]:
    """The sentence of the design as one Python sort."""

    def order(i):
        nan = math.isnan(scores[i])
        return (nan, 0.0 if nan else -scores[i], i * 2654435761 % 2**32)

    chosen = set(sorted(range(len(scores)), key=order)[:k])
    return [i in chosen for i in range(len(scores))]


def test_ties_follow_the_hash_of_the_index():
    # i * 2654435761 mod 2**32 for i = 0..3 is 0, 2654435761, 1013904226, 3668339987: worked out by hand
    masks = [reference.topk_mask(torch.full((4,), 0.5), k).tolist() for k in range(5)]
    assert masks == [[False] * 4, [True, False, False, False], [True, False, True, False], [True, True, True, False], [True] * 4]


@pytest.mark.parametrize(("n", "k"), BOUNDARY_NK)
def test_topk_equals_a_python_sort(n, k):
    scores = torch.randn(n, generator=torch.Generator().manual_seed(n + k)).mul(4).round().div(4)  # many ties
    assert reference.topk_mask(scores, k).tolist() == naive_topk(scores.tolist(), k)


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_topk_equals_a_python_sort_on_adversarial_scores(name):
    scores = ADVERSARIAL[name](513)
    for k in (0, 1, 100, 256, 257, 512, 513):
        assert reference.topk_mask(scores, k).tolist() == naive_topk(scores.tolist(), k)


def test_topk_orders_special_values():
    values = torch.tensor([math.nan, -math.inf, -1.0, -0.0, 0.0, 1e-45, 1.0, math.inf])
    kept_by_k = [reference.topk_mask(values, k).nonzero().flatten().tolist() for k in range(9)]
    # -0 (index 3) and +0 (index 4) are equal: 4 * 2654435761 mod 2**32 = 2027808452 is before 3668339987
    assert kept_by_k == [list(range(8 - k, 8)) for k in range(9)]


def test_topk_keeps_the_shape():
    mask = reference.topk_mask(torch.randn(2, 3, 4), 5)
    assert mask.shape == (2, 3, 4)
    assert mask.dtype == torch.bool
    assert int(mask.sum()) == 5


@pytest.mark.parametrize(
    ("n", "sparsity", "expected"),
    [(0, 0.5, 0), (100, 0.0, 100), (100, 0.95, 5), (10, 0.25, 8), (10, 0.35, 6), (10, 0.96, 0), (3, 0.5, 1), (272474, 0.95, 13624)],
)
def test_kept_rounds_half_to_even(n, sparsity, expected):
    assert reference.kept(n, sparsity) == expected


# --- the gradients ---------------------------------------------------------------------------------------------------------------


def network_loss(z):
    """Some loss with a dense, nonlinear, bounded dependence on every entry."""
    weights = torch.linspace(-1, 1, z.numel() ** 2, dtype=z.dtype).reshape(z.numel(), z.numel())
    return (torch.tanh(weights @ z) ** 2).sum() + (2 * torch.sin(3 * z)).sum()


def gradient_of_z(m, theta):
    z = (m * theta).detach().requires_grad_()
    return torch.autograd.grad(network_loss(z), z)[0]


def a4(m, theta, g, gamma):
    """h of the reference at a relaxed mask ``m``, read back from one step with a small mask_lr: the scores stay inside [0, 1]."""
    mid, none = torch.full_like(theta, 0.5), torch.zeros_like(theta)
    state = State(theta, none, mid, none, m)
    return (0.5 - reference.upper(state, g, Hyper(mask_lr=1e-3, gamma=gamma), 1).s) / 1e-3


def test_lower_gradient_is_autograd_through_the_mask():
    state, _ = random_state(20, seed=1, dtype=torch.float64)
    theta = state.theta.clone().requires_grad_()
    decay = 0.01
    (network_loss(state.m * theta) + decay / 2 * (theta**2).sum()).backward()
    after = reference.lower(state, gradient_of_z(state.m, state.theta), Hyper(lr=0.5, momentum=0.0, weight_decay=decay))
    torch.testing.assert_close(after.v, theta.grad, **TOLERANCE["float64"])
    torch.testing.assert_close(after.theta, state.theta - 0.5 * theta.grad, **TOLERANCE["float64"])


def test_score_gradient_without_the_implicit_term_is_autograd_of_the_mask():
    state, _ = random_state(20, seed=2, dtype=torch.float64)
    m = state.m.double().requires_grad_()
    network_loss(m * state.theta).backward()
    h = a4(state.m, state.theta, gradient_of_z(state.m, state.theta), gamma=1e300)
    torch.testing.assert_close(h, m.grad, **TOLERANCE["float64 difference"])


@pytest.mark.parametrize("gamma", [0.5, 1.0, 4.0])
def test_a4_is_the_exact_gradient_when_the_loss_is_linear(gamma):
    """loss(z) = c.z: the lower optimum is theta*(m) = -m*c/gamma, and A4's premise (no Hessian) holds exactly."""
    c = torch.linspace(-1, 1, 9, dtype=torch.float64)
    m = (torch.arange(9) % 3 > 0).double().requires_grad_()
    theta_star = -m * c / gamma
    (c * (m * theta_star)).sum().backward()
    torch.testing.assert_close(a4(m.detach().bool(), theta_star.detach(), c, gamma), m.grad, **TOLERANCE["float64 difference"])


def quadratic_bilevel(curvature, gamma):
    """min over m of loss(m*theta*(m)), theta*(m) = argmin loss(m*theta) + gamma/2 |theta|^2, loss(z) = b.z + curvature/2 z'Hz.

    Returns m, theta*, dloss/dz there, and the exact total derivative by autograd through the lower solution.
    """
    generator = torch.Generator().manual_seed(5)
    root = torch.randn(8, 8, generator=generator, dtype=torch.float64)
    hessian, b = curvature * (root @ root.T) / 8, torch.randn(8, generator=generator, dtype=torch.float64)
    m = (torch.arange(8) % 2).double().requires_grad_()
    lower_hessian = gamma * torch.eye(8, dtype=torch.float64) + m[:, None] * hessian * m[None, :]
    theta = torch.linalg.solve(lower_hessian, -m * b)
    z = m * theta
    loss = b @ z + z @ hessian @ z / 2
    return m.detach(), theta.detach(), (b + hessian @ z).detach(), torch.autograd.grad(loss, m)[0]


def test_a4_is_the_hessian_free_limit_of_the_bilevel_gradient():
    """The error of A4 is proportional to the curvature it leaves out: it falls tenfold with it, and vanishes."""
    errors = []
    for curvature in (1e-1, 1e-2, 1e-3, 1e-4):
        m, theta, g, exact = quadratic_bilevel(curvature, gamma=1.0)
        errors.append(float((a4(m.bool(), theta, g, 1.0) - exact).norm() / exact.norm()))
    for coarse, fine in itertools.pairwise(errors):
        assert 5 < coarse / fine < 20, errors
    assert errors[-1] < 1e-3


# --- one step, entry by entry ----------------------------------------------------------------------------------------------------


def naive_entry(phase, theta, v, s, u, m, g, h):
    """Section 2 of the design for one entry, in Python floats."""
    new_theta, new_v, new_s, new_u = theta, v, s, u
    if math.isfinite(g):
        if phase in ("lower", "joint"):
            d = m * g + h.weight_decay * theta
            new_v = h.momentum * v + d
            new_theta = theta - h.lr * (d + h.momentum * new_v if h.nesterov else new_v)
        if phase in ("upper", "joint"):
            slope = theta * g - m * g * g / h.gamma
            if h.mask_momentum > 0:
                slope = new_u = h.mask_momentum * u + slope
            new_s = min(max(s - h.mask_lr * slope, 0.0), 1.0)
    return new_theta, new_v, new_s, new_u


def naive_step(phase, state, g, h, k):
    rows = zip(*(x.tolist() for x in (state.theta, state.v, state.s, state.u, state.m, g)), strict=True)
    theta, v, s, u = (list(column) for column in zip(*(naive_entry(phase, *row, h) for row in rows), strict=True))
    m = state.m.tolist() if phase == "lower" else naive_topk(s, k)
    return State(*(torch.tensor(x, dtype=torch.float64) for x in (theta, v, s, u)), torch.tensor(m))


def reference_step(phase, state, g, h, k):
    return reference.lower(state, g, h) if phase == "lower" else getattr(reference, phase)(state, g, h, k)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("phase", ["lower", "upper", "joint"])
def test_each_phase_equals_a_loop_over_entries(phase, variant):
    h = hyper_of(variant, lr=0.07, mask_lr=0.4, weight_decay=0.01)
    state, g = random_state(60, seed=3, dtype=torch.float64)
    g[::17], g[5] = math.nan, math.inf
    for _ in range(3):
        expected, state = naive_step(phase, state, g, h, 21), reference_step(phase, state, g, h, 21)
        for name, ours, theirs in zip(State._fields, state, expected, strict=True):
            torch.testing.assert_close(ours, theirs, msg=lambda text, name=name: f"{name}: {text}", **TOLERANCE["float64"])
        state = state._replace(m=expected.m)


def test_a_lower_step_keeps_scores_and_mask_and_an_upper_step_keeps_weights():
    state, g = random_state(40, seed=4)
    below, above = reference.lower(state, g, Hyper()), reference.upper(state, g, Hyper(mask_momentum=0.5), 7)
    assert below.s is state.s
    assert below.u is state.u
    assert below.m is state.m
    assert not torch.equal(below.theta, state.theta)
    assert above.theta is state.theta
    assert above.v is state.v
    assert not torch.equal(above.s, state.s)
    assert int(above.m.sum()) == 7


@pytest.mark.parametrize("phase", ["lower", "upper", "joint"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_an_entry_without_a_finite_gradient_stays(phase, bad):
    state, g = random_state(16, seed=6)
    g[3] = bad
    after = reference_step(phase, state, g, Hyper(mask_momentum=0.5), 8)
    for name in ("theta", "v", "s", "u"):
        before_x, after_x = getattr(state, name), getattr(after, name)
        assert torch.equal(before_x[3], after_x[3]), name
    moved = after.s if phase == "upper" else after.theta
    assert not torch.equal(moved, state.s if phase == "upper" else state.theta), "the other entries did not move"


def test_an_overflowed_weight_gets_score_zero_and_not_nan():
    state, _g = random_state(4, seed=7)
    theta = torch.tensor([math.inf, math.nan, 1.0, 1.0])
    after = reference.upper(state._replace(theta=theta), torch.tensor([0.0, 1.0, 0.0, 0.0]), Hyper(), 2)
    assert after.s[:2].tolist() == [0.0, 0.0]
    assert after.s.isfinite().all()


def test_masked_writes_positive_zero_whatever_is_there():
    x = torch.tensor([math.nan, math.inf, -1.0, -0.0])
    assert reference.masked(torch.zeros(4, dtype=torch.bool), x).view(torch.int32).tolist() == [0, 0, 0, 0]
    assert reference.masked(torch.ones(4, dtype=torch.bool), x)[1:].tolist() == [math.inf, -1.0, -0.0]


def test_start_is_magnitude_pruning():
    theta = torch.tensor([0.1, -3.0, 0.5, -0.2, 2.0])
    state = reference.start(theta, 3)
    assert state.s.tolist() == pytest.approx([0.1, 1.0, 0.5, 0.2, 1.0])
    assert state.m.tolist() == [False, True, True, False, True]
    assert not state.v.any()
    assert not state.u.any()


# --- against torch.optim.SGD -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
def test_lower_at_a_full_mask_is_sgd(momentum, nesterov, dtype):
    state, _ = random_state(50, seed=8, dtype=getattr(torch, dtype))
    state = State(state.theta, torch.zeros_like(state.v), state.s, state.u, torch.ones_like(state.m))
    p = state.theta.clone().requires_grad_()
    sgd = torch.optim.SGD([p], lr=0.05, momentum=momentum, nesterov=nesterov, weight_decay=0.01, foreach=False)
    h = Hyper(lr=0.05, momentum=momentum, nesterov=nesterov, weight_decay=0.01)
    generator = torch.Generator().manual_seed(9)
    for _ in range(25):
        p.grad = torch.randn(50, generator=generator, dtype=p.dtype)
        state = reference.lower(state, p.grad, h)
        sgd.step()
    torch.testing.assert_close(state.theta, p.detach(), **TOLERANCE[dtype + " trajectory"])


# --- upper levels that are not the paper's --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask_momentum", [0.0, 0.5])
def test_variants_of_the_implicit_term(mask_momentum):
    state, g = random_state(500, seed=3, dtype=torch.float64)
    h = Hyper(mask_lr=0.01, gamma=2.0, mask_momentum=mask_momentum)
    theta, m = state.theta, state.m.double()
    gradients = {
        "paper": (theta - m * g / 2.0) * g,
        "published": theta * g - 1e-4 * (theta * g).square(),
        "none": theta * g,
    }
    found = {}
    for name, gradient in gradients.items():
        after = reference.upper(state, g, h, 100, reference.Variant(name))
        expected = (state.s - 0.01 * (mask_momentum * state.u + gradient)).clamp(0, 1)
        torch.testing.assert_close(after.s, expected, **TOLERANCE["float64"])
        assert torch.equal(after.m, reference.topk_mask(after.s, 100))
        assert torch.equal(after.theta, theta)
        found[name] = after.s
    assert not torch.equal(found["paper"], found["published"])
    assert not torch.equal(found["none"], found["published"])
    assert torch.equal(reference.upper(state, g, h, 100).s, found["paper"]), "the paper's is the default"


def test_shared_storage_moves_the_weights_and_prunes_by_their_magnitude():
    state, g = random_state(300, seed=4)
    variant, h = reference.Variant("published", shared=True), Hyper(lr=0.3, mask_lr=0.5)
    g[7] = torch.inf
    for _ in range(5):
        state = reference.lower(state, g, h)
        before = state.theta
        state = reference.upper(state, g, h, 60, variant)
        expected = before - 0.5 * (before * g - 1e-4 * (before * g).square())
        assert torch.equal(state.theta, torch.where(g.isfinite(), expected, before))
        assert torch.equal(state.s, state.theta.abs().clamp(max=1))
        assert torch.equal(state.m, reference.topk_mask(state.s, 60))
    with pytest.raises(ValueError, match="variant must not be shared in a joint step"):
        reference.joint(state, g, h, 60, variant)

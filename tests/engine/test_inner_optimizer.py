"""`optimizer=` as a function: any torch optimizer makes the step of theta."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from helpers import fill_gradients, make_model, make_params, pruned_of, train_step
from torch import nn

from bip_fast import FastBiP


def assert_invariant(opt):
    """Every parameter is m*theta."""
    for p in opt.pruned_params:
        expected = torch.where(opt.mask_of(p), opt.weight_of(p), 0.0).to(p.dtype)
        assert torch.equal(p, expected)


class Lion(torch.optim.Optimizer):
    """Chen et al. 2023, as a package would bring it: options and state of its own, and no closure."""

    def __init__(self, params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                beta1, beta2 = group["betas"]
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(group["lr"] * (beta1 * mean + (1 - beta1) * p.grad).sign())
                mean.mul_(beta2).add_(p.grad, alpha=1 - beta2)


def muon(groups):
    return [torch.optim.Muon(groups[:1], lr=0.01), torch.optim.AdamW(groups[1:], lr=1e-3)]


MAKERS = {
    "Adam": lambda groups: torch.optim.Adam(groups, lr=0.01, amsgrad=True),
    "Adagrad": lambda groups: torch.optim.Adagrad(groups, lr=0.02),
    "RMSprop": lambda groups: torch.optim.RMSprop(groups, lr=0.01, momentum=0.8, centered=True),
    "Lion": lambda groups: Lion(groups, lr=0.003, weight_decay=0.1),
    "Muon": muon,
}


@pytest.fixture(params=MAKERS)
def make(request):
    if request.param == "Muon" and not hasattr(torch.optim, "Muon"):
        pytest.skip("needs torch >= 2.9, which has Muon")
    return MAKERS[request.param]


def networks(backend, count=2, dtype=torch.float32):
    """As many copies of some matrices and a vector."""
    first = make_params([300, 1100], device=backend.device, dtype=dtype)
    first += make_params([40], 1, device=backend.device, dtype=dtype, pruned=False)
    return [first] + [[nn.Parameter(p.detach().clone()) for p in first] for _ in range(count - 1)]


def groups_of(params):
    return [{"params": params[:2], "name": "matrices"}, {"params": params[2:], "prune": False, "weight_decay": 0.03}]


def step_all(runs, seed):
    for params, opt in runs:
        fill_gradients(params, seed)
        opt.step()


@pytest.mark.parametrize("levels", ["alternating", "joint"])
def test_without_zeros_it_is_the_bare_optimizer_bit_for_bit(backend, make, levels):
    params, bare = networks(backend)
    opt = FastBiP(groups_of(params), sparsity=0.0, optimizer=make, levels=levels)
    theirs = make([{"params": bare[:2]}, {"params": bare[2:], "weight_decay": 0.03}])
    theirs = theirs if isinstance(theirs, list) else [theirs]
    for i in range(10):
        fill_gradients(params, i)
        for p, q in zip(params, bare, strict=True):
            q.grad = None if i % 4 == 3 and p is params[1] else p.grad.clone()
            p.grad = None if q.grad is None else p.grad
        moves = opt.phase != "upper"
        opt.step()
        if moves:
            for optimizer in theirs:
                optimizer.step()
        assert all(torch.equal(p, q) for p, q in zip(params, bare, strict=True)), i


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks_move_and_what_is_dropped_has_no_gradient(backend, make, dtype):
    """The optimizer sees m*g under the mask of before the step, and scores move by the dense g and theta of before."""
    (params,) = networks(backend, 1, dtype)
    opt = FastBiP(groups_of(params), sparsity=0.8, optimizer=make, levels="joint", mask_lr=0.3)
    seen = []
    for inner in opt.inner_optimizers:
        inner.register_step_pre_hook(lambda inner, *_: seen.extend((p, p.grad.clone()) for g in inner.param_groups for p in g["params"]))
    for i in range(6):
        fill_gradients(params, i)
        masks, thetas, scores = ([of(p) for p in params[:2]] for of in (opt.mask_of, opt.weight_of, opt.scores_of))
        seen.clear()
        opt.step()
        for (_, gradient), mask, theta, s, p in zip(seen, masks, thetas, scores, params, strict=False):
            g = p.grad.float()
            assert torch.equal(gradient, torch.where(mask, g, 0.0))
            expected = (s - 0.3 * ((theta - torch.where(mask, g, 0.0)) * g)).clamp(0, 1)
            assert torch.equal(opt.scores_of(p), expected)
        assert_invariant(opt)
        assert sum(int(opt.mask_of(p).sum()) for p in params[:2]) == 1400 - round(0.8 * 1400)


def test_options_are_in_the_groups_and_schedulers_move_them(backend):
    params, bare = networks(backend)
    opt = FastBiP(groups_of(params), sparsity=0.0, optimizer=MAKERS["Adam"], levels="joint", mask_lr=0.3)
    theirs = torch.optim.Adam([{"params": bare[:2]}, {"params": bare[2:], "weight_decay": 0.03}], lr=0.01, amsgrad=True)
    assert opt.param_groups[0]["lr"] == 0.01
    assert opt.param_groups[0]["name"] == "matrices"
    assert opt.param_groups[1]["weight_decay"] == 0.03
    schedules = [torch.optim.lr_scheduler.OneCycleLR(o, 0.05, total_steps=20) for o in (opt, theirs)]
    for i in range(12):
        fill_gradients(params, i)
        for p, q in zip(params, bare, strict=True):
            q.grad = p.grad.clone()
        opt.step()
        theirs.step()
        for schedule in schedules:
            schedule.step()
    assert opt.inner_optimizers[0].param_groups[0]["lr"] != 0.01
    assert all(torch.equal(p, q) for p, q in zip(params, bare, strict=True))


def test_resuming_copying_and_pickling_go_on_bit_for_bit(backend, make):
    (params,) = networks(backend, 1)
    opt = FastBiP(groups_of(params), sparsity=0.7, optimizer=make, mask_lr=0.3)
    for i in range(5):
        step_all([(params, opt)], i)
    runs = [(params, opt), copy.deepcopy((params, opt)), pickle.loads(pickle.dumps((params, opt)))]
    saved = copy.deepcopy(opt.state_dict())
    fresh = [nn.Parameter(torch.full_like(p, 0.5)) for p in params[:2]] + [nn.Parameter(params[2].detach().clone())]  # a model loads it
    loaded = FastBiP(groups_of(fresh), sparsity=0.7, optimizer=make, mask_lr=0.1)
    loaded.load_state_dict(saved)
    runs.append((fresh, loaded))
    for i in range(5, 11):
        step_all(runs, i)
    for others, _ in runs[1:]:
        assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))
    loaded.param_groups[0]["lr"] = 0.0  # the groups are still those of the optimizer inside
    with loaded.lower():
        step_all([(fresh, loaded)], 20)
    assert all(inner.param_groups[0]["lr"] == 0.0 for inner in loaded.inner_optimizers[:1])


def test_a_grad_scaler_skips_the_inner_step(backend):
    (params,) = networks(backend, 1)
    opt = FastBiP(groups_of(params), sparsity=0.5, optimizer=MAKERS["Adam"], levels="joint")
    steps = []
    opt.inner_optimizers[0].register_step_post_hook(lambda *_: steps.append(1))
    scaler = torch.amp.GradScaler(backend.device.type, init_scale=64.0)
    for i in range(6):
        fill_gradients(params, i)
        for p in params:
            p.grad *= scaler.get_scale()
        if i == 3:
            params[0].grad[0, 0] = torch.inf
        scaler.scale(torch.zeros((), device=backend.device, requires_grad=True))
        before = [p.detach().clone() for p in params]
        scaler.step(opt)
        scaler.update()
        assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True)) == (i == 3)
    assert len(steps) == 5


class Switched(torch.optim.SGD):
    """As schedule-free optimizers are: a count of steps named k and a switch among the options of its groups."""

    def __init__(self, params):
        super().__init__(params, lr=0.1)
        for group in self.param_groups:
            group |= {"k": 0, "on": False}

    def train(self):
        for group in self.param_groups:
            group["on"] = True

    def step(self, closure=None):
        assert all(group["on"] for group in self.param_groups), "call train() first"
        super().step()
        for group in self.param_groups:
            group["k"] += 1


def test_what_changes_in_the_inner_groups_stays():
    params = make_params([300, 1100]) + make_params([40], 1, pruned=False)
    opt = FastBiP(groups_of(params), sparsity=0.5, optimizer=Switched, levels="joint")
    (inner,) = opt.inner_optimizers
    inner.train()
    opt.param_groups[0]["lr"] = 0.2
    for i in range(3):
        step_all([(params, opt)], i)
    assert [(group["k"], group["on"], group["lr"]) for group in inner.param_groups] == [(3, True, 0.2), (3, True, 0.1)]
    assert [(group["k"], group["on"]) for group in opt.param_groups] == [(3, True)] * 2
    fresh = [nn.Parameter(p.detach().clone()) for p in params]
    loaded = FastBiP(groups_of(fresh), sparsity=0.5, optimizer=Switched, levels="joint")
    loaded.load_state_dict(copy.deepcopy(opt.state_dict()))
    copied, copied_opt = pickle.loads(pickle.dumps((params, opt)))
    runs = [(params, opt), (fresh, loaded), (copied, copied_opt)]
    step_all(runs, 3)
    assert all(own.inner_optimizers[0].param_groups[0]["k"] == 4 for _, own in runs)
    assert all(torch.equal(p, q) for others, _ in runs[1:] for p, q in zip(params, others, strict=True))
    with pytest.raises(ValueError, match="k is not an option"):
        opt.add_param_group({"params": make_params([20]), "k": 3})
    with pytest.raises(ValueError, match="k is not an option"):
        FastBiP([{"params": make_params([20]), "k": 3}], sparsity=0.5, optimizer=Switched)


def test_a_module_trains_with_it():
    model = make_model()
    opt = FastBiP(model, sparsity=0.8, optimizer=MAKERS["Lion"], levels="joint")
    for i in range(4):
        train_step(model, opt, i)
    assert_invariant(opt)
    opt.finalize()
    assert sum(int((p == 0).sum()) for p in pruned_of(model)) >= round(0.8 * sum(p.numel() for p in pruned_of(model)))


def test_finalize_lets_go_of_the_inner_optimizer():
    params = make_params([300])
    opt = FastBiP(params, sparsity=0.5, optimizer=MAKERS["Adam"])
    step_all([(params, opt)], 1)
    theta = weakref.ref(opt.inner_optimizers[0].param_groups[0]["params"][0])
    assert theta() is not None
    opt.finalize()
    gc.collect()
    assert theta() is None
    assert opt.inner_optimizers == ()


def test_a_group_may_be_added():
    params, bare = networks(type("Cpu", (), {"device": torch.device("cpu")}))
    opt = FastBiP(params[:1], sparsity=0.0, optimizer=MAKERS["Adam"], levels="joint")
    theirs = torch.optim.Adam(bare[:1], lr=0.01, amsgrad=True)
    for i in range(6):
        if i == 3:
            opt.add_param_group({"params": params[1:2], "lr": 0.5})
            theirs.add_param_group({"params": bare[1:2], "lr": 0.5})
        fill_gradients(params, i)
        for p, q in zip(params, bare, strict=True):
            q.grad = p.grad.clone()
        opt.step()
        theirs.step()
    assert opt.param_groups[1]["lr"] == 0.5
    assert all(torch.equal(p, q) for p, q in zip(params, bare, strict=True))


def test_a_group_that_cannot_be_added_leaves_everything(backend):
    params, _ = networks(backend)
    opt = FastBiP(params[:1], sparsity=0.5, optimizer=MAKERS["Adam"], levels="joint")
    with pytest.raises(ValueError, match="share memory"):
        opt.add_param_group({"params": [nn.Parameter(params[0].detach().view(-1)[:40].view(4, 10))]})
    with pytest.raises(ValueError, match="more than one parameter group"):  # the first of the two is new
        opt.add_param_group({"params": [nn.Parameter(torch.ones(4, 10, device=backend.device)), params[0]]})
    with pytest.raises(ValueError, match="non-leaf"):
        opt.add_param_group({"params": [params[1] * 2]})
    assert len(opt.param_groups) == len(opt.inner_optimizers[0].param_groups) == 1
    step_all([(params, opt)], 1)
    assert_invariant(opt)
    opt.add_param_group({"params": params[1:2]})
    step_all([(params, opt)], 2)
    assert_invariant(opt)


def test_a_group_cannot_be_added_to_several_optimizers():
    params = make_params([300, 1100, 40])
    opt = FastBiP(groups_of(params), sparsity=0.5, optimizer=lambda groups: [torch.optim.Adam(groups[:1]), torch.optim.SGD(groups[1:])])
    with pytest.raises(ValueError, match="a parameter group can be added to one inner optimizer, got Adam and SGD"):
        opt.add_param_group({"params": make_params([20])})
    step_all([(params, opt)], 1)
    assert_invariant(opt)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda groups: torch.optim.LBFGS([p for g in groups for p in g["params"]]), ValueError, "without a closure, got LBFGS"),
        (lambda groups: 3, TypeError, "must return a torch optimizer or a list of some, got int"),
        (lambda groups: torch.optim.Adam(groups[:1]), ValueError, "got Adam without group 1 of 1 parameters"),
        (lambda groups: torch.optim.Adam([p for g in groups for p in g["params"]]), ValueError, "got Adam without group 0"),
    ],
)
def test_what_a_function_must_return(make, error, message):
    params = make_params([300, 1100]) + make_params([40], 1, pruned=False)
    before = [p.detach().clone() for p in params]
    with pytest.raises(error, match=message):
        FastBiP(groups_of(params), sparsity=0.5, optimizer=make)
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))


def test_options_of_the_inner_optimizer_are_given_to_it():
    with pytest.raises(ValueError, match=r"lr must be given to the optimizer that your function makes, got lr=0.1 beside it"):
        FastBiP(make_params([40]), sparsity=0.5, optimizer=MAKERS["Adam"], lr=0.1)


def test_overrides_reach_the_inner_optimizer():
    model, bare = make_model(), make_model()
    bare.load_state_dict(model.state_dict())
    given = []

    def make(groups):
        given.extend({key: value for key, value in group.items() if key != "params"} for group in groups)
        return torch.optim.Adam(groups, lr=0.01)

    overrides = {
        "head": {"amsgrad": True, "foreach": None},  # of the inner optimizer alone, so for the bias too
        "head.weight": {"amsgrad": True, "weight_decay": 0.1, "sparsity": 0.0},
    }
    opt = FastBiP(model, sparsity=0.0, optimizer=make, levels="joint", mask_lr=0.3, overrides=overrides)
    own = {name: group for group in opt.param_groups for name, p in model.named_parameters() if any(p is q for q in group["params"])}
    assert {"amsgrad": True, "weight_decay": 0.1} in given  # and no option of pruning
    found = {name: (group["amsgrad"], group["weight_decay"]) for name, group in own.items()}
    assert found == {name: (name.startswith("head"), 0.1 if name == "head.weight" else 0) for name in found}
    of_bare = dict(bare.named_parameters())
    of_model = {p: key for key, p in model.named_parameters()}
    theirs = torch.optim.Adam(
        [
            {
                "params": [of_bare[of_model[p]] for p in group["params"]],
                "amsgrad": group["amsgrad"],
                "weight_decay": group["weight_decay"],
            }
            for group in opt.param_groups
        ],
        lr=0.01,
    )
    for i in range(6):
        fill_gradients(list(model.parameters()), i)
        for p in model.parameters():
            of_bare[of_model[p]].grad = p.grad.clone()
        opt.step()
        theirs.step()
    assert all(torch.equal(p, of_bare[key]) for key, p in model.named_parameters())


@pytest.mark.parametrize("wrong", [{"amsgrad": True, "sparsity": None}, {"density": None}, {"prune": False, "amsgrad": True}, {3: 4}])
def test_overrides_that_no_group_can_have(wrong):
    with pytest.raises(ValueError, match="overrides must give"):
        FastBiP(make_model(), sparsity=0.5, optimizer=MAKERS["Adam"], overrides={"*": wrong})


def test_keys_of_another_optimizer_stay_errors_for_the_rules_of_the_kernels():
    with pytest.raises(ValueError, match="overrides must give options of a parameter group, got 'amsgrad' for"):
        FastBiP(make_model(), sparsity=0.5, optimizer="adamw", overrides={"*": {"amsgrad": True}})


def test_options_of_the_inner_optimizer_are_its_own():
    """One with the name of an option of SGD's need not go with SGD's others, as in AdamP, which has nesterov and no momentum."""

    def make(groups):
        inner = Lion(groups)
        for group in inner.param_groups:
            group["nesterov"] = True
        return inner

    params = make_params([40])
    opt = FastBiP(params, sparsity=0.5, optimizer=make)
    step_all([(params, opt)], 1)
    assert_invariant(opt)


def test_states_of_another_optimizer_are_refused():
    first, second = (FastBiP(make_params([40]), sparsity=0.5, optimizer=MAKERS[name]) for name in ("Adam", "Lion"))
    with pytest.raises(ValueError, match="state_dict must be of optimizer='Lion', got one of 'Adam'"):
        second.load_state_dict(copy.deepcopy(first.state_dict()))


def test_states_of_other_shapes_are_refused_and_nothing_changes(backend):
    params, others = networks(backend)
    first, second = (FastBiP(groups_of(own), sparsity=0.7, optimizer=MAKERS["Adam"], levels="joint") for own in (params, others))
    step_all([(params, first), (others, second)], 0)
    saved = copy.deepcopy(first.state_dict())
    shape = tuple(params[1].shape)
    for damaged in (torch.zeros(shape[::-1]), torch.zeros(shape[0], shape[1] + 1)):
        broken = copy.deepcopy(saved)
        broken["state"][1]["optimizer"]["exp_avg_sq"] = damaged
        broken["param_groups"][0]["lr"] = 0.5
        before, weights = copy.deepcopy(second.state_dict()), [p.detach().clone() for p in others]
        with pytest.raises(ValueError) as caught:  # noqa: PT011 - the whole message is compared
            second.load_state_dict(broken)
        of = f"Adam for a parameter of shape {shape}"
        assert str(caught.value) == f"state_dict must hold a state of {of}, got exp_avg_sq of shape {tuple(damaged.shape)}"
        assert all(torch.equal(p, q) for p, q in zip(others, weights, strict=True))
        assert second.param_groups[0]["lr"] == 0.01
        assert torch.equal(second.state_dict()["state"][1]["optimizer"]["exp_avg"], before["state"][1]["optimizer"]["exp_avg"])
    second.load_state_dict(saved)


@pytest.mark.skipif(not hasattr(torch.optim, "Adafactor"), reason="needs torch >= 2.5, which has Adafactor")
def test_sums_over_rows_and_columns_are_states_too(backend):
    """Adafactor keeps a column and a row of every matrix."""
    params, others = networks(backend)
    first, second = (
        FastBiP(groups_of(own), sparsity=0.7, optimizer=lambda g: torch.optim.Adafactor(g), levels="joint") for own in (params, others)
    )
    step_all([(params, first)], 0)
    assert first.state_dict()["state"][1]["optimizer"]["row_var"].dim() == 2
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    step_all([(params, first), (others, second)], 1)
    assert all(torch.equal(p, q) for p, q in zip(params[:2], others[:2], strict=True))


def test_each_group_has_one_optimizer():
    params = make_params([40, 50])
    with pytest.raises(ValueError, match="must have each of the 1 parameter groups that it is given once, got 2"):
        FastBiP(params, sparsity=0.5, optimizer=lambda groups: [torch.optim.Adam(groups), torch.optim.SGD(groups, lr=0.1)])


def test_weights_that_move_while_it_is_made():
    def make(groups):
        made = torch.optim.SGD(groups, lr=1.0)
        fill_gradients(groups[0]["params"], 1)
        made.step()
        return made

    (p,) = make_params([40])
    before = p.detach().clone()
    with pytest.raises(ValueError, match="must leave the weights as they are while it is made, got SGD"):
        FastBiP([p], sparsity=0.5, optimizer=make)
    assert torch.equal(p, before)


@pytest.mark.parametrize("levels", ["alternating", "joint"])
def test_an_error_of_the_inner_optimizer_leaves_masked_weights(backend, levels):
    class Half(torch.optim.SGD):
        fails = False

        def step(self, closure=None):
            with torch.no_grad():
                self.param_groups[0]["params"][0].add_(1.0)
            if Half.fails:
                raise RuntimeError("their own")
            return super().step()

    (params,) = networks(backend, 1)
    opt = FastBiP(groups_of(params), sparsity=0.7, optimizer=lambda groups: Half(groups, lr=0.1), levels=levels, mask_lr=0.3)
    step_all([(params, opt)], 0)
    Half.fails = True
    with opt.lower() if levels == "alternating" else opt.joint(), pytest.raises(RuntimeError, match="their own"):
        step_all([(params, opt)], 1)
    assert_invariant(opt)
    assert all(theta.grad is None for group in opt.inner_optimizers[0].param_groups for theta in group["params"])
    Half.fails = False
    step_all([(params, opt)], 2)
    assert_invariant(opt)


def test_a_loaded_state_is_a_copy(backend):
    params, others = networks(backend)
    first, second = (FastBiP(groups_of(own), sparsity=0.7, optimizer=MAKERS["Adam"], levels="joint") for own in (params, others))
    step_all([(params, first)], 0)
    second.load_state_dict(first.state_dict())
    before = copy.deepcopy(second.state_dict()["state"][0]["optimizer"])
    step_all([(params, first)], 1)
    after = second.state_dict()["state"][0]["optimizer"]
    assert all(torch.equal(after[name], x) for name, x in before.items())


def test_what_is_no_parameter():
    opt = FastBiP(make_params([40]), sparsity=0.5, optimizer=MAKERS["Adam"])
    with pytest.raises(TypeError, match="params must hold parameters, got int"):
        opt.add_param_group({"params": [3]})
    with pytest.raises(TypeError, match="params must hold parameters, got int"):
        FastBiP([*make_params([40]), 3], sparsity=0.5, optimizer=MAKERS["Adam"])


def test_made_in_inference_mode(backend):
    params, others = networks(backend)
    with torch.inference_mode():
        opt = FastBiP(params[:1], sparsity=0.7, optimizer=MAKERS["Adam"], levels="joint")
        opt.add_param_group({"params": params[1:2]})
    same = FastBiP(others[:1], sparsity=0.7, optimizer=MAKERS["Adam"], levels="joint")
    same.add_param_group({"params": others[1:2]})
    for i in range(3):
        step_all([(params, opt), (others, same)], i)
    assert_invariant(opt)
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))

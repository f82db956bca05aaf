"""Saving and loading: resume bit for bit, plain model files, copies and pickles."""

import copy
import io
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import assert_bits, assert_same_snapshot, batch, fill_gradients, make_model, make_params, pruned_of, snapshot, train_step
from lockstep import LOWER_KEYS, MOVING, UPPER_KEYS, Lockstep, run_of

from bip_fast import FastBiP

SHARED = Path(__file__).parents[1] / "shared"
OPTIONS = [{}, {"levels": "joint", "mask_momentum": 0.7}, {"scope": "layer", "lower_steps": 2, "nesterov": True}]


def through_a_file(state):
    """As a checkpoint goes: saved, and loaded without trusting its pickle."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def advance(model, opt, steps, seed):
    for i in range(steps):
        fill_gradients(model.parameters(), seed + i)
        opt.step()


# --- the optimizer -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_resume_is_bit_for_bit(backend, options, steps, dtype):
    """Into a fresh model with other weights, from any point of the cycle; bf16 parameters keep their fp32 theta, scores and momentum."""
    model, fresh = make_model(device=backend.device).to(dtype), make_model(7, device=backend.device).to(dtype)
    opt, resumed = FastBiP(model, **(MOVING | options)), FastBiP(fresh, **(MOVING | options))
    advance(model, opt, steps, 0)
    saved = through_a_file({"model": model.state_dict(), "optimizer": opt.state_dict()})
    fresh.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    assert resumed.phase == opt.phase
    assert_same_snapshot(snapshot(resumed), snapshot(opt))
    for owner, optimizer in ((model, opt), (fresh, resumed)):
        advance(owner, optimizer, 6, 100)
    assert_same_snapshot(snapshot(resumed), snapshot(opt))


def test_lock_step_with_save_and_load_in_the_middle(backend):
    """The reference does not know that the optimizer was replaced half-way."""
    model = make_model(device=backend.device)
    run = run_of(model, mask_momentum=0.5)
    run.random_steps(7)
    saved = through_a_file(run.opt.state_dict())
    run.opt.finalize()
    run.opt = FastBiP(model, **MOVING, mask_momentum=0.5)
    run.opt.load_state_dict(saved)
    run.check("after loading")
    run.random_steps(13, seed=1)


def test_resume_in_a_new_process(backend, tmp_path):
    options = MOVING | {"mask_momentum": 0.5, "lower_steps": 2}
    model = make_model(device=backend.device).to(torch.bfloat16)
    opt = FastBiP(model, **options)
    advance(model, opt, 5, 0)
    saved = {"model": model.state_dict(), "optimizer": opt.state_dict(), "options": options, "next seed": 50, "dtype": torch.bfloat16}
    torch.save(saved, tmp_path / "checkpoint.pt")
    advance(model, opt, 8, 50)
    path = os.pathsep.join([*(p for p in sys.path if p), str(SHARED)])
    command = [sys.executable, SHARED / "resume_child.py", backend.name, tmp_path / "checkpoint.pt", tmp_path / "result.pt", "8"]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    result = torch.load(tmp_path / "result.pt", weights_only=True)
    assert result["phase"] == opt.phase
    assert_same_snapshot(result["snapshot"], snapshot(opt))
    assert result["model"].keys() == model.state_dict().keys()


def test_state_dict_has_the_standard_shape(backend):
    model = make_model(device=backend.device)
    opt = FastBiP(model, **MOVING)
    advance(model, opt, 2, 0)
    state = opt.state_dict()
    assert state.keys() == {"state", "param_groups"}
    numbers = [i for group in state["param_groups"] for i in group["params"]]
    assert numbers == list(range(len(numbers)))
    assert set(state["state"]) <= set(numbers)
    assert {*LOWER_KEYS["sgd"], *UPPER_KEYS, "sparsity", "prune", "scope"} <= state["param_groups"][0].keys()


def test_a_saved_state_is_a_copy_in_time(backend):
    """What `state_dict()` returned does not follow later steps once it was copied or saved, and loading does not tie two optimizers."""
    model, fresh = make_model(device=backend.device), make_model(device=backend.device)
    opt, other = FastBiP(model, **MOVING), FastBiP(fresh, **MOVING)
    advance(model, opt, 3, 0)
    other.load_state_dict(opt.state_dict())
    before = snapshot(opt)
    advance(fresh, other, 4, 10)
    assert_same_snapshot(snapshot(opt), before)


def test_loading_rewrites_the_parameters(backend):
    """z = m*theta holds after loading, also when the model's own file was not loaded."""
    model, fresh = make_model(device=backend.device), make_model(5, device=backend.device)
    opt, other = FastBiP(model, **MOVING), FastBiP(fresh, **MOVING)
    advance(model, opt, 4, 0)
    other.load_state_dict(through_a_file(opt.state_dict()))
    for p, q in zip(model.parameters(), fresh.parameters(), strict=True):
        if p.dim() >= 2:
            assert_bits(q.detach(), p.detach())


def test_hyper_parameters_come_with_the_state(backend):
    params, others = make_params([300], device=backend.device), make_params([300], device=backend.device)
    opt, other = FastBiP(params, **MOVING), FastBiP(others, sparsity=0.1, lr=7.0)
    opt.param_groups[0]["lr"] = 0.25
    other.load_state_dict(opt.state_dict())
    assert other.param_groups[0]["lr"] == 0.25
    assert int(other.mask_of(others[0]).sum()) == 60
    fill_gradients(others, 0)
    with other.upper():
        other.step()
    assert int(other.mask_of(others[0]).sum()) == 60


def test_num_nonfinite_and_phase_survive(backend):
    params, others = make_params([300], device=backend.device), make_params([300], device=backend.device)
    opt, other = FastBiP(params, **MOVING, lower_steps=3), FastBiP(others, **MOVING, lower_steps=3)
    for i in range(5):
        fill_gradients(params, i)
        params[0].grad[0, i] = torch.inf
        opt.step()
    other.load_state_dict(through_a_file(opt.state_dict()))
    assert other.num_nonfinite == opt.num_nonfinite == 5
    for _ in range(8):
        assert other.phase == opt.phase
        opt.step()
        other.step()


@pytest.mark.parametrize("what", ["shape", "number", "groups"])
def test_a_state_that_does_not_fit(backend, what):
    opt = FastBiP(make_params([300, 200], device=backend.device), **MOVING)
    sizes = {"shape": [300, 201], "number": [300, 200, 100], "groups": [300, 200]}[what]
    params = make_params(sizes, device=backend.device)
    other = FastBiP([{"params": [p]} for p in params] if what == "groups" else params, **MOVING)
    before = snapshot(other)
    with pytest.raises(ValueError):  # noqa: PT011 - torch words two of the three
        other.load_state_dict(opt.state_dict())
    assert_same_snapshot(snapshot(other), before)


def test_a_state_saved_right_after_loading_is_whole(backend):
    """Also the score momentum, for which the new optimizer had no memory yet."""
    params, others = make_params([300], device=backend.device), make_params([300], device=backend.device)
    opt, other = FastBiP(params, **MOVING, mask_momentum=0.9), FastBiP(others, **MOVING)
    for i in range(4):
        fill_gradients(params, i)
        opt.step()
    other.load_state_dict(through_a_file(opt.state_dict()))
    given, expected = (o.state_dict()["state"][0] for o in (other, opt))
    assert given.keys() == expected.keys() >= {"score_momentum"}
    assert given.pop("bip") == expected.pop("bip")
    for name, value in expected.items():
        assert_bits(given[name], value, name)


def test_a_state_of_another_optimizer(backend):
    params = make_params([300], device=backend.device)
    sgd = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    fill_gradients(params, 0)
    sgd.step()
    opt = FastBiP(params, **MOVING)
    with pytest.raises((ValueError, KeyError)):
        opt.load_state_dict(sgd.state_dict())


def test_freezing_survives_a_checkpoint(backend):
    model, fresh = make_model(device=backend.device), make_model(1, device=backend.device)
    opt, other = FastBiP(model, **MOVING), FastBiP(fresh, **MOVING)
    advance(model, opt, 3, 0)
    opt.freeze_masks()
    fresh.load_state_dict(model.state_dict())
    other.load_state_dict(through_a_file(opt.state_dict()))
    assert other.phase == "lower"
    for owner, optimizer in ((model, opt), (fresh, other)):
        advance(owner, optimizer, 4, 10)
    assert_same_snapshot(snapshot(other), snapshot(opt))


# --- the model ------------------------------------------------------------------------------------------------------------------------


def test_the_model_file_is_plain_and_already_pruned(backend):
    """Keys, shapes and dtypes as before; loads into an ordinary model with strict=True and computes the same."""
    model, fresh = make_model(device=backend.device), make_model(3, device=backend.device)
    expected = {name: (x.shape, x.dtype) for name, x in fresh.state_dict().items()}
    opt = FastBiP(model, sparsity=0.9, lr=0.05)
    for i in range(4):
        train_step(model, opt, i, backend.device)
    saved = through_a_file(model.state_dict())
    assert {name: (x.shape, x.dtype) for name, x in saved.items()} == expected
    fresh.load_state_dict(saved, strict=True)
    x, _ = batch(9, backend.device)
    assert_bits(fresh.eval()(x).detach(), model.eval()(x).detach())
    total = sum(p.numel() for p in pruned_of(fresh))
    assert sum(int((p == 0).sum()) for p in pruned_of(fresh)) >= round(0.9 * total)


def test_a_model_file_is_as_small_as_before(backend):
    """Parameters are not views into one large storage that would be saved with each of them."""
    model, plain = make_model(device=backend.device, width=32), make_model(device=backend.device, width=32)
    opt = FastBiP(model, **MOVING)
    opt.step()
    sizes = []
    for m in (model, plain):
        buffer = io.BytesIO()
        torch.save(m.state_dict(), buffer)
        sizes.append(buffer.tell())
    assert sizes[0] == sizes[1]


def test_deepcopy_of_the_model(backend):
    """An ordinary model with the same values, which the optimizer does not know."""
    model = make_model(device=backend.device)
    opt = FastBiP(model, **MOVING)
    advance(model, opt, 3, 0)
    twin = copy.deepcopy(model)
    before = {name: x.clone() for name, x in twin.state_dict().items()}
    for name, x in model.state_dict().items():
        assert_bits(before[name], x, name)
    advance(model, opt, 3, 10)
    for name, x in twin.state_dict().items():
        assert_bits(x, before[name], name)
    other = FastBiP(twin, **MOVING)
    advance(twin, other, 2, 20)


def test_pickle_of_the_model(backend):
    model = make_model(device=backend.device)
    opt = FastBiP(model, **MOVING)
    advance(model, opt, 3, 0)
    twin = pickle.loads(pickle.dumps(model))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert_bits(q.detach(), p.detach())


def test_lock_step_after_a_model_was_loaded_before_the_optimizer(backend):
    """Continuing from a pruned file: zeros start as the lowest scores, so the same weights are kept."""
    model, fresh = make_model(device=backend.device), make_model(3, device=backend.device)
    opt = FastBiP(model, **MOVING)
    advance(model, opt, 4, 0)
    fresh.load_state_dict(model.state_dict())
    run = Lockstep(fresh.parameters(), lambda: FastBiP(fresh, **MOVING), pruned_of(fresh))
    for p, q in zip(model.parameters(), fresh.parameters(), strict=True):
        assert_bits(q.detach(), p.detach())
    run.random_steps(3)

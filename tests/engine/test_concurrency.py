"""Threads, forks, streams and devices: the same bits whoever calls."""

import hashlib
import os
import select
import signal
import threading
import time

import pytest
import torch
from helpers import assert_same_snapshot, fill_gradients, make_params, snapshot
from lockstep import MOVING, Lockstep

from bip_fast import FastBiP, reference, topk_mask

FORK_TIMEOUT = 20.0  # seconds; the work itself takes a fraction of one


def sizes_of(backend):
    """Enough work for every thread, yet quick on the simulator."""
    return [3001, 2000] if backend.name == "sim" else [60_001, 40_000]


def digest(params):
    return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in params)).hexdigest()


# --- threads --------------------------------------------------------------------------------------------------------------------------


def test_two_python_threads_with_an_optimizer_each(backend):
    """The kernels let go of the interpreter lock, so both really run at once, with two threads each."""
    params = [make_params(sizes_of(backend), seed, device=backend.device) for seed in range(2)]
    runs = [Lockstep(p, lambda p=p: FastBiP(p, **MOVING)) for p in params]
    errors, barrier = [], threading.Barrier(2)

    def work(i):
        torch.set_num_threads(2)
        try:
            barrier.wait(timeout=60)
            runs[i].random_steps(8, seed=i)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    assert not errors, errors[0]


def test_topk_in_several_threads(backend):
    scores = [torch.rand(sizes_of(backend)[0], generator=backend.generator(i)).mul(50).round() for i in range(4)]
    given = [None] * 4

    def work(i):
        torch.set_num_threads(2)
        for _ in range(3):
            given[i] = topk_mask(scores[i].to(backend.device), 1000 + i).cpu()

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    for i in range(4):
        assert given[i] is not None
        assert torch.equal(given[i], reference.topk_mask(scores[i], 1000 + i))


def test_the_number_of_threads_may_change_between_steps(backend):
    params = make_params(sizes_of(backend), device=backend.device)
    run = Lockstep(params, lambda: FastBiP(params, **MOVING))
    for i, threads in enumerate((1, 2, 5, 3, 1, 2)):
        torch.set_num_threads(threads)
        run.random_steps(1, seed=i)


# --- forks ----------------------------------------------------------------------------------------------------------------------------


def in_forked_child(work):
    """Text that ``work`` returns in a forked child; fails if the child hangs or dies."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.write(write_end, work().encode())
            status = 0
        finally:
            os._exit(status)
    os.close(write_end)
    try:
        ready, _, _ = select.select([read_end], [], [], FORK_TIMEOUT)
        text = os.read(read_end, 4096).decode() if ready else None
    finally:
        os.close(read_end)
        if not reaped(child):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    assert text, "the child hangs" if text is None else "the child died"
    return text


def reaped(child):
    """True when ``child`` ended by itself within a moment."""
    for _ in range(100):
        if os.waitpid(child, os.WNOHANG)[0]:
            return True
        time.sleep(0.01)
    return False


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs an operating system with fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("backend", ["cpu", "sim"], indirect=True)  # CUDA itself does not survive a fork
def test_a_forked_child_steps_and_does_not_hang(backend):
    """As a DataLoader worker is forked: after the parent used its threads. Parent and child take the same steps, with the same bits."""
    torch.set_num_threads(2)
    params = make_params(sizes_of(backend))
    opt = FastBiP(params, **MOVING)
    fill_gradients(params, 0)
    for _ in range(3):
        opt.step()

    def two_steps():
        opt.step()
        opt.step()
        return digest(params)

    in_child = in_forked_child(two_steps)
    assert in_child == two_steps()
    assert in_forked_child(two_steps) == two_steps()


# --- streams and devices ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def cuda(monkeypatch):
    from helpers import use_backend

    return use_backend("cuda", monkeypatch)


def test_a_side_stream(cuda):
    """Everything is launched on the current stream: the step sees gradients made there just before, without a synchronisation."""
    params, same = make_params([500_000, 100], device=cuda.device), make_params([500_000, 100], device=cuda.device)
    opt, plain = FastBiP(params, **MOVING), FastBiP(same, **MOVING)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    for i in range(6):
        fill_gradients(same, i)
        plain.step()
        stream.wait_stream(torch.cuda.current_stream())  # it reads gradients that were made there
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10_000_000)  # a launch on another stream would now run ahead of its gradients
            for p, q in zip(params, same, strict=True):
                p.grad = q.grad * 2
                p.grad.div_(2)
            opt.step()
        stream.synchronize()
    assert_same_snapshot(snapshot(opt), snapshot(plain))


def test_a_step_does_not_synchronise(cuda):
    params = make_params([100_000], device=cuda.device)
    opt = FastBiP(params, **MOVING)
    fill_gradients(params, 0)
    opt.step()
    opt.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for i in range(4):
            opt.param_groups[0]["lr"] = 0.1 / (i + 1)  # as under a scheduler: new hyper-parameters go to the device
            opt.step()
        topk_mask(params[0].detach(), 100)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_second_device(cuda):
    """The model's device counts, not the current one."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two NVIDIA GPUs")
    params = make_params([50_000], device="cuda:1")
    with torch.cuda.device(0):
        run = Lockstep(params, lambda: FastBiP(params, **MOVING))
        run.random_steps(6)
        scores = torch.rand(5000, device="cuda:1")
        assert torch.equal(topk_mask(scores, 100).cpu(), reference.topk_mask(scores.cpu(), 100))
    assert torch.cuda.current_device() == 0

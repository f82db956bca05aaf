"""How long the memory of a plan lives, and when nothing may be written to it: other streams, and captures of CUDA graphs.

What only a GPU shows is marked so; the rest runs anywhere, with a stand-in for what torch would say of streams.
"""

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import assert_same_snapshot, fill_gradients, make_params, snapshot, use_backend
from lockstep import MOVING

from bip_fast import FastBiP
from bip_fast.engine import engine, native
from bip_fast.engine.launch import kernel_tables, plan


@pytest.fixture
def cuda(monkeypatch):
    return use_backend("cuda", monkeypatch)


@pytest.fixture
def streams(monkeypatch):
    """Says which stream is current, and whether it is being captured."""
    said = SimpleNamespace(current=SimpleNamespace(cuda_stream=7), capturing=False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: said.current)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: said.capturing)
    monkeypatch.setattr(native, "launch_guard", lambda device: nullcontext())
    return said


class Recording:
    """Stands in for a tensor on a GPU."""

    def __init__(self):
        self.streams = []

    def record_stream(self, stream):
        self.streams.append(stream.cuda_stream)


def plan_of(opt) -> plan.StepPlan:
    return opt._running("step").plan


def optimizer(device=None, sizes=(3000, 500), **options):
    params = make_params(sizes, device=device)
    return FastBiP(params, **(MOVING | options)), params


# --- another stream --------------------------------------------------------------------------------------------------------------


def test_all_memory_of_a_plan_is_held():
    """Tables, workspace, counters: all that kernels get the address of besides the arena's and the gradients'."""
    opt, params = optimizer()
    fill_gradients(params, 0)
    given, own = {}, plan_of(opt)
    held = {x.data_ptr() for x in own._memory}
    own.backend = SimpleNamespace(step=lambda **arguments: given.update(arguments))
    opt.step()
    pointers = {name: given[name] for name in ("tensors", "tile_tensor", "groups", "unit_sets", "parts", "hypers", "counters", "workspace")}
    assert set(pointers.values()) <= held
    assert {name for name, value in vars(own).items() if isinstance(value, torch.Tensor) and value.data_ptr() not in held} == set()
    assert len(held) == len(own._memory)


def test_a_plan_is_held_once_for_each_other_stream(streams):
    opt, _ = optimizer()
    own = plan_of(opt)
    own.device, own._streams = torch.device("cuda", 0), {7}
    own._memory = [Recording(), Recording()]
    for stream in (7, 8, 8, 7, 9, 8):
        streams.current = SimpleNamespace(cuda_stream=stream)
        own.hold()
    assert [x.streams for x in own._memory] == [[8, 9]] * 2
    streams.current, streams.capturing = SimpleNamespace(cuda_stream=10), True
    own.hold()
    assert own._memory[0].streams == [8, 9]
    streams.capturing = False
    own.hold()
    assert own._memory[0].streams == [8, 9, 10]


def test_every_step_and_every_replay_holds_its_plan(monkeypatch, double):
    from graph_pairs import Pair

    held = []
    monkeypatch.setattr(plan.StepPlan, "hold", lambda self: held.append(self))
    opt, params = optimizer()
    held.clear()
    fill_gradients(params, 0)
    opt.step()
    assert held == [plan_of(opt)]
    recorders = double()
    pair = Pair()
    pair.steps(12)
    held.clear()
    replays = recorders[0].replays
    pair.step(12)
    assert recorders[0].replays == replays + 1
    assert held.count(plan_of(pair.opts[0])) >= 1


@pytest.mark.gpu
def test_a_replaced_plan_keeps_its_memory_while_a_stream_uses_it(cuda):
    opt, params = optimizer(cuda.device, sizes=(500_000, 100_000))
    plain, same = optimizer(cuda.device, sizes=(500_000, 100_000))
    for p in (params, same):
        fill_gradients(p, 0)
    old = [(x.data_ptr(), x.numel()) for x in plan_of(opt)._memory]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(1_000_000_000)  # half a second
        with opt.upper():
            opt.step()
            opt.param_groups[0]["scope"] = "layer"
            opt.step()  # by a new plan; nobody has the old one any more
    fresh = [torch.full((size,), 255, dtype=torch.uint8, device=cuda.device) for _, size in old for _ in range(3)]
    assert not side.query(), "the side stream is done already, so this has shown nothing"
    for begin, size in old:
        assert not [x for x in fresh if x.data_ptr() < begin + size and begin < x.data_ptr() + x.numel()], "memory in use was given away"
    side.synchronize()
    with plain.upper():
        plain.step()
        plain.param_groups[0]["scope"] = "layer"
        plain.step()
    assert_same_snapshot(snapshot(opt), snapshot(plain))


# --- captures --------------------------------------------------------------------------------------------------------------------


def test_a_table_that_changes_in_a_capture_is_an_error(streams):
    table = kernel_tables.DeviceTable(np.arange(4), torch.device("cpu"))
    table._device = torch.device("cuda", 0)
    streams.capturing = True
    table.update(np.arange(4))  # as it was: nothing to write
    for _ in range(2):  # also the second time: it has not been taken for written
        with pytest.raises(RuntimeError, match=r"^options of the optimizer changed while a CUDA graph is being captured: take one step"):
            table.update(np.arange(4) + 1)
    assert table.memory.tolist() == list(np.arange(4).tobytes())


def test_no_plan_is_made_in_a_capture(streams):
    streams.capturing = True
    with pytest.raises(RuntimeError, match="the optimizer needs new tables while a CUDA graph is being captured"):
        plan.StepPlan(SimpleNamespace(device=torch.device("cuda", 0)), [], np.zeros(0), [])


CHANGES = {
    "step size": {"lr": 0.01},
    "number of kept": {"sparsity": 0.5},
    "scope": {"scope": "layer"},
    "mask momentum": {"mask_momentum": 0.5},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_after_the_error_the_next_step_takes_the_change(monkeypatch, change):
    """Nothing of a refused step stays behind, and nothing is forgotten."""
    opt, params = optimizer()
    plain, same = optimizer()
    for i in range(3):
        for p in (params, same):
            fill_gradients(p, i)
        opt.step()
        plain.step()
    for o in (opt, plain):
        o.param_groups[0].update(change)
    before = snapshot(opt)

    def refuse(device, what):
        raise RuntimeError("capturing")

    with monkeypatch.context() as patch:
        patch.setattr(plan, "not_capturing", refuse)
        patch.setattr(kernel_tables, "not_capturing", refuse)
        patch.setattr(engine, "not_capturing", refuse)
        for _ in range(2):
            with pytest.raises(RuntimeError, match=r"^capturing$"):
                opt.step()
    assert_same_snapshot(snapshot(opt), before)
    for i in range(3, 7):
        for p in (params, same):
            fill_gradients(p, i)
        opt.step()
        plain.step()
    assert_same_snapshot(snapshot(opt), snapshot(plain))


@pytest.mark.gpu
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_capture_of_ones_own(cuda, change):
    """Works where nothing has changed since the last step; says what to do where something has."""
    opt, params = optimizer(cuda.device)
    plain, same = optimizer(cuda.device)
    for p in (params, same):
        fill_gradients(p, 0)

    def upper(o):
        with o.upper():
            o.step()

    upper(opt)
    upper(plain)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        upper(opt)
    for _ in range(3):
        graph.replay()
        upper(plain)
    assert_same_snapshot(snapshot(opt), snapshot(plain))
    opt.param_groups[0].update(change)
    other = torch.cuda.CUDAGraph()
    with torch.cuda.graph(other):
        torch.zeros(1, device=cuda.device)  # a capture of nothing would be warned of
        with pytest.raises(RuntimeError, match="while a CUDA graph is being captured"):
            upper(opt)
    assert_same_snapshot(snapshot(opt), snapshot(plain))
    plain.param_groups[0].update(change)
    upper(opt)
    upper(plain)
    assert_same_snapshot(snapshot(opt), snapshot(plain))

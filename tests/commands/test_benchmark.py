"""`bip-fast bench` on a few weights: every row, errors in one line; its plain steps compute what the reference does."""

import pytest
import torch
from cli_runs import one_line

from bip_fast import reference
from bip_fast.commands import bench, cli
from bip_fast.timing import clock, plain, steps


@pytest.fixture
def quick(monkeypatch):
    """The command, in hundredths of a second."""
    measure = steps.measure
    monkeypatch.setattr(steps, "measure", lambda numel, device, density: measure(numel, device, density, budget=0.01))
    return lambda *options: cli.main(["bench", "--device", "cpu", *options])


@pytest.mark.parametrize("numel", [1, 33, 5000])
def test_the_table_has_a_row_for_every_operation(quick, capsys, numel):
    assert quick("--numel", str(numel)) == 0
    printed = capsys.readouterr().out.splitlines()
    assert f"{numel:,} weights" in printed[0]
    rows = [line for line in printed if line.endswith("x")]
    assert [row[:12].strip() for row in rows] == ["lower step", "upper step", "joint step", "topk_mask"]
    assert all(float(number) > 0 for row in rows for number in row[12:].replace("ms", "").replace("%", "").rstrip("x").split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--numel", "0"), "--numel must be in [1, 2**32), got 0"),
        (("--numel", "4294967296"), "--numel must be in [1, 2**32), got 4294967296"),
        (("--density", "0"), "--density must be in [1e-12, 1], got 0.0"),
        (("--density", "nan"), "--density must be in [1e-12, 1], got nan"),
        (("--density", "1e-13"), "--density must be in [1e-12, 1], got 1e-13"),
        (("--device", "tpu"), "--device must be auto, cpu, cuda or cuda:N, got 'tpu'"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(quick, capsys, options, message):
    assert quick(*options) == 2
    assert message in one_line(capsys.readouterr().err)


def test_more_than_fits_is_not_tried(quick, monkeypatch, capsys):
    assert clock.too_large(1, torch.device("cpu")) is None
    why = clock.too_large(10**15, torch.device("cpu"))
    assert why.startswith("needs 72000000.0 GB, ")
    monkeypatch.setattr(bench, "too_large", lambda numel, device: why)
    assert quick("--numel", "1000") == 2
    assert f"--numel 1000: {why} on cpu" in one_line(capsys.readouterr().err)


def test_memory_that_is_not_there_is_said_in_one_line(monkeypatch, capsys):
    def measure(*_):
        raise torch.OutOfMemoryError("tried to allocate")

    monkeypatch.setattr(steps, "measure", measure)
    assert cli.main(["bench", "--device", "cpu", "--numel", "1000"]) == 2
    assert "--numel 1000: not enough memory on cpu" in one_line(capsys.readouterr().err)


def flat(tensors):
    return torch.cat([x.flatten().float() for x in tensors])


@pytest.mark.parametrize("phase", ["lower", "upper", "joint"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_steps_do_what_the_reference_does(phase, dtype):
    """Scores without ties, so that torch.topk has no choice. Operations in another order: one rounding each."""
    torch.manual_seed(0)
    shapes = [(20, 30), (7, 11, 3)]
    weights = [torch.randn(shape) * 0.2 for shape in shapes]
    state = plain.plain_state(weights, 0.3, z=[torch.zeros(shape, dtype=dtype) for shape in shapes])
    assert state.kept == [249]
    expected = reference.start(flat(weights), state.kept[0])
    hyper = reference.Hyper(lr=plain.LR, mask_lr=plain.MASK_LR, weight_decay=plain.WEIGHT_DECAY)
    more = () if phase == "lower" else (state.kept[0],)
    for _ in range(3):
        gradients = [torch.randn(shape).to(dtype) for shape in shapes]
        plain.STEPS[phase](state, gradients)
        expected = getattr(reference, phase)(expected, flat(gradients), hyper, *more)
        for ours, theirs in ((state.theta, expected.theta), (state.v, expected.v), (state.s, expected.s)):
            torch.testing.assert_close(flat(ours), theirs, rtol=1e-5, atol=1e-6)
        assert torch.equal(flat(state.m).bool(), expected.m)
        assert all(z.dtype == dtype for z in state.z)
        assert torch.equal(flat(state.z), (flat(state.m) * flat(state.theta)).to(dtype).float())


@pytest.mark.parametrize(("phase", "contract"), [("lower", 24.1), ("upper", 16.3), ("joint", 32.3)])
def test_bytes_of_a_step_are_those_of_the_cost_model(phase, contract):
    """At 10 % density; the contract counts z in full where one line of thirty holds no kept weight."""
    assert steps.step_bytes(phase, 0.1) == pytest.approx(contract, abs=0.2)
    assert steps.step_bytes(phase, 0.1, itemsize=2) == pytest.approx(contract - (2 if phase == "upper" else 4), abs=0.2)
    assert steps.step_bytes(phase, 0.005) <= steps.step_bytes(phase, 0.5)

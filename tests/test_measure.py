"""Networks side by side: figures that can be counted by hand, verdicts that follow from them, 2:4 refusals, the command."""

from __future__ import annotations

import json

import pytest
import torch
from cli_runs import one_line, prune
from torch import nn

from bip_fast import FastBiP, cli
from bip_fast.export.measure import Measurement, Variant, _verdict, measure
from bip_fast.export.semi_structured import refusal, to_semi_structured, violations


def nets():
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    masked = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    opt = FastBiP(masked, sparsity=0.9)
    opt.finalize()
    small = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
    return {"dense": dense, "masked": masked, "small": small}


def test_figures_by_hand():
    networks = nets()
    networks["dense"].train()
    x, y = torch.randn(40, 64), torch.arange(40) % 10
    result = measure(networks, x[:2], batch_sizes=[1, 8], data=[(x, y)], rounds=5)
    dense, masked, small = result.variants
    assert dense.parameters == masked.parameters == 64 * 128 + 128 + 1280 + 10
    assert masked.nonzeros <= (64 * 128 + 1280) // 10 + 138 + 1
    assert dense.flops == masked.flops == 2 * (64 * 128 + 1280)
    assert small.flops == 2 * (64 * 16 + 160)
    assert dense.bytes == 4 * dense.parameters
    kept = int(torch.count_nonzero(networks["masked"][0].weight)) + int(torch.count_nonzero(networks["masked"][2].weight))
    assert masked.packed_bytes == 4 * (kept + 138) + (64 * 128 + 1280) // 8
    assert dense.accuracy == int((networks["dense"](x).argmax(1) == y).sum()) / 40
    assert set(dense.seconds) == {1, 8}
    assert dense.throughput[8] == 8 / dense.seconds[8]
    assert result.speedup("dense", 8) == 1
    assert networks["dense"].training
    assert "masked" in str(result)
    assert json.loads(json.dumps(result.as_dict()))["variants"][2]["name"] == "small"


def variant(seconds: float, flops: int = 100, nonzeros: int = 100) -> Variant:
    return Variant("it", 100, nonzeros, flops, 400, 400, {64: seconds})


@pytest.mark.parametrize(
    ("row", "text"),
    [
        (variant(1.0, nonzeros=10), "not faster (1.00x at batch 64): its 90 % zeros are stored"),
        (variant(0.5, flops=25), "2.00x at batch 64: 75 % of the FLOPs are gone; what is left is memory"),
        (variant(0.26, flops=25), "3.85x at batch 64: 75 % of the FLOPs are gone"),
        (variant(1.1, flops=25), "not faster (0.91x at batch 64) although 75 % of the FLOPs are gone"),
        (variant(1.0), "not faster (1.00x at batch 64): the same arithmetic"),
        (variant(0.5), "2.00x at batch 64, by other kernels"),
    ],
)
def test_verdicts(row, text):
    assert _verdict(variant(1.0), row).startswith(text)


def test_wrong_arguments():
    with pytest.raises(ValueError, match="at least one"):
        measure({}, torch.ones(1))
    with pytest.raises(ValueError, match="batch_sizes must be at least 1, got 0"):
        measure(nets(), torch.ones(1, 64), batch_sizes=[0])
    assert isinstance(measure(nets(), torch.ones(1, 64), rounds=1), Measurement)


# --- 2:4 -----------------------------------------------------------------------------------------------------------------------------


def test_violations():
    x = torch.tensor([[1.0, 1, 0, 0, 1, 1, 1, 0], [0, 0, 0, 0, 1, 1, 1, 1]])
    assert violations(x) == 2
    assert violations(x, 3) == 1
    assert violations(x, 4, 8) == 1
    with pytest.raises(ValueError, match="multiple of 4"):
        violations(torch.ones(2, 6))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (((64, 64), torch.float16, "cpu", None), "it is on cpu"),
        (((64, 64), torch.float16, "cuda", (7, 5)), "compute capability 7.5"),
        (((64, 64), torch.float32, "cuda", (9, 0)), "it is float32"),
        (((64, 32), torch.bfloat16, "cuda", (9, 0)), "multiples of 32x64"),
        (((64, 64), torch.bfloat16, "cuda", (9, 0)), None),
    ],
)
def test_refusals(kind, reason):
    shape, dtype, device, capability = kind
    given = refusal(shape, dtype, torch.device(device), capability)
    assert given is None if reason is None else reason in given


def test_every_layer_has_its_reason():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(64, 32), nn.Linear(32, 30), nn.Linear(30, 2))
    FastBiP([model[2].weight], pattern="2:4").finalize()
    result = to_semi_structured(model)
    reasons = {row.name: row.reason for row in result.layers}
    assert "no semi-structured convolution" in reasons["0"]
    assert "on cpu" in reasons["2"]
    assert "not 2:4: 240 of 240 groups" in reasons["3"]
    assert "30 inputs are not a multiple of 4" in reasons["4"]
    assert torch.equal(result.model[2].weight, model[2].weight)
    assert "2 (32, 64): it is on cpu" in str(result)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU that torch can use")
def test_semi_structured_layers_compute_the_same():
    model = nn.Sequential(nn.Linear(128, 256, bias=False), nn.ReLU(), nn.Linear(256, 128)).cuda().half()
    FastBiP(model, pattern="2:4").finalize()
    result = to_semi_structured(model)
    assert [row.reason for row in result.layers] == [None, None]
    x = torch.randn(64, 128, device="cuda", dtype=torch.half)
    torch.testing.assert_close(result.model(x), model(x), rtol=2e-2, atol=2e-2)


# --- the command ---------------------------------------------------------------------------------------------------------------------


def test_the_command(tmp_path, capsys):
    pytest.importorskip("torch_pruning", reason="needs the package torch-pruning: pip install 'bip-fast[test]'")
    pytest.importorskip("sklearn", reason="needs the package scikit-learn: pip install 'bip-fast[test]'")
    out = tmp_path / "run"
    options = ["--pattern", "filter", "--scope", "layer", "--sparsity", "0.5", "--model", "resnet20b"]
    assert prune(out, *options) == 0
    capsys.readouterr()
    assert cli.main(["measure", str(out), "--batch-sizes", "2", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    names = [row["name"] for row in result["variants"]]
    assert names == ["dense", "masked", "shrunk"]
    dense, masked, small = result["variants"]
    assert dense["parameters"] == masked["parameters"] > 2 * small["parameters"]
    assert masked["accuracy"] == small["accuracy"] is not None
    assert small["verdict"]
    assert any("2:4" in note for note in result["notes"])
    assert cli.main(["measure", str(out), "--batch-sizes", "2"]) == 0
    assert "shrunk: " in capsys.readouterr().out
    for wrong, message in [([str(tmp_path / "none")], "no finished run"), ([str(out), "--batch-sizes", "0"], "--batch-sizes")]:
        assert cli.main(["measure", *wrong]) == 2
        assert message in one_line(capsys.readouterr().err)

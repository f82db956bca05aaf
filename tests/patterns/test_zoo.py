"""Networks as people have them: a few steps in every pattern that fits, exact masks, the same function shrunk and in other formats."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from zoo import ZOO

from bip_fast import FastBiP, reference
from bip_fast.engine.layers import Layer
from bip_fast.engine.patterns import parse

PATTERNS = ["unstructured", "filter", "channel", "2:4", "1:4", "4:8", "block:4x4", "block:1x16"]


def made(name):
    torch.manual_seed(0)
    return ZOO[name].model()


def steps(model, opt, x, count=3):
    for _ in range(count):
        model(x).float().square().mean().backward()
        opt.step()
        opt.zero_grad()


def units_kept(opt, p, layer):
    """(kept, units) of a weight; every unit whole."""
    blocks = parse(opt.param_groups[0]["pattern"]).divide(p.shape, p.stride(), layer)
    mask = opt.mask_of(p)
    flat = mask.as_strided((p.numel(),), (1,)) if not mask.is_contiguous() else mask.flatten()
    units = flat.view(blocks.rows, blocks.cols)[:: blocks.block_rows, :: blocks.block_cols].flatten()
    assert torch.equal(reference.expand(units, blocks), flat)
    return int(units.sum()), blocks.units


def layer_of(model, p):
    for module in model.modules():
        if getattr(module, "weight", None) is p:
            return Layer(bool(getattr(module, "transposed", False)), getattr(module, "groups", 1))
    raise AssertionError


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", ZOO)
def test_every_pattern_that_fits(name, pattern, backend):
    model = made(name).to(backend.device)
    x = ZOO[name].example().to(backend.device)
    options = {} if parse(pattern).kind == "N:M" else {"sparsity": 0.6}
    opt = FastBiP(model, pattern=pattern, lr=0.05, mask_lr=1.0, levels="joint", **options)
    steps(model, opt, x)
    report = opt.report()
    known = {row.name: row for row in report.decisions}
    names = {name for name, p in model.named_parameters() if p.dim() >= 2}
    assert names <= known.keys(), "nothing is skipped silently"
    assert all((row.pattern is None) != (row.reason is None) for row in report.decisions)
    pruned = [p for name, p in model.named_parameters() if name in known and known[name].pattern]
    assert pruned
    for p in pruned:
        assert torch.equal(p != 0, opt.mask_of(p) & (opt.weight_of(p) != 0))
    if pattern == "unstructured":
        assert report.kept == reference.kept(report.total, 0.6)
    elif parse(pattern).kind == "N:M":
        n, m = parse(pattern).sizes
        assert all(bool((opt.mask_of(p).flatten(1).reshape(-1, m).sum(1) == n).all()) for p in pruned)
        assert report.kept * m == report.total * n
    else:
        counts = [units_kept(opt, p, layer_of(model, p)) for p in pruned]
        kept, units = map(sum, zip(*counts, strict=True))
        assert kept == max(reference.kept(units, 0.6), len(pruned))
        assert all(own >= 1 for own, _ in counts)


@pytest.mark.parametrize("pattern", ["filter", "channel"])
@pytest.mark.parametrize("name", ZOO)
def test_shrunk_networks_compute_the_same(name, pattern):
    pytest.importorskip("torch_pruning", reason="needs the package torch-pruning: pip install 'bip-fast[test]'")
    from bip_fast.export import coupled_filters, shrink

    model, x = made(name), ZOO[name].example()
    coupled = coupled_filters(model, x) if pattern == "filter" else ()
    opt = FastBiP(model, sparsity=0.5, pattern=pattern, scope="layer", coupled=coupled, lr=0.05, mask_lr=1.0, levels="joint")
    steps(model, opt, x)
    opt.finalize()
    model.eval()
    result = shrink(model, x)
    with torch.no_grad():
        expected, given = model(x), result.model(x)
        torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, result.model))
    assert result.removed
    assert after < before
    assert all(row.reason for row in result.kept)
    if name in ("resnet18", "vgg16_bn", "mobilenet") and pattern == "filter":
        assert after < 0.45 * before
        assert not result.kept


@pytest.mark.parametrize("small", [pytest.param(False, id="masked", marks=pytest.mark.slow), pytest.param(True, id="shrunk")])
@pytest.mark.parametrize("name", [pytest.param("resnet18", marks=pytest.mark.slow), "mobilenet", "vit"])
def test_other_formats(name, small, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs the package onnxruntime: pip install 'bip-fast[test]'")
    pytest.importorskip("onnxscript", reason="needs the package onnxscript: pip install 'bip-fast[test]'")
    model, x = made(name), ZOO[name].example()
    opt = FastBiP(model, sparsity=0.5, pattern="filter", scope="layer", lr=0.05, mask_lr=1.0)
    steps(model, opt, x)
    opt.finalize()
    model.eval()
    if small:
        from bip_fast.export import shrink

        model = shrink(model, x).model
    with torch.no_grad():
        expected = model(x)
    program = torch.export.export(model, (x,))
    torch.export.save(program, tmp_path / "model.pt2")
    again = torch.export.load(tmp_path / "model.pt2").module()
    with torch.no_grad():
        torch.testing.assert_close(again(x), expected, rtol=1e-5, atol=1e-6)
    zeros = {key: int((p == 0).sum()) for key, p in model.named_parameters()}
    assert {key: int((p == 0).sum()) for key, p in again.named_parameters()} == zeros
    torch.onnx.export(model, (x,), tmp_path / "model.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (given,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(given), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_masks_survive_a_copy_of_model_and_optimizer():
    model = made("resnet18")
    opt = FastBiP(model, sparsity=0.5, pattern="filter", lr=0.05, mask_lr=1.0, overrides={"stages.0.*": 0.25}, exclude=["conv1"])
    x = ZOO["resnet18"].example()
    steps(model, opt, x)
    twin, other = copy.deepcopy((model, opt))
    steps(model, opt, x)
    steps(twin, other, x)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True))
    assert opt.report().rows == other.report().rows
    assert opt.report().decisions == other.report().decisions
    assert isinstance(twin, nn.Module)

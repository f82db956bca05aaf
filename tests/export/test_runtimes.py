"""Networks measured in ONNX Runtime: the same figures, other times, and what it cannot run."""

import sys

import pytest
import torch
from torch import nn

from bip_fast.export import measure, runtimes

for package in runtimes.NEEDED:
    pytest.importorskip(package, reason=f"needs the package {package}: pip install 'bip-fast[test]'")

X = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
QUICK = {"batch_sizes": (2,), "seconds": 0.01}


def network(width=8):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.Flatten(), nn.Linear(64 * width, 5)]
    return nn.Sequential(*layers).eval()


def halved():
    model = network()
    with torch.no_grad():
        model[0].weight[4:] = model[0].bias[4:] = model[1].weight[4:] = model[1].bias[4:] = 0
    return model


def session_runs(monkeypatch):
    """Counts what ONNX Runtime is asked to compute: names of the outputs of every call."""
    import onnxruntime

    runs, run = [], onnxruntime.InferenceSession.run
    monkeypatch.setattr(onnxruntime.InferenceSession, "run", lambda self, *args: runs.append(1) or run(self, *args))
    return runs


@pytest.mark.slow
def test_all_networks_run_there_and_only_there_while_they_are_timed(monkeypatch):
    runs = session_runs(monkeypatch)
    found = measure(halved(), X[:1], dense=network(), data=[(X, torch.zeros(3, dtype=torch.int64))], runtime="onnxruntime", **QUICK)
    names = ["dense", "masked", "shrunk"]
    assert [row.name for row in found.variants if row.measured] == names
    # checked once, warmed up, once timed or more in every round
    assert len(runs) >= len(names) * (1 + 3 + found.rounds[2])
    assert found.runtime.startswith("ONNX Runtime ")
    assert found.runtime in str(found).splitlines()[0]
    assert found.as_dict()["runtime"] == found.runtime
    plain = measure(halved(), X[:1], dense=network(), data=[(X, torch.zeros(3, dtype=torch.int64))], **QUICK)
    for name in names:
        one, other = found[name].as_dict(), plain[name].as_dict()
        assert all(one[key] == other[key] for key in ("flops", "nonzeros", "parameters", "accuracy", "file_bytes"))


def test_a_call_computes_what_the_network_computes(monkeypatch):
    class Several(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x, more, times):
            return {"a": self.fc(x) * times + more["y"], "b": x.argmax(1)}

    inputs = (torch.randn(2, 4), {"y": torch.randn(2, 4)}, 3)
    model = Several().eval()
    with torch.no_grad():
        a, b = runtimes.prepared_call("onnxruntime", model, inputs)()
        expected = model(*inputs)
    torch.testing.assert_close(torch.from_numpy(a), expected["a"], rtol=1e-4, atol=1e-5)
    assert b.tolist() == expected["b"].tolist()


def test_threads_are_those_of_torch(monkeypatch):
    import onnxruntime

    seen, start = [], onnxruntime.InferenceSession.__init__

    def noted(self, path, options, **more):
        seen.append(options.intra_op_num_threads)
        start(self, path, options, **more)

    monkeypatch.setattr(onnxruntime.InferenceSession, "__init__", noted)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with torch.no_grad():
            runtimes.prepared_call("onnxruntime", network(), (X,))
    finally:
        torch.set_num_threads(threads)
    assert seen == [3]


class Odd(nn.Module):
    """Multiplies by what the export takes for a constant."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(x) * (2.0 if torch.compiler.is_exporting() else 1.0)


class Masked(Odd):
    """The same, and one of the logits is masked."""

    def forward(self, x):
        return super().forward(x).masked_fill(torch.tensor([False, True, False, False]), -1e9)


class Decides(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(x) if float(x.sum()) > 0 else x


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Masked(), "it computes something else there"),
        (Odd(), "it computes something else there"),
        (Decides(), "ONNX Runtime cannot run the model: "),
        (nn.Linear(4, 4).bfloat16(), "NOT_IMPLEMENTED"),
    ],
)
def test_what_it_cannot_run_is_one_error(model, message):
    x = torch.ones(2, 4, dtype=next(model.parameters()).dtype)
    with pytest.raises(ValueError, match=message) as caught:
        measure(model, x, runtime="onnxruntime", **QUICK)
    assert "\n" not in str(caught.value)


def test_it_is_for_cpus_and_needs_its_packages(monkeypatch):
    with pytest.raises(ValueError, match="runtime onnxruntime is measured on a CPU only, got device cuda:1"):
        runtimes.check_runtime("onnxruntime", torch.device("cuda:1"))
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match="runtime onnxruntime needs the package onnxscript: pip install"):
        measure(network(), X, runtime="onnxruntime", **QUICK)

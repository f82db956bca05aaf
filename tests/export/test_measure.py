"""Measured networks: figures against counts made by hand, and what is said of networks that cannot be measured."""

import copy

import pytest
import torch
from torch import nn

from bip_fast.export import measure, shrink
from bip_fast.export import measuring as module
from bip_fast.export.masks import save_masks
from bip_fast.export.shrinking import Shrunk
from bip_fast.state_dicts import write_safetensors

pytest.importorskip("safetensors", reason="file sizes need safetensors")
QUICK = {"batch_sizes": (1, 4), "seconds": 0.01}


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 10))


def pruned(seed=0):
    """12 of 216 weights of the convolution are kept, and 100 of 1280 of the Linear layer."""
    model = network(seed)
    with torch.no_grad():
        model[0].weight.view(-1)[12:] = 0
        model[4].weight.view(-1)[100:] = 0
    return model


X = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
MACS = 16 * 8 * 3 * 9 + 8 * 16 * 10


def with_shrink(monkeypatch, shrink):
    monkeypatch.setattr("bip_fast.export.variants.shrink", shrink)


# --- figures -------------------------------------------------------------------------------------------------------------------------


def test_figures_are_the_counts_made_by_hand(tmp_path):
    dense, model = network(), pruned()
    found = measure(model, X, dense=dense, **QUICK)
    first, masked = found["dense"], found["masked"]
    assert first.parameters == masked.parameters == 216 + 16 + 1280 + 10
    assert first.nonzeros == first.parameters - 8  # the bias of a new batch-norm
    assert masked.nonzeros == 12 + 100 + 8 + 10
    assert (first.sparsity, masked.sparsity) == (0, 1 - 112 / 1496)
    assert first.flops == masked.flops == 2 * MACS
    write_safetensors(tmp_path / "whole", model)
    assert first.file_bytes == masked.file_bytes == (tmp_path / "whole").stat().st_size
    assert first.packed_bytes is None
    assert masked.file_bytes - masked.packed_bytes == 4 * (204 + 1180) - (216 // 8 + 1280 // 8)
    save_masks(tmp_path / "masks", model)
    assert (tmp_path / "masks").stat().st_size > 216 // 8 + 1280 // 8


def test_every_batch_size_is_timed_in_the_same_rounds():
    found = measure(pruned(), X, dense=network(), batch_sizes=[3, 1, 3], seconds=0.01)
    assert list(found.rounds) == [3, 1]
    assert all(module.LEAST <= count <= module.MOST for count in found.rounds.values())
    for name in ("dense", "masked"):
        for size, timing in found[name].times.items():
            assert size in (3, 1)
            assert 0 < timing.seconds < 1
            assert timing.low <= timing.speedup <= timing.high
    assert found["dense"].times[3][1:] == (1, 1, 1)


def test_a_slower_network_is_measured_as_slower():
    """The clock, not the arithmetic: one that waits."""

    class Waits(nn.Module):
        def __init__(self, model, calls):
            super().__init__()
            self.model, self.calls = model, calls

        def forward(self, x):
            for _ in range(self.calls):
                y = self.model(x)
            return y

    found = measure(Waits(pruned(), 1), X, dense=Waits(network(), 20), batch_sizes=(2,), seconds=0.2)
    assert 5 < found["masked"].times[2].speedup < 60
    assert found["masked"].times[2].faster
    found = measure(Waits(pruned(), 20), X, dense=Waits(network(), 1), batch_sizes=(2,), seconds=0.2)
    assert 1 / 60 < found["masked"].times[2].speedup < 1 / 5
    assert found["masked"].sentence.startswith("Slower (0.")


def test_each_round_lets_every_network_have_its_turn_in_another_order():
    seen = []
    taken = module._race([lambda i=i: seen.append(i) for i in range(3)], torch.device("cpu"), 1e-4)
    seen = seen[3 * module.WARM_UP :]
    assert {len(own) for own in taken} == {len(seen) // 3}
    rounds = [seen[i : i + 3] for i in range(0, len(seen), 3)]
    assert rounds[:4] == [[0, 1, 2], [1, 2, 0], [2, 0, 1], [0, 1, 2]]


def test_accuracy_is_the_share_of_right_answers_in_one_pass_over_the_data():
    dense, model = network(), pruned()
    images, labels = torch.randn(7, 3, 4, 4), torch.arange(7)
    batches = ((x, y) for x, y in zip(images.split(3), labels.split(3), strict=True))  # can be read once
    found = measure(model, X, dense=dense, data=batches, **QUICK)
    for name, own in (("dense", dense), ("masked", model)):
        with torch.no_grad():
            assert found[name].accuracy == float((own.eval()(images).argmax(1) == labels).sum()) / 7
    assert measure(model, X, **QUICK)["masked"].accuracy is None


def test_every_pixel_may_have_a_label():
    model = nn.Sequential(nn.Conv2d(3, 5, 1))
    labels = torch.randint(0, 5, (2, 4, 4), generator=torch.Generator().manual_seed(0))
    found = measure(model, X, data=[(X, labels)], **QUICK)
    with torch.no_grad():
        assert found["masked"].accuracy == float((model(X).argmax(1) == labels).float().mean())


class Returns(nn.Module):
    def __init__(self, answer):
        super().__init__()
        self.fc, self.answer = nn.Linear(4, 3), answer

    def forward(self, x):
        return self.answer(self.fc(x))


@pytest.mark.parametrize(
    ("answer", "labels", "message"),
    [
        (lambda y: y, (2, 1), r"data must have labels of shape \(2,\), got labels \(2, 1\) for an output \(2, 3\)"),
        (lambda y: y, (3,), r"got labels \(3,\)"),
        (lambda y: y[:, 0], (2,), r"data must have an output of \(batch, classes, ...\), got labels \(2,\) for an output \(2,\)"),
        (lambda y: (y, y), (2,), "data needs a model that returns one tensor of logits, got tuple"),
        (lambda y: {"logits": y}, (2,), "got dict"),
    ],
)
def test_labels_that_do_not_fit_the_output_are_refused(answer, labels, message):
    with pytest.raises(ValueError, match=message):
        measure(Returns(answer), torch.randn(2, 4), data=[(torch.randn(2, 4), torch.zeros(labels, dtype=torch.int64))], **QUICK)


def test_without_a_dense_network_its_stand_in_has_no_zeros_and_no_accuracy():
    model = pruned()
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    found = measure(model, X, data=[(X, torch.tensor([0, 1]))], **QUICK)
    assert torch.equal(torch.get_rng_state(), state)
    first = found["dense"]
    assert (first.nonzeros, first.parameters, first.packed_bytes) == (first.parameters - 8, 1522, None)
    assert first.accuracy is None
    assert found["masked"].accuracy is not None
    assert "zeros replaced by random numbers" in first.sentence
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_models_keep_their_modes_and_values_also_after_an_error():
    dense, model = network(), pruned()
    model[1].eval()
    modes = [[m.training for m in own.modules()] for own in (dense, model)]
    before = copy.deepcopy(model.state_dict())
    measure(model, X, dense=dense, **QUICK)
    with pytest.raises(RuntimeError):
        measure(model, torch.randn(1, 4, 4, 4), dense=dense, **QUICK)
    assert [[m.training for m in own.modules()] for own in (dense, model)] == modes
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_it_runs_in_eval_mode_without_gradients_at_the_batch_sizes():
    seen = set()

    class Watched(nn.Linear):
        def forward(self, x):
            seen.add((len(x), self.training, torch.is_grad_enabled()))
            return super().forward(x)

    measure(nn.Sequential(Watched(4, 2)), torch.randn(3, 4), batch_sizes=(2, 5), seconds=0.01)
    assert {row for row in seen if row[0] != 3} <= {(1, False, False), (2, False, False), (5, False, False)}
    assert {2, 5} <= {row[0] for row in seen}


def test_networks_are_compared_in_one_memory_format(monkeypatch):
    formats = []
    conv = nn.Conv2d.forward
    monkeypatch.setattr(nn.Conv2d, "forward", lambda self, x: formats.append(self.weight.is_contiguous()) or conv(self, x))
    dense, model = network(), pruned().to(memory_format=torch.channels_last)
    with_shrink(monkeypatch, lambda model, x: Shrunk(model))  # whose own trials are not of interest
    measure(model, X, dense=dense, **QUICK)
    assert formats
    assert not any(formats)
    assert dense[0].weight.is_contiguous()


def test_inputs_may_be_many_and_bfloat16_is_counted():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4).bfloat16()

        def forward(self, x, more):
            assert len(x) == len(more["y"])
            return self.fc(x) + more["y"]

    model = Two()
    with torch.no_grad():
        model.fc.weight[:3] = 0
    given = (torch.randn(1, 4).bfloat16(), {"y": torch.randn(1, 4).bfloat16()})
    found = measure(model, given, **QUICK)
    assert found.dtype == "bfloat16"
    assert found["masked"].nonzeros == 8
    assert found["masked"].file_bytes - found["masked"].packed_bytes == 2 * 12 - 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_sizes": ()}, "batch_sizes must be whole numbers of at least 1"),
        ({"batch_sizes": (1, 0)}, r"got \(1, 0\)"),
        ({"batch_sizes": (1.5,)}, "batch_sizes must be whole"),
        ({"seconds": 0}, "seconds must be more than 0, got 0"),
        ({"device": "meta"}, "device must be one that this machine and this torch have, got meta: "),
        ({"device": "cuda:99"}, "device must be one that this machine and this torch have, got cuda:99: "),
        ({"runtime": "tensorrt"}, "runtime must be one of torch, onnxruntime, got 'tensorrt'"),
        ({"example_input": torch.tensor(1.0)}, "example_input must have a tensor whose first dimension"),
        ({"example_input": torch.ones(0, 3)}, "a batch of at least one"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        measure(network(), **{"example_input": X, **options})


# --- what is not there ---------------------------------------------------------------------------------------------------------------


def test_variants_that_cannot_be_are_rows_with_the_reason(monkeypatch):
    def needs_a_package(model, x):
        raise ImportError("shrink needs torch-pruning: pip install 'bip_fast[export]'")

    with_shrink(monkeypatch, needs_a_package)
    found = measure(pruned(), X, **QUICK)
    assert [row.name for row in found.variants] == ["dense", "masked", "shrunk", "2:4"]
    assert found["shrunk"].sentence == "Not measured: shrink needs torch-pruning: pip install 'bip_fast[export]'."
    assert found["2:4"].sentence == "Not measured: 2:4 needs an NVIDIA GPU of compute capability 8.0 or newer, this is a CPU."
    assert not found["shrunk"].measured
    assert str(found).count("Not measured") == 2

    def fails(model, x):
        raise KeyError("a model that\ncannot be followed")

    with_shrink(monkeypatch, fails)
    said = measure(pruned(), X, **QUICK)["shrunk"].sentence
    assert said.startswith("Not measured: the network cannot be shrunk: KeyError: ")
    assert "\n" not in said


def test_what_shrink_could_not_check_is_in_the_sentence(monkeypatch):
    with_shrink(monkeypatch, lambda model, x: Shrunk(nn.Sequential(nn.Flatten(), nn.Linear(48, 10)), note="half checked"))
    said = measure(pruned(), X, **QUICK)["shrunk"].sentence
    assert said.endswith("; half checked.")


def test_a_network_with_nothing_to_remove_is_not_timed_again(monkeypatch):
    with_shrink(monkeypatch, lambda model, x: Shrunk(copy.deepcopy(model)))
    found = measure(pruned(), X, **QUICK)
    assert found["shrunk"].sentence.startswith("Not measured: no filter or channel can be removed")


def test_a_shrunk_network_is_measured_like_the_others(monkeypatch):
    small = nn.Sequential(nn.Conv2d(3, 1, 3, padding=1, bias=False), nn.BatchNorm2d(1), nn.ReLU(), nn.Flatten(), nn.Linear(16, 10))
    with_shrink(monkeypatch, lambda model, x: Shrunk(small))
    found = measure(pruned(), X, data=[(X, torch.tensor([0, 1]))], **QUICK)
    assert found["shrunk"].parameters == 27 + 2 + 170
    assert found["shrunk"].flops == 2 * (16 * 27 + 160)
    assert found["shrunk"].accuracy is not None
    assert "87.5 % of the FLOPs are gone (8.00x fewer)" in found["shrunk"].sentence


def test_the_real_shrink_fits_in():
    pytest.importorskip("torch_pruning", reason="needs the package torch-pruning: pip install 'bip-fast[test]'")
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(16, 10))
    with torch.no_grad():
        model[0].weight[3:] = 0
    found = measure(model, X, **QUICK)
    assert found["shrunk"].parameters == sum(p.numel() for p in shrink(model, X).model.parameters())
    assert found["shrunk"].flops < found["masked"].flops
    assert "% of the FLOPs are gone" in found["shrunk"].sentence

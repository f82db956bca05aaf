"""The table of a measurement, and the sentences that follow from its figures."""

import json

import pytest

from bip_fast.export.measurement import Measurement, Timing, Variant, sentence


def clear(ratio):
    return Timing(1 / ratio, ratio, 0.98 * ratio, 1.02 * ratio)


DENSE = Variant("dense", {1: Timing(1.0), 64: Timing(1.0)}, parameters=1000, nonzeros=1000, flops=1000)
SENTENCES = {
    "zeros, same time": (
        {"times": {1: clear(0.99), 64: clear(1.01)}, "sparsity": 0.95},
        "Not faster (0.99x at batch 1, 1.01x at batch 64): its 95 % zeros are stored and multiplied like other numbers; "
        "unstructured sparsity needs a sparse runtime.",
    ),
    "zeros, noise": (
        {"times": {1: Timing(1, 1.2, 0.8, 1.5)}, "sparsity": 0.95},
        "Not faster (1.20x at batch 1, within the noise): its 95 % zeros are stored and multiplied like other numbers; "
        "unstructured sparsity needs a sparse runtime.",
    ),
    "zeros, and yet faster": (
        {"times": {1: clear(1.3)}, "sparsity": 0.95},
        "1.30x faster at batch 1: not by skipping, its 95 % zeros are stored and multiplied like other numbers.",
    ),
    "slower": (
        {"times": {1: clear(0.5), 64: clear(1.0)}, "sparsity": 0.0},
        "Slower (0.50x at batch 1, 1.00x at batch 64): its weights have no zeros and the arithmetic is the same.",
    ),
    "fewer FLOPs and faster": (
        {"times": {1: clear(1.7), 64: clear(1.8)}, "flops": 510, "sparsity": 0.0},
        "1.70x faster at batch 1, 1.80x at batch 64: 49 % of the FLOPs are gone (1.96x fewer).",
    ),
    "fewer FLOPs, faster in one batch only": (
        {"times": {1: clear(1.0), 64: clear(1.8)}, "flops": 500, "sparsity": 0.0},
        "Faster only at batch 64 (1.00x at batch 1, 1.80x at batch 64): 50 % of the FLOPs are gone (2.00x fewer), but the rest runs at a "
        "lower FLOP rate (50 % at batch 1 of the dense one's): small layers wait for memory and launches.",
    ),
    "fewer FLOPs and slower": (
        {"times": {1: clear(0.9), 64: clear(1.17)}, "flops": 830, "sparsity": 0.0},
        "Faster only at batch 64 (0.90x at batch 1, 1.17x at batch 64): 17 % of the FLOPs are gone (1.20x fewer), but the rest runs at a "
        "lower FLOP rate (75 % at batch 1 of the dense one's): small layers wait for memory and launches.",
    ),
    "fewer FLOPs and the same time": (
        {"times": {1: clear(1.0)}, "flops": 830, "sparsity": 0.0},
        "Not faster (1.00x at batch 1): 17 % of the FLOPs are gone (1.20x fewer), but the rest runs at a lower FLOP rate (83 % at batch 1 "
        "of the dense one's): small layers wait for memory and launches.",
    ),
    "not measured": ({"note": "there is no GPU"}, "Not measured: there is no GPU."),
    "not checked": (
        {"times": {1: clear(1.7)}, "flops": 510, "sparsity": 0.0, "doubt": "checked on example_input alone"},
        "1.70x faster at batch 1: 49 % of the FLOPs are gone (1.96x fewer); checked on example_input alone.",
    ),
    "2:4": ({"times": {1: clear(1.4)}, "note": "5 of 8 layers are"}, "1.40x faster at batch 1: 5 of 8 layers are."),
}


@pytest.mark.parametrize("case", SENTENCES)
def test_sentences_say_what_the_figures_say(case):
    given, expected = SENTENCES[case]
    given = {"flops": 1000, **given}
    assert sentence(DENSE, Variant("own", **given)) == expected


def test_the_table_is_aligned_and_json():
    masked = Variant("masked", {1: clear(0.9), 64: clear(1.5)}, 1234567, 1000, 0.5, 2_500_000, 4_000_000, 900, 0.987, sentence="Because.")
    found = Measurement((DENSE, masked, Variant("2:4", sentence="Not measured: x.")), "CPU", 1, "float32", "torch 2.13", {1: 5, 64: 7})
    lines = str(found).splitlines()
    assert lines[0] == "CPU, 1 thread, torch 2.13, float32; medians of rounds in which all take turns"
    assert len({len(line) for line in lines[1:4]}) == 1
    assert lines[1].split()[:5] == ["network", "batch", "1", "batch", "64"]
    numbers = ["1,234,567", "1,000", "2.50", "4.00", "MB", "0.9", "kB", "98.70", "%"]
    assert lines[3].split() == ["masked", "1.11e+03", "ms", "(0.90x)", "667", "ms", "(1.50x)", "96", *numbers]
    assert lines[4:] == ["", "dense   ", "masked  Because.", "2:4     Not measured: x."]
    told = json.loads(json.dumps(found.as_dict()))
    assert told["variants"][1]["samples_per_second"]["64"] == pytest.approx(96)
    assert told["variants"][1]["speedup"] == {"1": 0.9, "64": 1.5}
    assert (told["variants"][2]["measured"], told["variants"][2]["flops"], told["rounds"]) == (False, None, {"1": 5, "64": 7})

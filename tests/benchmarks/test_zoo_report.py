"""The table of networks that were pruned and shrunk, from rows that are made up."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("torch_pruning", reason="needs the package torch-pruning: pip install 'bip-fast[test]'")

ROWS = [
    {
        "network": "torchvision:a", "image": 128, "before": 4_000_000, "after": 1_000_000, "layers": 7, "same": True, "speedup": 2.504,
        "coupled_seconds": 1.2, "shrink_seconds": 3.4, "kept": 0, "reason": "", "seconds": 9.9,
    },
    {
        "network": "timm:b", "image": 224, "before": 2_000_000, "after": 2_000_000, "layers": 0, "same": True, "speedup": 1.0,
        "coupled_seconds": 20.4, "shrink_seconds": 0.2, "kept": 12, "reason": "a|b goes over these channels", "seconds": 30.0,
    },
    {"network": "timm:c", "failed": "not done after 300 seconds", "seconds": 300.0},
]  # fmt: skip


@pytest.fixture
def zoo(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    from bench.studies import zoo

    return zoo


def test_a_line_for_each_network_and_a_sentence_for_all(zoo):
    lines = zoo.table({"rows": ROWS}).splitlines()
    assert lines[2:] == [
        "| torchvision:a | 4.00M | 1.00M (25 %) | the same | 2.50x | 5 |  |",
        "| timm:b | 2.00M | 2.00M (100 %) | the same | 1.00x | 21 | 12, most: a\\|b goes over these channels |",
        "| timm:c |  |  | **failed** |  |  | not done after 300 seconds |",
    ]
    assert len({line.replace("\\|", "").count("|") for line in lines}) == 1
    expected = "3 networks: 1 smaller with the same outputs, 1 not smaller, 0 with other outputs, 1 failed."
    assert zoo.summary({"rows": ROWS}) == f"{expected} Both functions together took at most 21 seconds."
    assert "**differ**" in zoo.table({"rows": [ROWS[0] | {"same": False}]})


@pytest.mark.slow
def test_a_row_is_measured_in_a_process_of_its_own_and_kept_beside_others(zoo, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        zoo, "built", lambda name: (torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4)), torch.randn(1, 6))
    )
    row = zoo.row_of("torchvision:tiny")
    assert (row["before"], row["after"], row["same"], row["layers"]) == (6 * 8 + 8 + 8 * 4 + 4, 6 * 4 + 4 + 4 * 4 + 4, True, 1)
    assert zoo.main(["--networks", "torchvision:there_is_none", "--results", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*/zoo.json")
    (failed,) = json.loads(path.read_text())["rows"]
    assert failed["network"] == "torchvision:there_is_none"
    assert failed["failed"]
    path.write_text(json.dumps({"rows": [*ROWS, failed]}))
    monkeypatch.setattr(zoo, "tried", lambda name, limit: ROWS[1] | {"network": name, "kept": int(limit)})
    assert zoo.main(["--networks", "timm:c", "--limit", "7", "--results", str(tmp_path)]) == 0
    assert [row["network"] for row in json.loads(path.read_text())["rows"]] == [*(row["network"] for row in ROWS), failed["network"]]
    assert "| timm:c | 2.00M |" in capsys.readouterr().out

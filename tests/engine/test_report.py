"""The layer table: which weights it counts, exact figures, the printed form."""

import json

import pytest
import torch
from torch import nn

from bip_fast import FastBiP
from bip_fast.engine.report import Report, Row, layer_table, report


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.conv = nn.Conv2d(2, 3, 3)
        self.norm = nn.BatchNorm2d(3)
        self.up = nn.ConvTranspose1d(2, 3, 2)
        self.fc = nn.Linear(4, 6)
        self.tied = nn.Linear(4, 6)
        self.tied.weight = self.fc.weight


def test_eight_bit_floats_are_counted():
    x = torch.eye(4).to(torch.float8_e4m3fn)
    assert [(row.kept, row.total) for row in report({"a": x})] == [(4, 16)]


@pytest.fixture
def model():
    model = Network()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1)
        model.conv.weight[0] = 0
        model.conv.weight[1, 0, 0, 0] = -0.0
        model.fc.weight[:] = torch.eye(6, 4)
    return model


ROWS = (Row("conv.weight", (3, 2, 3, 3), 35, 54), Row("up.weight", (2, 3, 2), 12, 12), Row("fc.weight", (6, 4), 4, 24))


def test_a_model_is_counted_by_conv_and_linear_layers(model):
    table = report(model)
    assert table.rows == ROWS
    assert (table.kept, table.total, len(table)) == (51, 90, 3)
    assert table.sparsity == 1 - 51 / 90
    assert [row.sparsity for row in table] == [1 - 35 / 54, 0, 1 - 4 / 24]


def test_a_state_dict_is_counted_by_tensors_of_two_or_more_dimensions(model):
    state = model.state_dict()
    state["steps"] = torch.ones(2, 2, dtype=torch.int64)
    state["epoch"] = 3
    assert report(state).rows == (Row("embed.weight", (5, 4), 20, 20), *ROWS)


def test_memory_format_and_dtype_make_no_difference(model):
    assert report(model.to(memory_format=torch.channels_last).half()).rows == ROWS


def test_a_single_layer_has_the_name_of_its_parameter():
    assert [row.name for row in report(nn.Linear(2, 3))] == ["weight"]


def test_nan_counts_as_kept():
    assert layer_table([("a", torch.tensor([0.0, float("nan"), 1.0]))]).kept == 2


@pytest.mark.parametrize("source", [nn.BatchNorm2d(3), {}, {"bias": torch.ones(3)}])
def test_nothing_to_report_is_an_error(source):
    with pytest.raises(ValueError, match="no weights"):
        report(source)


def test_the_printed_table_is_aligned(model):
    table = Report((*report(model).rows, Row("a_long_name_for_a_layer.weight", (1234, 1000), 1_000_000, 1_234_000)))
    lines = str(table).splitlines()
    assert lines[0].split() == ["layer", "shape", "kept", "of", "sparsity"]
    assert lines[2].split() == ["conv.weight", "3x2x3x3", "35", "54", "35.19", "%"]
    assert lines[-1].split() == ["all", "layers", "1,000,051", "1,234,090", "18.96", "%"]
    assert len({len(line) for line in lines}) == 1


def test_the_dictionary_is_plain_json(model):
    found = json.loads(json.dumps(report(model).as_dict()))
    assert (found["kept"], found["total"], found["sparsity"]) == (51, 90, 1 - 51 / 90)
    assert found["layers"][0] == {"name": "conv.weight", "shape": [3, 2, 3, 3], "kept": 35, "total": 54, "sparsity": 1 - 35 / 54}


def test_an_empty_weight_is_dense():
    assert Row("a", (0, 3), 0, 0).sparsity == 0
    assert report({"a": torch.empty(0, 3)}).sparsity == 0


# --- of an optimizer -----------------------------------------------------------------------------------------------------------------


def layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 16, 3), nn.Linear(16, 4))


def test_units_are_counted_beside_weights():
    """Coupled ones once: 24 filters compete, though the layers have 32; and large filters go where small ones stay."""
    opt = FastBiP(layers(), sparsity=0.5, pattern="filter", coupled=[["0.weight", "1.weight"]])
    table = opt.report()
    assert [row.units[1] for row in table] == [8, 8, 16]
    assert table.rows[0].units == table.rows[1].units
    assert [(row.pattern, row.kept, row.total, row.sparsity) for row in table.units] == [("filter", 12, 24, 0.5)]
    assert table.rows[0].units[0] + table.rows[2].units[0] == 12
    assert table.sparsity != 0.5
    for row in table:
        assert row.kept * row.units[1] == row.total * row.units[0]
    lines = str(table).splitlines()
    assert lines[0].split() == ["layer", "shape", "units", "of", "kept", "of", "sparsity"]
    assert lines[2].split()[2:4] == [str(table.rows[0].units[0]), "8"]
    assert "filter: 12 of 24 units kept, sparsity 50.00 %, coupled ones counted once" in lines
    found = json.loads(json.dumps(table.as_dict()))
    assert found["units"] == [{"pattern": "filter", "kept": 12, "total": 24, "sparsity": 0.5}]
    assert found["layers"][0]["units"] == list(table.rows[0].units)
    opt.finalize()
    assert opt.report() == table


def test_patterns_have_a_column_where_they_differ():
    opt = FastBiP(layers(), sparsity=0.5, pattern="block:2x2", overrides={"1": {"pattern": "2:4"}, "3": {"pattern": "unstructured"}})
    lines = str(opt.report()).splitlines()
    assert lines[0].split() == ["layer", "shape", "pattern", "units", "of", "kept", "of", "sparsity"]
    assert [line.split()[2] for line in lines[2:6]] == ["block:2x2", "block:2x2", "2:4", "unstructured"]
    assert lines[4].split() == ["1.weight", "8x8x1x1", "2:4", "32", "64", "50.00", "%"]
    assert len({len(line) for line in lines[:8]}) == 1
    assert lines[8] == "block:2x2: 180 of 360 units kept, sparsity 50.00 %"
    assert str(FastBiP(layers(), sparsity=0.5).report()).splitlines()[0].split() == ["layer", "shape", "kept", "of", "sparsity"]

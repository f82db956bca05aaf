"""Energy of a run: what the counters of a device say, and when a run may claim it."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from cli_runs import prune

from bip_fast.experiments.runs import energy

CPU = torch.device("cpu")


def zones(folder, **microjoules):
    for name, value in microjoules.items():
        zone = folder / name.replace("_", ":")
        zone.mkdir(parents=True, exist_ok=True)
        (zone / "energy_uj").write_text(f"{value}\n")
    return folder


def test_packages_of_a_cpu_are_added_and_their_parts_are_not(tmp_path, monkeypatch):
    parts = {"intel-rapl_0": 1_500_000, "intel-rapl_1": 2_000_000, "intel-rapl_0_0": 900_000, "intel-rapl-mmio_0": 700_000}
    monkeypatch.setattr(energy, "RAPL", zones(tmp_path, **parts))
    assert energy.joules(CPU) == 3.5


@pytest.mark.parametrize("content", [None, "", "no number"])
def test_a_cpu_that_does_not_tell(tmp_path, monkeypatch, content):
    if content is not None:
        (tmp_path / "intel-rapl:0").mkdir()
        (tmp_path / "intel-rapl:0" / "energy_uj").write_text(content)
    monkeypatch.setattr(energy, "RAPL", tmp_path)
    assert energy.joules(CPU) is None


def test_millijoules_of_the_right_gpu(monkeypatch):
    class NVMLError(Exception):
        pass

    def of_uuid(text):
        if text != "GPU-1234":
            raise NVMLError(text)
        return "handle"

    nvml = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=of_uuid,
        nvmlDeviceGetTotalEnergyConsumption={"handle": 4250}.__getitem__,
        NVMLError=NVMLError,
        __spec__=object(),
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1234"))
    assert energy.joules(torch.device("cuda:0")) == 4.25
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="other"))
    assert energy.joules(torch.device("cuda:0")) is None


def test_no_library_no_figure(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert energy.joules(torch.device("cuda:0")) is None


def counted(folder, monkeypatch, read):
    """Joules by stage of a run whose device shows ``read(i)`` at the i-th look, and the number of looks."""
    looks = []

    def joules(device):
        looks.append(device)
        return read(len(looks) - 1)

    monkeypatch.setattr("bip_fast.experiments.runs.energy.joules", joules)
    assert prune(folder) == 0
    return json.loads((folder / "report.json").read_text())["joules"], len(looks)


def test_what_a_run_used_by_stage(tmp_path, monkeypatch):
    used, looks = counted(tmp_path, monkeypatch, lambda i: 10.0 + 2 * i)
    assert list(used) == ["pretrain", "prune"]
    assert min(used.values()) > 0
    assert sum(used.values()) == 2 * (looks - 1)


@pytest.mark.slow
def test_a_stage_of_which_a_part_was_not_counted_has_no_figure(tmp_path, monkeypatch):
    used, _ = counted(tmp_path, monkeypatch, lambda i: 100.0 if i == 0 else float(i))  # the counter started again
    assert used["pretrain"] is None
    assert used["prune"] > 0

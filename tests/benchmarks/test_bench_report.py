"""Result files, tables, targets and pictures made from benchmark runs. The rows are made up, so every figure can be checked by hand."""

import json
import re
from itertools import groupby
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'bip_fast[bench]'")

GPU = {"device": "NVIDIA H200", "torch": "2.13.0"}


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    from bench import readme, report, targets, workload

    return type("Bench", (), {"readme": readme, "report": report, "targets": targets, "workload": workload})


def measured(group, implementation, seconds, step, state="warm", n=25_600_000, **more):
    """As pytest-benchmark writes it: rounds of 10 calls, beside a copy of 1 ms."""
    extra = {"implementation": implementation, "n": n, "calls": 10, "step": step, "state": state, "density": 0.1}
    extra |= {"copy_seconds": 1e-3, "bytes_per_weight": 16.3, "host_seconds": 2e-5, "peak_bytes": 10**9, **more}
    stats = {"median": 10 * seconds, "min": 9 * seconds, "iqr": seconds, "rounds": 30}
    return {"group": group, "stats": stats, "extra_info": extra}


def launched(group, implementation, kernels):
    extra = {"implementation": implementation, "calls": 1, "launches": {"kernels": kernels, "host_launches": kernels + 1}}
    return {"group": group, "stats": {"median": 1, "min": 1, "iqr": 0, "rounds": 1}, "extra_info": extra}


@pytest.fixture
def raw(tmp_path):
    upper, topk, whole = "upper, flat 25.6M, global", "top-k, trained-like 25.6M", "iteration, resnet18"
    batch = {"batch": 128, "precision": "fp32", "n": 11_164_352}
    benchmarks = [
        launched(upper, "bip_fast", 4),
        measured(upper, "plain torch", 30e-3, "upper"),
        measured(upper, "bip_fast", 1.25e-3, "upper"),
        measured(upper + ", no window", "bip_fast", 3e-3, "upper", "no window"),
        measured("upper, flat 1G, global", "bip_fast", 2e-3, "upper", n=10**9),
        measured(topk, "bip_fast", 2e-3, "top-k", "trained-like"),
        measured(topk, "torch.topk(sorted=False), bare", 5e-3, "top-k", "trained-like"),
        measured(whole, "bip_fast, CUDA graph", 10.2e-3, "iteration", "resnet18", **batch),
        measured(whole, "dense SGD(fused=True), CUDA graph", 10e-3, "iteration", "resnet18", **batch),
        measured(whole, "bip_fast", 12e-3, "iteration", "resnet18", **batch),
        launched(whole, "bip_fast, CUDA graph", 300),
    ]
    interrupted = {"group": None, "stats": {"median": 1, "min": 1, "iqr": 0, "rounds": 1}, "extra_info": {}}
    benchmarks.append(interrupted)
    path = tmp_path / "raw.json"
    path.write_text(json.dumps({"machine_info": GPU, "datetime": "2026-12-01T00:00:00", "benchmarks": benchmarks}))
    return path


@pytest.fixture
def folder(bench, raw, tmp_path, capsys):
    assert bench.report.main(["--save", str(raw), str(tmp_path / "results")]) == 0
    capsys.readouterr()
    return tmp_path / "results" / "nvidia-h200"


def test_rows_are_times_of_one_call_and_launches_join_them(folder):
    rows = json.loads((folder / "results.json").read_text())["rows"]
    first = next(row for row in rows if row["implementation"] == "bip_fast")
    assert (first["median_seconds"], first["kernels"], first["host_launches"]) == (1.25e-3, 4, 5)
    assert not [row for row in rows if "iteration" in row["group"] or "calls" in row]
    iterations = json.loads((folder / "iterations.json").read_text())
    assert iterations["machine"] == GPU
    assert [row.get("kernels") for row in iterations["rows"]] == [300, None, None]


def test_saving_one_kind_leaves_the_other(bench, folder, raw, tmp_path):
    before = (folder / "iterations.json").read_bytes()
    data = json.loads(raw.read_text())
    data["benchmarks"] = [row for row in data["benchmarks"] if "iteration" not in str(row["group"])]
    raw.write_text(json.dumps(data))
    assert bench.report.main(["--save", str(raw), str(tmp_path / "results")]) == 0
    assert (folder / "iterations.json").read_bytes() == before


def test_targets_are_met_missed_or_not_measured(bench, folder):
    text = bench.targets.table(*(json.loads((folder / name).read_text()) for name in ("results.json", "iterations.json")))
    for line in (
        "| upper step, % of copy bandwidth | 25.6M | 80 | at least 85 | **missed** |",
        "| upper step, % of copy bandwidth | 1G | 50 | at least 85 | **missed** |",
        "| upper step, times faster than plain torch | 25.6M | 24 | at least 20 | met |",
        "| upper step, times faster than torch.topk(sorted=False), bare | 25.6M | 4 | at least 3 | met |",
        "| upper step, times faster than CUB DeviceTopK, bare | - |  | at least 3 | not measured |",
        "| upper step, no window, times the warm one | 25.6M | 2.4 | at most 2 | **missed** |",
        "| iteration of resnet18, times dense, both in a graph | 11.2M | 1.02 | at most 1.03 | met |",
        "| joint iteration of resnet50, times dense, both in a graph | - |  | at most 1.05 | not measured |",
    ):
        assert line in text.splitlines()


def test_the_report_has_tables_and_pictures(bench, folder, capsys):
    assert bench.report.main([str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "| upper, flat 25.6M, global | 25.6M | 10 % | bip_fast | 1.25 ms | 16.3 | 334 | 80 | 1.00 | 0.02 ms | 4 | 1 GB |" in printed
    assert "| iteration, resnet18 | 128 | fp32 | bip_fast, CUDA graph | 10.2 ms | 1.02 |  | 0.02 ms | 300 | 1 GB |" in printed
    for name in ("times.png", "roofline.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")


def test_readme_shows_results_and_says_what_has_none(bench, folder, monkeypatch):
    monkeypatch.setattr(bench.readme, "RESULTS", folder.parent)
    names = ("steps", "states", "topk", "targets", "iterations", "digits")
    text = "\n".join(f"<!-- results: {name} nvidia-h200 -->\nold\n<!-- end -->\n" for name in names)
    parts = [part.split("<!-- end -->")[0] for part in bench.readme.filled(text).split("<!-- results: ")[1:]]
    expected = ("30 ms (24.0x)", "no window", "5 ms (2.5x)", "| met |", "10.2 ms", "Not measured yet.")
    for part, shown in zip(parts, expected, strict=True):
        assert shown in part
        assert "old" not in part


def test_cases_are_boundary_lists(bench):
    workload = bench.workload
    for kind, most in (("cpu", 30), ("cuda", 45)):
        cases = workload.step_cases(kind, workload.DEFAULT_SIZES[kind])
        assert len(set(cases)) == len(cases) < most
        assert len({case.group for case in cases}) == len(cases)
        assert {case.n for case in cases} == set(workload.DEFAULT_SIZES[kind])
        assert {case.state for case in cases} == set(workload.STATES)
        assert {case.density for case in cases} == {0.5, 0.1, 0.01, 0.005}


def cells(line):
    return len(re.findall(r"(?<!\\)\|", line)) - 1


def committed_tables():
    root = Path(__file__).parents[2] / "bench" / "results"
    return sorted(str(path.relative_to(root)) for path in root.glob("*/*.json"))


@pytest.mark.parametrize("file", committed_tables())
def test_every_line_of_a_table_has_as_many_cells(bench, file):
    path = bench.readme.RESULTS / file
    texts = [make(bench.report.read(path), path.parent) for source, make in bench.readme.TABLES.values() if source == path.name]
    assert texts, f"{file} is shown nowhere"
    for text in texts:
        for is_table, lines in groupby(text.splitlines(), lambda line: line.startswith("|")):
            if is_table:
                header, delimiter, *rows = lines
                assert set(delimiter) <= set("|-: ")
                assert {cells(row) for row in rows} | {cells(delimiter)} == {cells(header)}

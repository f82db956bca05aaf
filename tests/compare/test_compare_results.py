"""What comes out of `bip-fast compare`: CSV, tables, pictures, and how long it says is left."""

import json
from pathlib import Path

import pytest
from compare_runs import rows_of

from bip_fast.experiments.compare import figures, grid, progress, results
from bip_fast.experiments.methods.stage import STEPS
from bip_fast.experiments.methods.table import steps_of
from bip_fast.experiments.runs.resolve import resolve


def row(label="BiP", sparsity=0.9, seed=0, accuracy=0.8, **more):
    base = {"data": "digits", "model": "resnet20", "width": None, "label": label, "row": label, "sparsity": sparsity, "seed": seed}
    base |= {"method": "dense" if label == "dense" else "bip", "pattern": "unstructured"}
    figures_ = {"accuracy": accuracy, "dense_accuracy": 0.9, "sparsity_exact": sparsity, "epochs_total": 4.0, "seconds_total": 90.0}
    return {**base, **figures_, "joules_total": None, **more}


def test_means_and_deviations():
    rows = [row(accuracy=0.8), row(seed=1, accuracy=0.9), row("IMP", accuracy=0.7, epochs_total=40.0)]
    first, second = results.summary(rows)
    assert (first["seeds"], first["accuracy"], first["accuracy_std"]) == (2, pytest.approx(0.85), pytest.approx(0.0707, abs=1e-4))
    assert (second["seeds"], second["accuracy_std"]) == (1, None)
    text = results.table([*rows, row("dense", 0.0, accuracy=0.95)])
    assert "| BiP | 85.00 ± 7.07 | 4 | 1.5 |" in text
    assert "| IMP | 70.00 | 40 | 1.5 |" in text
    assert "| dense | 95.00 | 4 | 1.5 |" in text


def test_only_dense_networks_stand_under_other_sparsities():
    text = results.table([row("dense", 0.0, accuracy=0.95), row(sparsity=0.0, accuracy=0.94), row(), row("IMP", 0.0, accuracy=0.93)])
    assert "| digits, resnet20 | 0 % | 90 % | epochs |" in text
    for line in ("| dense | 95.00 | 95.00 |", "| BiP | 94.00 | 80.00 |", "| IMP | 93.00 |  |"):
        assert line in text


def test_a_label_does_not_end_its_cell():
    assert "| a\\|b | 80.00 | 4 | 1.5 |" in results.table([row("a|b")])


@pytest.mark.parametrize(
    ("patterns", "head", "axis"),
    [
        (["unstructured", "2:4"], "| 50 % | 90 % |", "zeros among the weights of all layers that are pruned, %"),
        (["filter"], "| 50 % of the filters | 90 % of the filters |", "share of the filters that is pruned, %"),
        (["channel", "block:4x4"], "| 50 % of the input channels or blocks |", "share of the input channels or blocks that is pruned, %"),
    ],
)
def test_tables_and_pictures_say_what_a_sparsity_is_of(patterns, head, axis):
    from matplotlib.figure import Figure

    rows = [row(pattern, s, pattern=pattern) for pattern in patterns for s in (0.5, 0.9)] + [row("dense", 0.0)]
    assert head in results.table(rows)
    for plot in (figures._accuracy, figures._cost):
        axes = Figure().subplots()
        plot(axes, results.summary(rows), "")
        assert axes.get_xlabel().startswith(axis)


def test_pictures(finished, tmp_path):
    names = {path.name for path in finished.glob("*.png")}
    assert names == {"accuracy-digits-resnet20-2.png", "cost-digits-resnet20-2.png"}
    swept = [
        row(sparsity=s, setting_rewind=e, row=f"BiP, rewind {e}", accuracy=0.8 + i / 50)
        for s in (0.5, 0.9)
        for i, e in enumerate(["init", "3", "10"])
    ]
    made = figures.draw(swept, tmp_path)
    assert sorted(path.name for path in made) == ["accuracy-digits-resnet20.png", "cost-digits-resnet20.png", "rewind-digits-resnet20.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in made)
    assert figures._order("init") < figures._order("3") < figures._order("10") < figures._order("lr")


def test_results_become_a_table_of_the_readme(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    from bench import readme
    from bench.studies import compare as bench_compare

    assert bench_compare.main([str(finished), "--results", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    folder = next(tmp_path.iterdir())
    assert {path.name for path in folder.iterdir()} == {"out.json"} | {f"out-{path.name}" for path in finished.glob("*.png")}
    rows = json.loads((folder / "out.json").read_text())["rows"]
    assert [row["accuracy"] for row in rows] == [float(row["accuracy"]) for row in rows_of(finished / "runs.csv")]
    (folder / "quick.json").write_bytes((folder / "out.json").read_bytes())
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    text = readme.filled(f"<!-- results: quick {folder.name} -->\nold\n<!-- end -->")
    assert results.table(rows) in printed
    assert results.table(rows) in text
    assert "| BiP | " in text
    assert "`gmp`" in readme.filled("<!-- results: methods none -->\n<!-- end -->")


def test_a_search_becomes_its_table(finished, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    from bench import readme
    from bench.studies import compare as bench_compare

    search = tmp_path / "search"
    search.mkdir()
    (search / "runs.csv").write_bytes((finished / "runs.csv").read_bytes())
    assert bench_compare.main([str(search), "--results", str(tmp_path / "results")]) == 0
    (folder,) = (tmp_path / "results").iterdir()
    monkeypatch.setattr(readme, "RESULTS", tmp_path / "results")
    text = readme.filled(f"<!-- results: search {folder.name} -->\n<!-- end -->")
    assert "| method | levels | lr | mask_lr | mask_momentum | gamma | score_start | ramp | freeze | 0 % | 50 % | 80 % |" in text
    assert "| bip | joint | 0.2 | 1.6 | 0 | off | square | 0.5 | 1 |  | " in text
    assert "| imp |  |  |  |  |  |  |  |  |  | " in text


def test_steps_are_written_for_the_methods_that_take_them():
    for method, expected in {"bip-paper": "alternating", "bip": "joint", "omp": None}.items():
        assert steps_of(resolve({"method": method}))["levels"] == expected
    assert {name: value for name, value in steps_of(resolve({"method": "gmp"})).items() if value is not None} == {
        "lr": 0.05,
        "ramp": 0.5,
        "ramp_start": 0.0,
    }
    for method in ("omp", "omp-finetune", "imp"):
        assert steps_of(resolve({"method": method, "rewind": None, "lr": 0.2}))["lr"] == 0.2
        assert steps_of(resolve({"method": method, "rewind": "lr"}))["lr"] is None


def test_every_choice_of_the_committed_search_is_in_its_file():
    root = Path(__file__).parents[2]
    (committed,) = (root / "bench" / "results").glob("*/search.json")
    there = [
        (cell.settings.sparsity, cell.settings.method, steps_of(cell.settings)) for cell in grid.read(root / "configs/search.yaml").rows
    ]
    for row in json.loads(committed.read_text())["rows"]:
        names = {"bip", "bip-paper"} if row["method"] == "bip" else {row["method"]}
        wanted = {name: row[name] for name in STEPS if row.get(name) is not None}
        found = [own for sparsity, method, own in there if sparsity == row["sparsity"] and method in names]
        assert any(wanted.items() <= own.items() for own in found), row


def test_time_left_follows_what_was_measured():
    now = [100.0]
    cells = [grid.Cell("BiP", resolve({"epochs": 10, "seed": seed, "checkpoint": "x"})) for seed in range(4)]
    shown = progress.Progress(now=lambda: now[0])
    shown.begin(cells, {cells[3].address})
    assert "left" not in shown.summary()
    for cell in cells[:2]:
        shown.update(cell, 0.2, "", fresh=True)  # taken up where they were, which says nothing of the speed
    assert "left" not in shown.summary()
    for share in (0.3, 0.5):
        now[0] += 25
        for cell in cells[:2]:
            shown.update(cell, share, "epoch 5/10")
    assert shown.summary() == "1 of 4 runs, 50.0 % of the epochs, 2:47 left", "6 epochs in 50 seconds, 20 to go"
    now[0] += 50
    shown.finish(cells[0])
    shown.fail(cells[1], "broken")
    assert shown.summary() == "2 of 4 runs, 1 failed, 75.0 % of the epochs, 1:31 left", "11 in 100, 10 to go"

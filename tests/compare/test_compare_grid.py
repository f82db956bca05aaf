"""What a file of `bip-fast compare` stands for: combinations, what they start from, addresses, and wrong files."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from cli_runs import one_line
from compare_runs import TINY, compare, written
from data_files import write_fashion_mnist

from bip_fast.errors import UserError
from bip_fast.experiments.compare import grid
from bip_fast.experiments.methods.imp import rounds
from bip_fast.experiments.methods.table import steps_of
from bip_fast.experiments.models.transformer import DECODERS, TRANSFORMERS
from bip_fast.experiments.settings import Settings


def test_all_combinations_and_what_they_start_from(tmp_path):
    found = grid.read(written(tmp_path))
    rows = [(cell.label, cell.settings.sparsity, cell.settings.seed) for cell in found.rows]
    pruned = [(label, s, seed) for label in ("BiP", "imp", "random") for seed in (0, 1) for s in (0.5, 0.8)]
    assert sorted(rows) == sorted([("dense", 0.0, 0), ("dense", 0.0, 1), *pruned])
    assert len(found.cells) == 16, "the dense row is the dense run that the others start from; a round of imp on the way for each seed"
    for cell in found.rows:
        parent = cell.parent.settings if cell.parent else None
        assert (parent is None) == (cell.label in ("dense", "random"))
        if cell.label == "BiP":
            assert (parent.method, parent.seed) == ("dense", cell.settings.seed)
        if cell.label == "imp":
            line = [(ancestor.settings.method, ancestor.settings.sparsity) for ancestor in cell.ancestors()]
            assert line == [("imp", s) for s in (0.75, 0.5) if s < cell.settings.sparsity] + [("dense", 0.0)]
            assert cell.dense.settings.method == "dense"
            assert found.snapshots[cell.dense.address] == {1}
    assert [cell.epochs for cell in found.rows if cell.label == "imp"] == [1, 1, 1, 1], "a round of one epoch each"


def test_more_seeds_without_a_list_of_seeds(tmp_path):
    """They come on top of the seed that there is without one."""
    text = "sparsity: [0.5, 0.8]\nmore_seeds: {0.8: [1, 2]}\nmethods: {random: {}}"
    rows = [(cell.settings.sparsity, cell.settings.seed) for cell in grid.read(written(tmp_path, text)).rows]
    assert sorted(rows) == [(0.5, 0), (0.8, 0), (0.8, 1), (0.8, 2)]


def test_a_network_of_iterative_pruning_depends_on_no_other_sparsity_of_the_file(tmp_path):
    text = "seed: 0\nmethods: {imp: {rewind: 1, pretrain_epochs: 10, epochs: 10, sparsity: %s}}"
    both = {cell.settings.sparsity: cell for cell in grid.read(written(tmp_path, text % "[0.9, 0.95, 0.98]")).rows}
    for sparsity, count in ((0.9, 11), (0.95, 14), (0.98, 18)):
        (alone,) = grid.read(written(tmp_path, text % sparsity)).rows
        assert alone.address == both[sparsity].address
        line = [alone, *alone.ancestors()]
        sparsities = [cell.settings.sparsity for cell in reversed(line[:-1])]
        assert sparsities == rounds(0.0, sparsity, 0.2)
        assert (len(sparsities), sum(cell.epochs for cell in line[:-1])) == (count, 9 * count)
    on_the_way = grid.read(written(tmp_path, text % "[0.2, 0.36, 0.488, 0.5904, 0.67232, 0.737856, 0.790285, 0.832228]"))
    assert len(on_the_way.cells) == 9, "a sparsity that is a round is a round for the others too"


def test_an_address_is_what_decides_the_result(tmp_path):
    first = {cell.address for cell in grid.read(written(tmp_path)).rows}
    same = TINY.replace("BiP:", "another label:").replace("[0.8, 0.5]", "[0.5, 0.8]")
    assert {cell.address for cell in grid.read(written(tmp_path, same)).rows} == first
    whole = TINY.replace("[0.8, 0.5]", "[0.8, 0.5]\nmomentum: 0")
    assert [*grid.read(written(tmp_path, whole)).cells] == [*grid.read(written(tmp_path, whole.replace("tum: 0", "tum: 0.0"))).cells]
    default = TINY.replace("width: 2", f"width: 2\nmomentum: {Settings.momentum}")
    assert {cell.address for cell in grid.read(written(tmp_path, default)).rows} == first
    for change in (
        "pretrain_epochs: 2|pretrain_epochs: 3",
        "width: 2|width: 3",
        "data: digits|data: digits\nstride: 2",
        "seed:|threads: 2\nseed:",
    ):
        other = {cell.address for cell in grid.read(written(tmp_path, TINY.replace(*change.split("|")))).rows}
        assert not other & first, change
    defaults = dict(Settings.__dataclass_fields__)
    defaults["momentum"].default, before = 0.5, defaults["momentum"].default
    try:
        assert {cell.address for cell in grid.read(written(tmp_path, default)).rows} == first, (
            "a default that changes changes no given value"
        )
    finally:
        defaults["momentum"].default = before
    only_bip = {cell.address for cell in grid.read(written(tmp_path, TINY.replace("levels: joint", "levels: joint, gamma: 2.0"))).rows}
    assert len(only_bip - first) == 4


def test_other_files_of_the_same_name_are_another_run(tmp_path):
    text = written(tmp_path, "data: fashion-mnist\nmethods: {bip: }")
    addresses = set()
    for i, count in enumerate((20, 20, 30)):
        folder = tmp_path / str(i)
        write_fashion_mnist(folder, train=count, test=10)
        addresses.add(frozenset(grid.read(text, folder).cells))
        (folder / "notes.txt").write_text("none of its files")
        addresses.add(frozenset(grid.read(text, folder).cells))
    assert len(addresses) == 2


@pytest.mark.slow
def test_a_folder_that_began_with_other_settings_starts_afresh(finished, tmp_path, capsys):
    text = TINY.replace("seed: [0, 1]", "seed: 0").split("  imp")[0]
    out = tmp_path / "out"
    cell = next(cell for cell in grid.read(written(tmp_path, text)).rows if cell.label == "dense")
    stored = {**cell.settings.as_dict(), "momentum": 0.5}
    (out / cell.folder).mkdir(parents=True)
    (out / cell.folder / "config.json").write_text(json.dumps(stored))
    torch.save({"stage": "none"}, out / cell.folder / "checkpoint.pt")
    assert compare(written(tmp_path, text), out) == 0
    assert f"{cell.folder}: began with other settings; it starts afresh" in capsys.readouterr().err
    assert json.loads((out / cell.folder / "config.json").read_text())["momentum"] == 0.9
    assert (out / cell.folder / "model.safetensors").read_bytes() == (finished / cell.folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("damage", [b"half of a file", {"stage": "none"}])
def test_a_run_with_a_damaged_or_old_checkpoint_starts_afresh(finished, tmp_path, capsys, damage):
    text = TINY.replace("seed: [0, 1]", "seed: 0").split("  BiP")[0]
    out = tmp_path / "out"
    (cell,) = grid.read(written(tmp_path, text)).cells.values()
    folder = out / cell.folder
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(cell.settings.as_dict()))
    if isinstance(damage, bytes):
        (folder / "checkpoint.pt").write_bytes(damage)
    else:
        torch.save(damage, folder / "checkpoint.pt")
    assert compare(written(tmp_path, text), out) == 0
    shown = capsys.readouterr().err
    assert f"{cell.folder}: checkpoint.pt " in shown
    assert "; it starts afresh\n" in shown
    assert "--overwrite" not in shown
    assert (folder / "model.safetensors").read_bytes() == (finished / cell.folder / "model.safetensors").read_bytes()


def test_a_model_of_the_users_own_counts_with_its_code(tmp_path):
    own = tmp_path / "own.py"
    text = TINY.replace("model: resnet20", f"model: {own}:net").replace("width: 2\n", "")
    own.write_text("a = 1")
    found = grid.read(written(tmp_path, text))
    first = [cell.address for cell in found.rows]
    own.write_text("a = 2")
    assert [cell.address for cell in found.rows] == first, "as the code was when the comparison began"
    assert found.cells.keys() == {cell.address for cell in found.cells.values()}
    assert not set(first) & {cell.address for cell in grid.read(written(tmp_path, text)).rows}


def test_lists_inside_of_a_method_are_swept(tmp_path):
    text = TINY.replace("levels: joint", "levels: [joint, alternating], gamma: [0.5, 1.0, 2.0]")
    rows = [cell for cell in grid.read(written(tmp_path, text)).rows if cell.label == "BiP"]
    assert len(rows) == 2 * 3 * 2 * 2
    assert {cell.swept for cell in rows} == {(("levels", a), ("gamma", b)) for a in ("joint", "alternating") for b in (0.5, 1.0, 2.0)}


def test_a_list_of_methods_prunes_all_but_dense(tmp_path):
    text = TINY.replace("BiP: {method: bip, levels: joint}", "both: {method: [dense, bip]}")
    rows = [(cell.settings.method, cell.settings.sparsity) for cell in grid.read(written(tmp_path, text)).rows if cell.label == "both"]
    assert sorted(rows) == sorted(2 * [("dense", 0.0), ("bip", 0.5), ("bip", 0.8)])


def test_labels_of_the_same_settings_are_rows_of_one_run(tmp_path):
    text = TINY.replace("  random:", "  random:\n  again: {method: random}\n  unpruned: {method: dense, epochs: 0}")
    found = grid.read(written(tmp_path, text))
    assert found.cells.keys() == grid.read(written(tmp_path)).cells.keys()
    by_label = {label: [cell.address for cell in found.rows if cell.label == label] for label in ("random", "again", "dense", "unpruned")}
    assert by_label["random"] == by_label["again"]
    assert len(by_label["random"]) == 4
    assert by_label["dense"] == by_label["unpruned"]


def test_a_dense_network_is_a_row_for_each_setting_that_decides_it(tmp_path):
    text = TINY.replace("pretrain_epochs: 2", "pretrain_epochs: [2, 3]\ngamma: [1.0, 2.0]")
    rows = [(cell.swept, cell.settings.seed) for cell in grid.read(written(tmp_path, text)).rows if cell.label == "dense"]
    assert sorted(rows) == [((("pretrain_epochs", n),), seed) for n in (2, 3) for seed in (0, 1)]


def test_a_step_size_has_a_meaning_where_nothing_rewinds(tmp_path):
    text = "rewind: lr\nmethods: {imp: {rewind: null, lr: 0.2}, bip: {lr: 0.2}, gmp: {lr: 0.2}, omp: }"
    found = {cell.label: steps_of(cell.settings)["lr"] for cell in grid.read(written(tmp_path, text)).rows}
    assert found == {"imp": 0.2, "bip": 0.2, "gmp": 0.2, "omp": None}


def test_a_pattern_with_one_sparsity_needs_none(tmp_path):
    text = 'pattern: "2:4"\nmethods: {dense: {epochs: 0}, bip: , "dense, longer": {method: dense, epochs: 2}}'
    rows = {cell.label: (cell.settings.sparsity, cell.settings.pattern) for cell in grid.read(written(tmp_path, text)).rows}
    assert rows == {"dense": (0.0, "unstructured"), "bip": (0.5, "2:4"), "dense, longer": (0.0, "unstructured")}


BAD = {
    f"lr: 1{400 * '0'}\nmethods: {{bip: }}": "lr must be 0 or more, got inf",
    "methods: {gmp: {rewind: 3}}": "methods: gmp: method gmp makes no use of rewind: leave it out",
    "methods: {snip: {lr: 0.2}}": "methods: snip: method snip makes no use of lr: leave it out",
    "methods: {imp: {lr: 0.2}}": "methods: imp: method imp makes no use of lr: leave it out",
    "sparsity: [0.5, a]\nmethods: {bip: }": "sparsity must be float or int, got 'a'",
    "sparsity: [null, 0.5]\nmethods: {bip: }": "sparsity must be float or int, got None",
    "data: [[digits]]\nmethods: {bip: }": "tsv:FILE or text:FILE, got ['digits']",
    "data: {a: b}\nmethods: {bip: }": "got {'a': 'b'}",
    "lr: {a: b}\nmethods: {bip: }": "lr must be float or int, got {'a': 'b'}",
    "methods: {x: {method: {a: 1}}}": "method must be one of bip",
    "methods: {x: {method: [[bip]]}}": "got ['bip']",
    "methods: {bip: {model: [[resnet20]]}}": "model must be str, got ['resnet20']",
    "seed: 2020-13-45\nmethods: {bip: }": "is not YAML: month must be in 1..12",
    "seed: !!int abc\nmethods: {bip: }": "is not YAML: invalid literal for int()",
    "seed: !!timestamp abc\nmethods: {bip: }": "is not YAML",
    f"seed: {3000 * '['}": "is not YAML: maximum recursion depth exceeded",
    "[methods]: {bip: }": "is not YAML",
    "methods: {bip: {1: 2}}": "unknown setting 1",
    "methods: {bip: {rewind: [[1]]}}": "rewind must be str or NoneType, got [1]",
    "pattern: 2:4\nmethods: {bip: }": "got 124: YAML takes it for a number, quote it",
    "seed: 0\nmethods: {bip: }\nseed: 1": "tiny.yaml, line 3: 'seed' is there twice",
    "methods:\n  bip:\n  random:\n  bip: {lr: 1.0}": "tiny.yaml, line 4: 'bip' is there twice",
    "methods: {1: {method: bip}, '1': {method: random}}": "line 1: '1' is there twice",
    "methods: {bip: {lr: 1.0, epochs: 2, lr: 2.0}}": "line 1: 'lr' is there twice",
    "seed: [0, 1, 0]\nmethods: {bip: }": "methods: bip: seed lists 0 twice",
    "lr: [1, 1.0]\nmethods: {bip: }": "methods: bip: lr lists 1.0 twice",
    "methods: {}": "must have settings and `methods:`",
    "just text": "must have settings and `methods:`",
    "a: [": "is not YAML",
    "methods: {bip: 3}": "methods: bip: expected settings, got 3",
    "methods: {bip: {speed: 3}}": "methods: bip: unknown setting 'speed'; there are data,",
    "methods: {bip: {checkpoint: x}}": "unknown setting 'checkpoint'",
    "methods: {magic: }": "methods: magic: method must be one of bip",
    "methods: {bip: {lr: fast}}": "methods: bip: lr must be float",
    "methods: {bip: {seed: []}}": "seed must have a value, got an empty list",
    "sparsity: 95\nmethods: {bip: }": "sparsity must be in [0, 1), got 95 (write 0.95 for 95 %)",
    "data: cifar10\nmethods: {bip: }": "data cifar10 needs --data-dir",
}


@pytest.mark.parametrize("text", BAD)
def test_wrong_files_are_one_line(text, tmp_path, capsys):
    assert compare(written(tmp_path, text), tmp_path / "out") == 2
    assert BAD[text] in one_line(capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_not_there(tmp_path, capsys):
    assert compare(tmp_path / "no.yaml", tmp_path / "out") == 2
    assert "cannot read" in one_line(capsys.readouterr().err)


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_files_of_configs_can_be_read(path):
    model = str(yaml.safe_load(path.read_text()).get("model"))  # or a list
    package = (TRANSFORMERS | DECODERS).get(model)
    if package is not None and find_spec(package) is None:
        pytest.skip(f"needs {package}")
    assert grid.read(path).rows


def test_unknown_settings_name_what_there_is(tmp_path):
    with pytest.raises(UserError, match="unknown setting 'epoch'; there are data, train_images"):
        grid.read(written(tmp_path, "epoch: 3\nmethods: {bip: }"))

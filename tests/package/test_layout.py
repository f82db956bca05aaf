"""The layout of the package is its architecture (docs/architecture.md): imports go one way, and every room is where the page says."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "bip_fast"
FILES = sorted(PACKAGE.rglob("*.py"))
# What a folder must not import, also inside of functions and for annotations alone: everything that stands above it.
ABOVE = {
    "engine": ("optimizer", "schedule", "graphs", "timing", "export", "integrations", "experiments", "commands"),
    "timing": ("export", "integrations", "experiments", "commands"),
    "export": ("integrations", "experiments", "commands"),
    "integrations": ("experiments", "commands"),
    "experiments": ("integrations", "commands"),
    "experiments.data": ("experiments.methods", "experiments.runs", "experiments.compare"),
    "experiments.models": ("experiments.data", "experiments.methods", "experiments.runs", "experiments.compare"),
    "experiments.methods": ("experiments.runs", "experiments.compare"),
    "experiments.runs": ("experiments.compare",),
}


def module_of(path: Path) -> str:
    """Name inside of the package, such as "engine.launch.plan"; "" for the package itself."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip(".")


MODULES = {module_of(path): path for path in FILES}


def imports_of(path: Path) -> set[str]:
    """Modules of the package that a file imports anywhere in it: the file a name is taken from, and packages whose own names are taken."""
    package = module_of(path).split(".") if path.name == "__init__.py" else module_of(path).split(".")[:-1]
    package = [part for part in package if part]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("bip_fast").lstrip(".") for alias in node.names if alias.name.split(".")[0] == "bip_fast"}
        if not isinstance(node, ast.ImportFrom):
            continue
        if node.level:
            base = package[: len(package) - node.level + 1]
        elif (node.module or "").split(".")[0] == "bip_fast":
            base = []
        else:
            continue
        base = [*base, *(node.module or "").removeprefix("bip_fast").strip(".").split(".")]
        source = ".".join(part for part in base if part)
        for alias in node.names:
            submodule = f"{source}.{alias.name}".lstrip(".")
            found.add(submodule if submodule in MODULES else source)
    return found & MODULES.keys()


IMPORTS = {name: imports_of(path) for name, path in MODULES.items()}


def test_the_imports_are_seen():
    """The tests below would pass on an empty graph."""
    assert "engine.native" in IMPORTS["engine.launch.plan"]
    assert "engine.engine" in IMPORTS["optimizer"]
    assert {"commands.measure", "commands.prune"} <= {name for name in MODULES if "experiments.runs.folder" in IMPORTS[name]}
    assert len([1 for names in IMPORTS.values() if names]) > 50


def test_no_file_imports_itself_in_a_circle():
    done: set[str] = set()

    def follow(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, f"a circle: {' -> '.join((*way[way.index(name) :], name))}"
        if name not in done:
            for other in sorted(IMPORTS[name] - {""}):  # the package's face hands on names of optimizer and engine
                follow(other, (*way, name))
            done.add(name)

    for name in IMPORTS:
        follow(name, ())


@pytest.mark.parametrize("folder", ABOVE)
def test_a_folder_does_not_know_what_stands_above_it(folder):
    inside = [name for name in MODULES if name.startswith(folder + ".")]
    assert inside
    for name in inside:
        wrong = [other for other in IMPORTS[name] for above in ABOVE[folder] if (other + ".").startswith(above + ".")]
        assert not wrong, f"{name} imports {wrong}"


def test_nothing_imports_the_integrations():
    """Each needs a package that only its users have."""
    inside = {name for name in MODULES if name.split(".")[0] == "integrations"}
    assert len(inside) > 3
    assert {name: IMPORTS[name] & inside for name in MODULES.keys() - inside if IMPORTS[name] & inside} == {}


@pytest.mark.parametrize("where", ["bip_fast", "tests", "bench", "csrc"])
def test_no_folder_has_more_than_20_files(where):
    counts = Counter(path.parent for path in (ROOT / where).rglob("*") if path.suffix in {".py", ".cpp", ".cu", ".h", ".cuh"})
    counts = {str(folder.relative_to(ROOT)): count for folder, count in counts.items() if "__pycache__" not in folder.parts}
    assert counts
    assert {folder: count for folder, count in counts.items() if count > 20} == {}


def test_no_two_rooms_have_one_name():
    """A command is named after what it does, and so may be what does it."""
    names = Counter(path.stem for path in FILES if path.parent.name != "commands" and path.stem not in ("__init__", "__main__"))
    assert {name: count for name, count in names.items() if count > 1} == {}


def test_every_room_is_in_the_picture():
    page = (ROOT / "docs" / "architecture.md").read_text()
    missing = [name for name, path in MODULES.items() if path.stem not in ("__init__", "__main__") and f"{path.stem}.py" not in page]
    assert missing == [], "run python3 -m bench.readme"

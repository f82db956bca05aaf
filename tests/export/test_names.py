"""What a user imports from `bip_fast.export`: functions, each brought by its room when it is first looked up."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import bip_fast
from bip_fast import export

PUBLIC = (
    "apply_masks",
    "attach_masks",
    "coupled_filters",
    "load_masks",
    "measure",
    "save_masks",
    "shrink",
    "to_semi_structured",
)
OPTIONAL = {"torch_pruning", "safetensors", "onnx", "onnxruntime", "onnxscript"}


def modules_after(code):
    """Modules of the package, and optional ones, that are there after some code in a fresh interpreter."""
    root = Path(bip_fast.__file__).resolve().parents[1]
    code += f"\nimport sys; print(*(n for n in sys.modules if n.startswith('bip_fast') or n in {OPTIONAL}))"
    return set(subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout.split())


def test_the_names_are_functions():
    assert set(export.__all__) == set(PUBLIC)
    for name in PUBLIC:
        assert inspect.isfunction(getattr(export, name)), name
        assert name in dir(export)
        assert getattr(export, name).__module__.startswith("bip_fast.export.")


@pytest.mark.slow
@pytest.mark.parametrize("order", [PUBLIC, PUBLIC[::-1]], ids=["forwards", "backwards"])
def test_no_room_takes_the_place_of_a_function(order):
    """An import of a room puts it into the package under its own name."""
    lines = [f"from bip_fast.export import {name}; assert callable({name}), {name!r}" for name in order]
    again = [f"assert callable(bip_fast.export.{name}), {name!r}" for name in order]
    modules_after("\n".join([*lines, "import bip_fast.export", *again]))


def test_what_is_no_name():
    with pytest.raises(AttributeError, match=r"'bip_fast\.export' has no attribute 'shrnk'"):
        _ = export.shrnk
    with pytest.raises(ImportError, match="shrnk"):
        from bip_fast.export import shrnk  # noqa: F401


@pytest.mark.slow
def test_imports_are_light():
    core = modules_after("import bip_fast")
    rooms = {name.split(".")[1] for name in core if "." in name}
    assert rooms - {"_C"} == {"binding", "engine", "optimizer", "presets", "reference", "saving", "schedule", "tables"}
    assert modules_after("import bip_fast.export") == core | {"bip_fast.export"}
    masks = modules_after("from bip_fast.export import save_masks")
    assert "bip_fast.export.masks" in masks
    assert not masks & {"bip_fast.export.shrinking", "bip_fast.export.measuring", *OPTIONAL}

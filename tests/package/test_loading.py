"""Reading a file never runs code from it (SECURITY.md): calls that could are allowed only in the form in which they cannot."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NEVER = {
    "eval", "exec", "compile", "pickle.load", "pickle.loads", "marshal.load", "marshal.loads", "shelve.open", "joblib.load", "dill.load",
    "yaml.load", "yaml.unsafe_load", "yaml.full_load", "torch.hub.load", "runpy.run_path",
}  # fmt: skip
NEEDED = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False), "numpy.load": ("allow_pickle", False)}


def unsafe_calls(source: str) -> list[str]:
    """Calls that may run what is in a file, each with its line."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name, words = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
        needed = NEEDED.get(name)
        wrong = name in NEVER or (needed is not None and words.get(needed[0]) != repr(needed[1]))
        wrong |= words.get("trust_remote_code", "False") != "False" or words.get("allow_pickle", "False") != "False"
        if wrong:
            found.append(f"line {node.lineno}: {ast.unparse(node)}")
    return found


@pytest.mark.parametrize(
    "source",
    ["torch.load(path)", "torch.load(path, weights_only=False)", "pickle.load(file)", "np.load(path, allow_pickle=True)", "np.load(path)",
     "yaml.load(text, Loader)", "Model.from_pretrained(x, trust_remote_code=True)", "eval(text)"],
)  # fmt: skip
def test_unsafe_calls_are_seen(source):
    assert unsafe_calls(source)


def test_nothing_that_is_read_can_run():
    files = [*(ROOT / "bip_fast").rglob("*.py"), *(ROOT / "examples").rglob("*.py")]
    loads = sum(path.read_text().count("torch.load(") for path in files)
    assert loads >= 2
    found = {str(path.relative_to(ROOT)): unsafe_calls(path.read_text()) for path in files}
    assert {name: calls for name, calls in found.items() if calls} == {}


def test_the_unpickler_of_data_sets_refuses_code():
    """The one other unpickler of the package."""
    import io
    import pickle

    cifar = pytest.importorskip("bip_fast.experiments.data.cifar", reason="needs the packages of the command line")

    class Hostile:
        def __reduce__(self):
            return print, ("run",)

    with pytest.raises(pickle.UnpicklingError, match="not allowed in a data file"):
        cifar._ArrayUnpickler(io.BytesIO(pickle.dumps({b"data": Hostile()}, protocol=2)), encoding="bytes").load()

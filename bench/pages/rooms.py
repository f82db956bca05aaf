"""The files of the package, each with the first sentence of its docstring: a table for every folder, as docs/architecture.md shows them."""

from __future__ import annotations

import ast
import re
from pathlib import Path

__all__ = ["table"]

FOLDERS = (
    ".", "engine", "engine/launch", "export", "integrations", "timing", "experiments", "experiments/data", "experiments/models",
    "experiments/methods", "experiments/runs", "experiments/compare", "commands",
)  # fmt: skip


def _first_sentence(path: Path) -> str:
    """Of the docstring of a file, as one line of Markdown."""
    paragraph = (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n\n")[0]
    sentence = re.split(r"(?<=\.) +(?=[A-Z`])", " ".join(paragraph.split()))[0]
    return sentence.replace("``", "`").replace("|", r"\|").rstrip(".:;") + "."


def table(package: Path) -> str:
    """Markdown: for each folder of ``package`` a heading, what its ``__init__`` says, and a line for each file.

    Raises:
        ValueError: a folder with Python files is not among those that are known.
    """
    files = [path for path in sorted(package.rglob("*.py")) if path.name not in ("__init__.py", "__main__.py")]
    unknown = {path.parent.relative_to(package).as_posix() for path in files} - {*FOLDERS}
    if unknown:
        raise ValueError(f"folders of the package must be in FOLDERS of bench/pages/rooms.py, got {', '.join(sorted(unknown))} beside them")
    parts = []
    for folder in FOLDERS:
        own = [path for path in files if path.parent == package / folder]
        if own:
            title = f"### `{package.name}/{folder}/`".replace("/./", "/")
            lines = "\n".join(f"| `{path.name}` | {_first_sentence(path)} |" for path in own)
            parts.append(f"{title}\n\n{_first_sentence(package / folder / '__init__.py')}\n\n| file | what it is |\n|---|---|\n{lines}")
    return "\n\n".join(parts)

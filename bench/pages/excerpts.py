"""Functions of the sources, as pages show them: cut out by name, so that a page cannot show what the code no longer says."""

from __future__ import annotations

import ast
import re
from pathlib import Path

__all__ = ["excerpt"]


def excerpt(root: Path, place: str) -> str:
    """A Markdown block of the function that ``place`` names, such as "csrc/order_key.h:tie_key", in a file of C++ or Python under ``root``.

    Raises:
        ValueError: there is no such function in the file.
    """
    file, _, name = place.partition(":")
    source = (root / file).read_text()
    language, found = ("python", _of_python(source, name)) if file.endswith(".py") else ("cpp", _of_cpp(source, name))
    if found is None:
        raise ValueError(f"{file} has no function {name!r}")
    return f"```{language}\n{found}\n```"


def _of_python(source: str, name: str) -> str | None:
    functions = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef) and node.name == name)
    node = next(functions, None)
    return node and ast.get_source_segment(source, node)


def _of_cpp(source: str, name: str) -> str | None:
    """From a line that begins a definition to the brace that ends it: clang-format leaves that in the first column, or on the same line."""
    begin = re.compile(rf"^\w[\w ]*\b{name}\(.*\{{")
    lines = source.splitlines()
    for first, line in enumerate(lines):
        if begin.match(line):
            last = first if line.endswith("}") else next(i for i in range(first, len(lines)) if lines[i] == "}")
            return "\n".join(lines[first : last + 1])
    return None

"""Tables for people: aligned, or Markdown."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["aligned", "escaped"]


def aligned(rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """One line for each row of cells, in columns as wide as their widest cell; the first ``left`` of them start left, the others end right.

    A right-aligned last column makes all lines equally long; otherwise spaces at their ends are cut.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(_cell(text, i, widths[i], left) for i, text in enumerate(row)).rstrip() for row in rows]


def _cell(text: str, column: int, width: int, left: int) -> str:
    return text.ljust(width) if column < left else text.rjust(width)


def escaped(text: str) -> str:
    """What stands for ``text`` in a cell of a Markdown table."""
    return text.replace("|", "\\|")

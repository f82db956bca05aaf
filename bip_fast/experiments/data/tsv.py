"""Sentences with a label, a line each: ``sentence<TAB>label``, in UTF-8. A first line whose label is the word "label" is a heading."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from ...errors import UserError
from .dataset import split
from .sentences import Sentences

__all__ = ["read_sst2", "read_tsv", "tsv_files"]

HELD_OUT = 0.2  # of a single file, for the test
PARTS = (("train.tsv",), ("test.tsv", "dev.tsv"))  # in a folder; of several names the first that is there
Lines = list[tuple[int, str, str]]  # number in the file, sentence, label


def _lines(path: Path) -> Lines:
    """Numbered lines of a file; UserError names the first that is none."""
    try:
        rows = path.read_bytes().decode().removeprefix("\ufeff").split("\n")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        line, byte = error.object[: error.start].count(b"\n") + 1, error.object[error.start]
        raise UserError(f"{path}, line {line}: expected UTF-8, got the byte {byte:#04x}") from error
    found: Lines = []
    for number, row in enumerate(rows, 1):
        row = row.removesuffix("\r")
        if not row and number == len(rows):
            continue
        fields = [part.strip() for part in row.split("\t")]
        if len(fields) != 2 or not all(fields):
            raise UserError(f"{path}, line {number}: expected a sentence, a tab and a label, got {row[:60]!r}")
        if number > 1 or fields[1].lower() != "label":
            found.append((number, fields[0], fields[1]))
    if not found:
        raise UserError(f"{path} has no sentences")
    return found


def _numbers(path: Path, lines: Lines, labels: Sequence[str]) -> torch.Tensor:
    """Labels as int64 (n,): places in ``labels``."""
    place = {label: i for i, label in enumerate(labels)}
    for number, _, label in lines:
        if label not in place:
            raise UserError(f"{path}, line {number}: the label must be one of {', '.join(labels)}, got {label!r}")
    return torch.tensor([place[label] for _, _, label in lines])


def _labels(path: Path, lines: Lines) -> list[str]:
    """The labels that there are, numbers by their size."""
    found = {label for _, _, label in lines}
    if len(found) < 2:
        raise UserError(f"{path}: expected two or more labels, got {found.pop()!r} alone")
    return sorted(found, key=lambda label: (not label.isdecimal(), int(label) if label.isdecimal() else 0, label))


def tsv_files(place: Path) -> list[Path]:
    """What `read_tsv` reads: the file, or the two in the folder; not all need be there."""
    if not place.is_dir():
        return [place]
    return [next((place / name for name in names if (place / name).is_file()), place / names[0]) for names in PARTS]


def read_tsv(name: str, place: Path, labels: Sequence[str] = ()) -> Sentences:
    """A folder with train.tsv and test.tsv (or dev.tsv), or one file, of which a fifth of every class is held out as the test part.

    Args:
        name: of the data set.
        labels: in their order; empty: those of the training file.

    Raises:
        UserError: a file is missing, a line is none, or a label is unknown; names the file, the line, what was expected and what came.
    """
    files = tsv_files(place)
    for path in files:
        if not path.is_file():
            others = " or dev.tsv" if path.name == "test.tsv" and place.is_dir() else ""
            raise UserError(f"{path.name}{others} is missing in {path.parent}")
    lines = [_lines(path) for path in files]
    own = labels or _labels(files[0], lines[0])
    numbers = [_numbers(path, part, own) for path, part in zip(files, lines, strict=True)]
    texts = [[text for _, text, _ in part] for part in lines]
    if len(files) == 2:
        return Sentences(name, tuple(own), texts[0], numbers[0], texts[1], numbers[1])
    train, test = split(numbers[0], HELD_OUT)
    if not len(test):
        raise UserError(f"{files[0]}: expected enough sentences to hold out a fifth of every label, got {len(texts[0])}")
    whole = Sentences(name, tuple(own), texts[0], numbers[0], [], numbers[0][:0])
    return whole.selected(train, test)


def read_sst2(folder: Path, classes: int) -> Sentences:
    """SST-2 (Socher et al., 2013): train.tsv and dev.tsv, of 0 (bad) and 1 (good)."""
    return read_tsv("sst2", folder, [str(label) for label in range(classes)])

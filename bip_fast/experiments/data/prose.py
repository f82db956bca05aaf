"""Running text in files, in UTF-8: as WikiText has it, one paragraph a line. It is read as it stands, with its empty lines and headings."""

from __future__ import annotations

from pathlib import Path

from ...errors import UserError
from .windows import Prose

__all__ = ["prose_files", "read_prose"]

HELD_OUT = 0.2  # of a single file, at its end, for the test
TRAIN = ("train.txt", "wiki.train.tokens", "valid.txt", "wiki.valid.tokens")  # in a folder; of several the first that is there
TEST = ("test.txt", "wiki.test.tokens")


def prose_files(place: Path) -> list[Path]:
    """What `read_prose` may read."""
    return [place / name for name in (*TRAIN, *TEST)] if place.is_dir() else [place]


def read_prose(name: str, place: Path) -> Prose:
    """A folder with a training and a test text, or a file, whose last fifth of the lines is the test text.

    Raises:
        UserError: a file is missing, is no UTF-8, or has no text in one of its parts.
    """
    if not place.is_dir():
        lines = _text(place).splitlines(keepends=True)
        train = len(lines) - round(HELD_OUT * len(lines))
        texts, where = ("".join(lines[:train]), "".join(lines[train:])), (f"the first lines of {place}", f"the last lines of {place}")
        note = ""
    else:
        paths = [_first_there(place, names) for names in (TRAIN, TEST)]
        texts, where = (_text(paths[0]), _text(paths[1])), (str(paths[0]), str(paths[1]))
        note = f"trains on {paths[0].name}: there is no {TRAIN[0]}" if paths[0].name in TRAIN[2:] else ""
    for text, path in zip(texts, where, strict=True):
        if not text.strip():
            raise UserError(f"--data {name}: expected text in {path}, got none")
    return Prose(name, *texts, note)


def _first_there(folder: Path, names: tuple[str, ...]) -> Path:
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None:
        raise UserError(f"expected {' or '.join(names)} in {folder}, got none of them")
    return found


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: expected UTF-8, got the byte {error.object[error.start]:#04x} at {error.start:,}") from error

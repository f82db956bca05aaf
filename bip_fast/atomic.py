"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

__all__ = ["write_beside"]


def write_beside(target: Path, save: Callable[[Path], object]) -> None:
    """Run ``save`` on a file beside ``target``, sync it to the disk, then rename it to ``target``; an old file stays whole until then.

    Raises:
        OSError: the file cannot be written; it names ``target`` where the system names no file.
    """
    beside = target.with_name(f".{os.getpid()}-{target.name}")  # keeps the ending, which decides the format of a picture
    try:
        save(beside)
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, target)
    except OSError as error:
        if error.errno and not error.filename:
            error.filename = str(target)
        raise
    finally:
        beside.unlink(missing_ok=True)

"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

__all__ = ["write_beside"]


def write_beside(target: Path, save: Callable[[Path], object]) -> None:
    """Run ``save`` on a file beside ``target``, sync it to the disk, then rename it to ``target``; an old file stays whole until then.
    Its mode is what the umask leaves, also where ``save`` gives it another, as safetensors does.

    Raises:
        OSError: the file cannot be written; it names ``target`` where the system names no file.
    """
    beside = target.with_name(f".{os.getpid()}-{target.name}")  # keeps the ending, which decides the format of a picture
    try:
        beside.touch()
        mode = stat.S_IMODE(beside.stat().st_mode)
        save(beside)
        beside.chmod(mode)
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, target)
    except OSError as error:
        if error.errno and not error.filename:
            error.filename = str(target)
        raise
    finally:
        beside.unlink(missing_ok=True)

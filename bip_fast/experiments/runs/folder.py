"""Run folders: what is in one, written so that a run killed at any moment leaves whole files only.

config.json         the settings; written first, so a folder with one belongs to a run
checkpoint.pt       everything needed to continue, with the same bits
dense.safetensors   the dense network; `--checkpoint` starts another run from it
epoch-E.safetensors weights after E epochs of dense training, where a method or another run rewinds to them
model.safetensors   the pruned network: the keys of the plain model, exact zeros
curves.png          loss, accuracy and mask changes
events.out.tfevents.*  with `--log tensorboard`: one file for every time that the run began or went on
report.json         every figure; written last, so a folder with one is finished
.lock               empty: held by the process that works here

Of the ranks of a job only the first writes; the others may read.
"""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from ...atomic import write_beside
from ...errors import MEMORY, UserError, one_line
from ..ranks import agree, on_rank_0
from ..settings import FIELDS, PATHS, Settings, option
from .resolve import resolve

__all__ = [
    "DamagedCheckpoint",
    "RunFolder",
    "of_the_machine",
    "snapshot_name",
]

FILES = ("report.json", "checkpoint.pt", "dense.safetensors", "model.safetensors", "curves.png", "config.json")
EVENTS = "events.out.tfevents.*"
LOCK = ".lock"
DAMAGED = ".damaged"  # ending of files that were set aside
# Entries of a report that other rooms read.
REPORT = {
    "layers": list, "kept": int, "total": int, "sparsity": float, "evaluated_on": str, "images": dict, "pruned": dict, "image_passes": dict,
    "seconds": dict, "joules": dict, "versions": dict, "device": str,
}  # fmt: skip


def snapshot_name(epoch: int | str) -> str:
    """File with the weights after so many epochs of dense training."""
    return f"epoch-{epoch}.safetensors"


class DamagedFile(UserError):
    """A file of a run folder is missing or has the wrong content. One that merely could not be read this time is another error."""


class DamagedCheckpoint(UserError):
    """A run cannot go on from its checkpoint; it could start again."""

    def __init__(self, path: Path, what: str) -> None:
        super().__init__(f"{path} {what}; --overwrite starts again")
        self.why = f"{path.name} {what}"


def of_the_machine(error: Exception) -> bool:
    """Whether an error, raised while a file was read, is the machine's and not the file's: memory, a device, open files."""
    machine = (*MEMORY, OSError, getattr(torch, "AcceleratorError", OSError))
    return isinstance(error, machine) or any(text in str(error) for text in ("CUDA error", "out of memory", "DefaultCPUAllocator"))


class RunFolder:
    """One folder of the files above; `open` decides whether a run may write there.

    Args:
        patience: seconds to wait for another process that has the folder.
        say: is told that it waits.
    """

    def __init__(self, path: Path, *, patience: float = 0.0, say: Callable[[str], None] = lambda text: None) -> None:
        self.path, self.patience, self.say = path, patience, say
        # No soft lock where the file system has no locks: that one outlives a killed process.
        self._lock = FileLock(path / LOCK, thread_local=False, fallback_to_soft=False)

    @property
    def finished(self) -> bool:
        return (self.path / "report.json").is_file()

    @property
    def begun(self) -> bool:
        return (self.path / "config.json").is_file()

    def began_with(self, settings: Settings) -> bool:
        """Whether a run of these settings began here. The paths of the files that it starts from may differ."""
        try:
            stored = self.read_json("config.json")
        except DamagedFile:
            return False
        return {**stored, **dict.fromkeys(PATHS)} == {**settings.as_dict(), **dict.fromkeys(PATHS)}

    @on_rank_0
    def open(self, settings: Settings, *, overwrite: bool) -> None:
        """Make the folder and write its config.

        Raises:
            UserError: it belongs to another run and ``overwrite`` is not set, or it cannot be written.
        """
        there = [name for name in FILES if (self.path / name).exists()]
        if not self.begun and not overwrite and there:
            raise UserError(f"{self.path} has {', '.join(there)}, but no run; --overwrite replaces them, --out names another folder")
        if settings.checkpoint and Path(settings.checkpoint).resolve() in [(self.path / name).resolve() for name in FILES]:
            raise UserError(f"--checkpoint {settings.checkpoint} would be overwritten by the run in {self.path}; give another --out")
        if self.begun and not overwrite:
            if self.finished:
                raise UserError(f"{self.path} holds a finished run; --overwrite runs it again, --out names another folder")
            raise UserError(f"{self.path} holds a run that is not finished; --resume continues it, --overwrite starts again")
        self.make()
        try:
            self.lock()
            self.remove_leftovers()
            for name in FILES:
                (self.path / name).unlink(missing_ok=True)
            for path in (*self.path.glob(snapshot_name("*")), *self.path.glob(EVENTS)):
                path.unlink()
            self.write_json("config.json", settings.as_dict())
        except OSError as error:
            raise UserError(f"cannot write to --out {self.path}: {error.strerror}") from error

    @on_rank_0
    def make(self) -> None:
        """Make the folder if there is none.

        Raises:
            UserError: it cannot be made.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write to --out {self.path}: {error.strerror}") from error

    @on_rank_0
    def lock(self) -> None:
        """Hold the folder until `release`, or until this process ends, so that no two runs write into it.

        Raises:
            UserError: another process has it.
        """
        if self._lock.is_locked:
            return
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            if self.patience <= 0:
                raise self._in_use() from None
            self.say("in use by another run, and waits for that to end")
            try:
                self._lock.acquire(timeout=self.patience, poll_interval=0.1)
            except Timeout:
                raise self._in_use() from None
        except OSError:  # a file system without locks; or nothing can be written here, as the first file of the run will say
            return

    def _in_use(self) -> UserError:
        return UserError(f"{self.path} is in use by another run; wait for it, or give another --out")

    def release(self) -> None:
        self._lock.release()

    def settings(self, given: dict[str, Any]) -> Settings:
        """Settings of the run that began here; ``given`` options must agree with them.

        Raises:
            UserError: there is no run, its config is damaged, or an option says something else.
        """
        if not self.begun:
            raise UserError(f"nothing to resume: there is no run in {self.path}")
        stored = self.read_json("config.json")
        unknown = set(stored) - set(FIELDS)
        if unknown:
            raise UserError(f"{self.path / 'config.json'} has unknown settings: {', '.join(sorted(unknown))}")
        for name, value in given.items():
            own = stored.get(name, getattr(Settings, name, None))  # a setting that is younger than the run had its default
            if own != value:
                raise UserError(f"--resume continues a run with {option(name)} {own}, got {value}; leave {option(name)} out")
        try:
            return resolve(stored)
        except (UserError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{self.path / 'config.json'} is damaged: {one_line(error, 160)}") from error

    def read_json(self, name: str) -> dict[str, Any]:
        """Content of a file.

        Raises:
            DamagedFile: it is missing, or does not hold an object.
            UserError: it cannot be read.
        """
        try:
            value = json.loads((self.path / name).read_text())
        except (FileNotFoundError, ValueError, RecursionError) as error:
            raise DamagedFile(f"{self.path / name} is damaged: {one_line(error, 160)}") from error
        except OSError as error:
            raise UserError(f"cannot read {self.path / name}: {error.strerror or error}") from error
        if not isinstance(value, dict):
            raise DamagedFile(f"{self.path / name} is damaged: expected an object")
        return value

    def read_report(self) -> dict[str, Any]:
        """Content of report.json.

        Raises:
            DamagedFile: it is missing, or lacks an entry that is read from reports.
            UserError: it cannot be read.
        """
        value = self.read_json("report.json")
        for name, kind in REPORT.items():
            if not isinstance(value.get(name), kind):
                raise DamagedFile(f"{self.path / 'report.json'} is damaged: it has no {name}")
        return value

    def damaged(self, snapshots: Collection[int] = ()) -> dict[Path, str]:
        """Files of a finished run that are missing or have the wrong content, and why. Looks only at the files that other runs and
        results read: the report, the network and the weights after ``snapshots`` epochs.

        Raises:
            UserError, OSError: one cannot be read, which says nothing of its content.
        """
        from safetensors import SafetensorError, safe_open

        found = {}
        for name in ("report.json", "model.safetensors", *map(snapshot_name, sorted(snapshots))):
            path = self.path / name
            if not path.is_file():
                found[path] = f"{path.name} is missing"
                continue
            try:
                if path.suffix == ".json":
                    self.read_report()
                else:
                    path.open("rb").close()  # says why a file cannot be opened; safetensors, only that it is missing
                    with safe_open(path, "pt"):  # reads where its tensors are, which must be in the file
                        pass
            except (DamagedFile, SafetensorError) as error:
                found[path] = f"{path.name} is damaged ({one_line(error, 160)})"
        return found

    def write_json(self, name: str, value: dict[str, Any]) -> None:
        self.write(name, lambda path: path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n"))

    @on_rank_0
    def write(self, name: str, save: Callable[[Path], object]) -> None:
        """`write_beside` for a file of this folder."""
        write_beside(self.path / name, save)

    @on_rank_0
    def remove_leftovers(self) -> None:
        """Delete what a killed run was writing; such files are never read."""
        for name in (*FILES, snapshot_name("*")):
            for path in self.path.glob(f".*-{name}"):
                path.unlink(missing_ok=True)

    def remove_set_aside(self) -> None:
        """Delete the damaged files of a run that has been made again."""
        for name in (*FILES, snapshot_name("*")):
            for path in self.path.glob(f"{name}{DAMAGED}"):
                path.unlink(missing_ok=True)

    @on_rank_0
    def take(self, snapshots: Collection[int], other: Path) -> None:
        """Take the weights after so many epochs from the folder ``other``, and delete that."""
        for epoch in snapshots:
            os.replace(other / snapshot_name(epoch), self.path / snapshot_name(epoch))
        shutil.rmtree(other)

    @on_rank_0
    def set_aside(self, path: Path) -> None:
        """Rename a damaged file, which is not read any more, for a person to look at."""
        with suppress(FileNotFoundError):
            os.replace(path, path.with_name(f"{path.name}{DAMAGED}"))

    @on_rank_0
    def remove_checkpoint(self) -> None:
        """Delete the checkpoint of a run that is finished."""
        (self.path / "checkpoint.pt").unlink(missing_ok=True)

    @on_rank_0
    def save_checkpoint(self, state: dict[str, Any]) -> None:
        # Python writes the files, not torch or safetensors, whose errors do not say that a disk is full.
        contents = io.BytesIO()
        torch.save(state, contents)
        self.write("checkpoint.pt", lambda path: path.write_bytes(contents.getbuffer()))

    def load_checkpoint(self) -> dict[str, Any] | None:
        """State of the last checkpoint on the CPU, None when the run ended before its first one. Every rank must call this.

        Raises:
            DamagedCheckpoint: it cannot be read.
            UserError: (on all ranks) only some of them have it.
        """
        path = self.path / "checkpoint.pt"
        if not agree(path.is_file()):
            raise UserError(f"{self.path} must be a folder that all processes see, but only some find {path.name}")
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            return None
        except Exception as error:  # a damaged file raises nearly anything
            if of_the_machine(error):
                raise
            raise DamagedCheckpoint(path, f"is damaged ({one_line(error, 160)})") from error

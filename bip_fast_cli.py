"""Where the command `bip-fast` begins: beside the package, whose import loads torch, so that Ctrl-C ends these seconds in one line too."""

from __future__ import annotations

import os
import signal
from types import FrameType

__all__ = ["main"]


def main() -> int:
    """Run the command line; returns the exit code."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # else whoever started this wants no Ctrl-C, as nohup does
        signal.signal(signal.SIGINT, _end)
    from bip_fast.commands.cli import main as run

    signal.signal(signal.SIGINT, before)
    return run()


def _end(number: int, frame: FrameType | None) -> None:
    """At once, since an error would be lost: while torch is loaded it imports numpy, and goes on without it whatever is raised there."""
    os.write(2, b"interrupted\n")
    os._exit(130)

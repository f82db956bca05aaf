"""Where the command `bip-fast` begins: beside the package, whose import loads torch, so that Ctrl-C ends these seconds in one line too."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> int:
    """Run the command line; returns the exit code."""
    try:
        from bip_fast.commands.cli import main as run
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return run()

"""Errors: those that the user can mend, and those of somebody else's code, such as a model's, told in one line."""

from __future__ import annotations

import torch

__all__ = ["MEMORY", "UserError", "one_line"]

MEMORY = (MemoryError, torch.OutOfMemoryError)


class UserError(Exception):
    """Something the user can mend: the command line prints it as one line and exits with code 2."""


def one_line(error: BaseException, most: int = 200, *, named: bool = False) -> str:
    """The message in one line, cut to ``most`` characters; after its type if ``named``, or where the message alone says too little."""
    text = " ".join(str(error).split())[:most]
    if isinstance(error, MEMORY):
        return f"not enough memory: {text}" if text else "not enough memory"
    if text and not named and isinstance(error, (ValueError, RuntimeError, ImportError, OSError)):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__

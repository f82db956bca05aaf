"""The options of the commands, as `bip-fast COMMAND --help` explains them."""

from __future__ import annotations

import argparse
import html

from bip_fast.commands.cli import COMMANDS, room_of

__all__ = ["table"]


def _line(action: argparse.Action) -> str:
    name = ", ".join(action.option_strings) or str(action.metavar)
    choices = "{" + ",".join(map(str, action.choices or ())) + "}"
    value = "" if action.nargs == 0 or not action.option_strings else f" {action.metavar or choices}"
    text = (action.help or "").replace("%(default)s", str(action.default)).replace("%%", "%")
    return f"| `{name}{value}` | {html.escape(text, quote=False).replace('|', chr(92) + '|')} |"


def table(command: str) -> str:
    """Markdown: a table for each group of the options of a command.

    Raises:
        ValueError: there is no such command.
    """
    if command not in COMMANDS:
        raise ValueError(f"command must be {', '.join(COMMANDS)}, got {command!r}")
    parser = argparse.ArgumentParser(prog=f"bip-fast {command}", add_help=False)
    room_of(command).add_options(parser)
    groups = [group for group in parser._action_groups if group._group_actions]
    titled = [group for group in groups if group.title not in ("options", "positional arguments")]
    others = [_line(action) for group in groups if group not in titled for action in group._group_actions]
    head = "| option | what it does |\n|---|---|\n"
    parts = [head + "\n".join(others)] if others else []
    parts += [f"**{group.title}**\n\n{head}" + "\n".join(map(_line, group._group_actions)) for group in titled]
    return "\n\n".join(parts)

"""The tables and excerpts of README.md and of the pages under docs, made from the committed results and from the code.

python3 -m bench.readme           rewrite the parts between <!-- results: NAME DEVICE --> and <!-- end -->
python3 -m bench.readme --check   say with exit code 1 that they are not what the results give
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import kernel_model, report, targets
from bench.pages import headlines, options, rooms
from bench.pages.excerpts import excerpt
from bench.studies import compare, digits, distributed, memory, paper, patterns, structured, window, zoo
from bip_fast.engine.rules import GIVEN
from bip_fast.experiments.methods import table
from bip_fast.presets import PRESETS, preset_text

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
PART = re.compile(r"(<!-- results: (\S+) (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def _where(results: dict[str, Any]) -> str:
    return f"{results['machine']['device']}, torch {results['machine']['torch']}, {results['date']}."


def _usual(row: dict[str, Any]) -> bool:
    """A warm step of more than a million weights, fp32, 10 % kept; every row of results that have no states yet."""
    return row.get("state", "warm") == "warm" and row["density"] == 0.1 and "bf16" not in row["group"] and row["n"] > 1e6


def _steps(results: dict[str, Any], usual: bool) -> str:
    names = ("lower", "upper", "joint")
    return report.pivot({**results, "rows": [row for row in results["rows"] if _usual(row) == usual]}, names)


def _presets() -> str:
    """A line for each option, a column for each preset and rule of the lower level."""
    columns = {
        f"{preset}, {'your own' if rule == GIVEN.name else rule}": options
        for preset, rules in PRESETS.items()
        for rule, options in rules.items()
    }
    names = dict.fromkeys(name for options in columns.values() for name in options)
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name in names:
        cells = [preset_text(options[name]) if name in options else "" for options in columns.values()]
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _targets(results: dict[str, Any], folder: Path) -> str:
    return targets.table(results, report.read(folder / "iterations.json"))


# A table's file ("": it is made from the code or from several files), and its text from that file and the folder it is in.
TABLES: dict[str, tuple[str, Callable[[dict[str, Any], Path], str]]] = {
    "steps": ("results.json", lambda results, _: _where(results) + "\n\n" + _steps(results, True)),
    "states": ("results.json", lambda results, _: _steps(results, False)),
    "topk": ("results.json", lambda results, _: report.pivot(results, ("top-k",))),
    "targets": ("results.json", _targets),
    "iterations": ("iterations.json", lambda results, _: _where(results) + "\n\n" + report.iterations(results)),
    "quick": ("quick.json", lambda results, _: _where(results) + "\n\n" + compare.table(results)),
    "search": ("search.json", lambda results, _: _where(results) + "\n\n" + compare.search_table(results)),
    "sst2-search": ("sst2-search.json", lambda results, _: _where(results) + "\n\n" + compare.settings_table(results)),
    "cost": ("cost.json", lambda results, _: _where(results) + "\n\n" + compare.table(results)),
    "paper": ("paper.json", lambda results, _: _where(results) + "\n\n" + paper.table(results)),
    "digits": ("digits.json", lambda results, _: _where(results) + "\n\n" + digits.table(results)),
    "patterns": ("patterns.json", lambda results, _: _where(results) + "\n\n" + patterns.table(results)),
    "structured": ("structured.json", lambda results, _: _where(results) + "\n\n" + structured.table(results["rows"])),
    "distributed": ("distributed.json", lambda results, _: _where(results) + "\n\n" + distributed.table(results)),
    "scale": ("", lambda results, _: distributed.model_table()),
    "kernels": ("", lambda results, _: kernel_model.table()),
    "memory": ("memory.json", lambda results, _: _where(results) + "\n\n" + memory.table(results)),
    "zoo": ("zoo.json", lambda results, _: _where(results) + " " + zoo.summary(results) + "\n\n" + zoo.table(results)),
    "wikitext2": ("wikitext2.json", lambda results, _: _where(results) + "\n\n" + compare.table(results)),
    "methods": ("", lambda results, _: table.table()),
    "rooms": ("", lambda results, _: rooms.table(ROOT / "bip_fast")),
    "presets": ("", lambda results, _: _presets()),
    "headlines": ("", lambda results, _: headlines.table(RESULTS)),
    "window": ("window.json", lambda results, _: window.summary(results["steps"]) + "."),
}


def filled(text: str) -> str:
    """``text`` with the tables of the present results: a part names a table and a folder of bench/results. No results, no figures.

    A part "code FILE:FUNCTION" is that function of the sources, and "options COMMAND" are the options of a command.
    """

    def fill(part: re.Match[str]) -> str:
        begin, name, folder, end = part.groups()
        if name == "code":
            return f"{begin}\n{excerpt(ROOT, folder)}\n\n{end}"
        if name == "options":
            return f"{begin}\n{options.table(folder)}\n\n{end}"
        file, table = TABLES[name]
        results = report.read(RESULTS / folder / file) if file else {"code": True}
        return f"{begin}\n{table(results, RESULTS / folder) if results else 'Not measured yet.'}\n\n{end}"

    return PART.sub(fill, text)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python3 -m bench.readme", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing")
    chosen = parser.parse_args(arguments)
    wrong = 0
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        old = page.read_text()
        new = filled(old)
        if chosen.check and new != old:
            print(f"{page.relative_to(ROOT)} does not show the committed results: run python3 -m bench.readme", file=sys.stderr)
            wrong = 1
        elif not chosen.check:
            page.write_text(new)
    return wrong


if __name__ == "__main__":
    sys.exit(main())

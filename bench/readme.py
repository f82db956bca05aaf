"""The result tables of README.md, made from the committed results.

python3 -m bench.readme           rewrite the parts of README.md between <!-- results: NAME --> and <!-- end -->
python3 -m bench.readme --check   say with exit code 1 that they are not what the results give
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from bench import digits, fashion_mnist, report

README = Path(__file__).parents[1] / "README.md"
RESULTS = Path(__file__).parent / "results"
PART = re.compile(r"(<!-- results: (\S+) (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def _where(results: dict[str, Any]) -> str:
    return f"{results['machine']['device']}, torch {results['machine']['torch']}, {results['date']}."


TABLES = {
    "steps": lambda results: _where(results) + "\n\n" + report.pivot(results, ("lower", "upper", "joint")),
    "topk": lambda results: report.pivot(results, ("top-k",)),
    "fashion-mnist": lambda results: fashion_mnist.table(results["rows"]),
    "digits": lambda results: _where(results) + "\n\n" + digits.table(results),
}
FILES = {"steps": "results.json", "topk": "results.json", "fashion-mnist": "fashion-mnist.json", "digits": "digits.json"}


def filled(text: str) -> str:
    """``text`` with the tables of the present results: a part names a table and a folder of bench/results."""

    def fill(part: re.Match[str]) -> str:
        begin, name, folder, end = part.groups()
        results = json.loads((RESULTS / folder / FILES[name]).read_text())
        return f"{begin}\n{TABLES[name](results)}\n\n{end}"

    return PART.sub(fill, text)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python3 -m bench.readme", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing")
    options = parser.parse_args(arguments)
    old = README.read_text()
    new = filled(old)
    if options.check:
        if new != old:
            print("README.md does not show the committed results: run python3 -m bench.readme", file=sys.stderr)
        return int(new != old)
    README.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Draw the pictures of the documentation.

python3 -m bench.pictures           draw all into docs/pictures
python3 -m bench.pictures --check   say with exit code 1 which of them do not show what the results and the code say now
"""

from __future__ import annotations

import argparse
import sys

from bench.pictures import house, ideas, measured
from bench.pictures.style import digest, digest_of, save
from bench.readme import ROOT

FOLDER = ROOT / "docs" / "pictures"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python3 -m bench.pictures", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing")
    options = parser.parse_args(arguments)
    wrong = 0
    for name, (title, data_of, draw) in (house.PICTURES | ideas.PICTURES | measured.PICTURES).items():
        path, data = FOLDER / f"{name}.svg", data_of()
        if not options.check:
            save(draw(data), path, title, data)
        elif digest_of(path) != digest(data):
            print(f"{path.relative_to(ROOT)} does not show what is there now: run python3 -m bench.pictures", file=sys.stderr)
            wrong = 1
    return wrong


if __name__ == "__main__":
    sys.exit(main())

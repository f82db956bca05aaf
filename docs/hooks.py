"""What the build of the documentation does beyond mkdocs: pages and pictures from elsewhere in the repository, and formulas.

bench/NOTES.md and CHANGELOG.md become pages. Pictures of measured results stay in bench/results, beside the figures they show, and pages
name them by the path that also works in the repository (``../bench/results/DEVICE/NAME.png``). Formulas, which `pymdownx.arithmatex` finds
between dollars, become MathML. Browsers draw that by themselves, so no script has to be fetched when a page is built or read.
"""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

from math_core import LatexToMathML
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
RESULTS = "bench/results/"
PAGES = {"h200.md": "bench/NOTES.md", "changelog.md": "CHANGELOG.md"}
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """Add the pictures of the committed results, and the pages that stand elsewhere."""
    for page, source in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    for picture in sorted((ROOT / RESULTS).glob("*/*.png")):
        files.append(File.generated(config, picture.relative_to(ROOT).as_posix(), abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Paths of pictures as they are in the site. mkdocs checks that each exists."""
    up = "../" * page.file.src_uri.count("/")
    return markdown.replace(f"]({up}../{RESULTS}", f"]({up}{RESULTS}")


def on_page_content(content: str, **_: Any) -> str:
    """Formulas as MathML. What math_core does not know is an error of the build."""
    latex = LatexToMathML()

    def drawn(found: re.Match[str]) -> str:
        block = found[1] == "div"
        formula = latex.convert_with_local_state(html.unescape(found[2]).strip(), displaystyle=block)
        return f'<div class="formula">{formula}</div>' if block else formula

    return FORMULA.sub(drawn, content)

"""What all pictures share: size, colours, letters, and how a file is written.

SVG with letters as outlines, so that a picture looks the same everywhere, and with ids that do not change from one drawing to the next.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

__all__ = ["BLUE", "GREY", "INK", "LIGHT", "ORANGE", "PALE", "TEAL", "digest", "digest_of", "figure", "plain", "save"]

INK, GREY, LIGHT = "#1f2933", "#7b8794", "#e4e7eb"
TEAL, ORANGE, BLUE, PALE = "#00796b", "#e8590c", "#0b5cad", "#cfe8e4"


def figure(width: float, height: float, columns: int = 1, rows: int = 1, **options: Any) -> Any:
    """A figure in inches and its axes, as `pyplot.subplots` gives them."""
    pyplot.rcParams.update(
        {
            "svg.fonttype": "path",
            "svg.hashsalt": "bip_fast",
            "font.family": "DejaVu Sans",
            "font.size": 10,
            "axes.edgecolor": GREY,
            "axes.labelcolor": INK,
            "axes.titlesize": 11,
            "text.color": INK,
            "xtick.color": INK,
            "ytick.color": INK,
        }
    )
    return pyplot.subplots(rows, columns, figsize=(width, height), layout="constrained", **options)


def plain(axes: Any) -> None:
    """Without a frame: for drawings that have no scale."""
    axes.set_axis_off()
    axes.set_aspect("equal")


def digest(data: Any) -> str:
    """Of everything that a picture shows."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


def digest_of(path: Path) -> str | None:
    """The digest that a picture was written with."""
    found = re.search(r"data ([0-9a-f]{16})", path.read_text()) if path.is_file() else None
    return found[1] if found else None


def save(drawn: Any, path: Path, title: str, data: Any) -> None:
    """Write the figure, with its title and the digest of its data in the file."""
    about = {"Title": title, "Description": f"drawn by python3 -m bench.pictures, data {digest(data)}", "Date": None, "Creator": None}
    drawn.savefig(path, format="svg", metadata=about, facecolor="white")
    path.write_text("\n".join(line.rstrip() for line in path.read_text().splitlines()) + "\n")
    pyplot.close(drawn)

"""Where the documentation is read as files: links of the README, tables and excerpts. `mkdocs build` checks the site."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _bench(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))


def test_links_of_the_readme_lead_to_files():
    links = re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", (ROOT / "README.md").read_text())
    assert len(links) > 15
    assert [link for link in links if not (ROOT / link).is_file()] == []


def test_a_changed_figure_is_noticed():
    from bench import readme

    parts = [part for page in (ROOT / "docs").rglob("*.md") for part in readme.PART.finditer(page.read_text())]
    assert {part[2] for part in parts} == {*readme.TABLES, "code", "options"} - {"states"}
    spoilt = 0
    for part in parts:
        digit = re.search(r"\d", part[0][len(part[1]) : -len(part[4])])
        if digit:
            at = len(part[1]) + digit.start()
            changed = part[0][:at] + str((int(digit[0]) + 1) % 10) + part[0][at + 1 :]
            assert readme.filled(changed) == part[0] != changed, part[2]
            spoilt += 1
    assert spoilt > 20


@pytest.mark.parametrize("page", ["README.md", "docs/usage.md", "docs/schedules.md", "docs/graphs.md"])
def test_the_loops_that_pages_show_run(page):
    import torch

    from bip_fast import FastBiP

    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)
    assert blocks
    loader = [(torch.randn(8, 4), torch.randint(0, 3, (8,))) for _ in range(4)]
    for block in blocks:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 64), torch.nn.ReLU(), torch.nn.Linear(64, 3))
        names = {"torch": torch, "FastBiP": FastBiP, "model": model, "loss_fn": torch.nn.functional.cross_entropy, "epochs": 2}
        names |= {"loader": loader, "train_loader": loader, "mask_loader": loader}
        if "FastBiP(" not in block:  # it goes on where another made it
            names["opt"] = FastBiP(model, sparsity=0.5)
            names["schedule"] = torch.optim.lr_scheduler.ConstantLR(names["opt"])
        exec(compile(block, page, "exec"), names)
        if "finalize" in block:
            weights = [p for p in model.parameters() if p.dim() > 1]
            assert sum(int((p == 0).sum()) for p in weights) == round(0.95 * sum(p.numel() for p in weights))


@pytest.mark.parametrize(
    ("place", "begins"),
    [
        ("csrc/order_key.h:tie_key", "BIP_HD uint32_t tie_key("),
        ("csrc/order_key.h:score_key", "BIP_HD"),
        ("bip_fast/reference.py:upper", "def upper("),
    ],
)
def test_an_excerpt_is_one_function(place, begins):
    from bench.pages.excerpts import excerpt

    lines = excerpt(ROOT, place).splitlines()
    assert lines[0].startswith("```")
    assert lines[1].startswith(begins)
    assert sum(line.startswith(("BIP_HD", "def ")) for line in lines) == 1


def test_an_excerpt_that_is_gone_is_an_error():
    from bench.pages.excerpts import excerpt

    with pytest.raises(ValueError, match=r"csrc/order_key\.h has no function 'no_such'"):
        excerpt(ROOT, "csrc/order_key.h:no_such")
